"""The ``compute`` part of an experiment file: where rows are scored and filtered. It changes speed and memory, not results."""

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

    @model_validator(mode="after")
    def _address_is_rays(self) -> "ComputeSpec":
        if self.address is not None and self.engine != "ray":
            raise ValueError(f"address {self.address!r} is a Ray cluster's; set engine: ray or leave address out")
        return self
