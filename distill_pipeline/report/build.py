"""The facts of a student's report, for machines and for the pages: one JSON document, from plain counts and evaluations.

Decided: every result stands beside its baselines; what is unknown is null with a reason, never left out in silence; nothing
here reads a clock, so equal inputs give an equal document.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.report.comparison import build_comparison
from distill_pipeline.report.funnel import filter_facts
from distill_pipeline.report.samples import side_by_side
from distill_pipeline.report.scores import Evaluation, document_scores, headline, headline_metrics, interval_of

FEW_DOCUMENTS = 100
"""Below this many documents a 95 % interval of a share can be over 0.2 wide."""

TRUNCATED_FRAC = 0.05
"""Share of cut answers above which the numbers measure the limit on tokens too."""

BASELINES = ("teacher", "untrained")
"""Without these two a student's score cannot be read."""

POOL_LOSSES = ("malformed", "duplicate", "near_duplicate", "contaminated")
OUTPUT_LOSSES = ("failed", "pending")
"""Counts of rows that did not go on, in the manifests of the prompt pool and of teacher outputs."""


def build_student_report(
    *,
    experiment: str,
    student: str,
    teacher: str,
    filter_name: str,
    method: str,
    evaluations: Mapping[str, Evaluation],
    parameters: Mapping[str, int | None],
    held_out: Mapping[str, Mapping[str, Any]] | None = None,
    init: Mapping[str, Any] | None = None,
    curve: Sequence[Mapping[str, Any]] = (),
    pool_counts: Mapping[str, int] | None = None,
    outputs: Mapping[str, Mapping[str, int]] | None = None,
    filters: Mapping[str, Mapping[str, Any]] | None = None,
    training: Mapping[str, Any] | None = None,
    teachers: Sequence[Mapping[str, Any]] = (),
    cost: Mapping[str, float | None] | None = None,
    lineage: Sequence[Mapping[str, Any]] = (),
    input_versions: Mapping[str, str] | None = None,
    packages: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    seed: int = 0,
) -> dict[str, Any]:
    """Everything a student's report shows.

    Args:
        teacher, filter_name, method: as the graph's node names them; several joined by ``+``.
        evaluations: results by role: ``student``, and of ``teacher``, ``untrained`` and other students those that exist.
        parameters: ``{"student", "teacher"}``, numbers of parameters.
        held_out: results of ``held_out_divergence`` by role, of ``student`` and perhaps ``untrained``.
        init: the ``init`` part of the student's recipe.
        curve: rows with ``step`` and ``loss``, and whatever else training wrote down.
        pool_counts: the prompt pool's counts. outputs: counts of teacher outputs by teacher.
        filters: by ``teacher/filter``: its ``counts``, ``reject_reasons`` {reason: completions}, and filtering's ``facts``.
        training: counts and facts of training worth showing, flat.
        teachers: licence facts: ``name, model, revision, license, verdict, clause, obligations, accepted_because``.
        cost: any of ``teacher_prompt_tokens, teacher_completion_tokens, trained_tokens, generation_seconds,
            training_seconds, evaluation_seconds``.
        lineage: nearest first: ``{"name", "version", "counts"}``.
        input_versions: what the report itself was made from.
        notes: what a reader should know besides; they come first among the warnings.
    Returns:
        A JSON-able document. ``tasks`` is {task: {metric: {role: {"value", "low", "high", "n"}}}}; ``metrics`` says of each
        whether more is better and which one speaks for its task; ``scores`` holds the student's score on each document.
    Raises:
        IntegrityError: the models were evaluated on different documents.
    """
    head = headline(evaluations, seed=seed)
    report = {
        "schema": "eval_report/1",
        "experiment": experiment, "student": student, "teacher": teacher, "filter": filter_name, "method": method,
        "init": dict(init) if init else None,
        "parameters": {**parameters, "share": _share(parameters.get("student"), parameters.get("teacher"))},
        "headline": head,
        "gap_recovered": head["gap_recovered"],
        "tasks": _task_table(evaluations),
        "metrics": _metric_facts(evaluations["student"]),
        "scores": {f"{task}, {metric}": document_scores(evaluations["student"], task, metric)
                   for task, metric in headline_metrics(evaluations)},
        "missing_baselines": [name for name in BASELINES if name not in evaluations],
        "held_out": {name: dict(found) for name, found in (held_out or {}).items()},
        "yields": {name: _yield(found["counts"]) for name, found in (filters or {}).items()},
        "funnel": _funnel(pool_counts, outputs or {}, filters or {}),
        "filters": {name: filter_facts(found.get("facts", {})) for name, found in (filters or {}).items()},
        "training": dict(training or {}),
        "curve": [dict(row) for row in curve],
        "teachers": [dict(facts) for facts in teachers],
        "cost": dict(cost or {}),
        "samples": side_by_side(evaluations),
        "lineage": [{key: row[key] for key in ("name", "version", "counts")} for row in lineage],
        "input_versions": dict(input_versions or {}),
        "packages": {**(packages or {}), "lm-eval": evaluations["student"]["lm_eval_version"]},
        "limit": evaluations["student"]["limit"],
        "seed": seed,
    }  # fmt: skip
    return report | {"warnings": [*notes, *_warnings(report, evaluations)]}


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _task_table(evaluations: Mapping[str, Evaluation]) -> dict[str, dict[str, dict[str, Any]]]:
    return {
        task: {
            metric: {
                name: interval
                for name, evaluation in evaluations.items()
                if (interval := interval_of(evaluation, task, metric)) is not None
            }
            for metric in metrics
        }
        for task, metrics in evaluations["student"]["tasks"].items()
    }


