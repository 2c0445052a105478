"""The ``compute`` part of an experiment file: where rows are scored and filtered, and with Ray where teachers answer.

It changes speed and memory, not results.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from distill_pipeline.spec import Spec


class ComputeSpec(Spec):
    """Which engine works on chunks of rows, and how many of its processes at a time."""

    engine: Literal["local", "ray"] = Field("local", description="processes of this machine, or actors of a Ray cluster")
    workers: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="processes; 1 works without any; auto is one per CPU, and none where a small input would not repay them",
    )
    address: str | None = Field(None, description="of a running Ray cluster; null starts one on this machine and ends it")
    cpus_per_engine: int = Field(1, ge=1, description="with ray: CPUs of each actor that holds a teacher")
    gpus_per_engine: float = Field(0.0, ge=0.0, description="with ray: GPUs of each actor that holds a teacher; 0 is on CPUs")

    @model_validator(mode="after")
    def _some_fields_are_rays(self) -> "ComputeSpec":
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address {self.address!r} is a Ray cluster's; set engine: ray or leave address out")
        if self.engine != "ray" and (self.cpus_per_engine != 1 or self.gpus_per_engine):
            raise ValueError("cpus_per_engine and gpus_per_engine are for engine: ray")
        return self
