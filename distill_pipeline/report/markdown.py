"""The reports as Markdown tables, for the orchestrator's pages, and as text, for a terminal.

Whatever a model, a prompt or a file said is escaped so that it stays one cell of text.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.records import FUNNEL
from distill_pipeline.report.comparison import contrast_students, is_share_headline, shared_warnings, teacher_text
from distill_pipeline.report.funnel import funnel_rows, largest_reasons, pass_text, reason_rows
from distill_pipeline.report.text import (
    UNKNOWN,
    compact,
    duration,
    interval_text,
    markdown_text,
    metric_text,
    number,
    one_line,
    percent,
    signed,
)

MARKDOWN_SAMPLES = 8
TERMINAL_COLUMNS = (0, 1, 2, 3, 4, 5, 7)
"""Of the leaderboard: all but the time of training, which is the machine's as well as the student's."""


def student_markdown(report: Mapping[str, Any]) -> str:
    """A student's report: scores beside baselines, imitation, yields, warnings, and a few answers."""
    models = report["headline"]["models"]
    is_share = is_share_headline(report)
    rows = [[name, interval_text(found, is_share=is_share), number(found["n"])] for name, found in models.items()]
    gap = report["gap_recovered"]
    gap_said = interval_text(gap) if gap["value"] is not None else f"unknown: {gap.get('reason')}"
    who, method, rule = (markdown_text(report[key]) for key in ("student", "method", "filter"))
    teacher = markdown_text(teacher_text(report))
    parts = [
        f"**{who}** ({method}, teacher {teacher}, filter {rule}): gap recovered {markdown_text(gap_said)}",
        _table(["model", report["headline"]["label"], "documents"], rows),
    ]
    if report["warnings"]:
        parts.append("\n".join(f"- {markdown_text(line, 600)}" for line in report["warnings"]))
    if report["held_out"]:
        listed = [
            [name, number(found.get("forward_kl")), percent(found.get("top1_agreement"))]
            for name, found in report["held_out"].items()
        ]
        parts.append(_table(["held-out answers", "KL to teacher, nats/token", "same likeliest token"], listed))
    if report["yields"]:
        listed = [
            [name, number(found["accepted"]), number(found["completions"]), percent(found["accepted_frac"])]
            for name, found in report["yields"].items()
        ]
        parts.append(_table(["filter", "accepted", "completions", "yield"], listed))
    for name, facts in report["filters"].items():
        if facts["funnel"]:
            parts += [f"**{markdown_text(name)}**: {markdown_text(pass_text(facts))}", funnel_markdown(facts)]
    parts.append(samples_markdown(report["samples"][:MARKDOWN_SAMPLES], list(models)))
    return "\n\n".join(part for part in parts if part) + "\n"


def funnel_markdown(facts: Mapping[str, Any]) -> str:
    """The funnel of a filtered set by domain, then its reasons by domain (``filter_facts``)."""
    rows = [
        [row["domain"], *(number(row[stage]) for stage in FUNNEL), percent(row["accepted_frac"])] for row in funnel_rows(facts)
    ]
    domains, reasons = reason_rows(facts)
    shown = domains if len(domains) > 1 else []
    listed = [[reason, *(number(count) for count in counts[: 1 + len(shown)])] for reason, counts in reasons]
    tables = [_table(["domain", *FUNNEL, "of completions"], rows)]
    return "\n\n".join(tables + ([_table(["first reason", "rejected", *shown], listed)] if listed else []))


