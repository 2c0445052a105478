"""The ``scorers`` part of an experiment file."""

from typing import Any

from pydantic import Field

from distill_pipeline.spec import Spec

ALGORITHM = "scored_outputs/2"
"""Raise when the same scorers would write other rows."""


class ScorerSpec(Spec):
    """One scorer: the name of a known kind, or ``package.module:function`` for the user's own."""

    kind: str = Field(min_length=1)
    options: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the scorer")
    timeout_seconds: float = Field(10.0, gt=0.0, description="after this long, one row's score is unknown")
