"""Rollouts: what a student answers to the prompts of a step while it is trained, so that it learns where it goes itself.

The project's own engine steps the very module that is trained, in evaluation mode: no second copy of the weights, and no
text between drawing and learning, because a text may have other tokens than those that were drawn. Draws follow from the
seed, the stage, the step and the prompt's number in it, so a run that goes on from a checkpoint answers as one that was not
interrupted, and several processes draw for their prompts what one would. A stage that names a server has it draw instead
(:mod:`distill_pipeline.training.served_rollouts`).

A rollout ends with the end token that was drawn. One that was cut at its limit has none, and none is learned there.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.generation.decoders import Decoder, PlainDecoder, decoder_for
from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.generation.shared_prefix import SharedPrefixDecoder
from distill_pipeline.hashing import unit_interval
from distill_pipeline.models.forward import evaluating
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.examples import Example
from distill_pipeline.training.layout import forward_precision
from distill_pipeline.training.parallel import ALONE, PLAIN, HeldModel, Processes
from distill_pipeline.training.served_rollouts import ServedRollouts
from distill_pipeline.training.spec import RolloutServerSpec, RolloutSpec, TrainStageSpec


@dataclass(frozen=True)
class RolloutBatch:
    """This process's prompts of one step with the student's completions.

    ``completions``, ``truncated`` and ``num_tokens`` (end tokens included) count those of all processes.
    """

    examples: list[Example]
    completions: int
    truncated: int
    num_tokens: int

    def row(self) -> dict[str, Any]:
        """What the training curve says of it."""
        return {
            "rollouts": self.completions, "rollout_mean_tokens": self.num_tokens / self.completions,
            "rollout_truncated_frac": self.truncated / self.completions,
        }  # fmt: skip


class StudentSampler:
    """Answers prompts with a student under training, whose weights it shares, or has servers answer them."""

    def __init__(
        self, student: Any, renderer: ChatRenderer, *, seed: int, limit: int, dtype: torch.dtype = torch.float32,
        served: Mapping[RolloutServerSpec, ServedRollouts] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            student: a transformers causal language model; between rollouts it is whatever its trainer makes of it.
            limit: most tokens of a prompt with its completion; see :func:`length_limit`.
            dtype: what the forward passes run in.
            served: the servers that draw for the stages which name them.
        """
        self._student, self._renderer, self._seed, self._limit = student, renderer, seed, limit
        self._dtype, self._served = dtype, served or {}
        with evaluating(student):
            self.shares_prefixes = isinstance(decoder_for(student), SharedPrefixDecoder)
        self.num_tokens = 0
        self.seconds = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Completion tokens a second of generation, in this process."""
        return self.num_tokens / max(self.seconds, 1e-9)

    def server_facts(self) -> list[dict[str, Any]]:
        """How each server's part went."""
        return [served.facts() for served in self._served.values()]

    def roll_out(
        self, examples: Sequence[Example], rollouts: RolloutSpec, *, stage: int, step: int, held: HeldModel = PLAIN,
        processes: Processes = ALONE,
    ) -> RolloutBatch:  # fmt: skip
        """The same prompts, or this process's share, with ``rollouts.samples`` completions each by the student as it is now.

        Raises:
            TrainingError: the student's logits are not numbers, or a server fails or does not draw from the student.
            ConfigError: a server was not started for this.
        """
        most_tokens = rollouts.samples * rollouts.max_tokens
        mine = processes.share(examples, lambda example: len(example.prompt) + most_tokens)
        requests = [
            Request(f"{self._seed}/{stage}/{step}/{row}/{sample}", example.prompt)
            for row, example in mine
            for sample in range(rollouts.samples)
        ]
        served = None if rollouts.server is None else self._served[rollouts.server]
        if served is not None:
            served.open(processes)
        started = time.monotonic()
        with held.whole(self._student) as student:
            if served is None:
                done = self._answers(student, requests, rollouts)
            else:
                done = served.answers(student, requests, rollouts, stage=stage, step=step, processes=processes)
        self.seconds += time.monotonic() - started
        answers = [done[request.key] for request in requests]
        if failed := next((answer for answer in answers if answer.finish_reason == "error"), None):
            raise TrainingError(f"the student answers no prompt in step {step + 1} of stage {stage + 1}: {failed.error}")
        drawn = [_drawn_ids(answer) for answer in answers]
        rolled = [
            replace(example, completions=tuple(drawn[place * rollouts.samples : (place + 1) * rollouts.samples]))
            for place, (_, example) in enumerate(mine)
        ]
        truncated, tokens = sum(answer.finish_reason == "length" for answer in answers), sum(map(len, drawn))
        counts = [int(count) for count in processes.sum([len(answers), truncated, tokens])]
        self.num_tokens += counts[2]
        return RolloutBatch(rolled, *counts)

    def _answers(self, student: Any, requests: Sequence[Request], rollouts: RolloutSpec) -> dict[str, Completion]:
        """By key. A new decoder each time, so that no cache stays in memory while the student learns."""
        decoder: Decoder = SharedPrefixDecoder(student) if self.shares_prefixes else PlainDecoder(student)
        engine = TransformersEngine(student, self._renderer, batch_tokens=rollouts.batch_tokens, decoder=decoder)
        engine.context_tokens = self._limit
        with evaluating(student), forward_precision(student.device.type, self._dtype):
            answers = engine.generate(
                requests, max_tokens=rollouts.max_tokens, temperature=rollouts.temperature, top_k=rollouts.top_k,
                top_p=rollouts.top_p,
            )  # fmt: skip
            return {answer.key: answer for answer in answers}


