"""One process of a training that torchrun started: it finds the others, and the first of them makes the artifact.

All read the same experiment. The first looks for stored results and inputs as a lone process does, and tells the others
whether there is something to train; these load the same data and models, and store nothing. Whoever fails first says so;
the others are silent, and torchrun ends them.
"""

import os
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from distill_pipeline.errors import DistillError
from distill_pipeline.outcome import silent
from distill_pipeline.pipeline import Pipeline

if TYPE_CHECKING:
    from distill_pipeline.storage.artifacts import Artifact
    from distill_pipeline.training.parallel import Processes

LONGEST_WAIT = timedelta(hours=1)
"""How long a process waits for another within a step: a checkpoint on a slow disk takes minutes, a hang without end."""

LONGEST_PREPARATION = timedelta(days=7)
"""How long the others wait for the first one's word: it may have a model to fetch."""


def is_started_by_torchrun() -> bool:
    """Whether the environment says which of several processes this one is."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def train_together(pipeline: Pipeline, name: str, *, shards: bool) -> "Artifact | None":
    """Make a student with all processes of this torchrun; the artifact in the first process, None in the others.

    Raises:
        SystemExit: another process failed before this one, and said why.
    """
    import torch.distributed as dist

    processes = join(pipeline.student_device, shards=shards)
    pipeline = replace(pipeline, processes=processes, progress=pipeline.progress if processes.is_first else silent)
    artifact = None
    try:
        if processes.is_first:
            artifact = _make_for_all(pipeline, name)
        elif processes.hears_of_work(LONGEST_PREPARATION):
            pipeline.train_along(name)
    except DistillError:
        if not processes.fails_first():
            raise SystemExit(1) from None
        raise
    dist.destroy_process_group()
    return artifact


def _make_for_all(pipeline: Pipeline, name: str) -> "Artifact":
    assert pipeline.processes is not None
    try:
        return pipeline.make(name)
    finally:
        pipeline.processes.tell(work=False)  # unless training began, and they were told so


def join(device: str, *, shards: bool) -> "Processes":
    """Meet the other processes, whose addresses are in the environment; gradients go by NCCL on GPUs, all else by gloo.

    Raises:
        ConfigError: there is no such device, or not one for each process.
    """
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from distill_pipeline.models.load import resolve_device
    from distill_pipeline.training.parallel import Processes

    store, rank, size = next(rendezvous("env://"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    processes = Processes(rank, size, local_rank=local_rank, shards=shards, store=store)
    on_gpu = processes.device(resolve_device(device)).startswith("cuda")
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=PrefixStore("training", store), rank=rank, world_size=size,
        timeout=LONGEST_WAIT,
    )  # fmt: skip
    return processes
