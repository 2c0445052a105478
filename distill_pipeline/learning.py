"""How weights are trained, as an experiment says it: what a student's stages and a teacher's correction have in common."""

from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from distill_pipeline.spec import Spec

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class LearningSpec(Spec):
    """How long and how fast weights are trained."""

    epochs: float = Field(1.0, gt=0.0)
    max_steps: int | None = Field(None, ge=1, description="stop after this many optimizer steps")
    max_tokens: int | None = Field(
        None, ge=1,
        description="stop with the step that reaches this many completion tokens, however many epochs that takes",
    )  # fmt: skip
    batch_prompts: int = Field(16, ge=1, description="prompts an optimizer step, each with all its completions")
    micro_batch_tokens: int = Field(1024, ge=64, description="most tokens a forward pass; changes memory, never the result")
    lr: float = Field(3e-4, gt=0.0)
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_frac: float = Field(0.05, ge=0.0, lt=1.0)
    decay_frac: float = Field(0.1, gt=0.0, le=1.0, description="the last part of the way, on which wsd falls to zero")
    weight_decay: float = Field(0.0, ge=0.0)
    clip_norm: float | None = Field(1.0, gt=0.0)

    @model_validator(mode="after")
    def _no_setting_in_vain(self) -> "LearningSpec":
        if vain := sorted(self._unread() & self.model_fields_set):
            raise ValueError(f"{', '.join(vain)}: not read by {self._reader()}")
        if self.schedule == "wsd" and self.warmup_frac + self.decay_frac > 1.0:
            raise ValueError(
                f"warmup_frac {self.warmup_frac} and decay_frac {self.decay_frac} are more than the whole way; lower one"
            )
        return self

    def _unread(self) -> set[str]:
        """Settings that the others leave without a meaning."""
        return set() if self.schedule == "wsd" else {"decay_frac"}

    def _reader(self) -> str:
        """Which settings those are, in words."""
        return f"schedule {self.schedule}"

    def _hidden(self) -> set[str]:
        """Settings that decide nothing, so they are in no manifest and no version."""
        return self._unread()

    @model_serializer(mode="wrap")
    def _without_hidden(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        hidden = self._hidden()
        return {name: value for name, value in handler(self).items() if name not in hidden}


class LoraSpec(Spec):
    """Low-rank adapters: only they are trained, and merged into the weights at the end."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0.0, description="the adapters' product is multiplied by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="of the adapters' inputs; other micro-batches draw others")
    target_modules: tuple[str, ...] | None = Field(
        None, min_length=1, description="layers by the last part of their names; null is every linear layer but the head"
    )


class FittingSpec(Spec):
    """What training takes of memory and precision, and the longest row that it takes."""

    max_length: int = Field(
        2048, ge=16, description="longest prompt plus completion in tokens; longer ones are left out, counted"
    )
    lora: LoraSpec | None = Field(
        None, exclude_if=lambda value: value is None, description="train adapters instead of the weights themselves"
    )
    precision: Precision = Field(
        "auto", exclude_if=lambda value: value == "auto",
        description="of forward passes; auto is bf16 on CUDA, else fp32; weights and losses are always fp32",
    )  # fmt: skip
    gradient_checkpointing: bool = Field(
        False, exclude_if=lambda value: value is False,
        description="keep only what enters each layer and compute the rest again: less memory, more time, same result",
    )  # fmt: skip


class CorrectionSpec(LearningSpec, FittingSpec):
    """A short training of a teacher on gold answers, the references of its prompts, before it answers anything."""

    lr: float = Field(1e-5, gt=0.0)
    alternatives: bool = Field(
        True,
        description="a bar in a reference parts right answers, of which the first is learnt; false learns the text as it is",
    )
