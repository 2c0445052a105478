"""The ``signals`` part of an experiment file."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from distill_pipeline.spec import Spec

ALGORITHM = "teacher_signals/1"
"""Raise when the same rows and settings would be captured or laid out otherwise."""

DISTINCT_OF_50 = 12.1
"""Distinct tokens among 50 draws on general text (Anshumann et al. 2025); on short answers of a sure teacher they are half."""

SignalKind = Literal["topk", "sampled"]

Temperature = Annotated[float, Field(gt=0.0, le=100.0)]


class SignalsSpec(Spec):
    """What is stored of teachers for students whose stages say ``signal: topk`` or ``signal: sampled``."""

    k: int = Field(16, ge=1, description="topk: how many of a position's likeliest tokens are stored")
    draws: int = Field(50, ge=1, le=255, description="sampled: how many tokens are drawn a position, with replacement")
    temperatures: tuple[Temperature, ...] = Field(
        (1.0,), min_length=1, description="each kd_temperature that a student may train at"
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="of stored log-probabilities")

    @field_validator("temperatures")
    @classmethod
    def _each_once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) != len(value):
            raise ValueError("a temperature is listed twice")
        return value

    def bytes_a_token(self, kind: SignalKind) -> float:
        """About what a completion token takes in a file, with the prompt's share: as measured, text for text a little less."""
        number = 2 if self.dtype == "float16" else 4
        each = {
            "topk": self.k * (number * 0.7 + 1.1) + number + 4,
            "sampled": len(self.temperatures) * (min(self.draws, DISTINCT_OF_50 * self.draws / 50) * 2.4 + number + 4),
        }
        return each[kind]

    def captured(self, kinds: tuple[SignalKind, ...]) -> dict[str, Any]:
        """The settings that decide what a capture of these kinds holds."""
        own = {"topk": {"k": self.k}, "sampled": {"draws": self.draws}}
        chosen = {key: value for kind in kinds for key, value in own[kind].items()}
        return {"kinds": list(kinds), **chosen, "temperatures": list(self.temperatures), "dtype": self.dtype}