def answers_itself(stage: TrainStageSpec, *, seed: int, index: int, step: int) -> bool:
    """Whether the student answers the prompts of a step: a ``lambda_`` share of the steps, drawn from these numbers alone."""
    return stage.method == "on_policy" and unit_interval(f"rollouts/{seed}/{index}/{step}") < stage.lambda_


def length_limit(stages: Sequence[TrainStageSpec], models: Sequence[Any], *, max_length: int, longest_prompt: int) -> int:
    """Most tokens of a prompt with its rollout: ``max_length``, or the shortest context of the models that read it.

    Raises:
        ConfigError: a stage's ``rollouts.max_tokens`` or the longest prompt alone fills it.
    """
    limit = min([max_length, *(getattr(model.config, "max_position_embeddings", None) or max_length for model in models)])
    for index, stage in enumerate(stages):
        if stage.method == "on_policy" and stage.rollouts.max_tokens >= limit:
            raise ConfigError(
                f"stages.{index}.rollouts.max_tokens is {stage.rollouts.max_tokens}, and the models' context holds {limit} "
                "tokens, prompt included. Lower it."
            )
    if longest_prompt >= limit:
        raise ConfigError(
            f"the longest prompt has {longest_prompt} tokens and the models' context holds {limit}: nothing could be answered. "
            "Lower max_length, so that long prompts are left out."
        )
    return limit


def rollouts_text(sampler: StudentSampler | None, curve: Sequence[Mapping[str, Any]]) -> str:
    """How the rollouts of the last step were and how fast all of them, to follow other words; empty if it had none."""
    if sampler is None or not (row := curve[-1]).get("rollouts"):
        return ""
    return (
        f"; rollouts {sampler.tokens_per_second:.0f} tokens/s, {row['rollout_mean_tokens']:.1f} tokens long, "
        f"{row['rollout_truncated_frac']:.0%} truncated"
    )


def rollout_facts(sampler: StudentSampler, curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rollouts of a training from its curve, and how fast those of this process were."""
    rows = [row for row in curve if row.get("rollouts")]
    completions = sum(row["rollouts"] for row in rows)
    tokens = sum(row["rollouts"] * row["rollout_mean_tokens"] for row in rows)
    truncated = sum(row["rollouts"] * row["rollout_truncated_frac"] for row in rows)
    return {
        "completions": completions, "tokens": round(tokens), "mean_tokens": round(tokens / max(completions, 1), 2),
        "truncated_frac": round(truncated / max(completions, 1), 4), "seconds": round(sampler.seconds, 3),
        "tokens_per_second": round(sampler.tokens_per_second, 1),
        **({"servers": servers} if (servers := sampler.server_facts()) else {"shares_prefixes": sampler.shares_prefixes}),
    }  # fmt: skip


def _drawn_ids(answer: Completion) -> tuple[int, ...]:
    """All tokens that were drawn, in order."""
    return answer.token_ids if answer.end_token_id is None else (*answer.token_ids, answer.end_token_id)