def samples_markdown(samples: Sequence[Mapping[str, Any]], models: Sequence[str]) -> str:
    """Prompts, references and answers side by side; nothing for no samples."""
    if not samples:
        return ""
    rows = [
        [sample["prompt"], sample["reference"], *(_answer_cell(sample["answers"].get(name)) for name in models)]
        for sample in samples
    ]
    return _table(["prompt", "reference", *models], rows)


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The leaderboard, what each change bought, and the warnings."""
    header, *rows = _leaderboard(comparison)
    parts = [_table(header, rows)]
    if comparison["contrasts"]:
        listed = [
            [f"{c['factor']}: {c['from']} → {c['to']}", contrast_students(c), _gain_text(c, comparison["is_share"])]
            for c in comparison["contrasts"]
        ]
        parts.append(_table(["change", "students", f"difference in {comparison['label']}"], listed))
    if comparison["filters"]:
        listed = [
            [row["name"], *(number(row[stage]) for stage in FUNNEL), percent(row["accepted_frac"]),
             ", ".join(f"{name} {percent(rate)}" for name, rate in row["pass_at"].items()), largest_reasons(row["reasons"])]
            for row in comparison["filters"]
        ]  # fmt: skip
        parts.append(_table(["filter", *FUNNEL, "of completions", "pass rates", "largest reasons"], listed))
    lines = [f"- {markdown_text(line, 600)}" for line in shared_warnings(comparison)]
    return "\n\n".join([*parts, *(["\n".join(lines)] if lines else [])]) + "\n"


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """The leaderboard as aligned columns for a terminal, baselines below, warnings last."""
    rows = [[one_line(row[column], 60) for column in TERMINAL_COLUMNS] for row in _leaderboard(comparison)]
    width = len(rows[0])
    for reference in comparison["references"]:
        score = interval_text(reference["score"], is_share=comparison["is_share"])
        rows.append([one_line(reference["name"], 60), "", score, *[""] * (width - 4), compact(reference["parameters"])])
    widths = [max(_columns(row[column]) for row in rows) for column in range(width)]
    lines = ["  ".join(cell + " " * (widths[i] - _columns(cell)) for i, cell in enumerate(row)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * size for size in widths))
    lines.insert(2 + len(comparison["leaderboard"]), "")
    head = f"{comparison['experiment']}: {one_line(comparison['label'])}, 95 % intervals"
    notes = [f"! {one_line(line, 400)}" for line in shared_warnings(comparison)]
    return "\n".join([head, "", *lines, *(["", *notes] if notes else [])])


def _leaderboard(comparison: Mapping[str, Any]) -> list[list[str]]:
    is_share = comparison["is_share"]
    header = ["student", "made by", "score", "gap recovered", "KL to teacher", "trained tokens", "training", "parameters"]
    return [header] + [
        [
            row["student"], f"{row['method']}, {row['teacher']}/{row['filter']}",
            interval_text(row["score"], is_share=is_share),
            interval_text(row["gap_recovered"]), number(row["held_out_kl"]), compact(row["trained_tokens"]),
            duration(row["training_seconds"]),
            compact(row["parameters"]) + ("" if row["share"] is None else f" ({percent(row['share'], 0)})"),
        ]
        for row in comparison["leaderboard"]
    ]  # fmt: skip


def _gain_text(contrast: Mapping[str, Any], is_share: bool) -> str:
    found = contrast["difference"]
    low, high = found["low"], found["high"]
    ends = "" if low is None else f" ({signed(low, is_share=is_share)} to {signed(high, is_share=is_share)})"
    return f"{signed(found['value'], is_share=is_share)}{' points' if is_share else ''}{ends}"


def _answer_cell(answer: Mapping[str, Any] | None) -> str:
    if answer is None:
        return UNKNOWN
    marks = {True: "✓ ", False: "✗ "}
    mark = marks[answer["right"]] if answer["right"] is not None else ""
    is_graded = answer["right"] is None and answer["score"] is not None
    score = f"[{metric_text(answer['score'], is_share=False)}] " if is_graded else ""
    return f"{mark}{score}{answer['text']}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        f"| {' | '.join(cell if index == 1 else markdown_text(cell) for cell in row)} |" for index, row in enumerate(lines)
    )


def _columns(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + wide - sum(unicodedata.combining(character) > 0 for character in text)
