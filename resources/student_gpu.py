"""The devices that students, and teachers to be corrected, train on, and in which processes."""

import os
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.device import DEVICE_HELP, chosen_device

if TYPE_CHECKING:
    from distill_pipeline.launching import Launch


class StudentGpuResource(dg.ConfigurableResource):
    """One accelerator, or the CPU, for training. How many steps may use it at once is the pool ``student_gpu``."""

    device: str = Field(default="", description=f"{DEVICE_HELP}. Empty: the environment variable DISTILL_STUDENT_DEVICE.")
    training: str = Field(
        default="",
        description="How training is started: in_process (in the step's own process), subprocess (`distill train` or `correct` "
        "as a process of its own), torchrun:N (the same in N processes, one a GPU, each with a copy of the weights) or "
        "torchrun:N:shard (the same, with weights in shards). Empty: in_process, or what the environment variables "
        "DISTILL_TRAIN_PROCESSES (1 is a subprocess, more are torchrun) and DISTILL_TRAIN_SHARD (1) say.",
    )

    def device_name(self) -> str:
        """The device for the library. Raises ValueError for a name that is no device."""
        return chosen_device(self.device, "DISTILL_STUDENT_DEVICE")

    def launch(self) -> "Launch | None":
        """How the library starts training; None is in this process. Raises ValueError for a setting that means nothing."""
        from distill_pipeline.launching import Launch

        kind, *rest = (self.training or _training_of_environment()).split(":")
        if (kind, rest) == ("in_process", []):
            return None
        if (kind, rest) == ("subprocess", []):
            return Launch()
        if kind == "torchrun" and rest and rest[0].isdigit() and int(rest[0]) > 1 and rest[1:] in ([], ["shard"]):
            return Launch(int(rest[0]), shard=bool(rest[1:]))
        raise ValueError(
            f"training is {':'.join([kind, *rest])!r}; it must be in_process, subprocess, torchrun:N or torchrun:N:shard, "
            "with N from 2 (in the environment: DISTILL_TRAIN_PROCESSES, a number from 1, and DISTILL_TRAIN_SHARD, 0 or 1)."
        )


def _training_of_environment() -> str:
    """The same setting as the environment says it."""
    processes = os.environ.get("DISTILL_TRAIN_PROCESSES") or ""
    shard = os.environ.get("DISTILL_TRAIN_SHARD") or "0"
    if shard not in {"0", "1"}:
        raise ValueError(f"DISTILL_TRAIN_SHARD is {shard!r}; it must be 0 or 1.")
    if processes in {"", "1"}:
        return "subprocess" if processes else "in_process"
    return f"torchrun:{processes}" + (":shard" if shard == "1" else "")
