"""The ``prompt_pool`` part of an experiment file."""

from typing import Literal

from pydantic import Field, field_validator

from distill_pipeline.spec import Spec

ALGORITHM = "prompt_pool/1"
"""Raise when the same sources and settings would give other prompts."""


class SourceColumns(Spec):
    """What a source calls its columns."""

    prompt: str = "prompt"
    messages: str = "messages"
    reference: str = "reference"
    domain: str = "domain"
    id: str = "id"


class SourceSpec(Spec):
    """Where prompts come from: a JSONL, JSON, CSV or Parquet file, a folder of them, or a glob; any fsspec URL."""

    path: str = Field(min_length=1)
    domain: str = Field("general", min_length=1, description="domain of rows that do not name one")
    license: str = Field(min_length=1, description="licence of the prompts, for instance cc0-1.0")
    columns: SourceColumns = SourceColumns()


class NearDedupSpec(Spec):
    """Near duplicates: equal reference, equal numbers, and an estimated Jaccard similarity of word 5-grams above this."""

    threshold: float = Field(0.85, gt=0.0, le=1.0)


class DedupSpec(Spec):
    """Which repeated prompts are dropped; the first of a source's order stays."""

    exact: bool = Field(True, description="always true: a prompt's id is its messages, so equal prompts are one prompt")
    near: NearDedupSpec | None = NearDedupSpec()

    @field_validator("exact")
    @classmethod
    def _is_true(cls, exact: bool) -> bool:
        if not exact:
            raise ValueError("equal prompts are one prompt, for a prompt's id is its messages; leave exact out. "
                             "For more answers to a prompt raise its teacher's sampling.n")  # fmt: skip
        return exact


class DecontaminateSpec(Spec):
    """What a training prompt must not resemble: the documents of this experiment's evaluation tasks, and listed files."""

    against: Literal["evaluation"] | None = "evaluation"
    files: tuple[str, ...] = Field((), description="text or JSONL files with one protected item a line; fsspec URLs too")


class PromptPoolSpec(Spec):
    """Sources and what is kept of them."""

    sources: tuple[SourceSpec, ...] = Field(min_length=1)
    holdout_fraction: float = Field(0.2, ge=0.0, lt=1.0, description="share held out from training, by hash of the prompt")
    dedup: DedupSpec = DedupSpec()
    decontaminate: DecontaminateSpec = DecontaminateSpec()
