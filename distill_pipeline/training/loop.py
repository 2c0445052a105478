"""The training loop: stages in order, optimizer steps within a stage, micro-batches within a step.

The loss of a step is the sum over its completion tokens divided by their number, whatever the micro-batches. The data of
step s of a stage follow from (seed, epoch) alone, so a run that is killed goes on from its last checkpoint with the same
losses as one that was not. Where a stage asks for it, the student first answers a step's prompts itself, and all counts are
those of its own tokens. A loss or gradient that is not a number stops the run before the weights are touched.

Decided: AdamW with one state per stage, or that of the stage before where asked; no weight decay on vectors (norms, biases);
weights and losses in float32, on CUDA the forward passes in bfloat16. With several processes each one works on its share of
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
from distill_pipeline.outcome import Progress
from distill_pipeline.signals.table import StoredSignals
from distill_pipeline.training.batches import Example, ExampleSet, Layout, MicroBatch, epoch_order, micro_batches
from distill_pipeline.training.checkpoints import Checkpoint, save_checkpoint
from distill_pipeline.training.head import POLICY_GRADIENT, head_loss
from distill_pipeline.training.layout import forward_precision, hidden_states
from distill_pipeline.training.parallel import ALONE, PLAIN, HeldModel, Processes, training_cost, whole_tensor
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

    ``vocab_width`` is the narrower head's number of rows: the wider one is cut there, at padding that no token uses. Models
    are called, and their heads read, inside of ``student_held.run`` and ``teacher_held.run``.
    """

    student: Any
    vocab_width: int
    teacher: Any = None
    signals: StoredSignals | None = None
    student_held: HeldModel = PLAIN
    teacher_held: HeldModel = PLAIN

    @property
    def student_head_VH(self) -> Tensor:
        """The matrix that makes the student's logits."""
        head_VH: Tensor = self.student.get_output_embeddings().weight
        return head_VH

    @property
    def teacher_head_VH(self) -> Tensor | None:
        """The teacher's."""
        return None if self.teacher is None else self.teacher.get_output_embeddings().weight


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
    processes: Processes = ALONE
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
            if self.processes.decide(now - saved_at >= pause) and not position.is_over:
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
            rolled = self.sampler.roll_out(
                batch, stage.rollouts, stage=index, step=position.step, held=self.models.student_held, processes=self.processes
            )
            share, num_tokens, stage = rolled.examples, rolled.num_tokens, stage.model_copy(update={"ce_weight": 0.0})
        else:
            share = [example for _, example in self.processes.share(batch, training_cost)]
            num_tokens = sum(example.num_tokens for example in batch)
        rate = position.next_rate(num_tokens)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        result = accumulate_gradients(
            self.models, share, stage, layout=self.layout, pad_id=self.pad_id, device=self.device,
            use_bfloat16=self.use_bfloat16, num_tokens=num_tokens, processes=self.processes, idle=batch[0],
        )  # fmt: skip
        norm = float(whole_tensor(torch.nn.utils.clip_grad_norm_(student.parameters(), stage.clip_norm or math.inf)))
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            names = ", ".join(example.prompt_id for example in batch)
            raise TrainingError(
                f"stage {index + 1} ({stage.method}), after {position}: the loss is {result.loss} and the gradient "
                f"norm {norm}. The weights were not changed. Lower lr ({stage.lr}) or look at these prompts: {names}"
            )
        optimizer.step()
        self.trained_tokens += result.num_tokens
        position.advance(result.num_tokens)
        self.curve.append({
            "step": len(self.curve) + 1, "stage": index, "method": stage.method, "loss": result.loss,
            "kl": result.kl if stage.distills else None, "ce": result.ce, "lr": rate, "grad_norm": norm,
            "tokens": self.trained_tokens, **(rolled.row() if rolled is not None else {}),
        })  # fmt: skip

    def _save(self, stage: int, step: int, optimizer: torch.optim.Optimizer) -> None:
        state = self.checkpoint_state | {
            "stage": stage, "step": step, "curve": self.curve, "trained_tokens": self.trained_tokens,
        }  # fmt: skip
        save_checkpoint(self.checkpoint_dir, len(self.curve), self.models.student, optimizer, state, self.processes)


