"""The training loop: stages in order, optimizer steps within a stage, micro-batches within a step.

The loss of a step is the sum over its completion tokens divided by their number, whatever the micro-batches. The data of
step s of a stage follow from (seed, epoch) alone, so a run that is killed goes on from its last checkpoint with the same
losses as one that was not. Where a stage asks for it, the student first answers a step's prompts itself, and all counts are
those of its own tokens. A loss or gradient that is not a number stops the run before the weights are touched.

Decided: AdamW with one state per stage, or that of the stage before where asked; no weight decay on vectors (norms, biases);
weights and losses in float32, on CUDA the forward passes in bfloat16. Given up: training a model that does not fit one device.
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
from distill_pipeline.training.batches import Example, ExampleSet, Layout, MicroBatch, epoch_order, micro_batches
from distill_pipeline.training.checkpoints import Checkpoint, save_checkpoint
from distill_pipeline.training.head import POLICY_GRADIENT, head_loss
from distill_pipeline.training.layout import forward_precision, hidden_states
from distill_pipeline.training.measuring import prompts_without_numbers
from distill_pipeline.training.position import StagePosition
from distill_pipeline.training.rollouts import StudentSampler, answers_itself, rollouts_text
from distill_pipeline.training.spec import TrainStageSpec

PROGRESS_SECONDS = 5.0
CHECKPOINT_SHARE = 0.05
"""Most of the training time that checkpoints may take: a slow disk makes them rarer."""

ADAM_BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class ModelPair:
    """Student and frozen teacher (None where no stage needs one), with their heads; or what was stored of the teacher.

    The student's head is cut to ``vocab_width`` rows, at padding that no token uses; the teacher's is cut already: to as many,
    or where the two have different tokenizers to its own.
    """

    student: Any
    student_head: OutputHead
    vocab_width: int
    teacher: Any = None
    teacher_head: OutputHead | None = None
    signals: StoredSignals | None = None


@dataclass(frozen=True)
class StepLoss:
    """Of one optimizer step, in nats a token: the loss, and its parts before weighting."""

    loss: float
    kl: float
    ce: float
    num_tokens: int


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
    use_bfloat16: bool
    checkpoint_dir: Path
    checkpoint_state: dict[str, Any]
    checkpoint_seconds: float
    progress: Progress
    sampler: StudentSampler | None = None
    """Answers the prompts of on_policy stages."""
    curve: list[dict[str, Any]] = field(default_factory=list)
    trained_tokens: int = 0
    first_tokens: int = 0
    """Tokens that an earlier, interrupted run had trained."""
    stage_seconds: list[float] = field(default_factory=list)
    """Of each stage, as far as this process trained it."""
    _optimizer: torch.optim.Optimizer | None = None

    def run(self, resume: Checkpoint | None) -> None:
        """Train all stages; ``curve`` then has one row a step. With ``resume``, go on where that checkpoint stopped.

        Raises:
            TrainingError: a loss or gradient is not a number, or a part that a stage needs is not there.
        """
        self._check_parts()
        first_stage = first_step = 0
        if resume is not None:
            self.curve, self.trained_tokens = list(resume.state["curve"]), resume.state["trained_tokens"]
            self.first_tokens = self.trained_tokens
            first_stage, first_step = resume.state["stage"], resume.state["step"]
        self.stage_seconds = [0.0] * len(self.stages)
        for index in range(first_stage, len(self.stages)):
            self._run_stage(index, first_step if index == first_stage else 0, resume if index == first_stage else None)

    def _check_parts(self) -> None:
        for index, stage in enumerate(self.stages):
            for part, needed, there in (
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
        elif stage.keep_optimizer and self._optimizer is not None:
            optimizer.state.update(self._optimizer.state)
        self._optimizer = optimizer
        before = next((row["tokens"] for row in reversed(self.curve) if row["stage"] < index), 0)
        position = StagePosition.of(stage, len(self.examples), step=first_step, tokens=self.trained_tokens - before)
        saved_at = spoke_at = start = time.monotonic()
        tokens_before, share_before, pause = self.trained_tokens, position.share, self.checkpoint_seconds
        student.train()
        while not position.is_over:
            batch = step_examples(self.examples, stage, self.seed, position.step)
            self._train_step(index, position, batch, optimizer)
            now = time.monotonic()
            if now - spoke_at >= PROGRESS_SECONDS or position.is_over:
                rate = (self.trained_tokens - tokens_before) / max(now - start, 1e-9)
                left = (now - start) / (position.share - share_before) * (1.0 - position.share)
                self.progress(f"{stage.method} {position}, loss {self.curve[-1]['loss']:.4f}, "
                              f"{rate:.0f} tokens/s, {left:.0f} s left{rollouts_text(self.sampler, self.curve)}")  # fmt: skip
                spoke_at = now
            if now - saved_at >= pause and not position.is_over:
                self._save(index, position.step, optimizer)
                saved_at = time.monotonic()
                pause = max(self.checkpoint_seconds, (saved_at - now) / CHECKPOINT_SHARE)
        self.stage_seconds[index] = time.monotonic() - start
        if index + 1 < len(self.stages):
            self._save(index + 1, 0, optimizer)

    def _train_step(
        self, index: int, position: StagePosition, batch: Sequence[Example], optimizer: torch.optim.Optimizer
    ) -> None:
        stage, student = self.stages[index], self.models.student
        rolled = None
        if self.sampler is not None and answers_itself(stage, seed=self.seed, index=index, step=position.step):
            rolled = self.sampler.roll_out(batch, stage.rollouts, stage=index, step=position.step)
            batch, stage = rolled.examples, stage.model_copy(update={"ce_weight": 0.0})
        rate = position.next_rate(sum(example.num_tokens for example in batch))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        own = None
        if stage.reads_apart and self.examples.own is not None:
            own = step_examples(self.examples.own, stage, self.seed, position.step)
        result = accumulate_gradients(
            self.models, batch, stage, layout=self.layout, pad_id=self.pad_id, device=self.device,
            use_bfloat16=self.use_bfloat16, own=own,
        )  # fmt: skip
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), stage.clip_norm or math.inf))
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            cause = self._cause(stage, batch if own is None else own)
            raise TrainingError(
                f"stage {index + 1} ({stage.method}), after {position}: the loss is {result.loss} and the gradient "
                f"norm {norm}. The weights were not changed. {cause}"
            )
        optimizer.step()
        self.trained_tokens += result.num_tokens
        position.advance(result.num_tokens)
        self.curve.append({
            "step": len(self.curve) + 1, "stage": index, "method": stage.method, "loss": result.loss,
            "kl": result.kl if stage.distills else None, "ce": result.ce, "lr": rate, "grad_norm": norm,
            "tokens": self.trained_tokens, **(rolled.row() if rolled is not None else {}),
        })  # fmt: skip

    def _cause(self, stage: TrainStageSpec, read: Sequence[Example]) -> str:
        """Where a loss that is not a number comes from: the teacher's logits, if they are none, else perhaps the step."""
        models, names = self.models, [example.prompt_id for example in read]
        if stage.needs_teacher and models.teacher_head is not None:
            faulty = prompts_without_numbers(models.teacher, models.teacher_head, read, use_bfloat16=self.use_bfloat16)
            if faulty:
                return f"The teacher's logits are not numbers on these prompts: {', '.join(faulty)}. Choose another teacher."
        return f"Lower lr ({stage.lr}) or look at these prompts: {', '.join(names)}"

    def _save(self, stage: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = self.checkpoint_state | {
            "stage": stage, "step": step, "curve": self.curve, "trained_tokens": self.trained_tokens,
        }  # fmt: skip
        save_checkpoint(self.checkpoint_dir, len(self.curve), self.models.student, optimizer, state)


def accumulate_gradients(
    models: ModelPair,
    batch: Sequence[Example],
    stage: TrainStageSpec,
    *,
    layout: Layout,
    pad_id: int,
    device: str,
    use_bfloat16: bool = False,
    own: Sequence[Example] | None = None,
) -> StepLoss:
    """Add the gradient of one global batch to the student's parameters, micro-batch by micro-batch.

    The same loss and gradient whatever ``stage.micro_batch_tokens`` and ``layout`` (to rounding).

    Args:
        own: the batch in the teacher's tokens, for a stage that reads apart; that one is always laid out ``plain``.
    """
    num_tokens = sum(example.num_tokens for example in batch)
    sums, reading = torch.zeros(3, device=device), None
    if stage.reads_apart:
        assert own is not None, "the run's examples were encoded twice"
        layout, tokens = "plain", stage.micro_batch_tokens
        batch, reading = read_apart(models.teacher, batch, own, max_tokens=tokens, device=device, use_bfloat16=use_bfloat16)
    for part in micro_batches(batch, layout=layout, max_tokens=stage.micro_batch_tokens, pad_id=pad_id):
        sums += _micro_step(models, part.to(device), stage, num_tokens, use_bfloat16, reading)
    loss, kl, ce = sums.tolist()
    return StepLoss(loss, kl, ce, num_tokens)


def _micro_step(
    models: ModelPair, part: MicroBatch, stage: TrainStageSpec, num_tokens: int, use_bfloat16: bool,
    reading: TeacherReading | None,
) -> Tensor:  # fmt: skip
    device_type = part.token_ids_ST.device.type
    teacher_hidden_PH = None
    if stage.distills and stage.signal != "online":
        assert models.signals is not None, "the run checked its parts"
        sparse = models.signals.targets(stage.signal, stage.kd_temperature, part.signals.first_rows())
        part = replace(part, targets=replace(part.targets, sparse=sparse.to(part.token_ids_ST.device)))
    elif reading is not None:
        teacher_hidden_PH, part = reading.of(part)
    elif stage.distills:
        with torch.inference_mode(), forward_precision(device_type, use_bfloat16):
            teacher_hidden_PH = hidden_states(models.teacher, part)
    with forward_precision(device_type, use_bfloat16):
        hidden_PH = hidden_states(models.student, part)
    if use_bfloat16:
        hidden_PH = hidden_PH.to(torch.bfloat16)
        teacher_hidden_PH = None if teacher_hidden_PH is None else teacher_hidden_PH.to(torch.bfloat16)
    result = head_loss(
        hidden_PH, models.student_head.cut(models.vocab_width), part.targets, num_tokens=num_tokens,
        teacher_hidden_PH=teacher_hidden_PH, teacher_head=models.teacher_head if stage.needs_teacher else None,
        options=stage.divergence_options,
        divergence=POLICY_GRADIENT if stage.objective == "policy_gradient" else stage.divergence,
        kd_temperature=stage.kd_temperature, ce_weight=stage.ce_weight if stage.distills else 1.0,
    )  # fmt: skip
    result.loss.backward()  # type: ignore[no-untyped-call]
    return torch.stack([result.loss.detach(), result.divergence, result.cross_entropy])


def make_optimizer(student: Any, stage: TrainStageSpec) -> torch.optim.Optimizer:
    """AdamW in one fused pass; weight decay on matrices only."""
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=stage.lr, betas=ADAM_BETAS, fused=True)


def step_examples(examples: ExampleSet, stage: TrainStageSpec, seed: int, step: int) -> list[Example]:
    """The prompts of one optimizer step: a slice of its epoch's permutation. An epoch's last step may be smaller."""
    epoch, index = divmod(step, math.ceil(len(examples) / stage.batch_prompts))
    order = epoch_order(len(examples), seed=seed, epoch=epoch)
    return [examples[i] for i in order[index * stage.batch_prompts : (index + 1) * stage.batch_prompts]]
