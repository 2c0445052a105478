"""What an experiment will need before it runs: rows, tokens, bytes and time on this machine.

Rows are counted, not guessed: the pool is built in a draft where it is not stored yet, and the generation store is asked
what it holds. Speeds come from a probe that answers a few prompts and takes one training step for each student; it stores
nothing. What cannot be known before it happens (how many answers a filter accepts) is taken at its upper bound, and said.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.nodes import Node
from distill_pipeline.outcome import silent
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.runners import RUNNERS
from distill_pipeline.training.position import stage_load
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.work import Work, evaluation_documents_of

if TYPE_CHECKING:
    from distill_pipeline.signals.table import SignalSource

PROBE_PROMPTS = 8
ROW_OVERHEAD_BYTES = 300
"""Ids, counts and keys of a stored completion beside its text, compressed."""
BYTES_A_TOKEN = 4.5
TRAINING_COPIES = 4
"""A student's weights on disk, in float32 copies: the finished model, and a checkpoint with weights and two Adam moments.

Of a student with adapters only the finished model counts: checkpoints hold the adapters alone.
"""


@dataclass(frozen=True)
class PlanLine:
    """What one node needs. ``seconds`` is None where nothing was measured."""

    node: str
    rows: int
    tokens: int
    num_bytes: int
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class TeacherProbe:
    """A teacher's few answers: its speed, lengths, and the rows a training probe can use."""

    rows_per_second: float
    tokens_per_row: float
    training_rows: list[dict[str, Any]]


def plan_experiment(pipeline: Pipeline, *, probe: bool = True) -> list[PlanLine]:
    """One line a node that will have work to do or has it done.

    Args:
        probe: run the models for a few seconds to learn speeds; without it times are unknown and nothing is downloaded.
    """
    with _pool(pipeline) as (counts, batches):
        prompts = [row for batch in batches for row in batch.to_pylist() if row["split"] == "train"]
    lines = [
        PlanLine("prompt_pool", counts["kept"], 0, 0, None, f"{counts['train']:,} to train on, {counts['heldout']:,} held out")
    ]
    probes: dict[str, TeacherProbe] = {}
    for teacher in pipeline.experiment.teachers:
        line, found = _plan_teacher(pipeline, teacher, prompts, probe)
        lines.append(line)
        if found is not None:
            probes[teacher] = found
    lines += [_plan_signals(pipeline, name, prompts, probes) for name in pipeline.experiment.wanted_signals()]
    for student in pipeline.experiment.students:
        lines.append(_plan_student(pipeline, student, prompts, probes.get(pipeline.experiment.teacher_of(student))))
    documents = len(evaluation_documents_of(pipeline.experiment))
    limit = pipeline.experiment.evaluation.limit
    documents = documents if limit is None else min(documents, limit * len(pipeline.experiment.evaluation.tasks))
    for name, node in pipeline.nodes.items():
        if node.stage == "eval_report":
            speed = next((found.rows_per_second for found in probes.values()), None)
            models = 1 + ("untrained" in pipeline.experiment.evaluation.baselines)
            seconds = None if speed is None else models * documents / speed
            lines.append(PlanLine(name, documents, 0, 0, seconds, f"{models} models; the teacher is measured once for all"))
    return lines


def plan_text(lines: Sequence[PlanLine]) -> str:
    """The plan as a table for a terminal."""
    head = ["node", "rows", "tokens", "bytes", "time", ""]
    table = [[line.node, f"{line.rows:,}", f"{line.tokens:,}" if line.tokens else "-", _bytes(line.num_bytes),
              _duration(line.seconds), line.note] for line in lines]  # fmt: skip
    known = [line.seconds for line in lines if line.seconds is not None]
    total = [["total", "", f"{sum(line.tokens for line in lines):,}", _bytes(sum(line.num_bytes for line in lines)),
              _duration(sum(known) if known else None), ""]]  # fmt: skip
    rows = [head, *table, *total]
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:5], widths[1:], strict=True)), row[5]]
        ).rstrip()
        for row in rows
    )


def _bytes(number: float) -> str:
    if not number:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _work(pipeline: Pipeline, node: Node) -> Work:
    return Work(
        pipeline.experiment, pipeline.store, node, {}, pipeline.teacher_device, pipeline.student_device, pipeline.progress
    )


@contextmanager
def _pool(pipeline: Pipeline) -> Iterator[tuple[dict[str, int], Iterator[pa.RecordBatch]]]:
    """Counts and rows of the pool: the stored one where its inputs match, else one built in a folder that goes away."""
    node = pipeline.node("prompt_pool")
    making = pipeline.making(_work(pipeline, node))
    stored = pipeline.store.find(node.name, making.input_key)
    if stored is not None:
        yield stored.manifest.counts, stored.batches()
        return
    with pipeline.store.draft() as folder:
        outcome = RUNNERS[node.stage](_work(pipeline, node), folder, making.input_key)
        parts = sorted(folder.glob("part-*.parquet"))
        yield outcome.counts, (batch for part in parts for batch in pq.ParquetFile(part).iter_batches())


