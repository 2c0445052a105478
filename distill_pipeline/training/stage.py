"""Train one student: from accepted completions and a teacher to a model folder with its training curve.

Writes ``model.safetensors``, ``config.json``, the tokenizer's files and ``curve.parquet`` (one row an optimizer step: step
from 1, stage from 0, method, loss, kl (the stage's divergence; null in sft), ce, lr, grad_norm, tokens seen so far; losses in
nats a token; with an on_policy stage also the step's rollouts, their mean tokens and the share that was truncated, null where
there were none; with a held-out part its KL(teacher || student) and the share of places where both find the same token
likeliest, null between comparisons). Times and memory, which differ between equal runs, are facts, and by step in
``speed.parquet`` (step, tokens_per_second, peak_memory_bytes), which makes no version.

Decided: where student and teacher give the same meaning to every token id, both use the teacher's tokenizer and chat
template, so they see the same tokens that generation saw. Otherwise the student keeps its own, and only sft and logit_kd with
divergence uld are possible.
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
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome, Progress, silent
from distill_pipeline.reasoning import opening_of
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.signals.files import Wanted
from distill_pipeline.signals.spec import SignalsSpec
from distill_pipeline.signals.table import SignalSource, StoredSignals, open_signals
from distill_pipeline.training.adapters import add_adapters
from distill_pipeline.training.checkpoints import Checkpoint, latest_checkpoint, remove_checkpoints, written_or_removed
from distill_pipeline.training.examples import Example, ExampleSet, encode_examples, epoch_order
from distill_pipeline.training.held_out import KL, TOP1, HeldOut, held_out_facts, split_held_out
from distill_pipeline.training.layout import choose_layout, compute_dtype
from distill_pipeline.training.loop import ModelPair, TrainingRun
from distill_pipeline.training.measuring import mean_cross_entropy
from distill_pipeline.training.parallel import ALONE, Processes, whole_tensor
from distill_pipeline.training.reading import rows_for_target, weigh_tasks
from distill_pipeline.training.rollouts import StudentSampler, length_limit, rollout_facts
from distill_pipeline.training.served_rollouts import served_rollouts
from distill_pipeline.training.spec import ALGORITHM, StudentSpec
from distill_pipeline.training.student import InitialStudent, initial_student
from distill_pipeline.training.trees import Layout

CALIBRATION_EXAMPLES = 24
"""Prompts, with one completion each, on which layers and the untrained student are measured."""

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

HELD_OUT_SCHEMA = pa.schema([(KL, pa.float64()), (TOP1, pa.float64())])
"""Further columns of the curve of a student with a held-out part."""

SPEED_SCHEMA = pa.schema([("step", pa.int64()), ("tokens_per_second", pa.float64()), ("peak_memory_bytes", pa.int64())])

_AS_DEFAULT = SignalsSpec()


@dataclass(frozen=True)
class _Text:
    """Who reads the data: renderer, whose tokenizer it is, the teacher's own for stages that read apart, and the examples."""

    renderer: ChatRenderer
    owner: str
    own_renderer: ChatRenderer | None
    examples: ExampleSet
    held_out: list[Example]
    counts: dict[str, int]
    fingerprint: str
    """Of all examples."""


