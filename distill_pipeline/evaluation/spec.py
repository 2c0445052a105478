"""The ``evaluation`` part of an experiment file."""

from typing import Any

from pydantic import Field, model_validator

from distill_pipeline.spec import Spec

ALGORITHM = "eval_report/1"
"""Raise when the same models and tasks would give other numbers."""


def _is_unset(value: Any) -> bool:
    return not value


class EvaluationSpec(Spec):
    """What every student is measured on, and beside which models."""

    tasks: tuple[str, ...] = Field(min_length=1, description="lm-eval task names")
    include_path: str | None = Field(None, description="folder with local lm-eval tasks")
    domains: dict[str, str] = Field(
        {}, exclude_if=_is_unset, description="by task: the domain under whose system prompt it is asked; * is any other's"
    )
    baselines: tuple[str, ...] = Field(
        ("teacher", "untrained"), description="what each student is compared with: teacher, untrained, or another student"
    )
    limit: int | None = Field(None, ge=1, description="documents a task; null is all of them")
    batch_size: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _domains_are_of_tasks(self) -> "EvaluationSpec":
        if strange := [task for task in self.domains if task not in self.tasks]:
            raise ValueError(f"domains.{strange[0]}: no such task; tasks: {', '.join(self.tasks)}")
        return self