def accumulate_gradients(
    models: ModelPair,
    batch: Sequence[Example],
    stage: TrainStageSpec,
    *,
    layout: Layout,
    pad_id: int,
    device: str,
    use_bfloat16: bool = False,
    num_tokens: int | None = None,
    processes: Processes = ALONE,
    idle: Example | None = None,
) -> StepLoss:
    """Add the gradient of one global batch to the student's parameters, micro-batch by micro-batch.

    The same loss and gradient whatever ``stage.micro_batch_tokens``, ``layout`` and number of processes (to rounding).

    Args:
        batch: this process's share of the global batch.
        num_tokens: completion tokens of the global batch; by default those of ``batch``.
        idle: an example for processes that have less to do than others, which then run it without weight; needed where there
            are several.
    """
    if num_tokens is None:
        num_tokens = sum(example.num_tokens for example in batch)
    own = micro_batches(batch, layout=layout, max_tokens=stage.micro_batch_tokens, pad_id=pad_id)
    passes: list[tuple[MicroBatch, float]] = [(part, num_tokens) for part in own]
    if (missing := processes.most(len(passes)) - len(passes)) and idle is not None:
        one = replace(idle, completions=idle.completions[:1], signal_rows=idle.signal_rows[:1])
        passes += [(part, math.inf) for part in micro_batches([one], layout="plain", max_tokens=1, pad_id=pad_id)] * missing
    sums = torch.zeros(3, device=device)
    for number, (part, divisor) in enumerate(passes, 1):
        with models.student_held.adding_up(last=number == len(passes)):
            sums += _micro_step(models, part.to(device), stage, divisor, use_bfloat16)
    loss, kl, ce = processes.sum(sums.tolist())
    return StepLoss(loss, kl, ce, num_tokens)


def _micro_step(models: ModelPair, part: MicroBatch, stage: TrainStageSpec, num_tokens: float, use_bfloat16: bool) -> Tensor:
    """(loss, divergence, cross-entropy) of one forward and backward pass, summed and divided by ``num_tokens``."""
    device_type = part.token_ids_ST.device.type
    teacher_hidden_PH = None
    if stage.distills and stage.signal != "online":
        assert models.signals is not None, "the run checked its parts"
        sparse = models.signals.targets(stage.signal, stage.kd_temperature, part.signals.first_rows())
        part = replace(part, targets=replace(part.targets, sparse=sparse.to(part.token_ids_ST.device)))
    elif stage.distills:
        with torch.no_grad(), forward_precision(device_type, use_bfloat16):
            teacher_hidden_PH = models.teacher_held.run(hidden_states, models.teacher, part)
    loss, divergence, cross_entropy = models.student_held.run(
        _losses, models, part, teacher_hidden_PH, stage, num_tokens, use_bfloat16
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.stack([loss.detach(), divergence, cross_entropy])


def _losses(
    models: ModelPair, part: MicroBatch, teacher_hidden_PH: Tensor | None, stage: TrainStageSpec, num_tokens: float,
    use_bfloat16: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    with forward_precision(part.token_ids_ST.device.type, use_bfloat16):
        hidden_PH = hidden_states(models.student, part)
    if use_bfloat16:
        hidden_PH = hidden_PH.to(torch.bfloat16)
        teacher_hidden_PH = None if teacher_hidden_PH is None else teacher_hidden_PH.to(torch.bfloat16)
    student_VH, teacher_VH = models.student_head_VH, models.teacher_head_VH if stage.needs_teacher else None
    if len(student_VH) != models.vocab_width:
        student_VH = student_VH[: models.vocab_width]
    if teacher_VH is not None:
        teacher_VH = teacher_VH[: models.vocab_width]
    result = head_loss(
        hidden_PH, student_VH, part.targets, num_tokens=num_tokens, teacher_hidden_PH=teacher_hidden_PH,
        teacher_weight_VH=teacher_VH, options=stage.divergence_options,
        divergence=POLICY_GRADIENT if stage.objective == "policy_gradient" else stage.divergence,
        kd_temperature=stage.kd_temperature, ce_weight=stage.ce_weight if stage.distills else 1.0,
    )  # fmt: skip
    return result.loss, result.divergence, result.cross_entropy


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
