"""Where a stage's training stands: how far it is, when it ends, and the learning rate of its next step.

A stage is as long as its epochs, or ``max_steps`` where that is less. With ``max_tokens`` it goes on, over as many epochs as
that takes, up to the step that reaches so many completion tokens, so that students of large and of small sets can be trained
on equally much; ``max_steps`` still ends it earlier. Everything here follows from the number of steps and tokens that are
behind, so a run that goes on from a checkpoint goes on alike.
"""

import math
from dataclasses import dataclass

from distill_pipeline.training.spec import TrainStageSpec


@dataclass
class StagePosition:
    """Steps and completion tokens of one stage that are behind. ``max_steps`` is None where only tokens end the stage."""

    stage: TrainStageSpec
    max_steps: int | None
    step: int = 0
    tokens: int = 0

    @classmethod
    def of(cls, stage: TrainStageSpec, num_examples: int, *, step: int = 0, tokens: int = 0) -> "StagePosition":
        """The position after ``step`` steps that trained ``tokens`` tokens, in a stage over so many examples."""
        return cls(stage, stage_steps(stage, num_examples), step, tokens)

    @property
    def share(self) -> float:
        """How much of the stage is done, in [0, 1]."""
        return min(1.0, max(done / whole for done, whole, _ in self._measures(0)))

    @property
    def is_over(self) -> bool:
        """Whether the last step was the last one."""
        return any(done >= whole for done, whole, _ in self._measures(0))

    def next_rate(self, batch_tokens: int) -> float:
        """The learning rate of the next step, which trains on so many tokens."""
        done, whole, size = max(self._measures(batch_tokens), key=lambda measure: measure[0] / measure[1])
        return learning_rate(self.stage, done, whole, size)

    def advance(self, batch_tokens: int) -> None:
        """One more step of so many tokens is behind."""
        self.step += 1
        self.tokens += batch_tokens

    def __str__(self) -> str:
        steps = "" if self.max_steps is None else f" of {self.max_steps}"
        limit = self.stage.max_tokens
        return f"step {self.step}{steps}" + ("" if limit is None else f", {self.tokens:,} of {limit:,} tokens")

    def _measures(self, batch_tokens: int) -> list[tuple[int, int, int]]:
        """(done, whole, the next step's size) in steps and in tokens, where these end the stage."""
        steps = [] if self.max_steps is None else [(self.step, self.max_steps, 1)]
        return steps + ([] if self.stage.max_tokens is None else [(self.tokens, self.stage.max_tokens, batch_tokens)])


def stage_steps(stage: TrainStageSpec, num_examples: int) -> int | None:
    """Optimizer steps of a stage; a part of an epoch is rounded up to whole steps. None where ``max_tokens`` alone ends it."""
    if stage.max_tokens is not None:
        return stage.max_steps
    steps = max(1, math.ceil(stage.epochs * math.ceil(num_examples / stage.batch_prompts) - 1e-9))
    return steps if stage.max_steps is None else min(steps, stage.max_steps)


@dataclass(frozen=True)
class StageLoad:
    """What one training stage sees at most: completions, those among them that the student makes, and their tokens."""

    rows: int
    rollouts: int
    tokens: int


def stage_load(stage: TrainStageSpec, num_prompts: int, a_prompt: int, tokens_a_row: float | None) -> StageLoad:
    """A stage over ``num_prompts`` with ``a_prompt`` completions of ``tokens_a_row`` tokens each (None: not known).

    A stage that ends by tokens trains on its budget; unknown lengths of the data count as no tokens. Rollouts count as
    ``rollouts.max_tokens`` long, which is what an untrained student makes of them.
    """
    if not num_prompts:
        return StageLoad(0, 0, 0)
    own_frac = stage.lambda_ if stage.method == "on_policy" else 0.0
    rollouts_a_prompt, rows_a_prompt = own_frac * stage.rollouts.samples, (1.0 - own_frac) * a_prompt
    tokens_a_prompt = rollouts_a_prompt * stage.rollouts.max_tokens + rows_a_prompt * (tokens_a_row or 0.0)
    steps = stage_steps(stage, num_prompts)
    # Steps are as many as cover the prompts of an epoch, and the last one of an epoch may be smaller.
    seen = math.inf if steps is None else steps * num_prompts / math.ceil(num_prompts / stage.batch_prompts)
    if stage.max_tokens is not None and (steps is None or seen * tokens_a_prompt > stage.max_tokens):
        seen = stage.max_tokens / tokens_a_prompt if tokens_a_prompt else stage.epochs * num_prompts
        return StageLoad(int(seen * (rollouts_a_prompt + rows_a_prompt)), int(seen * rollouts_a_prompt), stage.max_tokens)
    return StageLoad(
        int(seen * (rollouts_a_prompt + rows_a_prompt)), int(seen * rollouts_a_prompt), int(seen * tokens_a_prompt)
    )


def learning_rate(stage: TrainStageSpec, done: int, whole: int, size: int = 1) -> float:
    """Rises linearly over the first ``warmup_frac`` of the way, then follows ``schedule`` down to zero (or stays).

    ``wsd`` stays, and falls linearly on the last ``decay_frac`` of the way (warmup, stable, decay: Hu et al. 2024,
    arXiv:2404.06395, section 4.2).

    Args:
        done, whole, size: what is behind the step, the whole way, and the step's own part of it; in steps, or in tokens.
    """
    warmup = math.ceil(stage.warmup_frac * whole)
    if done < warmup:
        return stage.lr * (done + size) / (warmup + size)
    passed = (done - warmup) / max(1, whole - warmup)
    if stage.schedule == "constant":
        return stage.lr
    if stage.schedule == "wsd":
        return stage.lr * min(1.0, (whole - done) / (stage.decay_frac * whole))
    return stage.lr * (1.0 - passed if stage.schedule == "linear" else (1.0 + math.cos(math.pi * passed)) / 2)
