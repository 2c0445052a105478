"""What an experiment will need before it runs: rows, tokens, bytes and time on this machine.

Rows are counted, not guessed: the pool is built in a draft where it is not stored yet, and the generation store is asked
what it holds. Speeds, lengths, costs and yields come from a dry run of a few prompts (:mod:`distill_pipeline.dry_run`) and from
one training step of each correction and student. What nobody measured is taken at its upper bound, and said.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.dry_run import TeacherProbe
from distill_pipeline.nodes import Node, corrected_name
from distill_pipeline.outcome import silent
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.plan_lines import PlanLine
from distill_pipeline.records import PROMPT_SCHEMA, TRAINING_SCHEMA
from distill_pipeline.runners import RUNNERS
from distill_pipeline.teacher_plan import most_a_prompt, plan_teacher
from distill_pipeline.training.position import stage_load
from distill_pipeline.training.spec import StudentSpec
from distill_pipeline.work import Work, evaluation_documents_of

if TYPE_CHECKING:
    from distill_pipeline.signals.table import SignalSource
    from distill_pipeline.training.spec import TrainStageSpec

STEP_PROMPTS = 8
"""Prompts of the one training step that is measured."""
TRAINING_COPIES = 4
"""A student's weights on disk, in float32 copies: the finished model, and a checkpoint with weights and two Adam moments.

