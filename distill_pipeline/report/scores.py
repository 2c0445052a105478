"""Documents' scores, model by model on the same documents: what all intervals and comparisons of a report start from."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.errors import IntegrityError
from distill_pipeline.evaluation.statistics import Interval, above_teacher, difference, gap_recovered, mean_interval

Evaluation = Mapping[str, Any]
"""What ``evaluation.stage.evaluate_model`` returns."""


def document_scores(evaluation: Evaluation, task: str, metric: str) -> dict[str, float]:
    """Scores by ``task:document``, of a task or of all tasks of a group, in order; documents without one are left out."""
    tasks = evaluation["subtasks"].get(task, [task])
    return {
        f"{sample['task']}:{sample['doc_id']}": sample["metrics"][metric]
        for sample in evaluation["samples"]
        if sample["task"] in tasks and metric in sample["metrics"]
    }


def interval_of(evaluation: Evaluation, task: str, metric: str) -> Interval | None:
    """A metric's value with its interval; the value alone where it is no mean over documents; None where it is missing."""
    found = evaluation["tasks"].get(task, {}).get(metric)
    if found is None:
        return None
    scores = document_scores(evaluation, task, metric)
    if is_document_mean(found, scores):
        return mean_interval(list(scores.values()))
    return {"value": found["value"], "low": None, "high": None, "n": found["n"]}


def is_document_mean(found: Mapping[str, Any], scores: Mapping[str, float]) -> bool:
    """Whether a metric is the mean of its documents' scores (a perplexity or an F1 is not)."""
    return bool(scores) and math.isclose(sum(scores.values()) / len(scores), found["value"], abs_tol=1e-9)


def paired_scores(evaluations: Mapping[str, Evaluation], names: Sequence[str], task: str, metric: str) -> list[list[float]]:
    """One list a model, the same documents in the same order.

    Raises:
        IntegrityError: the models were not evaluated on the same documents.
    """
    tables = [document_scores(evaluations[name], task, metric) for name in names]
    for name, table in zip(names, tables, strict=True):
        if table.keys() != tables[0].keys():
            odd = sorted(table.keys() ^ tables[0].keys())[:3]
            raise IntegrityError(
                f"{names[0]} and {name} were not evaluated on the same documents of {task} ({len(tables[0])} and {len(table)}; "
                f"for instance {', '.join(odd)}). Evaluate both again with the same tasks and limit."
            )
    documents = list(tables[0])
    return [[table[document] for document in documents] for table in tables]


def headline_metrics(evaluations: Mapping[str, Evaluation]) -> list[tuple[str, str]]:
    """(task, metric) pairs that the headline averages: the primary metric of each task asked for, where more is better.

    Where several tasks were asked for, only shares count: an average of percentages and perplexities would mean nothing.
    """
    student = evaluations["student"]
    pairs = []
    for task in student["requested"]:
        metric = student["primary"][task]
        found = student["tasks"][task][metric]
        scores = document_scores(student, task, metric)
        if found["higher_is_better"] and is_document_mean(found, scores):
            pairs.append((task, metric, all(0.0 <= score <= 1.0 for score in scores.values())))
    return [(task, metric) for task, metric, is_share in pairs if is_share or len(pairs) == 1]


def headline(evaluations: Mapping[str, Evaluation], *, seed: int = 0) -> dict[str, Any]:
    """The one number a model is compared by, for each model, and what the student recovered of its teacher's lead.

    Returns:
        ``{"label", "metrics", "models": {name: interval}, "student_minus_teacher", "above_teacher", "gap_recovered"}``;
        comparisons with a model that was not evaluated are unknown and say so.
    """
    pairs = headline_metrics(evaluations)
    names = list(evaluations)
    by_model: dict[str, list[list[float]]] = {name: [] for name in names}
    for task, metric in pairs:
        for name, scores in zip(names, paired_scores(evaluations, names, task, metric), strict=True):
            by_model[name].append(scores)
    zeros = [[0.0] * len(scores) for scores in by_model["student"]]
    models = {
        name: mean_interval(scores[0]) if len(pairs) == 1 else difference(scores, zeros, seed=seed)
        for name, scores in by_model.items()
    }
    lead: Interval = {"value": None, "low": None, "high": None, "n": 0}
    if pairs and "teacher" in by_model:
        lead = difference(by_model["student"], by_model["teacher"], seed=seed)
    return {
        "label": _label(pairs), "metrics": [list(pair) for pair in pairs], "models": models,
        "student_minus_teacher": lead, "above_teacher": above_teacher(lead), "gap_recovered": _gap(by_model, pairs, seed),
    }  # fmt: skip


def _gap(by_model: Mapping[str, list[list[float]]], pairs: Sequence[tuple[str, str]], seed: int) -> Interval:
    missing = [name for name in ("teacher", "untrained") if name not in by_model]
    if missing or not pairs:
        reason = f"not evaluated: {' and '.join(missing)}" if missing else "no task has a metric that is a mean over documents"
        return {"value": None, "low": None, "high": None, "n": 0, "reason": reason}
    return gap_recovered(by_model["student"], by_model["teacher"], by_model["untrained"], seed=seed)


def _label(pairs: Sequence[tuple[str, str]]) -> str:
    if len(pairs) == 1:
        return f"{pairs[0][0]}, {pairs[0][1]}"
    return f"mean of {len(pairs)} tasks" if pairs else "no metric"
