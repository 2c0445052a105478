"""How each stage of an experiment is run: from a node's stored inputs to files in a draft folder.

Each runner reads its inputs' records, calls one library function and returns its outcome. ``EXTERNAL_INPUTS`` names what a
stage depends on beside stored artifacts (source files, models, evaluation documents), as versions.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from distill_pipeline.cards.pieces import CARD
from distill_pipeline.hashing import version_of
from distill_pipeline.nodes import Stage
from distill_pipeline.outcome import Outcome
from distill_pipeline.storage.artifacts import Artifact
from distill_pipeline.work import Work, evaluation_documents_of, protected_documents, protected_index

if TYPE_CHECKING:
    from distill_pipeline.generation.accepting import CountAccepted
    from distill_pipeline.generation.opening import TeacherModel
    from distill_pipeline.models.resolve import ModelFolder
    from distill_pipeline.scoring.rows import ScoringContext
    from distill_pipeline.signals.table import SignalSource
    from distill_pipeline.training.parallel import Processes

UNHASHED_FILES = frozenset(
    {"report.html", "report.json", "comparison.html", "comparison.json", "leaderboard.json", "speed.parquet", CARD}
)
"""Files that tell of an artifact, some with times and costs: they are listed with their hashes but do not make a version."""


# --- what a stage depends on beside stored artifacts ---------------------------------------------------------------


def _pool_externals(work: Work) -> dict[str, str]:
    from distill_pipeline.prompts.sources import source_files

    found: dict[str, str] = {}
    for source in work.experiment.prompt_pool.sources:
        files = source_files(source, work.experiment.resolve_path)
        found |= {f"source:{path}": digest[:16] for path, digest in files.items()}
    return found | {"protected:documents": version_of(list(protected_documents(work.experiment)))}


def _filter_externals(work: Work) -> dict[str, str]:
    assert work.node.filter is not None
    rule = work.experiment.filters[work.node.filter]
    found = {f"model:{reference}": work.model(reference).identity for reference in rule.tokenizers()}
    if rule.drops("contaminated"):
        found["protected:documents"] = version_of(list(protected_documents(work.experiment)))
    return found


def _teacher_externals(work: Work) -> dict[str, str]:
    work.teacher_terms(work.teacher_name)
    model = work.teacher_model() or work.answering_model(work.teacher_name)
    return {f"model:{model.reference}": model.identity}


def _correction_externals(work: Work) -> dict[str, str]:
    work.teacher_terms(work.teacher_name)
    model = work.original_model()
    return {f"model:{model.reference}": model.identity}


def _outputs_externals(work: Work) -> dict[str, str]:
    work.teacher_terms(work.teacher_name)
    teacher, model = work.experiment.teachers[work.teacher_name], work.answering_model(work.teacher_name)
    found = {f"model:{model.reference}": model.identity}
    return found if teacher.accept_target is None else _scorer_externals(work) | found


def _student_externals(work: Work) -> dict[str, str]:
    assert work.node.student is not None
    for name in work.experiment.teachers_of(work.node.student):
        work.teacher_terms(name)
    found = _teacher_externals(work)
    init = work.experiment.students[work.node.student].init
    return found | ({f"model:{init.model}": work.model(init.model).identity} if init.model else {})


def _report_externals(work: Work) -> dict[str, str]:
    documents = evaluation_documents_of(work.experiment)
    return _teacher_externals(work) | {"tasks:documents": version_of(list(documents))}


def _scorer_externals(work: Work) -> dict[str, str]:
    from distill_pipeline.scoring.registry import scorer_versions

    found = {f"scorer:{kind}": version for kind, version in scorer_versions(work.experiment.scorers).items()}
    models = work.scoring_models()
    return found | {f"model:{model}@{revision or ''}".rstrip("@"): m.identity for (model, revision), m in models.items()}


def _nothing(work: Work) -> dict[str, str]:
    return {}


EXTERNAL_INPUTS: Mapping[Stage, Callable[[Work], dict[str, str]]] = {
    "prompt_pool": _pool_externals, "corrected_teacher": _correction_externals, "teacher_outputs": _outputs_externals,
    "scored_outputs": _scorer_externals, "filtered_set": _filter_externals, "teacher_signals": _teacher_externals,
    "student_checkpoint": _student_externals, "eval_report": _report_externals, "comparison": _nothing,
}  # fmt: skip


# --- the work itself ------------------------------------------------------------------------------------------------


def _run_prompt_pool(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.prompts.pool import build_pool

    part = work.experiment.prompt_pool
    return build_pool(
        part.sources, out_dir, resolve_path=work.experiment.resolve_path, holdout_frac=part.holdout_fraction,
        dedup=part.dedup, protected=protected_index(work.experiment), progress=work.progress,
    )  # fmt: skip


def _run_corrected_teacher(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.training.correction import correct_teacher

    name = work.teacher_name
    teacher = work.experiment.teachers[name]
    assert teacher.correction is not None
    outcome = correct_teacher(
        work.input("prompt_pool").batches(), out_dir, work.store.work_dir(work.node.name, input_key), name=name,
        correction=teacher.correction, model=work.original_model(), answers=teacher.answers, prompts=teacher.system_prompts,
        device=work.student_device, seed=work.experiment.seed, progress=work.progress, processes=_joined(work),
    )  # fmt: skip
    facts = _told_of_correction(work, out_dir, outcome.counts, outcome.facts)
    return Outcome(outcome.counts, facts, outcome.failed_gate)


def _told_of_correction(work: Work, out_dir: Path, counts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a correction with the model that was corrected and its terms."""
    return {**facts, "teacher": _told_of_teacher(work, work.original_model())}


