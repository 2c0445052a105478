"""Train one student: from accepted completions and a teacher to a model folder with its training curve.

Writes ``model.safetensors``, ``config.json``, the tokenizer's files and ``curve.parquet`` (one row an optimizer step: step
from 1, stage from 0, method, loss, kl (the stage's divergence; null in sft), ce, lr, grad_norm, tokens seen so far; losses in
nats a token; with an on_policy stage also the step's rollouts, their mean tokens and the share that was truncated, null where
there were none). Times are facts, never in a file, so that equal runs leave equal files.

Decided: where student and teacher give the same meaning to every token id, both use the teacher's tokenizer and chat
template, so they see the same tokens that generation saw. Otherwise the student keeps its own, and only sft is possible.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill_pipeline.errors import TrainingError, VocabularyMismatchError
from distill_pipeline.hashing import version_of
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome, Progress, silent
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.signals.files import Wanted
from distill_pipeline.signals.spec import SignalsSpec
from distill_pipeline.signals.table import SignalSource, StoredSignals, open_signals
from distill_pipeline.training.batches import ExampleSet, encode_examples, epoch_order
from distill_pipeline.training.checkpoints import Checkpoint, latest_checkpoint, remove_checkpoints
from distill_pipeline.training.head import plain_head
from distill_pipeline.training.layout import choose_layout
from distill_pipeline.training.loop import ModelPair, TrainingRun
from distill_pipeline.training.parallel import ALONE, PLAIN, Processes, whole_tensor
from distill_pipeline.training.rollouts import StudentSampler, length_limit, rollout_facts
from distill_pipeline.training.spec import ALGORITHM, StudentSpec
from distill_pipeline.training.student import InitialStudent, initial_student

CALIBRATION_EXAMPLES = 24
"""Prompts, with one completion each, on which block influence is measured."""

CURVE_SCHEMA = pa.schema(
    [
        ("step", pa.int64()), ("stage", pa.int32()), ("method", pa.string()), ("loss", pa.float64()), ("kl", pa.float64()),
        ("ce", pa.float64()), ("lr", pa.float64()), ("grad_norm", pa.float64()), ("tokens", pa.int64()),
    ]
)  # fmt: skip

ROLLOUT_SCHEMA = pa.schema(
    [("rollouts", pa.int64()), ("rollout_mean_tokens", pa.float64()), ("rollout_truncated_frac", pa.float64())]
)
"""Further columns of the curve of a student with an on_policy stage."""


_AS_DEFAULT = SignalsSpec()


@dataclass(frozen=True)
class _Text:
    """Who reads the data: renderer, whose tokenizer it is, and the examples."""

    renderer: ChatRenderer
    owner: str
    examples: ExampleSet
    counts: dict[str, int]


def train_student(
    training_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    work_dir: Path,
    *,
    student: StudentSpec,
    teacher: ModelFolder,
    init_model: ModelFolder | None,
    system: str | None,
    device: str,
    seed: int,
    progress: Progress,
    checkpoint_seconds: float = 120.0,
    signals: SignalsSpec = _AS_DEFAULT,
    signal_sources: Sequence[SignalSource] = (),
    processes: Processes = ALONE,
) -> Outcome:
    """Train a student and write it to ``out_dir``.

    Args:
        training_batches: rows of TRAINING_SCHEMA, in a fixed order.
        work_dir: keeps checkpoints between runs; a run that was killed goes on from the last one.
        init_model: the folder of ``student.init.model``, else None.
        system: the teacher's system prompt.
        device: a torch device or ``auto``; on CUDA forward passes are in bfloat16.
        checkpoint_seconds: at least so long between two checkpoints.
        signals, signal_sources: how teacher signals were captured and where they are, for stages that do not read them online.
        processes: those that train it together; all call this function alike, and the first one writes and reports.
    Raises:
        TrainingError: nothing to train on, an architecture this cannot train, or a loss that is not a number.
        VocabularyMismatchError: a stage needs the teacher, and the models' token ids mean different things.
        ConfigError: rollouts do not fit the models' contexts.
        SignalMismatchError: teacher signals are missing, or belong to other tokens, settings or another teacher.
    """
    device = processes.device(resolve_device(device))
    progress = progress if processes.is_first else silent
    renderer, owner = _renderer(student, teacher, init_model, system)
    stored = _stored_signals(student, renderer, signals, signal_sources, work_dir / "signals" / str(processes.rank))
    examples, counts = encode_examples(
        training_batches, renderer, max_length=student.max_length, signal_row=stored.row if stored else None
    )
    text = _Text(renderer, owner, examples, counts)
    run_key = version_of(
        {"algorithm": ALGORITHM, "student": student.document(), "teacher": teacher.identity, "seed": seed,
         "init_model": init_model.identity if init_model else None, "renderer": text.renderer.fingerprint,
         "data": text.examples.fingerprint(), "device": torch.device(device).type}
    )  # fmt: skip
    checkpoint_dir = work_dir / "checkpoints"
    resume = latest_checkpoint(checkpoint_dir, run_key, progress)
    if resume is not None:
        progress(f"going on from {resume.folder}: {len(resume.state['curve'])} steps are done")
    torch.manual_seed(seed)
    loading = processes.loading_device(device)
    initial = _initial(student, teacher, init_model, text, seed, loading, resume)
    progress(f"student: {initial.facts['parameters']:,} parameters, {initial.facts['share']:.0%} of the teacher's")
    use_bfloat16 = torch.device(device).type == "cuda"
    pair = _pair(initial.model, teacher if student.needs_teacher else None, text, loading, use_bfloat16, stored)
    models = [model for model in (pair.student, pair.teacher) if model is not None]
    sampler, longest = _sampler(student, models, text, seed, use_bfloat16)
    layout, reason = choose_layout(models, longest)
    hash_before = parameters_sha256(pair.teacher) if pair.teacher is not None else None
    pair = replace(
        pair, student_held=processes.hold(pair.student, device),
        teacher_held=PLAIN if pair.teacher is None else processes.hold(pair.teacher, device),
    )  # fmt: skip
    run = TrainingRun(
        pair, student.stages, text.examples, layout, text.renderer.end_token_id, seed, device, use_bfloat16, checkpoint_dir,
        {"run_key": run_key, "init": initial.facts}, checkpoint_seconds, progress, sampler, processes,
    )  # fmt: skip
    run.run(resume)
    hash_after = parameters_sha256(pair.teacher) if pair.teacher is not None else None
    if hash_before != hash_after:
        raise TrainingError(f"the teacher {teacher.reference} changed while the student trained: {hash_before} to {hash_after}")
    with pair.student_held.whole(pair.student) as whole:
        if processes.is_first:
            _write_student(whole, text.renderer.tokenizer, run.curve, out_dir)
            remove_checkpoints(checkpoint_dir)
            shutil.rmtree(work_dir / "signals", ignore_errors=True)
    facts = initial.facts | _run_facts(run) | {
        "layout": layout, "layout_reason": reason, "tokenizer": text.owner, "renderer": text.renderer.fingerprint,
        "teacher_sha256_before": hash_before, "teacher_sha256_after": hash_after, "device": device,
        "dtype": "bfloat16 forward, float32 weights" if use_bfloat16 else "float32",
        "resumed_from_step": len(resume.state["curve"]) if resume is not None else None,
        "stages": [stage.model_dump(mode="json") for stage in student.stages],
        "processes": processes.size, "weights_held_in": "shards" if processes.shards else "copies",
    }  # fmt: skip
    return Outcome(text.counts | {"steps": len(run.curve), "trained_tokens": run.trained_tokens}, facts)


def parameters_sha256(model: Any) -> str:
    """SHA-256 of a model's parameters: names, and bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        whole = whole_tensor(parameter.detach()).cpu()
        digest.update(memoryview(whole.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _renderer(
    student: StudentSpec, teacher: ModelFolder, init_model: ModelFolder | None, system: str | None
) -> tuple[ChatRenderer, str]:
    """What turns text into the student's tokens, and whose tokenizer it has."""
    tokenizer, owner = load_tokenizer(teacher.path), "teacher"
    if init_model is not None:
        own = load_tokenizer(init_model.path)
        differing = different_ids(own.get_vocab(), tokenizer.get_vocab())
        if differing and any(stage.distills for stage in student.stages):
            raise VocabularyMismatchError(
                f"{init_model.reference} and {teacher.reference} give different meanings to {len(differing)} token ids, for "
                f"instance {', '.join(differing[:5])}. Use sft, or a student with the teacher's tokenizer."
            )
        if differing:
            tokenizer, owner = own, "student"
    return ChatRenderer(tokenizer, system=system), owner


def _stored_signals(
    student: StudentSpec, renderer: ChatRenderer, signals: SignalsSpec, sources: Sequence[SignalSource], folder: Path
) -> StoredSignals | None:
    """The teacher signals that the stages read, compared with what they are wanted for; None where none does."""
    if not student.signal_kinds():
        return None
    sizes = {"topk": signals.k, "sampled": signals.draws}
    wanted = [
        Wanted(
            stage.signal, renderer.tokenizer_sha256, renderer.template_sha256, renderer.vocab_size, stage.kd_temperature,
            sizes[stage.signal],
        )
        for stage in student.stages
        if stage.signal != "online"
    ]  # fmt: skip
    return open_signals(sources, list(dict.fromkeys(wanted)), folder)


def different_ids(student_vocab: dict[str, int], teacher_vocab: dict[str, int]) -> list[str]:
    """Token ids that mean different things in two vocabularies, each as ``id: 'student token' / 'teacher token'``."""
    student_tokens = {index: token for token, index in student_vocab.items()}
    teacher_tokens = {index: token for token, index in teacher_vocab.items()}
    differing = [
        i for i in sorted(student_tokens.keys() | teacher_tokens.keys()) if student_tokens.get(i) != teacher_tokens.get(i)
    ]
    return [f"{i}: {student_tokens.get(i)!r} / {teacher_tokens.get(i)!r}" for i in differing]


def _initial(
    student: StudentSpec, teacher: ModelFolder, init_model: ModelFolder | None, text: _Text, seed: int, device: str,
    resume: Checkpoint | None,
) -> InitialStudent:  # fmt: skip
    if resume is not None:
        facts = resume.state["init"]
        made = initial_student(student.init, teacher, init_model, [], seed, device, facts.get("kept_layers"))
        return InitialStudent(made.model, facts)
    chosen = epoch_order(len(text.examples), seed=seed, epoch=0)[:CALIBRATION_EXAMPLES]
    calibration = [[*text.examples[i].prompt, *text.examples[i].completions[0]] for i in chosen]
    return initial_student(student.init, teacher, init_model, calibration, seed, device)


def _pair(
    model: Any, teacher: ModelFolder | None, text: _Text, device: str, use_bfloat16: bool, signals: StoredSignals | None
) -> ModelPair:
    """Student and teacher in memory, with their heads, or what was stored of the teacher."""
    width, frozen = len(plain_head(model)), None
    if teacher is not None:
        frozen = load_model(teacher.path, device=device, dtype="bfloat16" if use_bfloat16 else "float32")
        frozen.eval().requires_grad_(False)
        width = min(width, len(plain_head(frozen)))
    if text.renderer.vocab_size > width:
        raise VocabularyMismatchError(
            f"the tokenizer has {text.renderer.vocab_size} ids and the models' heads only {width} in common. "
            "Choose a model whose embedding covers its tokenizer."
        )
    if signals is not None:
        width = text.renderer.vocab_size  # what signals are about: padding columns hold no token
    return ModelPair(model, width, frozen, signals)


def _sampler(
    student: StudentSpec, models: Sequence[Any], text: _Text, seed: int, use_bfloat16: bool
) -> tuple[StudentSampler | None, int]:
    """Who answers in on_policy stages, and the most tokens that any sequence of the training has."""
    own = [stage for stage in student.stages if stage.method == "on_policy"]
    if not own:
        return None, text.examples.longest()
    longest_prompt = text.examples.longest_prompt()
    limit = length_limit(student.stages, models, max_length=student.max_length, longest_prompt=longest_prompt)
    rolled = min(limit, longest_prompt + max(stage.rollouts.max_tokens for stage in own))
    sampler = StudentSampler(models[0], text.renderer, seed=seed, limit=limit, use_bfloat16=use_bfloat16)
    return sampler, max(text.examples.longest(), rolled)


def _write_student(model: Any, tokenizer: Any, curve: Sequence[dict[str, Any]], out_dir: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    model.eval()
    model.config._name_or_path = ""
    model.save_pretrained(out_dir, max_shard_size="10TB")
    tokenizer.save_pretrained(out_dir)
    has_rollouts = any("rollouts" in row for row in curve)
    schema = pa.unify_schemas([CURVE_SCHEMA, ROLLOUT_SCHEMA]) if has_rollouts else CURVE_SCHEMA
    pq.write_table(pa.Table.from_pylist(list(curve), schema=schema), out_dir / "curve.parquet")


def _run_facts(run: TrainingRun) -> dict[str, Any]:
    losses = [row["loss"] for row in run.curve]
    last = losses[-max(1, len(losses) // 10) :]
    resumed_tokens, seconds = run.trained_tokens - run.first_tokens, sum(run.stage_seconds)
    tokens_before = [
        max((row["tokens"] for row in run.curve if row["stage"] < i), default=0) for i in range(len(run.stages) + 1)
    ]
    return {
        "initial_loss": losses[0], "final_loss": sum(last) / len(last), "seconds": round(seconds, 3),
        "tokens_per_second": round(resumed_tokens / max(seconds, 1e-9), 1),
        "stage_seconds": [round(spent, 3) for spent in run.stage_seconds],
        "stage_tokens": [after - before for before, after in pairwise(tokens_before)],
        **({} if run.sampler is None else {"rollouts": rollout_facts(run.sampler, run.curve)}),
    }  # fmt: skip
