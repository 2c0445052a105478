"""The training loop: stages in order, optimizer steps within a stage, micro-batches within a step.

The loss of a step is the sum over its completion tokens divided by their number, whatever the micro-batches. The data of
step s of a stage follow from (seed, epoch) alone, so a run that is killed goes on from its last checkpoint with the same
losses as one that was not. Where a stage asks for it, the student first answers a step's prompts itself, and all counts are
those of its own tokens. A loss or gradient that is not a number stops the run before the weights are touched.

Decided: AdamW with one state per stage, or that of the stage before where asked; no weight decay on vectors (norms, biases);
weights and losses in float32, forward passes in what ``precision`` says. Of several processes each works on its share of
every step, and the loop is the same: see :mod:`distill_pipeline.training.parallel`.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.outcome import Progress
from distill_pipeline.signals.table import StoredSignals
from distill_pipeline.training.apart import TeacherReading, read_apart
from distill_pipeline.training.batches import MicroBatch, micro_batches
from distill_pipeline.training.checkpoints import Checkpoint, save_checkpoint
from distill_pipeline.training.examples import Example, ExampleSet, epoch_order
from distill_pipeline.training.head import POLICY_GRADIENT, head_loss
from distill_pipeline.training.held_out import BestWeights, HeldOut, comparisons, has_settled, held_out_text
from distill_pipeline.training.layout import forward_precision, hidden_states
from distill_pipeline.training.measuring import prompts_without_numbers
from distill_pipeline.training.optim import LossScale, make_optimizer
from distill_pipeline.training.parallel import ALONE, PLAIN, HeldModel, Processes, training_cost
from distill_pipeline.training.position import StagePosition
from distill_pipeline.training.progress import StageClock
from distill_pipeline.training.rollouts import StudentSampler, answers_itself
from distill_pipeline.training.spec import TrainStageSpec
from distill_pipeline.training.trees import Layout

CHECKPOINT_SHARE = 0.05
"""Most of the training time that checkpoints may take: a slow disk makes them rarer."""


@dataclass(frozen=True)
class ModelPair:
    """Student and frozen teacher (None where no stage needs one), with their heads; or what was stored of the teacher.

    The student's head is cut to ``vocab_width`` rows, at padding that no token uses; the teacher's is cut already: to as many,
    or where the two have different tokenizers to its own. Models are called, and their heads' weights read, inside of
    ``student_held.run`` and ``teacher_held.run``.
    """

    student: Any
    student_head: OutputHead
    vocab_width: int
    teacher: Any = None
    teacher_head: OutputHead | None = None
    signals: StoredSignals | None = None
    student_held: HeldModel = PLAIN
    teacher_held: HeldModel = PLAIN

    def held_by(self, processes: Processes, device: str) -> "ModelPair":
        """Both models as several processes hold them."""
        pair = self
        if processes.shards:
            head = None if self.teacher_head is None else self.teacher_head.without_weights()
            pair = replace(self, student_head=self.student_head.without_weights(), teacher_head=head)
        teacher_held = PLAIN if self.teacher is None else processes.hold(self.teacher, device)
        return replace(pair, student_held=processes.hold(self.student, device), teacher_held=teacher_held)


@dataclass(frozen=True)
class StepLoss:
    """Of one optimizer step, in nats a token: the loss, and its parts before weighting."""

    loss: float
    kl: float
    ce: float
    num_tokens: int


@dataclass(frozen=True)
class StepShare:
    """One process's part of a step, in the student's tokens and perhaps the teacher's; ``num_tokens`` are all processes'."""

    batch: Sequence[Example]
    num_tokens: int
    own: Sequence[Example] | None = None

    @classmethod
    def of(cls, processes: Processes, batch: Sequence[Example], own: Sequence[Example] | None) -> "StepShare":
        """This process's part of the data's prompts."""
        share = processes.share(batch, training_cost)
        num_tokens = sum(example.num_tokens for example in batch)
        return cls([example for _, example in share], num_tokens, None if own is None else [own[index] for index, _ in share])

    @property
    def read(self) -> Sequence[Example]:
        """What a teacher reads of it."""
        return self.batch if self.own is None else self.own


@dataclass
class TrainingRun:
    """One student's training, from its first step to its last."""

    models: ModelPair
    stages: Sequence[TrainStageSpec]
    examples: ExampleSet
    layout: Layout
    pad_id: int
    seed: int
    device: str
    dtype: torch.dtype
    """Of forward passes."""
    checkpoint_dir: Path
    checkpoint_state: dict[str, Any]
    checkpoint_seconds: float
    progress: Progress
    sampler: StudentSampler | None = None
    """Answers the prompts of on_policy stages."""
    held_out: HeldOut | None = None
    """What the student is compared with its teacher on."""
    processes: Processes = ALONE
    curve: list[dict[str, Any]] = field(default_factory=list)
    trained_tokens: int = 0
    first_tokens: int = 0
    """Tokens that an earlier, interrupted run had trained."""
    stage_seconds: list[float] = field(default_factory=list)
    """Of each stage, as far as this process trained it."""
    _optimizer: torch.optim.Optimizer | None = None
    _loss_scale: LossScale = field(init=False)
    _best: BestWeights = field(default_factory=BestWeights)
    """Of a stage that may stop early, while it runs."""

    def run(self, resume: Checkpoint | None) -> None:
        """Train all stages; ``curve`` then has one row a step. With ``resume``, go on where that checkpoint stopped.

        Raises:
            TrainingError: a loss or gradient is not a number, or a part that a stage needs is not there.
        """
        self._check_parts()
        first_stage = first_step = 0
        self._loss_scale = LossScale.of(self.dtype)
        if resume is not None:
            self.curve, self.trained_tokens = list(resume.state["curve"]), resume.state["trained_tokens"]
            self.first_tokens = self.trained_tokens
            self._loss_scale = LossScale(**resume.state["loss_scale"])
            first_stage, first_step = resume.state["stage"], resume.state["step"]
        self.stage_seconds = [0.0] * len(self.stages)
        for index in range(first_stage, len(self.stages)):
            self._run_stage(index, first_step if index == first_stage else 0, resume if index == first_stage else None)

    def _check_parts(self) -> None:
        for index, stage in enumerate(self.stages):
            for part, needed, there in (
                ("a held-out part", stage.early_stop is not None, self.held_out is not None),
                ("a teacher", stage.needs_teacher, self.models.teacher is not None),
                ("teacher signals", stage.signal != "online", self.models.signals is not None),
                ("a sampler", stage.method == "on_policy", self.sampler is not None),
            ):
                if needed and not there:
                    raise TrainingError(f"stage {index + 1} ({stage.method}) needs {part}, and none was given")

    def _run_stage(self, index: int, first_step: int, resume: Checkpoint | None) -> None:
        stage, student = self.stages[index], self.models.student
        optimizer = make_optimizer(student, stage)
        if resume is not None:
            resume.restore(student, optimizer if first_step or stage.keep_optimizer else None)
            self._best = BestWeights(resume.best_tensors())
        elif stage.keep_optimizer and self._optimizer is not None:
            optimizer.state.update(self._optimizer.state)
        self._optimizer = optimizer
        before = next((row["tokens"] for row in reversed(self.curve) if row["stage"] < index), 0)
        position = StagePosition.of(stage, len(self.examples), step=first_step, tokens=self.trained_tokens - before)
        clock, saved_at, pause = StageClock(position, self.trained_tokens), time.monotonic(), self.checkpoint_seconds
        student.train()
        settled = self._is_settled(index)
        while not (position.is_over or settled):
            batch = step_examples(self.examples, stage, self.seed, position.step)
            self._train_step(index, position, batch, optimizer)
            self.curve[-1] |= clock.step(self.trained_tokens, self.device)
            settled = self._compare(index, position)
            if line := clock.line(position, self.curve, self.sampler):
                self.progress(line)
            now = time.monotonic()
            if self.processes.decide(now - saved_at >= pause) and not position.is_over:
                self._save(index, position.step, optimizer)
                saved_at = time.monotonic()
                pause = max(self.checkpoint_seconds, (saved_at - now) / CHECKPOINT_SHARE)
            clock.skip()
        if not position.is_over:
            self.progress(f"{stage.method}, after {position}: stopped early{held_out_text(self.curve)}")
        self._best.restore(student)
        self.stage_seconds[index] = clock.seconds
        if index + 1 < len(self.stages):
            self._save(index + 1, 0, optimizer)

    def _is_settled(self, index: int) -> bool:
        rule = self.stages[index].early_stop
        return rule is not None and has_settled(comparisons(self.curve, index), rule)

    def _compare(self, index: int, position: StagePosition) -> bool:
        """How near the student is to its teacher, where a comparison is due; whether that ends the stage early."""
        if self.held_out is None or not self.held_out.is_due(position):
            return False
        with forward_precision(torch.device(self.device).type, self.dtype):
            self.curve[-1] |= self.held_out.compare(self.models.student)
        if self.stages[index].early_stop is not None:
            self._best.offer(self.models.student, comparisons(self.curve, index))
        return self._is_settled(index)

    def _train_step(
        self, index: int, position: StagePosition, batch: Sequence[Example], optimizer: torch.optim.Optimizer
    ) -> None:
        stage, rolled = self.stages[index], None
        if self.sampler is not None and answers_itself(stage, seed=self.seed, index=index, step=position.step):
            rolled = self.sampler.roll_out(
                batch, stage.rollouts, stage=index, step=position.step, held=self.models.student_held, processes=self.processes
            )
            share = StepShare(rolled.examples, rolled.num_tokens)
            stage = stage.model_copy(update={"ce_weight": 0.0})
        else:
            own = None
            if stage.reads_apart and self.examples.own is not None:
                own = step_examples(self.examples.own, stage, self.seed, position.step)
            share = StepShare.of(self.processes, batch, own)
        rate = position.next_rate(share.num_tokens)
        for group in optimizer.param_groups:
            group["lr"] = rate
        result, norm = self._gradients(share, stage, optimizer)
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            cause = self._cause(stage, share.read if self.processes.size == 1 else batch)
            raise TrainingError(
                f"stage {index + 1} ({stage.method}), after {position}: the loss is {result.loss} and the gradient "
                f"norm {norm}. The weights were not changed. {cause}"
            )
        optimizer.step()
        self._loss_scale.grow()
        self.trained_tokens += result.num_tokens
        position.advance(result.num_tokens)
        self.curve.append({
            "step": len(self.curve) + 1, "stage": index, "method": stage.method, "loss": result.loss,
            "kl": result.kl if stage.distills else None, "ce": result.ce, "lr": rate, "grad_norm": norm,
            "tokens": self.trained_tokens, **(rolled.row() if rolled is not None else {}),
        })  # fmt: skip

    def _gradients(self, share: "StepShare", stage: TrainStageSpec, optimizer: torch.optim.Optimizer) -> tuple[StepLoss, float]:
        """A step's loss with its clipped gradient in the student, and the gradient's norm; again while it overflows."""
        while True:
            optimizer.zero_grad(set_to_none=True)
            result = accumulate_gradients(
                self.models, share.batch, stage, layout=self.layout, pad_id=self.pad_id, device=self.device, dtype=self.dtype,
                grad_scale=self._loss_scale.scale, own=share.own, num_tokens=share.num_tokens, processes=self.processes,
            )  # fmt: skip
            norm = self._loss_scale.unscaled_norm(self.models.student, stage.clip_norm)
            if math.isfinite(norm) or not math.isfinite(result.loss) or not self._loss_scale.shrink():
                return result, norm

    def _cause(self, stage: TrainStageSpec, read: Sequence[Example]) -> str:
        """Where a loss that is not a number comes from: the teacher's logits, if they are none, else perhaps the step."""
        names = [example.prompt_id for example in read]
        if stage.needs_teacher and self.models.teacher_head is not None:
            faulty = self.models.teacher_held.run(self._prompts_without_numbers, self.models.teacher_head, read)
            if faulty:
                return f"The teacher's logits are not numbers on these prompts: {', '.join(faulty)}. Choose another teacher."
        return f"Lower lr ({stage.lr}) or look at these prompts: {', '.join(names)}"

    def _prompts_without_numbers(self, head: OutputHead, read: Sequence[Example]) -> list[str]:
        teacher = self.models.teacher
        return prompts_without_numbers(teacher, head.of(teacher), read, dtype=self.dtype)

    def _save(self, stage: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = self.checkpoint_state | {
            "stage": stage, "step": step, "curve": self.curve, "trained_tokens": self.trained_tokens,
            "loss_scale": self._loss_scale.state(),
        }  # fmt: skip
        save_checkpoint(
            self.checkpoint_dir, len(self.curve), self.models.student, optimizer, state, self._best.tensors, self.processes
        )


def accumulate_gradients(
    models: ModelPair,
    batch: Sequence[Example],
    stage: TrainStageSpec,
    *,
    layout: Layout,
    pad_id: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    grad_scale: float = 1.0,
    own: Sequence[Example] | None = None,
    num_tokens: int | None = None,
    processes: Processes = ALONE,
) -> StepLoss:
    """Add the gradient of one global batch, times ``grad_scale``, to the student's parameters, micro-batch by micro-batch.

    The same loss and gradient whatever ``stage.micro_batch_tokens`` and ``layout`` (to rounding).

    Args:
        batch: this process's share of the global batch.
        own: the batch in the teacher's tokens, for a stage that reads apart; that one is always laid out ``plain``.
        num_tokens: completion tokens of the global batch; by default those of ``batch``.
    """
    if num_tokens is None:
        num_tokens = sum(example.num_tokens for example in batch)
    sums, reading = torch.zeros(3, device=device), None
    if stage.reads_apart:
        assert own is not None, "the run's examples were encoded twice"
        layout, tokens = "plain", stage.micro_batch_tokens
        batch, reading = read_apart(
            models.teacher, batch, own, max_tokens=tokens, device=device, dtype=dtype, held=models.teacher_held,
            processes=processes,
        )  # fmt: skip
    own_passes = micro_batches(batch, layout=layout, max_tokens=stage.micro_batch_tokens, pad_id=pad_id)
    passes = list(processes.passes(own_passes))
    for number, (part, is_own) in enumerate(passes, 1):
        divisor = num_tokens if is_own else math.inf
        with models.student_held.adding_up(last=number == len(passes)):
            sums += _micro_step(models, part.to(device), stage, divisor, dtype, grad_scale, reading)
    loss, kl, ce = processes.sum(sums.tolist())
    return StepLoss(loss, kl, ce, num_tokens)


def _micro_step(
    models: ModelPair, part: MicroBatch, stage: TrainStageSpec, num_tokens: float, dtype: torch.dtype, grad_scale: float,
    reading: TeacherReading | None,
) -> Tensor:  # fmt: skip
    """(loss, divergence, cross-entropy) of one forward and backward pass, summed and divided by ``num_tokens``."""
    device_type = part.token_ids_ST.device.type
    teacher_hidden_PH = None
    if stage.distills and stage.signal != "online":
        assert models.signals is not None, "the run checked its parts"
        sparse = models.signals.targets(stage.signal, stage.kd_temperature, part.signals.first_rows())
        part = replace(part, targets=replace(part.targets, sparse=sparse.to(part.token_ids_ST.device)))
    elif reading is not None:
        teacher_hidden_PH, part = reading.of(part)
    elif stage.distills:
        with torch.no_grad(), forward_precision(device_type, dtype):
            teacher_hidden_PH = models.teacher_held.run(hidden_states, models.teacher, part)
    loss, divergence, cross_entropy = models.student_held.run(
        _losses, models, part, teacher_hidden_PH, stage, num_tokens, dtype, grad_scale
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.stack([loss.detach(), divergence, cross_entropy])


def _losses(
    models: ModelPair, part: MicroBatch, teacher_hidden_PH: Tensor | None, stage: TrainStageSpec, num_tokens: float,
    dtype: torch.dtype, grad_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    teacher_head = None
    if stage.needs_teacher and models.teacher_head is not None:
        teacher_head = models.teacher_head.of(models.teacher)
    with forward_precision(part.token_ids_ST.device.type, dtype):
        hidden_PH = hidden_states(models.student, part)
    if dtype != torch.float32:
        hidden_PH = hidden_PH.to(dtype)
        teacher_hidden_PH = None if teacher_hidden_PH is None else teacher_hidden_PH.to(dtype)
    result = head_loss(
        hidden_PH, models.student_head.of(models.student).cut(models.vocab_width), part.targets, num_tokens=num_tokens,
        teacher_hidden_PH=teacher_hidden_PH, teacher_head=teacher_head, options=stage.divergence_options,
        divergence=POLICY_GRADIENT if stage.objective == "policy_gradient" else stage.divergence,
        kd_temperature=stage.kd_temperature, ce_weight=stage.ce_weight if stage.distills else 1.0,
        grad_scale=grad_scale,
    )  # fmt: skip
    return result.loss, result.divergence, result.cross_entropy


def step_examples(examples: ExampleSet, stage: TrainStageSpec, seed: int, step: int) -> list[Example]:
    """The prompts of one optimizer step: a slice of its epoch's permutation. An epoch's last step may be smaller."""
    epoch, index = divmod(step, math.ceil(len(examples) / stage.batch_prompts))
    order = epoch_order(len(examples), seed=seed, epoch=epoch)
    return [examples[i] for i in order[index * stage.batch_prompts : (index + 1) * stage.batch_prompts]]