def _joined(work: Work) -> "Processes":
    """Those that train together, told that there is something to train."""
    from distill_pipeline.training.parallel import ALONE

    processes = work.processes or ALONE
    processes.tell(work=True)
    return processes


def _run_teacher_outputs(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.generation.stage import generate_outputs

    name = work.teacher_name
    outcome = generate_outputs(
        work.input("prompt_pool").batches(), out_dir, teacher_name=name, teacher=work.experiment.teachers[name],
        model=work.answering_model(name), generations_dir=work.store.shared_folder("generations"), device=work.teacher_device,
        seed=work.experiment.seed, progress=work.progress, compute=work.experiment.compute,
        count_accepted=_count_accepted(work),
    )  # fmt: skip
    return Outcome(outcome.counts, _told_of_outputs(work, out_dir, outcome.counts, outcome.facts), outcome.failed_gate)


def _told_of_outputs(work: Work, out_dir: Path, counts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a teacher's outputs with who it is and its terms."""
    name = work.teacher_name
    return {**facts, "teacher": _told_of_teacher(work, work.answering_model(name)) | work.correction_facts(name)}


def _told_of_teacher(work: Work, model: "TeacherModel") -> dict[str, Any]:
    """Who the node's teacher is, as this model, and its terms."""
    name = work.teacher_name
    teacher = work.experiment.teachers[name]
    identity = {"name": name, "model": model.reference, "revision": model.revision, "identity": model.identity}
    how = {"engine": teacher.engine, "trust_remote_code": teacher.trust_remote_code}
    return identity | work.teacher_terms(name) | how


def _count_accepted(work: Work) -> "CountAccepted | None":
    """Who says which answers are accepted, where that decides how many samples a prompt is asked for."""
    if work.experiment.teachers[work.teacher_name].accept_target is None:
        return None
    from distill_pipeline.acceptance import accepted_by_scores

    return accepted_by_scores(work.experiment.scorers, scoring_context(work), work.experiment.compute)


def scoring_context(work: Work, kept_dir: Path | None = None) -> "ScoringContext":
    """What the experiment's scorers need; scores and answers are kept in the store, or in another folder."""
    from distill_pipeline.scoring.rows import ScoringContext

    scores, generations = (
        work.store.shared_folder(name) if kept_dir is None else kept_dir / name for name in ("scores", "generations")
    )
    return ScoringContext(
        models=work.scoring_models(), device=work.teacher_device, scores_dir=scores, generations_dir=generations,
        progress=work.progress,
    )  # fmt: skip


def _run_scored_outputs(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.scoring.stage import score_outputs

    return score_outputs(
        work.input("prompt_pool").batches(), work.input("teacher_outputs").batches(), out_dir,
        scorers=work.experiment.scorers, context=scoring_context(work), compute=work.experiment.compute,
    )  # fmt: skip


def _run_filtered_set(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.alignment import CHUNK_ROWS
    from distill_pipeline.filtering.lengths import ModelTokenCounter
    from distill_pipeline.filtering.stage import filter_outputs

    assert work.node.filter is not None
    rule, teacher = work.experiment.filters[work.node.filter], work.experiment.teachers[work.teacher_name]
    outcome = filter_outputs(
        work.input("prompt_pool").batches(), work.input("teacher_outputs").batches(rows=CHUNK_ROWS),
        work.input("scored_outputs").batches(), out_dir, rule=rule, filter_name=work.node.name,
        protected=protected_index(work.experiment) if rule.drops("contaminated") else None, progress=work.progress,
        counters={reference: ModelTokenCounter(work.model(reference).path) for reference in rule.tokenizers()},
        first_samples=None if teacher.accept_target is None else teacher.sampling.n, compute=work.experiment.compute,
    )  # fmt: skip
    return Outcome(outcome.counts, _told_of_set(work, out_dir, outcome.counts, outcome.facts), outcome.failed_gate)


def _told_of_set(work: Work, out_dir: Path, counts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A filtered set's facts with its teacher's; writes its card."""
    from distill_pipeline.cards.data_card import write_data_card

    teacher = work.input("teacher_outputs").manifest.facts["teacher"]
    write_data_card(
        out_dir, experiment=work.experiment.name, name=work.node.name.removeprefix("filtered_set/"), teacher=teacher,
        rules=work.node.spec["filter"], pool_spec=work.input("prompt_pool").manifest.made.spec, counts=counts,
    )  # fmt: skip
    return {**facts, "teacher": teacher}


def _run_teacher_signals(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.training.capture import capture_signals
    from distill_pipeline.training.reading import rows_under_prompts

    data = work.input("filtered_set")
    prompts = work.experiment.teachers[work.teacher_name].system_prompts
    system, rows = rows_under_prompts([(_training_rows(data), prompts)])
    kinds, max_length = work.experiment.wanted_signals()[work.node.name.split("/", 1)[1]]
    outcome = capture_signals(
        rows, out_dir, work.store.work_dir(work.node.name, input_key), signals=work.experiment.signals, kinds=kinds,
        max_length=max_length, teacher=work.teacher_weights(), system=system, device=work.teacher_device,
        seed=work.experiment.seed, progress=work.progress,
    )  # fmt: skip
    return Outcome(outcome.counts, outcome.facts | {"teacher": data.manifest.facts["teacher"]}, outcome.failed_gate)


def _run_student_checkpoint(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.training.reading import rows_under_prompts
    from distill_pipeline.training.stage import train_student

    assert work.node.student is not None
    processes = _joined(work)
    student, recipe = work.node.student, work.experiment.students[work.node.student]
    sets = _sets(work)
    system, rows = rows_under_prompts(
        (_training_rows(data), work.experiment.data_prompts(student, data.name.split("/")[1])) for data in sets
    )
    outcome = train_student(
        rows, out_dir, work.store.work_dir(work.node.name, input_key), student=recipe, teacher=work.teacher_model(),
        init_model=_init_model(work), system=system, device=work.student_device, seed=work.experiment.seed,
        progress=work.progress, signals=work.experiment.signals, signal_sources=_signal_sources(work, sets, system),
        processes=processes,
    )  # fmt: skip
    return Outcome(outcome.counts, _told_of_student(work, out_dir, outcome.counts, outcome.facts), outcome.failed_gate)


def _told_of_student(work: Work, out_dir: Path, counts: Mapping[str, int], facts: Mapping[str, Any]) -> dict[str, Any]:
    """A student's facts with those of its teachers and its name; writes its card."""
    from distill_pipeline.cards.model_card import student_name, write_model_card

    assert work.node.student is not None
    experiment, student, sets = work.experiment.name, work.node.student, _sets(work)
    init = work.experiment.students[student].init
    teachers = list({facts["name"]: facts for facts in (data.manifest.facts["teacher"] for data in sets)}.values())
    write_model_card(
        out_dir, experiment=experiment, student=student, init=init.document(), teachers=teachers, sets=sets,
        base=_init_model(work) or (work.teacher_model() if init.prune else None), counts=counts, facts=facts,
        seed=work.experiment.seed,
    )  # fmt: skip
    return {**facts, "teachers": teachers, "published_name": student_name(experiment, student, teachers)}


def _sets(work: Work) -> list[Artifact]:
    """The filtered sets that a student is trained on."""
    return [artifact for name, artifact in work.inputs.items() if name.startswith("filtered_set/")]


def _init_model(work: Work) -> "ModelFolder | None":
    """The model whose weights a student begins with, where it is not its teacher."""
    reference = work.experiment.students[str(work.node.student)].init.model
    return work.model(reference) if reference else None


_TOLD: Mapping[Stage, Callable[[Work, Path, Mapping[str, int], Mapping[str, Any]], dict[str, Any]]] = {
    "corrected_teacher": _told_of_correction, "teacher_outputs": _told_of_outputs, "filtered_set": _told_of_set,
    "student_checkpoint": _told_of_student,
}  # fmt: skip


def told_anew(work: Work, found: Artifact) -> Artifact:
    """A stored artifact, with card and facts renewed where its teachers' terms have changed since; its content stays."""
    tell = _TOLD.get(work.node.stage)
    if tell is None:
        return found
    with work.store.draft() as folder:
        facts = tell(work, folder, found.manifest.counts, found.manifest.facts)
        has_card = {entry.name for entry in folder.iterdir()} <= {entry.path for entry in found.manifest.files}
        if has_card and facts == found.manifest.facts:
            return found
        return work.store.retell(found, folder, facts, inputs=work.inputs.values())


def _signal_sources(work: Work, sets: Iterable[Artifact], system: str | None) -> "list[SignalSource]":
    """Where the signals of each set lie that the student reads, beside who wrote its completions, and under what."""
    from distill_pipeline.signals.table import SignalSource

    found = []
    for data in sets:
        name = data.name.replace("filtered_set/", "teacher_signals/")
        if name in work.inputs:
            own = None if system is not None else work.experiment.teachers[data.name.split("/")[1]].system_prompts.shared
            identity = data.manifest.facts["teacher"]["identity"]
            found.append(SignalSource(name, work.inputs[name].local_dir(), identity, own))
    return found


def _training_rows(data: Artifact) -> Iterator[pa.RecordBatch]:
    return data.batches(prefix="train-")


def _run_eval_report(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.reporting import report_student

    return report_student(work, out_dir)


def _run_comparison(work: Work, out_dir: Path, input_key: str) -> Outcome:
    from distill_pipeline.report.build import build_comparison
    from distill_pipeline.report.html import write_comparison

    reports = [artifact.read_json("report.json") for artifact in work.inputs.values()]
    comparison = build_comparison(reports)
    (out_dir / "comparison.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
    (out_dir / "leaderboard.json").write_text(json.dumps(comparison, indent=1), encoding="utf-8")
    (out_dir / "inputs.json").write_text(json.dumps({n: a.version for n, a in work.inputs.items()}), encoding="utf-8")
    write_comparison(comparison, out_dir / "comparison.html")
    return Outcome({"students": len(reports)})


RUNNERS: Mapping[Stage, Callable[[Work, Path, str], Outcome]] = {
    "prompt_pool": _run_prompt_pool, "corrected_teacher": _run_corrected_teacher, "teacher_outputs": _run_teacher_outputs,
    "scored_outputs": _run_scored_outputs, "filtered_set": _run_filtered_set, "teacher_signals": _run_teacher_signals,
    "student_checkpoint": _run_student_checkpoint, "eval_report": _run_eval_report, "comparison": _run_comparison,
}  # fmt: skip