Of a student with adapters only the finished model counts: checkpoints hold the adapters alone.
"""


def plan_experiment(pipeline: Pipeline, *, probe: bool = True, dry_run_served: bool = False) -> list[PlanLine]:
    """One line a node that will have work to do or has it done.

    Args:
        probe: run the models for a few seconds to learn speeds, lengths and yields; without it these are unknown and nothing is
            downloaded.
        dry_run_served: ask served models too, which costs money, within their budgets; their answers are stored.
    """
    with _pool(pipeline) as (counts, batches, pool_version):
        prompts = [row for batch in batches for row in batch.to_pylist() if row["split"] == "train"]
    lines = [
        PlanLine("prompt_pool", counts["kept"], 0, 0, None, f"{counts['train']:,} to train on, {counts['heldout']:,} held out")
    ]
    asked_for, (pipeline, waiting) = pipeline, _as_corrected(pipeline, pool_version)
    lines += [_plan_correction(asked_for, name, prompts, waits=name in waiting, probe=probe)
              for name in asked_for.experiment.teachers if asked_for.experiment.corrects(name)]  # fmt: skip
    probes: dict[str, TeacherProbe] = {}
    for teacher in pipeline.experiment.teachers:
        work = _work(pipeline, pipeline.node(f"teacher_outputs/{teacher}"))
        mine = [row for row in prompts if pipeline.experiment.teachers[teacher].answers(row["domain"])]
        planned, found = plan_teacher(
            work, mine, probe=probe, dry_run_served=dry_run_served, waits_for_correction=teacher in waiting
        )
        lines += planned
        if found is not None:
            probes[teacher] = found
    lines += [_plan_signals(pipeline, name, prompts, probes) for name in pipeline.experiment.wanted_signals()]
    for student in pipeline.experiment.students:
        lines.append(_plan_student(pipeline, student, prompts, probes))
    documents = len(evaluation_documents_of(pipeline.experiment))
    limit = pipeline.experiment.evaluation.limit
    documents = documents if limit is None else min(documents, limit * len(pipeline.experiment.evaluation.tasks))
    for name, node in pipeline.nodes.items():
        if node.stage == "eval_report":
            speed = next((found.rows_per_second for found in probes.values() if found.rows_per_second), None)
            models = 1 + ("untrained" in pipeline.experiment.evaluation.baselines)
            seconds = None if speed is None else models * documents / speed
            lines.append(PlanLine(name, documents, 0, 0, seconds, f"{models} models; the teacher is measured once for all"))
    return lines


def _work(pipeline: Pipeline, node: Node) -> Work:
    corrected = [name for name in node.inputs if pipeline.node(name).stage == "corrected_teacher"]
    return Work(
        pipeline.experiment, pipeline.store, node, {name: pipeline.input_of(name) for name in corrected},
        pipeline.teacher_device, pipeline.student_device, pipeline.progress,
    )  # fmt: skip


def _as_corrected(pipeline: Pipeline, pool_version: str | None) -> tuple[Pipeline, set[str]]:
    """The pipeline with every teacher as it is whose correction was not made on this pool yet, and the names of these."""
    experiment = pipeline.experiment
    waiting = {name for name in experiment.teachers if experiment.corrects(name) and not _is_made(pipeline, name, pool_version)}
    teachers = {
        name: part.model_copy(update={"correction": None}) if name in waiting else part
        for name, part in experiment.teachers.items()
    }
    return replace(pipeline, experiment=experiment.model_copy(update={"teachers": teachers})), waiting


def _is_made(pipeline: Pipeline, teacher: str, pool_version: str | None) -> bool:
    """Whether the latest corrected weights of a teacher are those that the experiment asks for."""
    node = pipeline.node(corrected_name(teacher))
    found = pipeline.store.latest(node.name)
    ways = [] if found is None else [found.manifest.made, *found.manifest.also_made]
    return any((way.code_version, way.inputs["prompt_pool"]) == (node.code_version, pool_version) for way in ways)


def _plan_correction(pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], *, waits: bool, probe: bool) -> PlanLine:
    """References a teacher learns, and the time from one measured step."""
    from distill_pipeline.training.correction import correct_teacher, recipe_of

    node, teacher = pipeline.node(corrected_name(name)), pipeline.experiment.teachers[name]
    if not waits:
        return PlanLine(node.name, 0, 0, 0, None, "stored")
    assert teacher.correction is not None
    mine = [row for row in prompts if teacher.answers(row["domain"]) and (row["reference"] or "").strip()]
    note = f"{len(mine):,} of {len(prompts):,} training prompts have a reference that it learns"
    stage = recipe_of(name, teacher.correction, teacher.model).stages[0]
    if not mine or not probe:
        load = stage_load(stage, len(mine), 1.0, None)
        return PlanLine(node.name, load.rows, load.tokens, 0, None, note)
    work = _work(pipeline, node)
    work.teacher_terms(name)
    pipeline.progress(f"probe: one step of {node.name}")
    one_step = teacher.correction.model_copy(update={"max_steps": 1, "batch_prompts": STEP_PROMPTS})
    with tempfile.TemporaryDirectory() as folder:
        outcome = correct_teacher(
            [pa.RecordBatch.from_pylist(mine[:STEP_PROMPTS], schema=PROMPT_SCHEMA)], Path(folder, "out"), Path(folder, "work"),
            name=name, correction=one_step, model=work.original_model(), answers=teacher.answers,
            prompts=teacher.system_prompts, device=pipeline.student_device, seed=pipeline.experiment.seed, progress=silent,
        )  # fmt: skip
    facts, counts = outcome.facts, outcome.counts
    load = stage_load(stage, len(mine), 1.0, counts["data_tokens"] / counts["used"])
    size = facts["parameters"] * 4 * (TRAINING_COPIES if teacher.correction.lora is None else 1)
    seconds = load.tokens * facts["stage_seconds"][0] / max(facts["stage_tokens"][0], 1)
    return PlanLine(node.name, load.rows, load.tokens, size, seconds, note)


@contextmanager
def _pool(pipeline: Pipeline) -> Iterator[tuple[dict[str, int], Iterator[pa.RecordBatch], str | None]]:
    """Counts and rows of the pool, and its version: the stored one where its inputs match, else one built in a folder that goes
    away, without a version."""
    node = pipeline.node("prompt_pool")
    making = pipeline.making(_work(pipeline, node))
    stored = pipeline.store.find(node.name, making.input_key)
    if stored is not None:
        yield stored.manifest.counts, stored.batches(), stored.version
        return
    with pipeline.store.draft() as folder:
        outcome = RUNNERS[node.stage](_work(pipeline, node), folder, making.input_key)
        parts = sorted(folder.glob("part-*.parquet"))
        yield outcome.counts, (batch for part in parts for batch in pq.ParquetFile(part).iter_batches()), None


def _plan_signals(
    pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], probes: Mapping[str, TeacherProbe]
) -> PlanLine:
    """Bytes of a teacher's stored distributions, for what its filter accepts."""
    signals, teacher = pipeline.experiment.signals, name.split("/")[0]
    (kinds, _), probe = pipeline.experiment.wanted_signals()[name], probes.get(teacher)
    sampling = pipeline.experiment.teachers[teacher].sampling
    _, num_rows, _ = _accepted(pipeline, name, prompts, probes)
    tokens = int(num_rows * (probe.tokens_per_row if probe else sampling.max_tokens))
    a_token = sum(signals.bytes_a_token(kind) for kind in kinds)
    note = f"{' and '.join(kinds)}, {a_token:.0f} bytes a token" + ("" if probe else "; tokens at most")
    return PlanLine(f"teacher_signals/{name}", round(num_rows), tokens, int(tokens * a_token), None, note)