def _metric_facts(evaluation: Evaluation) -> dict[str, dict[str, dict[str, bool]]]:
    """Of each metric: whether more is better, whether it is a share, and whether it speaks for its task."""
    return {
        task: {
            metric: {
                "higher_is_better": found["higher_is_better"],
                "is_share": all(0.0 <= score <= 1.0 for score in document_scores(evaluation, task, metric).values())
                and 0.0 <= found["value"] <= 1.0,
                "is_primary": metric == evaluation["primary"][task],
            }
            for metric, found in metrics.items()
        }
        for task, metrics in evaluation["tasks"].items()
    }


def _yield(counts: Mapping[str, int]) -> dict[str, Any]:
    """Of a filter: completions seen and accepted, and the share that passed."""
    completions, accepted = counts.get("completions", 0), counts.get("accepted", 0)
    return {"completions": completions, "accepted": accepted, "accepted_frac": _share(accepted, completions)}


def _funnel(
    pool: Mapping[str, int] | None, outputs: Mapping[str, Mapping[str, int]], filters: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """From prompts read to completions accepted: at each stage how many came in, went on, and were lost to which reason."""
    stages = []
    if pool:
        lost = {reason: pool.get(reason, 0) for reason in POOL_LOSSES}
        stages.append(_funnel_stage("prompt pool", "prompts", pool.get("seen", 0), pool.get("kept", 0), lost))
    for teacher, counts in outputs.items():
        lost = {reason: counts.get(reason, 0) for reason in OUTPUT_LOSSES}
        expected = counts.get("expected", 0)
        stages.append(_funnel_stage(f"answers of {teacher}", "completions", expected, expected - sum(lost.values()), lost))
    for name, found in filters.items():
        counts = found["counts"]
        lost = {**found.get("reject_reasons", {}), "failed": counts.get("failed", 0)}
        unexplained = counts.get("completions", 0) - counts.get("accepted", 0) - sum(lost.values())
        lost |= {"other": unexplained} if unexplained > 0 else {}
        stages.append(
            _funnel_stage(f"filter {name}", "completions", counts.get("completions", 0), counts.get("accepted", 0), lost)
        )
    return stages


def _funnel_stage(stage: str, unit: str, came: int, kept: int, lost: Mapping[str, int]) -> dict[str, Any]:
    ordered = sorted(((n, reason) for reason, n in lost.items() if n), key=lambda pair: (-pair[0], pair[1]))
    return {"stage": stage, "unit": unit, "in": came, "kept": kept, "lost": {reason: n for n, reason in ordered}}


def _warnings(report: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What a reader should know before believing the numbers."""
    found = [
        f"The {name} was not evaluated, so the student's score has nothing to stand beside."
        for name in report["missing_baselines"]
    ]
    head = report["headline"]
    if head["above_teacher"]["flag"]:
        more = "by more than noise" if head["above_teacher"]["beyond_noise"] else "within noise"
        found.append(
            f"The student scores above its teacher, {more}. Look for evaluation documents in the training data, "
            "and for answers that the task reads more kindly from one of them."
        )
    if reason := head["gap_recovered"].get("reason"):
        found.append(f"Gap recovered is unknown: {reason}.")
    documents = head["models"]["student"]["n"]
    if 0 < documents < FEW_DOCUMENTS:
        plural = "s" * (documents != 1)
        found.append(f"Only {documents} document{plural}: the intervals are wide, and small differences mean nothing.")
    if report["limit"] is not None:
        found.append(f"Each task was cut to its first {report['limit']} documents (evaluation.limit).")
    for name, evaluation in evaluations.items():
        found += _answer_warnings(name, evaluation)
    for teacher in report["teachers"]:
        if teacher.get("accepted_because"):
            found.append(
                f"The licence of {teacher.get('name')} ({teacher.get('license') or 'unknown'}: {teacher.get('verdict')}) "
                f"was accepted because: {teacher['accepted_because']}"
            )
    return found


def _answer_warnings(name: str, evaluation: Evaluation) -> list[str]:
    reasons = [sample["finish_reason"] for sample in evaluation["samples"] if sample["finish_reason"] is not None]
    found = []
    cut, failed = reasons.count("length"), reasons.count("error")
    if reasons and cut / len(reasons) > TRUNCATED_FRAC:
        found.append(f"{cut} of {len(reasons)} answers of the {name} were cut at the task's limit on tokens.")
    if failed:
        found.append(f"{failed} of {len(reasons)} questions did not fit the context of the {name} and count as unanswered.")
    return found


__all__ = ["build_comparison", "build_student_report"]
