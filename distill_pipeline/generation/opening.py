"""From a teacher in the experiment file to its engine. Nothing is loaded and nobody is asked yet."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.generation.protocol import Engine
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Progress, silent

HERE = ComputeSpec()

TeacherModel = ModelFolder | ServedModel
"""Where a teacher is: a folder on this machine, or a server."""


def open_engine(
    name: str,
    teacher: TeacherSpec,
    model: TeacherModel,
    *,
    device: str,
    seed: int,
    progress: Progress = silent,
    compute: ComputeSpec = HERE,
) -> Engine:
    """The engine of a teacher. Where its system prompts differ by domain, conversations must carry theirs.

    Args:
        name: what messages call it.
        device: a torch device or ``auto``; a served model has none. On a Ray cluster ``auto`` is ``cuda`` where its actors
            have GPUs and ``cpu`` where not.
        compute: with ``engine: ray`` engine transformers is run by the cluster's actors; engine vllm runs here, and a server is
            asked from here, all the same.
    """
    if isinstance(model, ServedModel):
        from distill_pipeline.generation.server.engine import ServerEngine

        return ServerEngine(
            model, name=name, sampling=teacher.sampling, seed=seed, system=teacher.system_prompts.shared,
            extra_body=teacher.extra_body, logprobs=teacher.logprobs, top_logprobs=teacher.top_logprobs, progress=progress,
        )  # fmt: skip
    if teacher.engine == "vllm":
        from distill_pipeline.generation.vllm_engine import VllmEngine

        return VllmEngine(
            model, name=name, sampling=teacher.sampling, seed=seed, device=device, system=teacher.system_prompts.shared,
            dtype=teacher.dtype, max_model_len=teacher.max_model_len, resources=teacher.vllm,
            trust_remote_code=teacher.trust_remote_code, top_logprobs=teacher.top_logprobs,
        )  # fmt: skip
    from distill_pipeline.generation.local import LocalEngine

    is_elsewhere = compute.engine == "ray"
    if is_elsewhere and device == "auto":
        device = "cuda" if compute.gpus_per_engine else "cpu"
    engine = LocalEngine(
        model, sampling=teacher.sampling, seed=seed, device=device, system=teacher.system_prompts.shared, dtype=teacher.dtype,
        batch_tokens=teacher.batch_tokens, trust_remote_code=teacher.trust_remote_code, top_logprobs=teacher.top_logprobs,
        is_elsewhere=is_elsewhere,
    )  # fmt: skip
    if not is_elsewhere:
        return engine
    from distill_pipeline.generation.cluster import ClusterEngine

    return ClusterEngine(engine, partial(_open_there, teacher, model, device, seed), compute)


def _open_there(teacher: TeacherSpec, model: ModelFolder, device: str, seed: int) -> Engine:
    """A teacher's engine in an actor of a Ray cluster."""
    from distill_pipeline.generation.cluster import model_here

    return open_engine("", teacher, model_here(model), device=device, seed=seed)


def greedy_engine(model: TeacherModel, *, max_tokens: int, device: str, extra_body: Mapping[str, Any] | None = None) -> Engine:
    """The engine of a model that gives one greedy answer a prompt, under its own default system prompt."""
    sampling = {"n": 1, "temperature": 0.0, "max_tokens": max_tokens}
    where: dict[str, Any] = {}
    if isinstance(model, ServedModel):
        where = {"engine": "openai", "server": model.server, "extra_body": dict(extra_body or {})}
    teacher = TeacherSpec.model_validate({"model": model.reference, "sampling": sampling, **where})
    return open_engine(model.reference, teacher, model, device=device, seed=0)