def _accepted(
    pipeline: Pipeline, reference: str, prompts: Sequence[dict[str, Any]], probes: Mapping[str, TeacherProbe]
) -> tuple[float, float, bool]:
    """Prompts and completions that a ``teacher/filter`` accepts, as in the dry run or at most, and whether it was measured."""
    teacher, rule = reference.split("/")
    answered = [row for row in prompts if pipeline.experiment.teachers[teacher].answers(row["domain"])]
    values = probes[teacher].accepted.get(rule) if teacher in probes else None
    if values is None:
        rules = pipeline.experiment.filters[rule].rules()
        return len(answered), len(answered) * most_a_prompt(pipeline.experiment.teachers[teacher], rules), False
    return len(answered) * sum(map(bool, values)) / len(values), len(answered) * sum(values) / len(values), True


def _plan_student(
    pipeline: Pipeline, name: str, prompts: Sequence[dict[str, Any]], probes: Mapping[str, TeacherProbe]
) -> PlanLine:
    """Completions a student sees, and the time from one measured step of each stage."""
    recipe, probe = pipeline.experiment.students[name], probes.get(pipeline.experiment.teacher_of(name))
    sets = [_accepted(pipeline, reference, prompts, probes) for reference in recipe.data]
    num_prompts = max(with_any for with_any, _, _ in sets)
    a_prompt = sum(num_rows for _, num_rows, _ in sets) / num_prompts if num_prompts else 0.0
    is_measured = all(measured for *_, measured in sets)
    note = "if its filters accept as in the dry run" if is_measured else "if the filter accepts everything"
    tokens_a_row = None if probe is None else probe.tokens_per_row
    training = round(num_prompts * (1.0 - (recipe.held_out.fraction if recipe.held_out else 0.0)))
    loads = [stage_load(stage, training, a_prompt, tokens_a_row) for stage in recipe.stages]
    rows, rolled = sum(load.rows for load in loads), sum(load.rollouts for load in loads)
    if rolled:
        note += f"; {rolled:,} of its own, as long as they may be"
    tokens = sum(load.tokens for load in loads)
    teacher = pipeline.experiment.teachers[pipeline.experiment.teacher_of(name)]
    if probe is None or (teacher.server is not None and teacher.weights is None):
        return PlanLine(f"student_checkpoint/{name}", rows, tokens, 0, None, note)
    seconds_a_token, parameters = _probe_student(pipeline, name, probe)
    size = parameters * 4 * (TRAINING_COPIES if recipe.lora is None else 1)
    seconds = sum(load.tokens * cost for load, cost in zip(loads, seconds_a_token, strict=True))
    return PlanLine(f"student_checkpoint/{name}", rows, tokens, size, seconds, note)


def _probe_student(pipeline: Pipeline, name: str, probe: TeacherProbe) -> tuple[list[float], int]:
    """(seconds a completion token of each stage, parameters) from one optimizer step a stage on the probe's answers."""
    from distill_pipeline.training.stage import train_student

    recipe = pipeline.experiment.students[name]
    steps = tuple(map(_one_step, recipe.stages))
    node = pipeline.node(f"student_checkpoint/{name}")
    work = _work(pipeline, node)
    pipeline.progress(f"probe: one step of {name}")
    rows = pa.RecordBatch.from_pylist(_training_rows(probe.training_rows[:STEP_PROMPTS]), schema=TRAINING_SCHEMA)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train_student(
            [rows], Path(folder, "out"), Path(folder, "work"),
            student=recipe.model_copy(update={"stages": steps, "held_out": None}), teacher=work.teacher_model(),
            init_model=work.model(recipe.init.model) if recipe.init.model else None,
            system=pipeline.experiment.data_prompts(name, work.teacher_name).shared, device=pipeline.student_device,
            seed=pipeline.experiment.seed, progress=silent, signals=pipeline.experiment.signals,
            signal_sources=_probe_signals(work, rows, recipe, Path(folder, "signals")),
        )  # fmt: skip
    facts = outcome.facts
    costs = [seconds / max(tokens, 1) for seconds, tokens in zip(facts["stage_seconds"], facts["stage_tokens"], strict=True)]
    return costs, int(facts["parameters"])


def _one_step(stage: "TrainStageSpec") -> "TrainStageSpec":
    """A stage cut to one step, which a student that answers itself answers here: no server is asked."""
    cut: dict[str, Any] = {"max_steps": 1, "batch_prompts": STEP_PROMPTS, "early_stop": None}
    if stage.method == "on_policy" and stage.lambda_:
        rollouts = stage.rollouts.model_copy(update={"server": None, "refresh_every": None})
        cut |= {"lambda_": 1.0, "rollouts": rollouts}
    return stage.model_copy(update=cut)


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
