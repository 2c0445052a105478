"""How near a student comes to its teacher while it learns: prompts that train nothing, and when their divergence falls no more.

Which prompts are held out follows from the hash of each prompt alone, so a prompt stays on its side when others come or go,
and so do its answers and its reasonings where these are two tasks.
Measuring draws no random number and touches no weight: a run that measures often ends with the weights of one that does not.

Decided: a stage that may stop early ends with the weights of its least divergence, whether it stopped or ran its whole way.
The stop follows from the curve, so a run that goes on from a checkpoint stops where one that was not interrupted stops.
Given up: a kept copy of the teacher's distributions, which would save its forward passes and cost 200 KB a token.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.hashing import unit_interval
from distill_pipeline.losses import forward_kl
from distill_pipeline.models.forward import LOGIT_CELLS, evaluating
from distill_pipeline.training.batches import micro_batches
from distill_pipeline.training.checkpoints import model_tensors, put_tensors
from distill_pipeline.training.examples import Example, ExampleSet
from distill_pipeline.training.layout import place_logits
from distill_pipeline.training.parallel import ALONE, PLAIN, HeldModel, Processes, training_cost, whole_tensors
from distill_pipeline.training.position import StagePosition
from distill_pipeline.training.reading import REASONING_TASK
from distill_pipeline.training.spec import EarlyStopSpec, HeldOutSpec
from distill_pipeline.training.trees import Layout

KL, TOP1 = "held_out_kl", "held_out_top1"
"""Columns of the curve, null in steps without a comparison."""


@dataclass(frozen=True)
class HeldOut:
    """The held-out part of a student's data, the teacher, and every how many steps the student is compared with it.

    ``student_held``, ``teacher_held`` and ``processes`` say how both models are reached, and with whom the work is shared.
    """

    examples: Sequence[Example]
    teacher: Any
    every: int
    layout: Layout
    pad_id: int
    vocab_size: int
    device: str
    student_held: HeldModel = PLAIN
    teacher_held: HeldModel = PLAIN
    processes: Processes = ALONE

    def is_due(self, position: StagePosition) -> bool:
        """Whether the student is compared after a step: after every so many of a stage, and after its last one."""
        return position.step % self.every == 0 or position.is_over

    def compare(self, student: Any) -> dict[str, float]:
        """What the curve says of a student's step.

        Raises:
            TrainingError: the divergence is not a number.
        """
        share = [example for _, example in self.processes.share(self.examples, training_cost)]
        with self.student_held.whole(student) as whole, evaluating(whole):
            found = teacher_agreement(
                whole, self.teacher, share, layout=self.layout, pad_id=self.pad_id, vocab_size=self.vocab_size,
                device=self.device, teacher_held=self.teacher_held, processes=self.processes,
            )  # fmt: skip
        if not math.isfinite(found.forward_kl):
            raise TrainingError(
                f"the held-out divergence is {found.forward_kl}: the logits of the student or the teacher are no numbers. "
                "Lower lr, or try precision: fp32."
            )
        return {KL: found.forward_kl, TOP1: found.top1_agreement}


@dataclass(frozen=True)
class Agreement:
    """Of a student with its teacher on some tokens: mean KL(teacher || student) in nats, share of equal likeliest tokens."""

    forward_kl: float
    top1_agreement: float
    num_tokens: int


def teacher_agreement(
    student: Any, teacher: Any, examples: Sequence[Example], *, layout: Layout, pad_id: int, vocab_size: int, device: str,
    teacher_held: HeldModel = PLAIN, processes: Processes = ALONE,
) -> Agreement:  # fmt: skip
    """Compare two models' next-token distributions at every completion token of ``examples``; computed in float32.

    Args:
        student, teacher: causal language models in evaluation mode on ``device``.
        vocab_size: columns of the logits that are tokens; padding behind them is cut.
        teacher_held, processes: how the teacher is called, and with whom: the result is over the examples of all processes.
    Returns:
        0 and 1 where both models are equal.
    """
    kl_sum, agreed, tokens = 0.0, 0, 0
    own = micro_batches(examples, layout=layout, max_tokens=LOGIT_CELLS // vocab_size, pad_id=pad_id)
    for part, is_own in processes.passes(own):
        batch = part.to(device)
        with torch.no_grad():
            teacher_PV = teacher_held.run(place_logits, teacher, batch)[:, :vocab_size].float()
            if not is_own:
                continue
            student_PV = place_logits(student, batch)[:, :vocab_size].float()
        # A place that several answers run through stands for as many tokens.
        place_N = batch.targets.pair_position_N.repeat_interleave(batch.targets.pair_weight_N.long())
        teacher_NV, student_NV = teacher_PV[place_N], student_PV[place_N]
        kl_sum += float(forward_kl(student_NV[None], teacher_NV[None], torch.zeros_like(place_N)[None])) * len(place_N)
        agreed += int((teacher_NV.argmax(dim=-1) == student_NV.argmax(dim=-1)).sum())
        tokens += len(place_N)
    kl_sum, agreed_sum, num_tokens = processes.sum([kl_sum, agreed, tokens])
    return Agreement(kl_sum / num_tokens, agreed_sum / num_tokens, int(num_tokens))


def split_held_out(
    examples: ExampleSet, counts: Mapping[str, int], part: HeldOutSpec | None
) -> tuple[ExampleSet, list[Example], dict[str, int]]:
    """Divide a student's examples into those that train and those that only measure.

    Returns:
        Both, each in the examples' order, and the counts of ``encode_examples`` as they are now, with ``held_out_rows`` and
        ``held_out_completions``; with ``part`` None everything as it was.
    Raises:
        TrainingError: one side would be empty.
    """
    if part is None:
        return examples, [], dict(counts)
    training, held = ExampleSet(), list[Example]()
    training.own = None if examples.own is None else ExampleSet()
    for index in range(len(examples)):
        example = examples[index]
        if unit_interval(f"held_out:{example.prompt_id.removesuffix(REASONING_TASK)}") < part.fraction:
            held.append(example)
            continue
        training.append(example)
        if training.own is not None and examples.own is not None:
            training.own.append(examples.own[index])
    if not held or not len(training):
        raise TrainingError(
            f"held_out.fraction {part.fraction} holds out {len(held)} of {len(examples)} prompts, and both training and "
            "comparing need one. Choose another fraction, or leave held_out out."
        )
    completions = sum(len(example.completions) for example in held)
    return training, held, {
        **counts,
        "trained_rows": counts["trained_rows"] - len(held), "held_out_rows": len(held),
        "trained_completions": counts["trained_completions"] - completions, "held_out_completions": completions,
        "data_tokens": counts["data_tokens"] - sum(example.num_tokens for example in held),
    }  # fmt: skip


def comparisons(curve: Sequence[Mapping[str, Any]], stage: int) -> list[float]:
    """The held-out divergences of one stage, in order."""
    return [row[KL] for row in curve if row["stage"] == stage and row.get(KL) is not None]


def has_settled(divergences: Sequence[float], rule: EarlyStopSpec) -> bool:
    """Whether none of the last ``patience`` divergences lay more than ``min_delta`` below all that were before it."""
    least, misses = math.inf, 0
    for divergence in divergences:
        misses = 0 if divergence < least - rule.min_delta else misses + 1
        least = min(least, divergence)
    return misses >= rule.patience


class BestWeights:
    """The student's weights at the least held-out divergence of a stage, in CPU memory."""

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        self.tensors = tensors

    def offer(self, student: Any, divergences: Sequence[float]) -> None:
        """Keep the student's weights if the last divergence, which is theirs, is the first to be so small."""
        if divergences and divergences[-1] < min(divergences[:-1], default=math.inf):
            tensors = whole_tensors(model_tensors(student), keep=True)
            self.tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}

    def restore(self, student: Any) -> None:
        """Put the kept weights into the student, if there are any, and forget them."""
        if self.tensors is not None:
            put_tensors(student, self.tensors)
        self.tensors = None


def held_out_text(curve: Sequence[Mapping[str, Any]]) -> str:
    """The last comparison, to follow other words; empty if there was none."""
    row = next((row for row in reversed(curve) if row.get(KL) is not None), None)
    return "" if row is None else f"; held-out KL {row[KL]:.4f}, same likeliest token {row[TOP1]:.1%}"


def held_out_facts(curve: Sequence[Mapping[str, Any]], num_stages: int) -> list[dict[str, Any]]:
    """Of each stage: its steps, and the first, least and last held-out divergence with the step of the least."""
    facts = []
    for stage in range(num_stages):
        rows = [row for row in curve if row["stage"] == stage]
        measured = [row for row in rows if row.get(KL) is not None]
        if measured:
            least = min(measured, key=lambda row: row[KL])
            facts.append({
                "steps": len(rows), "first_kl": round(measured[0][KL], 6), "least_kl": round(least[KL], 6),
                "least_kl_step": least["step"], "last_kl": round(measured[-1][KL], 6),
                "last_top1": round(measured[-1][TOP1], 4),
            })  # fmt: skip
    return facts
