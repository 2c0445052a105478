"""The ``filters`` part of an experiment file."""

from typing import Literal

from pydantic import Field

from distill_pipeline.spec import Spec

ALGORITHM = "filtered_set/1"
"""Raise when the same filter would decide otherwise."""

DropRule = Literal["truncated", "refusal", "repetition", "contaminated", "empty", "duplicate"]
KeepRule = Literal["all", "best_of_n", "shortest"]


class FilterSpec(Spec):
    """Which completions train a student. Held-out prompts and failed rows never do, whatever the filter says."""

    min_score: float | None = Field(None, ge=0.0, le=1.0, description="every known score at least this; unknown rejects")
    keep: KeepRule = Field("all", description="of a prompt's accepted completions: all, the best score, or the shortest")
    max_per_prompt: int | None = Field(None, ge=1, description="and at most this many of them")
    drop: tuple[DropRule, ...] = ()
