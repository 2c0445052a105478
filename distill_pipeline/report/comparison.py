"""All students side by side: the leaderboard, and what each change of filter, teacher, method or first weights bought."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from distill_pipeline.evaluation.statistics import Interval, difference
from distill_pipeline.report.funnel import filter_row
from distill_pipeline.report.text import compact

FACTORS = ("teacher", "filter", "method", "init")
"""What two students may differ in. A contrast is a pair that differs in exactly one of them."""

LEFT_OUT = frozenset({"samples", "scores", "filters"})
"""Parts of a student's report that are long and stand in that report."""


def build_comparison(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The comparison of students' reports.

    Args:
        reports: documents of :func:`~distill_pipeline.report.build.build_student_report`.
    Returns:
        ``students``: the reports without samples and document scores; ``leaderboard``: one row a student, best first;
        ``references``: teachers and untrained students, each once; ``contrasts``: pairs of students that differ in one
        factor, with the paired difference of their scores and what each was trained on; ``filters``: one row a filtered set;
        ``warnings`` by student.
    """
    ordered = sorted(reports, key=_best_first)
    labels = sorted({report["headline"]["label"] for report in reports})
    return {
        "schema": "comparison/1",
        "experiment": ordered[0]["experiment"] if ordered else None,
        "label": labels[0] if len(labels) == 1 else "; ".join(labels) or "no metric",
        "is_share": all(is_share_headline(report) for report in ordered),
        "leaderboard": [leaderboard_row(report) for report in ordered],
        "references": _references(ordered),
        "contrasts": list(_contrasts(ordered)),
        "filters": _filter_rows(ordered),
        "warnings": [{key: report[key] for key in ("student", "warnings")} for report in ordered if report["warnings"]],
        "students": [{key: value for key, value in report.items() if key not in LEFT_OUT} for report in ordered],
    }


def leaderboard_row(report: Mapping[str, Any]) -> dict[str, Any]:
    """One student's line: who made it, how good it is beside its baselines, and what it cost."""
    held_out = report["held_out"].get("student", {})
    cost = report["cost"]
    models = report["headline"]["models"]
    return {
        "student": report["student"], "method": report["method"], "teacher": teacher_text(report), "filter": report["filter"],
        "init": init_text(report["init"]), "parameters": report["parameters"].get("student"),
        "share": report["parameters"]["share"], "score": models["student"], "teacher_score": models.get("teacher"),
        "untrained_score": models.get("untrained"), "gap_recovered": report["gap_recovered"],
        "above_teacher": report["headline"]["above_teacher"], "held_out_kl": held_out.get("forward_kl"),
        "top1_agreement": held_out.get("top1_agreement"), "trained_tokens": cost.get("trained_tokens"),
        "training_seconds": cost.get("training_seconds"), "num_warnings": len(report["warnings"]),
    }  # fmt: skip


def teacher_text(report: Mapping[str, Any]) -> str:
    """A student's teachers, each that was corrected before it answered with a word of it."""
    corrected = {teacher["name"] for teacher in report["teachers"] if teacher.get("correction")}
    return "+".join(f"{name} (corrected)" if name in corrected else name for name in report["teacher"].split("+"))


def init_text(init: Mapping[str, Any] | None) -> str:
    """A student's first weights in a few words.

    >>> init_text({"prune": {"layers": 20, "by": "block_influence"}, "scratch": None, "model": None})
    'pruned to 20 layers'
    >>> init_text({"prune": {"drop": [3, 4]}})
    'pruned of layers 3, 4'
    """
    given = {key: value for key, value in (init or {}).items() if value}
    if "prune" in given:
        return _prune_text(given["prune"])
    if "scratch" in given:
        return f"random, {given['scratch']['layers']} layers"
    return str(given.get("model", "unknown"))


def _prune_text(prune: Mapping[str, Any]) -> str:
    if "layers" in prune:
        by = prune["by"].replace("_", " ")
        return f"pruned to {prune['layers']} layers" + ("" if by == "block influence" else f" by {by}")
    verb, listed = ("to", prune["keep"]) if "keep" in prune else ("of", prune["drop"])
    return f"pruned {verb} layers {', '.join(map(str, listed))}"


def is_share_headline(report: Mapping[str, Any]) -> bool:
    """Whether a report's headline number is a share, to be shown as a percentage."""
    pairs = report["headline"]["metrics"]
    return bool(pairs) and all(report["metrics"][task][metric]["is_share"] for task, metric in pairs)


def shared_warnings(comparison: Mapping[str, Any]) -> list[str]:
    """Each warning once, with the students it is about; no names where it is about all of them."""
    about: dict[str, list[str]] = {}
    for found in comparison["warnings"]:
        for line in found["warnings"]:
            about.setdefault(line, []).append(found["student"])
    everyone = len(comparison["leaderboard"])
    return [line if len(students) == everyone else f"{', '.join(students)}: {line}" for line, students in about.items()]


def _best_first(report: Mapping[str, Any]) -> tuple[float, str]:
    value = report["headline"]["models"]["student"]["value"]
    return (float("inf") if value is None else -value, report["student"])


def _references(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each teacher, and each kind of untrained student, once."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports:
        models, parameters = report["headline"]["models"], report["parameters"]
        teacher = f"teacher {teacher_text(report).split('+')[0]}"
        untrained = f"untrained, {init_text(report['init'])}"
        for name, role, size in ((teacher, "teacher", "teacher"), (untrained, "untrained", "student")):
            if role in models:
                found.setdefault(name, {"name": name, "role": role, "score": models[role], "parameters": parameters.get(size)})
    return sorted(found.values(), key=lambda row: (row["role"] != "teacher", row["name"]))


def _contrasts(reports: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for better, other in combinations(reports, 2):
        ours, theirs = ({**report, "init": init_text(report["init"])} for report in (better, other))
        changed = [factor for factor in FACTORS if ours[factor] != theirs[factor]]
        gain = _paired_difference(better, other)
        if len(changed) == 1 and gain is not None:
            yield {
                "trained_tokens": [theirs["cost"].get("trained_tokens"), ours["cost"].get("trained_tokens")],
                "factor": changed[0], "from": theirs[changed[0]], "to": ours[changed[0]],
                "student": better["student"], "other": other["student"], "difference": gain,
            }  # fmt: skip


def _filter_rows(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each filtered set once, by name."""
    found = {name: facts for report in reports for name, facts in report["filters"].items() if facts["funnel"]}
    return [filter_row(name, found[name]) for name in sorted(found)]


def contrast_students(contrast: Mapping[str, Any]) -> str:
    """``sft (9.1K tokens) → kl (9.2K tokens)``: who is compared, and on how much each was trained."""
    said = [
        student if tokens is None else f"{student} ({compact(tokens)} tokens)"
        for student, tokens in zip((contrast["other"], contrast["student"]), contrast["trained_tokens"], strict=True)
    ]
    return " → ".join(said)


def _paired_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> Interval | None:
    """The difference on the same documents, or None where the two reports do not share them."""
    ours, theirs = one["scores"], other["scores"]
    if not ours or ours.keys() != theirs.keys() or any(ours[key].keys() != theirs[key].keys() for key in ours):
        return None
    left = [list(ours[key].values()) for key in ours]
    right = [[theirs[key][document] for document in ours[key]] for key in ours]
    return difference(left, right)
