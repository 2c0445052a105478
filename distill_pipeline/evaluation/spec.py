"""The ``evaluation`` part of an experiment file."""

from pydantic import Field

from distill_pipeline.spec import Spec

ALGORITHM = "eval_report/1"
"""Raise when the same models and tasks would give other numbers."""


class EvaluationSpec(Spec):
    """What every student is measured on, and beside which models."""

    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval task names")
    include_path: str | None = Field(None, description="folder with local lm-eval tasks")
    baselines: tuple[str, ...] = Field(
        ("teacher", "untrained"), description="what each student is compared with: teacher, untrained, or another student"
    )
    limit: int | None = Field(None, ge=1, description="documents a task; null is all of them")
    batch_size: int = Field(64, ge=1)