def _plan_teacher(
    pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], probe: bool
) -> tuple[PlanLine, TeacherProbe | None]:
    """Requests a teacher will be sent, and what a few of them took."""
    teacher = pipeline.experiment.teachers[name]
    mine = [row for row in prompts if teacher.answers(row["domain"])]
    node, expected = f"teacher_outputs/{name}", len(mine) * teacher.sampling.n
    if teacher.server is not None and mine:
        return _plan_served(pipeline, name, mine), None
    if not probe or not mine:
        most = expected * teacher.sampling.max_tokens
        return PlanLine(
            node, expected, most, int(most * BYTES_A_TOKEN), None, "tokens at most; stored answers not looked up"
        ), None
    found, missing = _probe_teacher(pipeline, name, mine)
    tokens = int(missing * found.tokens_per_row)
    size = int(missing * (found.tokens_per_row * BYTES_A_TOKEN + ROW_OVERHEAD_BYTES))
    note = f"{expected - missing:,} of {expected:,} stored; {found.tokens_per_row:.1f} tokens a completion"
    return PlanLine(node, missing, tokens, size, missing / found.rows_per_second, note), found


def _plan_served(pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]]) -> PlanLine:
    """What a served teacher will be asked for at most. It is not probed: that would cost."""
    from distill_pipeline.generation.budget import Usage
    from distill_pipeline.generation.stage import missing_requests

    teacher, node = pipeline.experiment.teachers[name], f"teacher_outputs/{name}"
    missing = missing_requests(
        prompts, teacher=teacher, model=_work(pipeline, pipeline.node(node)).answering_model(name),
        generations_dir=pipeline.store.local_folder("generations"), device=pipeline.teacher_device,
        seed=pipeline.experiment.seed,
    )  # fmt: skip
    most = missing * teacher.sampling.max_tokens
    note = f"{len(prompts) * teacher.sampling.n - missing:,} stored; tokens at most"
    if teacher.budget is not None:
        note += f", {Usage(completion_tokens=most).usd(teacher.budget):,.2f} USD for them at most, prompts not counted"
    return PlanLine(node, missing, most, int(most * BYTES_A_TOKEN), None, note)


