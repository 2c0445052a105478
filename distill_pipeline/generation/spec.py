"""The ``teachers`` part of an experiment file."""

from typing import Literal

from pydantic import Field

from distill_pipeline.spec import Spec

ALGORITHM = "teacher_outputs/1"
"""Raise when the same answers of a teacher would be laid out or parsed otherwise."""


class SamplingSpec(Spec):
    """How a teacher answers. ``temperature: 0`` is greedy and then ``n`` must be 1."""

    n: int = Field(4, ge=1, le=4096, description="completions a prompt")
    temperature: float = Field(0.7, ge=0.0, le=10.0)
    top_k: int = Field(50, ge=1, le=1024, description="sampled among this many likeliest tokens")
    top_p: float = Field(0.95, gt=0.0, le=1.0, description="and among the likeliest tokens that hold this mass")
    max_tokens: int = Field(512, ge=1, le=131_072, description="longest completion, in the teacher's tokens")


class TeacherSpec(Spec):
    """One teacher: which model, how it is run, and which prompts it answers."""

    model: str = Field(min_length=1, description="Hub id, local folder, GGUF file, or pypi:PACKAGE==VERSION")
    revision: str | None = Field(None, description="commit of a Hub model; pins it")
    engine: Literal["transformers"] = "transformers"
    license: str | None = Field(None, description="licence key of the model, for instance apache-2.0")
    accept: str | None = Field(None, min_length=8, description="why a licence that is refused by default is accepted")
    domains: tuple[str, ...] = Field(("*",), min_length=1, description="domains it answers; * is all")
    system: str | None = Field(None, description="system prompt; null leaves the model's own default")
    sampling: SamplingSpec = SamplingSpec()
    batch_tokens: int = Field(16_384, ge=256, description="most tokens of a generation batch, prompts and answers")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; recorded in the manifest")