def train_student(
    training_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    work_dir: Path,
    *,
    student: StudentSpec,
    teacher: ModelFolder | None,
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
        teacher: None for one that is only an API: then there is an ``init_model``, and all stages are sft.
        init_model: the folder of ``student.init.model``, else None.
        system: the system prompt of conversations that do not begin with one.
        device: a torch device or ``auto``.
        checkpoint_seconds: at least so long between two checkpoints.
        signals, signal_sources: how teacher signals were captured and where they are, for stages that do not read them online.
        processes: those that train it together; all call this function alike, and the first one writes and reports.
    Raises:
        TrainingError: nothing to train on, an architecture this cannot train, a loss that is not a number, or a full disk.
        VocabularyMismatchError: a stage needs the teacher, and the models' token ids mean different things.
        ConfigError: rollouts do not fit the models' contexts, or a server that is to draw them was not started for it.
        SignalMismatchError: teacher signals are missing, or belong to other tokens, settings or another teacher.
    """
    device = processes.device(resolve_device(device))
    progress = progress if processes.is_first else silent
    stored_dir = work_dir / "signals" / str(processes.rank)
    text, stored = _read(training_batches, student, teacher, init_model, system, signals, signal_sources, stored_dir)
    run_key = version_of(
        {"algorithm": ALGORITHM, "student": student.resumable_document(), "seed": seed,
         "teacher": teacher.identity if teacher else None,
         "init_model": init_model.identity if init_model else None, "renderer": text.renderer.fingerprint,
         "data": text.fingerprint, "device": torch.device(device).type}
    )  # fmt: skip
    checkpoint_dir = work_dir / "checkpoints"
    resume = latest_checkpoint(checkpoint_dir, run_key, progress)
    if resume is not None:
        progress(f"going on from {resume.folder}: {len(resume.state['curve'])} steps are done")
    torch.manual_seed(seed)
    loading = processes.loading_device(device)
    initial = _initial(student, teacher, init_model, text, seed, loading, resume)
    share = initial.facts["share"]
    progress(f"student: {initial.facts['parameters']:,} parameters" + (f", {share:.0%} of the teacher's" if share else ""))
    dtype = compute_dtype(student.precision, device)
    adapters = add_adapters(initial.model, student.lora, seed) if student.lora is not None else None
    if student.gradient_checkpointing:
        checkpoint_activations(initial.model)
    pair = _pair(initial.model, teacher if student.needs_teacher else None, text, loading, dtype, stored)
    if resume is None:
        initial.facts["untrained_loss"] = round(
            mean_cross_entropy(pair.student, pair.student_head, _calibration(text, seed), pad_id=text.renderer.end_token_id), 6
        )
    models = [model for model in (pair.student, pair.teacher) if model is not None]
    sampler, longest = _sampler(student, models, text, seed, dtype, processes, progress)
    layout, reason = choose_layout(models, longest)
    hash_before = parameters_sha256(pair.teacher) if pair.teacher is not None else None
    pair = pair.held_by(processes, device)
    run = TrainingRun(
        pair, student.stages, text.examples, layout, text.renderer.end_token_id, seed, device, dtype, checkpoint_dir,
        {"run_key": run_key, "init": initial.facts}, checkpoint_seconds, progress, sampler,
        held_out=_held_out(student, pair, text, layout, device, processes), processes=processes,
    )  # fmt: skip
    run.run(resume)
    hash_after = parameters_sha256(pair.teacher) if pair.teacher is not None else None
    if hash_before != hash_after:
        assert teacher is not None, "only a teacher that reads along has a hash"
        raise TrainingError(f"the teacher {teacher.reference} changed while the student trained: {hash_before} to {hash_after}")
    with pair.student_held.whole(pair.student) as whole:
        if processes.is_first:
            trained = whole if adapters is None else adapters.merge(whole)
            with written_or_removed(out_dir, "the student", checkpoint_dir):
                _write_student(trained, text.renderer.tokenizer, run.curve, out_dir)
            remove_checkpoints(checkpoint_dir)
            shutil.rmtree(work_dir / "signals", ignore_errors=True)
    facts = initial.facts | _run_facts(run) | {
        "layout": layout, "layout_reason": reason, "tokenizer": text.owner, "renderer": text.renderer.fingerprint,
        "teacher_sha256_before": hash_before, "teacher_sha256_after": hash_after, "device": device,
        "dtype": "float32" if dtype == torch.float32 else f"{dtype_name(dtype)} forward, float32 weights",
        **({"lora": adapters.facts} if adapters is not None else {}),
        "resumed_from_step": len(resume.state["curve"]) if resume is not None else None,
        "stages": [stage.model_dump(mode="json") for stage in student.stages],
        "processes": processes.size, "weights_held_in": "shards" if processes.shards else "copies",
    }  # fmt: skip
    return Outcome(text.counts | {"steps": len(run.curve), "trained_tokens": run.trained_tokens}, facts)


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` of ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def checkpoint_activations(model: Any) -> None:
    """In training, let ``model`` keep only what enters each layer, and compute the rest again in the backward pass.

    Raises:
        TrainingError: its architecture has no layers that can.
    """
    if not model.supports_gradient_checkpointing:
        raise TrainingError(f"{type(model).__name__} cannot compute its layers again; leave gradient_checkpointing out")
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.23
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


def parameters_sha256(model: Any) -> str:
    """SHA-256 of a model's parameters: names, and bytes."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        whole: Any = whole_tensor(parameter.detach()).cpu()
        digest.update(memoryview(whole.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _read(
    training_batches: Iterable[pa.RecordBatch], student: StudentSpec, teacher: ModelFolder | None,
    init_model: ModelFolder | None, system: str | None, signals: SignalsSpec, sources: Sequence[SignalSource], stored_dir: Path,
) -> tuple[_Text, StoredSignals | None]:  # fmt: skip
    """The training rows as the student reads them, and what was stored of the teacher where a stage reads that."""
    renderer, owner = _renderer(student, teacher, init_model, system)
    own_renderer = None
    if any(stage.reads_apart for stage in student.stages):
        assert teacher is not None, "the experiment file checks that its weights are here"
        own_renderer = renderer if owner == "teacher" else ChatRenderer(load_tokenizer(teacher.path), system=system)
    stored = _stored_signals(student, renderer, signals, sources, stored_dir)
    opened = "" if student.target == "trace" else opening_of(renderer)
    rows = rows_for_target(training_batches, student.target, opened=opened)
    examples, counts = encode_examples(
        rows, renderer, max_length=student.max_length, signal_row=stored.row if stored else None, own_renderer=own_renderer
    )
    training, held_out, counts = split_held_out(examples, counts, student.held_out)
    if student.target == "both":
        counts |= {f"{task}_tokens": number for task, number in weigh_tasks(training, student.answer_weight).items()}
    return _Text(renderer, owner, own_renderer, training, held_out, counts, examples.fingerprint()), stored


def _renderer(
    student: StudentSpec, teacher: ModelFolder | None, init_model: ModelFolder | None, system: str | None
) -> tuple[ChatRenderer, str]:
    """What turns text into the student's tokens, and whose tokenizer it has."""
    if teacher is None:
        assert init_model is not None, "the experiment file checks that"
        return ChatRenderer(load_tokenizer(init_model.path), system=system), "student"
    tokenizer, owner = load_tokenizer(teacher.path), "teacher"
    if init_model is not None:
        own = load_tokenizer(init_model.path)
        differing = different_ids(own.get_vocab(), tokenizer.get_vocab())
        apart = all(stage.reads_apart for stage in student.stages if stage.distills)
        if differing and (student.held_out is not None or not apart):
            raise VocabularyMismatchError(
                f"{init_model.reference} and {teacher.reference} give different meanings to {len(differing)} token ids, for "
                f"instance {', '.join(differing[:5])}. Use sft, logit_kd with divergence uld, or a student with "
                "the teacher's tokenizer; and no held_out, which compares the two token by token."
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
    return open_signals(sources, list(dict.fromkeys(wanted)), folder, renderer.template_under)


def different_ids(student_vocab: dict[str, int], teacher_vocab: dict[str, int]) -> list[str]:
    """Token ids that mean different things in two vocabularies, each as ``id: 'student token' / 'teacher token'``."""
    student_tokens = {index: token for token, index in student_vocab.items()}
    teacher_tokens = {index: token for token, index in teacher_vocab.items()}
    differing = [
        i for i in sorted(student_tokens.keys() | teacher_tokens.keys()) if student_tokens.get(i) != teacher_tokens.get(i)
    ]
    return [f"{i}: {student_tokens.get(i)!r} / {teacher_tokens.get(i)!r}" for i in differing]


def _initial(
    student: StudentSpec, teacher: ModelFolder | None, init_model: ModelFolder | None, text: _Text, seed: int, device: str,
    resume: Checkpoint | None,
) -> InitialStudent:  # fmt: skip
    if resume is not None:
        facts = resume.state["init"]
        made = initial_student(student.init, teacher, init_model, [], seed, device, facts.get("kept_layers"))
        return InitialStudent(made.model, facts)
    calibration = [[*example.prompt, *example.completions[0]] for example in _calibration(text, seed)]
    return initial_student(student.init, teacher, init_model, calibration, seed, device)


def _calibration(text: _Text, seed: int) -> list[Example]:
    """The prompts of the first steps, with one completion each."""
    chosen = epoch_order(len(text.examples), seed=seed, epoch=0)[:CALIBRATION_EXAMPLES]
    return [
        replace(example, completions=example.completions[:1], signal_rows=()) for example in (text.examples[i] for i in chosen)
    ]


def _pair(
    model: Any, teacher: ModelFolder | None, text: _Text, device: str, dtype: torch.dtype, signals: StoredSignals | None
) -> ModelPair:
    """Student and teacher in memory, with their heads, or what was stored of the teacher."""
    head, frozen, teacher_head = output_head(model), None, None
    own = text.own_renderer if text.owner == "student" else None  # the teacher's, where it is another than the student's
    width = len(head)
    if teacher is not None:
        frozen = load_model(teacher.path, device=device, dtype=dtype_name(dtype))
        frozen.eval().requires_grad_(False)
        teacher_head = output_head(frozen)
        width = width if own else min(width, len(teacher_head))
    if text.renderer.vocab_size > width:
        raise VocabularyMismatchError(
            f"the tokenizer has {text.renderer.vocab_size} ids and the models' heads only {width} in common. "
            "Choose a model whose embedding covers its tokenizer."
        )
    if signals is not None or own:
        width = text.renderer.vocab_size  # what the teacher's side is about: padding columns hold no token
    if teacher_head is not None:
        teacher_head = teacher_head.cut(min(len(teacher_head), own.vocab_size) if own else width)
    return ModelPair(model, head, width, frozen, teacher_head, signals)


def _sampler(
    student: StudentSpec, models: Sequence[Any], text: _Text, seed: int, dtype: torch.dtype, processes: Processes,
    progress: Progress,
) -> tuple[StudentSampler | None, int]:  # fmt: skip
    """Who answers in on_policy stages, and the most tokens that any sequence of the training has.

    Servers find the untrained student in their folders from here on: they may start while earlier stages train.
    """
    longest = max([text.examples.longest(), *(len(e.prompt) + max(map(len, e.completions)) for e in text.held_out)])
    own = [stage for stage in student.stages if stage.method == "on_policy"]
    if not own:
        return None, longest
    longest_prompt = text.examples.longest_prompt()
    limit = length_limit(student.stages, models, max_length=student.max_length, longest_prompt=longest_prompt)
    rolled = min(limit, longest_prompt + max(stage.rollouts.max_tokens for stage in own))
    served = served_rollouts(student.stages, text.renderer, limit=limit, dtype=dtype, progress=progress)
    for one in served.values() if processes.is_first else ():
        one.prepare(models[0])
    sampler = StudentSampler(models[0], text.renderer, seed=seed, limit=limit, dtype=dtype, served=served)
    return sampler, max(longest, rolled)


def _held_out(
    student: StudentSpec, pair: ModelPair, text: _Text, layout: Layout, device: str, processes: Processes
) -> HeldOut | None:
    """What the student is compared with its teacher on, where its recipe asks for that."""
    if student.held_out is None:
        return None
    renderer, every = text.renderer, student.held_out.every
    return HeldOut(
        text.held_out, pair.teacher, every, layout, renderer.end_token_id, renderer.vocab_size, device, pair.student_held,
        pair.teacher_held, processes,
    )  # fmt: skip


def _write_student(model: Any, tokenizer: Any, curve: Sequence[dict[str, Any]], out_dir: Path) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    model.eval()
    model.config._name_or_path = ""
    model.save_pretrained(out_dir, max_shard_size="10TB")
    tokenizer.save_pretrained(out_dir)
    further = [part for part in (ROLLOUT_SCHEMA, HELD_OUT_SCHEMA) if any(part.names[0] in row for row in curve)]
    schema = pa.unify_schemas([CURVE_SCHEMA, *further])
    pq.write_table(pa.Table.from_pylist(list(curve), schema=schema), out_dir / "curve.parquet")
    pq.write_table(pa.Table.from_pylist(list(curve), schema=SPEED_SCHEMA), out_dir / "speed.parquet")


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
        "peak_memory_bytes": run.curve[-1]["peak_memory_bytes"],
        **({} if run.sampler is None else {"rollouts": rollout_facts(run.sampler, run.curve)}),
        **({} if run.held_out is None else {"held_out": held_out_facts(run.curve, len(run.stages))}),
    }  # fmt: skip