def _probe_teacher(pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]]) -> tuple[TeacherProbe, int]:
    """Answer a few evenly spaced prompts and count what the generation store lacks."""
    from distill_pipeline.generation.stage import generate_outputs, missing_requests

    teacher = pipeline.experiment.teachers[name]
    work = _work(pipeline, pipeline.node(f"teacher_outputs/{name}"))
    work.teacher_terms(name)
    model = work.answering_model(name)
    missing = missing_requests(
        prompts, teacher=teacher, model=model, generations_dir=pipeline.store.local_folder("generations"),
        device=pipeline.teacher_device, seed=pipeline.experiment.seed,
    )  # fmt: skip
    chosen = list(islice(prompts, 0, None, max(1, len(prompts) // PROBE_PROMPTS)))[:PROBE_PROMPTS]
    pipeline.progress(f"probe: {name} answers {len(chosen)} prompts")
    with tempfile.TemporaryDirectory() as folder:
        outcome = generate_outputs(
            [pa.RecordBatch.from_pylist(chosen)], Path(folder), teacher_name=name, teacher=teacher, model=model,
            generations_dir=Path(folder, "generations"), device=pipeline.teacher_device, seed=pipeline.experiment.seed,
            progress=silent,
        )  # fmt: skip
        answers = [row for part in sorted(Path(folder).glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in answers:
        if row["finish_reason"] != "error":
            by_prompt.setdefault(row["prompt_id"], []).append(row)
    rows = [{**prompt, "completions": by_prompt[prompt["prompt_id"]]} for prompt in chosen if prompt["prompt_id"] in by_prompt]
    facts = outcome.facts
    return TeacherProbe(
        rows_per_second=len(answers) / max(facts["seconds"], 1e-6),
        tokens_per_row=facts["completion_tokens"] / len(answers),
        training_rows=rows,
    ), missing


def _plan_signals(
    pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], probes: Mapping[str, TeacherProbe]
) -> PlanLine:
    """Bytes of a teacher's stored distributions, if the filter accepts everything."""
    signals, teacher = pipeline.experiment.signals, name.split("/")[0]
    (kinds, _), probe = pipeline.experiment.wanted_signals()[name], probes.get(teacher)
    sampling = pipeline.experiment.teachers[teacher].sampling
    rows = len(prompts) * _most_a_prompt(pipeline, name)
    tokens = int(rows * (probe.tokens_per_row if probe else sampling.max_tokens))
    a_token = sum(signals.bytes_a_token(kind) for kind in kinds)
    note = f"{' and '.join(kinds)}, {a_token:.0f} bytes a token" + ("" if probe else "; tokens at most")
    return PlanLine(f"teacher_signals/{name}", rows, tokens, int(tokens * a_token), None, note)


def _most_a_prompt(pipeline: Pipeline, reference: str) -> int:
    """Completions a prompt that a ``teacher/filter`` keeps at most."""
    teacher, rule = reference.split("/")
    n = pipeline.experiment.teachers[teacher].sampling.n
    return max(min(n, part.most_per_prompt or n) for part in pipeline.experiment.filters[rule].rules())


def _plan_student(pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], probe: TeacherProbe | None) -> PlanLine:
    """Completions a student sees at most, and the time from one measured step of each stage."""
    recipe = pipeline.experiment.students[name]
    a_prompt = sum(_most_a_prompt(pipeline, reference) for reference in recipe.data)
    tokens_a_row = None if probe is None else probe.tokens_per_row
    training = round(len(prompts) * (1.0 - (recipe.held_out.fraction if recipe.held_out else 0.0)))
    loads = [stage_load(stage, training, a_prompt, tokens_a_row) for stage in recipe.stages]
    rows, rolled = sum(load.rows for load in loads), sum(load.rollouts for load in loads)
    note = "if the filter accepts everything"
    if rolled:
        note += f"; {rolled:,} of its own, as long as they may be"
    tokens = sum(load.tokens for load in loads)
    if probe is None:
        return PlanLine(f"student_checkpoint/{name}", rows, tokens, 0, None, note)
    seconds_a_token, parameters = _probe_student(pipeline, name, probe)
    size = parameters * 4 * (TRAINING_COPIES if recipe.lora is None else 1)
    seconds = sum(load.tokens * cost for load, cost in zip(loads, seconds_a_token, strict=True))
    return PlanLine(f"student_checkpoint/{name}", rows, tokens, size, seconds, note)


def _probe_student(pipeline: Pipeline, name: str, probe: TeacherProbe) -> tuple[list[float], int]:
    """(seconds a completion token of each stage, parameters) from one optimizer step a stage on the probe's answers."""
    from distill_pipeline.training.stage import train_student

    recipe = pipeline.experiment.students[name]
    one_step: dict[str, Any] = {"max_steps": 1, "batch_prompts": PROBE_PROMPTS, "early_stop": None}
    own = one_step | {"lambda_": 1.0}
    steps = tuple(s.model_copy(update=own if s.method == "on_policy" and s.lambda_ else one_step) for s in recipe.stages)
    node = pipeline.node(f"student_checkpoint/{name}")
    work = _work(pipeline, node)
    pipeline.progress(f"probe: one step of {name}")
    rows = pa.RecordBatch.from_pylist(_training_rows(probe.training_rows), schema=TRAINING_SCHEMA)
    system = pipeline.experiment.data_prompts(name, work.teacher_name).shared
    with tempfile.TemporaryDirectory() as folder:
        outcome = train_student(
            [rows], Path(folder, "out"), Path(folder, "work"),
            student=recipe.model_copy(update={"stages": steps, "held_out": None}), teacher=work.teacher_model(),
            init_model=work.model(recipe.init.model) if recipe.init.model else None,
            system=system, device=pipeline.student_device, seed=pipeline.experiment.seed, progress=silent,
            signals=pipeline.experiment.signals,
            signal_sources=_probe_signals(work, rows, recipe, Path(folder, "signals")),
        )  # fmt: skip
    facts = outcome.facts
    costs = [seconds / max(tokens, 1) for seconds, tokens in zip(facts["stage_seconds"], facts["stage_tokens"], strict=True)]
    return costs, int(facts["parameters"])


def _probe_signals(work: Work, rows: pa.RecordBatch, recipe: StudentSpec, folder: Path) -> "list[SignalSource]":
    """Teacher signals of the probe's answers, for a student that reads stored ones."""
    from distill_pipeline.signals.table import SignalSource
    from distill_pipeline.training.capture import capture_signals

    if not recipe.signal_kinds():
        return []
    folder.mkdir()
    teacher, experiment = work.teacher_weights(), work.experiment
    capture_signals(
        [rows], folder, folder / "work", signals=experiment.signals, kinds=recipe.signal_kinds(), max_length=recipe.max_length,
        teacher=teacher, system=experiment.teachers[work.teacher_name].system_prompts.shared, device=work.teacher_device,
        seed=experiment.seed, progress=silent,
    )  # fmt: skip
    return [SignalSource("of the probe", folder, teacher.identity)]


def _training_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Probe answers as training rows."""
    keep = ("completion_id", "raw_text", "finish_reason")
    return [
        {**{key: row[key] for key in ("prompt_id", "messages", "reference", "domain")},
         "completions": [{key: answer[key] for key in keep} for answer in row["completions"]]}
        for row in rows
    ]  # fmt: skip
