"""The evaluation of a student beside its baselines: measures each model once, and writes the student's report.

Measurements are artifacts of their own (``model_evaluation/...``), named by what was measured, so that a teacher is measured
once for all its students and an untrained student once for all that start from the same weights.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distill_pipeline.evaluation.spec import ALGORITHM
from distill_pipeline.hashing import version_of
from distill_pipeline.outcome import Outcome
from distill_pipeline.storage.artifacts import Artifact, Making
from distill_pipeline.work import Work, evaluation_documents_of

HELD_OUT_ANSWERS = 48
"""Answers of the teacher, evenly spaced, on which distributions are compared: some 600 tokens."""


@dataclass(frozen=True)
class Subject:
    """A model to be measured: the artifact's name, what it depends on, and how to get it."""

    name: str
    inputs: dict[str, str]
    load: Callable[[str], tuple[Any, Any]] | None
    """From a device to (model, tokenizer); None for a teacher that is only an API."""
    systems: dict[str, str | None]
    """The system prompt of each task."""


def report_student(work: Work, out_dir: Path) -> Outcome:
    """Measure the node's student, its teacher and its baselines, and write ``report.json`` and ``report.html``."""
    from distill_pipeline.report.build import build_student_report
    from distill_pipeline.report.html import write_student_report

    student = work.node.student
    assert student is not None
    checkpoint = work.inputs[f"student_checkpoint/{student}"]
    is_api = work.teacher_model() is None
    teacher, notes = _teacher_measured(work) if is_api else (_measured(work, _teacher(work), None), [])
    imitated = None if is_api else teacher
    measured = {"student": _measured(work, _student(work, checkpoint), imitated)}
    for baseline in work.experiment.evaluation.baselines:
        if baseline == "teacher":
            measured |= {"teacher": teacher} if teacher is not None else {}
        elif baseline == "untrained":
            measured["untrained"] = _measured(work, _untrained(work, checkpoint), imitated)
        elif baseline != student:
            measured[baseline] = _measured(work, _student(work, work.inputs[f"student_checkpoint/{baseline}"]), imitated)
    facts, counts = checkpoint.manifest.facts, checkpoint.manifest.counts
    report = build_student_report(
        experiment=work.experiment.name,
        student=student,
        teacher=str(work.node.teacher),
        filter_name=str(work.node.filter),
        method=str(work.node.method),
        evaluations={role: artifact.read_json("evaluation.json") for role, artifact in measured.items()},
        parameters={"student": facts["parameters"], "teacher": facts["teacher_parameters"]},
        held_out=_held_out(work, measured, is_api=is_api),
        init=work.experiment.students[student].init.document(),
        curve=_curve(checkpoint),
        training={**counts, **{key: facts[key] for key in TRAINING_FACTS if key in facts}},
        teachers=facts["teachers"],
        lineage=[checkpoint.as_ancestor.model_dump(), *(a.model_dump() for a in checkpoint.manifest.lineage)],
        input_versions={name: artifact.version for name, artifact in work.inputs.items()},
        packages=checkpoint.manifest.made.packages,
        seed=work.experiment.seed,
        **_origins(work, checkpoint),
        cost=_cost(work, checkpoint, measured),
        notes=notes,
    )
    results = {role: artifact.version for role, artifact in measured.items()}
    (out_dir / "measured.json").write_text(json.dumps(results | {"checkpoint": checkpoint.version}, indent=1), encoding="utf-8")
    (out_dir / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    write_student_report(report, out_dir / "report.html")
    samples = len(measured["student"].read_json("evaluation.json")["samples"])
    return Outcome(
        {"documents": samples, "models": len(measured)}, {"headline": report["headline"], "warnings": report["warnings"]}
    )


TRAINING_FACTS = (
    "untrained_loss", "initial_loss", "final_loss", "kept_layers", "layout", "tokens_per_second", "resumed_from_step",
    "rollouts", "held_out",
)  # fmt: skip


def _curve(checkpoint: Artifact) -> list[dict[str, Any]]:
    """Training by step: what equal runs share, and beside it how fast this one was."""
    speed = {row["step"]: row for row in checkpoint.rows(prefix="speed")}
    return [row | speed.get(row["step"], {}) for row in checkpoint.rows(prefix="curve")]


def _origins(work: Work, checkpoint: Artifact) -> dict[str, Any]:
    """What the stages before training counted and found, by the names the report gives them."""
    ancestors = {ancestor.name: ancestor for ancestor in checkpoint.manifest.lineage}
    filters = {name.split("/", 1)[1]: a for name, a in ancestors.items() if name.startswith("filtered_set/")}
    prefix = "rejected_"
    return {
        "pool_counts": ancestors["prompt_pool"].counts,
        "outputs": {n.split("/", 1)[1]: a.counts for n, a in ancestors.items() if n.startswith("teacher_outputs/")},
        "filters": {
            name: {
                "counts": ancestor.counts,
                "reject_reasons": {k.removeprefix(prefix): n for k, n in ancestor.counts.items() if k.startswith(prefix)},
                "facts": work.store.open(ancestor.name, ancestor.version).manifest.facts,
            }
            for name, ancestor in filters.items()
        },
    }


def _cost(work: Work, checkpoint: Artifact, measured: Mapping[str, Artifact]) -> dict[str, float | None]:
    """What the student took: the teacher's correction, its tokens and seconds over all runs, training, and evaluation."""
    outputs = [
        work.store.open(ancestor.name, ancestor.version).manifest.facts
        for ancestor in checkpoint.manifest.lineage
        if ancestor.name.startswith("teacher_outputs/")
    ]
    corrections = [a for a in checkpoint.manifest.lineage if a.name.startswith("corrected_teacher/")]
    seconds = [work.store.open(a.name, a.version).manifest.facts.get("seconds", 0.0) for a in corrections]
    return {
        **({"correction_seconds": sum(seconds)} if corrections else {}),
        "teacher_prompt_tokens": sum(facts.get("prompt_tokens", 0) for facts in outputs),
        "teacher_completion_tokens": sum(facts.get("completion_tokens", 0) for facts in outputs),
        "generation_seconds": sum(facts.get("seconds", 0.0) for facts in outputs),
        "trained_tokens": checkpoint.manifest.counts.get("trained_tokens"),
        "training_seconds": checkpoint.manifest.facts.get("seconds"),
        "evaluation_seconds": measured["student"].manifest.made.wall_seconds,
    }


def _held_out(work: Work, measured: Mapping[str, Artifact], *, is_api: bool) -> dict[str, dict[str, Any]]:
    """Each model's divergence from the teacher; of a teacher that is only an API nobody knows it, and the reason is said."""
    if is_api:
        reason = f"teacher {work.teacher_name} is only an API: its distribution is not available"
        return {"student": {"forward_kl": None, "top1_agreement": None, "tokens": 0, "answers": 0, "reason": reason}}
    found = {role: artifact.read_json("held_out.json") for role, artifact in measured.items()}
    return {role: divergence for role, divergence in found.items() if divergence is not None}


def _teacher_measured(work: Work) -> tuple[Artifact | None, list[str]]:
    """The measurement of a teacher that is only an API, where it is asked for and possible, and what the report says of it."""
    from distill_pipeline.evaluation.served import unanswerable_tasks

    part, name = work.experiment.evaluation, work.teacher_name
    said = [f"Teacher {name} is only an API: how far the student is from its distribution is not known."]
    if "teacher" not in part.baselines:
        return None, said
    if fault := unanswerable_tasks(part.tasks, work.experiment.resolve_path(part.include_path) if part.include_path else None):
        return None, [*said, f"Teacher {name} is only an API and was not evaluated: {fault}."]
    inputs = {
        "model:teacher": work.answering_model(name).identity,
        "extra_body": version_of(work.experiment.teachers[name].extra_body),
    }
    return _measured(work, Subject(f"model_evaluation/teacher/{name}", inputs, None, _teacher_systems(work)), None), said


def _teacher(work: Work) -> Subject:
    folder = work.teacher_weights()
    systems = _teacher_systems(work)
    name, inputs = f"model_evaluation/teacher/{work.teacher_name}", {"model:teacher": folder.identity}
    return Subject(name, inputs, _loader(folder.path), systems)


def _teacher_systems(work: Work) -> dict[str, str | None]:
    return work.experiment.asked_under(work.experiment.teachers[work.teacher_name].system_prompts)


def _student(work: Work, checkpoint: Artifact) -> Subject:
    name = checkpoint.name.split("/")[1]
    inputs, systems = {checkpoint.name: checkpoint.version}, work.experiment.asked_under(work.experiment.prompts_of(name))
    return Subject(f"model_evaluation/student/{name}", inputs, _loader(checkpoint.local_dir()), systems)


def _untrained(work: Work, checkpoint: Artifact) -> Subject:
    """The student as it was before its first step, made again from its recipe and the layers it kept."""
    student = checkpoint.name.split("/")[1]
    init = work.experiment.students[student].init
    teacher = work.teacher_model()
    init_model = work.model(init.model) if init.model else None
    kept_layers = checkpoint.manifest.facts.get("kept_layers")
    inputs = {
        **({"model:teacher": teacher.identity} if teacher is not None else {}),
        "init:recipe": version_of([init.document(), kept_layers, init_model.identity if init_model else None]),
        "init:seed": str(work.experiment.seed),
    }

    def load(device: str) -> tuple[Any, Any]:
        from distill_pipeline.models.load import load_tokenizer
        from distill_pipeline.training.student import initial_student

        made = initial_student(
            init, teacher, init_model, calibration=[], seed=work.experiment.seed, device=device, kept_layers=kept_layers
        )
        folder = init_model or teacher
        assert folder is not None, "a student without a teacher's folder starts from a model"
        return made.model.eval(), load_tokenizer(folder.path)

    systems = work.experiment.asked_under(work.experiment.prompts_of(student))
    return Subject(f"model_evaluation/untrained/{version_of(inputs)}", inputs, load, systems)


def _loader(folder: Path) -> Callable[[str], tuple[Any, Any]]:
    def load(device: str) -> tuple[Any, Any]:
        from distill_pipeline.models.load import load_model, load_tokenizer

        return load_model(folder, device=device), load_tokenizer(folder)

    return load


def _measured(work: Work, subject: Subject, teacher: Artifact | None) -> Artifact:
    """A subject's measurement: found in the store, or made now. ``teacher`` is the teacher's own, None for itself."""
    evaluation = work.experiment.evaluation
    spec = {"evaluation": evaluation.document(), **_told(subject.systems)}
    if teacher is not None and subject.systems != (asked := _teacher_systems(work)):
        spec["teacher_told"] = _told(asked)
    inputs = {**subject.inputs, "tasks:documents": version_of(list(evaluation_documents_of(work.experiment)))}
    if teacher is not None:
        inputs[teacher.name] = teacher.version
    making = Making(
        experiment=work.experiment.name, spec=spec, code_version=version_of([ALGORITHM, spec]), inputs=inputs,
        seed=work.experiment.seed,
    )  # fmt: skip
    found = None if work.force else work.store.find(subject.name, making.input_key)
    if found is not None:
        work.progress(f"{subject.name}: measured before")
        return found
    started = time.monotonic()
    with work.store.draft() as folder:
        evaluated, held_out = _measure(work, subject, teacher)
        (folder / "evaluation.json").write_text(json.dumps(evaluated, indent=1), encoding="utf-8")
        (folder / "held_out.json").write_text(json.dumps(held_out, indent=1), encoding="utf-8")
        making = making.model_copy(update={"wall_seconds": round(time.monotonic() - started, 3)})
        return work.store.commit(
            folder, subject.name, making, counts={"documents": len(evaluated["samples"])}, facts={"tasks": evaluated["tasks"]}
        )


def _told(systems: Mapping[str, str | None]) -> dict[str, Any]:
    """The system prompt of all tasks, or of each."""
    distinct = set(systems.values())
    return {"system": distinct.pop()} if len(distinct) == 1 else {"systems": dict(systems)}


def _measure(work: Work, subject: Subject, teacher: Artifact | None) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Run the tasks, then compare with the teacher's distribution on the teacher's own answers."""
    from distill_pipeline.evaluation.divergence import unknown_divergence
    from distill_pipeline.evaluation.stage import evaluate_by_system, held_out_divergence
    from distill_pipeline.models.load import resolve_device
    from distill_pipeline.rendering import ChatRenderer

    if subject.load is None:
        return _asked(work, subject.systems), None
    part, device = work.experiment.evaluation, resolve_device(work.student_device)
    model, tokenizer = subject.load(device)
    work.progress(f"{subject.name}: measuring on {', '.join(part.tasks)}")
    evaluated = evaluate_by_system(
        model, tokenizer, systems=subject.systems,
        include_path=work.experiment.resolve_path(part.include_path) if part.include_path else None,
        limit=part.limit, batch_size=part.batch_size, device=device, progress=work.progress,
    )  # fmt: skip
    if teacher is None:
        return evaluated, None
    asked = _teacher_systems(work)
    system = _told(asked).get("system")
    samples = _asked_alike(teacher.read_json("evaluation.json"), subject.systems, asked)
    if not samples:
        return evaluated, unknown_divergence("it is never asked under the system prompts of its teacher")
    teacher_model, teacher_tokenizer = _loader(work.teacher_weights().path)(device)
    step = max(1, len(samples) // HELD_OUT_ANSWERS)
    divergence = held_out_divergence(
        model, teacher_model, ChatRenderer(tokenizer, system=system), samples[::step][:HELD_OUT_ANSWERS], device,
        teacher_renderer=ChatRenderer(teacher_tokenizer, system=system),
    )  # fmt: skip
    return evaluated, divergence


def _asked(work: Work, systems: Mapping[str, str | None]) -> dict[str, Any]:
    """Run the tasks on a teacher that is only an API: one greedy answer a question, kept in the generation store."""
    from distill_pipeline.evaluation.served import evaluate_served
    from distill_pipeline.evaluation.stage import by_system
    from distill_pipeline.generation.asking import GreedyAnswers

    part, name = work.experiment.evaluation, work.teacher_name
    teacher, model = work.experiment.teachers[name], work.answering_model(name)

    def answers(max_tokens: int) -> GreedyAnswers:
        return GreedyAnswers(
            model, generations_dir=work.store.shared_folder("generations"), device=work.teacher_device, max_tokens=max_tokens,
            extra_body=teacher.extra_body,
        )  # fmt: skip

    evaluate = partial(
        evaluate_served, answers, name=name, limit=part.limit, progress=work.progress,
        include_path=work.experiment.resolve_path(part.include_path) if part.include_path else None,
    )  # fmt: skip
    return by_system(evaluate, systems)


def _asked_alike(
    evaluated: Mapping[str, Any], systems: Mapping[str, str | None], asked: Mapping[str, str | None]
) -> list[dict[str, Any]]:
    """The teacher's samples of tasks that it and a subject are asked under the same system prompt: their tokens are equal."""
    alike = {task for task, system in systems.items() if system == asked[task]}
    alike |= {leaf for task in alike for leaf in evaluated["subtasks"].get(task, ())}
    return [sample for sample in evaluated["samples"] if sample["task"] in alike]
