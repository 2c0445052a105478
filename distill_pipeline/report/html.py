"""The reports as pages: one self-contained HTML file each, without scripts, fonts or requests.

Decided: the template engine escapes everything, texts of models go through ``visible_text`` besides, and a content
security policy allows the page's own style sheet by its hash and nothing else, so that markup that slipped through would
still be inert. Charts are SVG with numbers only. Equal reports give equal bytes.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from distill_pipeline.records import FUNNEL
from distill_pipeline.report.comparison import contrast_students, init_text, is_share_headline, shared_warnings, teacher_text
from distill_pipeline.report.figures import (
    count_rows,
    curve_panels,
    curve_plot,
    difference_row,
    gap_ruler,
    histogram_bars,
    score_chart,
)
from distill_pipeline.report.funnel import (
    funnel_rows,
    histogram_rows,
    largest_reasons,
    pass_text,
    reason_rows,
    sample_rows,
)
from distill_pipeline.report.text import (
    UNKNOWN,
    compact,
    duration,
    interval_range,
    metric_text,
    number,
    percent,
    signed,
    visible_text,
)

TEMPLATES = Path(__file__).parent / "templates"
NO_BREAK_PERCENT = "\u00a0%"
COST_LABELS = {
    "teacher_prompt_tokens": "Teacher's prompt tokens", "teacher_completion_tokens": "Teacher's answer tokens",
    "trained_tokens": "Trained tokens", "generation_seconds": "Generation", "training_seconds": "Training",
    "evaluation_seconds": "Evaluation",
}  # fmt: skip


def student_html(report: Mapping[str, Any]) -> str:
    """A student's report (of ``build_student_report``) as a page."""
    models = report["headline"]["models"]
    is_share, gap = is_share_headline(report), report["gap_recovered"]
    rows = [{"name": name, "role": name, "interval": found} for name, found in _baselines_first(models)]
    return _render(
        "student.html.j2", report=report, models=[name for name, _ in _baselines_first(models)],
        init=visible_text(init_text(report["init"]), 120), teacher=teacher_text(report), lede=_student_lede(report),
        tiles=_tiles(report), documents=number(models["student"]["n"]) if models["student"]["n"] else "",
        scores=score_chart(rows, is_share=is_share), ruler=gap_ruler(gap, gap["n"]),
        table=_task_rows(report), held_out=_held_out_rows(report), plot=curve_plot(report["curve"]),
        panels=curve_panels(report["curve"]),
        training=[(name.replace("_", " "), _plain(value)) for name, value in report["training"].items()],
        cost=_cost_rows(report["cost"]), funnel=[_funnel_stage(stage) for stage in report["funnel"]],
        filters=[_filter_part(name, facts) for name, facts in report["filters"].items() if facts["funnel"]],
        lineage=[{**row, "counts": counts_text(row.get("counts", {}))} for row in report["lineage"]],
        inputs=sorted(report["input_versions"].items()), packages=sorted(report["packages"].items()),
    )  # fmt: skip


def comparison_html(comparison: Mapping[str, Any]) -> str:
    """A comparison (of ``build_comparison``) as a page."""
    is_share = comparison["is_share"]
    teachers = [row for row in comparison["references"] if row["role"] == "teacher"]
    others = [row for row in comparison["references"] if row["role"] != "teacher"]
    rows = [{"name": row["name"], "role": row["role"], "interval": row["score"]} for row in teachers]
    rows += [
        {"name": row["student"], "role": "student", "detail": row["method"], "interval": row["score"]}
        for row in comparison["leaderboard"]
    ]
    rows += [{"name": row["name"], "role": row["role"], "interval": row["score"]} for row in others]
    plots = [(report, curve_plot(report["curve"])) for report in comparison["students"]]
    facts = {str(teacher.get("name")): teacher for report in comparison["students"] for teacher in report["teachers"]}
    return _render(
        "comparison.html.j2", comparison=comparison, lede=_comparison_lede(comparison),
        scores=score_chart(rows, is_share=is_share),
        rows=[_leaderboard_cells(row, is_share) for row in comparison["leaderboard"]],
        contrasts=_contrast_rows(comparison), filters=[_filter_cells(row) for row in comparison["filters"]],
        teachers=[facts[name] for name in sorted(facts)],
        plots=[{**plot, "name": report["student"], "method": report["method"]} for report, plot in plots if plot],
        warnings=shared_warnings(comparison),
    )  # fmt: skip


def write_student_report(report: Mapping[str, Any], path: Path) -> None:
    """Write a student's page."""
    path.write_text(student_html(report), encoding="utf-8")


def write_comparison(comparison: Mapping[str, Any], path: Path) -> None:
    """Write the comparison's page."""
    path.write_text(comparison_html(comparison), encoding="utf-8")


def counts_text(counts: Mapping[str, Any]) -> str:
    """``prompts 1,200, accepted 980``, without zeros."""
    said = [f"{name.replace('_', ' ')} {_plain(value)}" for name, value in counts.items() if value]
    return visible_text(", ".join(said) or "no counts")


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_finalized,
    )  # fmt: skip
    environment.filters |= {"visible": visible_text, "number": number}
    return environment


def _finalized(value: Any) -> Any:
    """Every plain text on its way into a page: its invisible characters become visible ones. Escaping comes after."""
    return visible_text(value, len(value)) if type(value) is str else value


def _render(template: str, **values: Any) -> str:
    from markupsafe import Markup

    style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    page: str = _environment().get_template(template).render(**values, style=Markup(style), style_hash=Markup(digest))
    return page


# --- what a student's page says ---------------------------------------------------------------------------------------


def _baselines_first(models: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Teacher, then the student, then other students, then the untrained one: the order in which people compare."""
    order = {"teacher": 0, "student": 1, "untrained": 3}
    return sorted(models.items(), key=lambda item: (order.get(item[0], 2), item[0]))


def _student_lede(report: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """The result as one sentence or two: parts of text, and whether each is a number to be set in bold."""
    models, gap, share = report["headline"]["models"], report["gap_recovered"], report["parameters"]["share"]
    is_share = is_share_headline(report)
    if models["student"]["value"] is None:
        return [("No task of this evaluation has a metric by which models can be compared; see the table below.", False)]
    said = [("The student scores ", False), _figure(models["student"], is_share), (f" on {report['headline']['label']}", False)]
    for name, words in (("teacher", "; its teacher "), ("untrained", ", and before training it had ")):
        if name in models:
            said += [(words, False), _figure(models[name], is_share)]
    if gap["value"] is not None:
        said += [(". Training recovered ", False), (percent(gap["value"], 0), True), (" of the gap", False)]
        said += [(" with ", False), (percent(share, 0), True), (" of the parameters", False)] if share is not None else []
    return [*said, (".", False)]


def _figure(interval: Mapping[str, Any], is_share: bool) -> tuple[str, bool]:
    return metric_text(interval["value"], is_share=is_share), True


def _tiles(report: Mapping[str, Any]) -> list[dict[str, str]]:
    models, gap, parameters = report["headline"]["models"], report["gap_recovered"], report["parameters"]
    is_share = is_share_headline(report)
    held_out = report["held_out"].get("student", {})
    start = report["held_out"].get("untrained", {}).get("forward_kl")
    said = [f"{interval_range(gap, is_share=True)} %"] if gap["value"] is not None else [gap.get("reason") or "unknown"]
    lead = report["headline"]["student_minus_teacher"]
    known = lead["value"] is not None
    beside = f"{_signed(lead['value'], is_share)} against the teacher" if known else "no teacher to compare with"
    return [
        {"what": "Gap recovered", "value": percent(gap["value"]), "more": said[0]},
        {"what": "Score", "value": metric_text(models["student"]["value"], is_share=is_share), "more": beside},
        {"what": "KL to the teacher", "value": number(held_out.get("forward_kl")),
         "more": "nats per token" + (f", before training {number(start)}" if start is not None else "")},
        {"what": "Size", "value": compact(parameters.get("student")),
         "more": f"{percent(parameters['share'], 0)} of the teacher's {compact(parameters.get('teacher'))}"
                 if parameters["share"] is not None else "the teacher's size is not known"},
    ]  # fmt: skip


def _signed(value: float, is_share: bool) -> str:
    return signed(value, is_share=is_share) + (" points" if is_share else "")


def _task_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, metrics in report["tasks"].items():
        for metric, models in metrics.items():
            facts = report["metrics"][task][metric]
            cells = [models.get(name, {"value": None}) for name, _ in _baselines_first(report["headline"]["models"])]
            known = [cell["value"] for cell in cells if cell["value"] is not None]
            best = (max if facts["higher_is_better"] else min)(known) if known else None
            rows.append({
                "task": task, "metric": metric, "higher": facts["higher_is_better"],
                "n": number(models.get("student", {}).get("n")),
                "cells": [{
                    "value": metric_text(cell["value"], is_share=facts["is_share"]), "best": cell["value"] == best is not None,
                    "range": interval_range(cell, is_share=facts["is_share"]),
                } for cell in cells],
            })  # fmt: skip
    return rows


def _held_out_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "name": name, "kl": number(found.get("forward_kl")), "agreement": percent(found.get("top1_agreement")),
            "tokens": f"{number(found.get('tokens'))} in {number(found.get('answers'))} answers", "reason": found.get("reason"),
        }
        for name, found in report["held_out"].items()
    ]  # fmt: skip


def _cost_rows(cost: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        (COST_LABELS.get(name, name.replace("_", " ")), duration(value) if name.endswith("_seconds") else number(value))
        for name, value in cost.items()
        if value is not None
    ]


def _funnel_stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    frac = f" ({percent(stage['kept'] / stage['in'])})".replace(" %", NO_BREAK_PERCENT) if stage["in"] else ""
    return {
        "name": stage["stage"], "said": f"{stage['kept']:,} of {stage['in']:,} {stage['unit']} went on{frac}",
        "rows": count_rows(("went on", stage["kept"]), stage["lost"], stage["in"]),
    }  # fmt: skip


def _filter_part(name: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What one filter decided: the funnel by domain, reasons by domain, accepted per prompt, pass rates, samples."""
    domains, reasons = reason_rows(facts)
    return {
        "name": name, "stages": FUNNEL, "domains": domains, "pass_text": pass_text(facts), "samples": sample_rows(facts),
        "funnel": [
            {"domain": row["domain"], "cells": [number(row[stage]) for stage in FUNNEL], "share": percent(row["accepted_frac"])}
            for row in funnel_rows(facts)
        ],
        "reasons": [(reason.replace("_", " "), [number(n) if n else "" for n in counts]) for reason, counts in reasons],
        "accepted": histogram_bars([(f"{accepted} accepted", n) for accepted, n in histogram_rows(facts)]),
    }  # fmt: skip


def _filter_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    rates = ", ".join(f"{name} {percent(rate)}" for name, rate in row["pass_at"].items())
    return {
        "name": row["name"], "cells": [number(row[stage]) for stage in FUNNEL], "share": percent(row["accepted_frac"]),
        "per_prompt": number(row["per_prompt"]), "rates": rates or UNKNOWN,
        "reasons": largest_reasons(row["reasons"]),
    }  # fmt: skip


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: UNKNOWN}[value]
    if isinstance(value, int | float):
        return number(value, 4)
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(part)}" for name, part in value.items())
    return ", ".join(map(_plain, value)) if isinstance(value, list | tuple) else str(value)


# --- what the comparison says -----------------------------------------------------------------------------------------


def _comparison_lede(comparison: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Who leads, by how much, and who is last."""
    rows = [row for row in comparison["leaderboard"] if row["score"]["value"] is not None]
    if not rows:
        return [("No student has a score by which it can be compared.", False)]
    best, last, is_share = rows[0], rows[-1], comparison["is_share"]
    said = [
        (best["student"], True),
        (" leads with ", False),
        _figure(best["score"], is_share),
        (f" on {comparison['label']}", False),
    ]
    if (gap := best["gap_recovered"]["value"]) is not None:
        said += [(", which is ", False), (percent(gap, 0), True), (" of the way from its untrained self to its teacher", False)]
    if len(rows) > 1:
        said += [(f". {last['student']} is last with ", False), _figure(last["score"], is_share)]
    return [*said, (".", False)]


def _leaderboard_cells(row: Mapping[str, Any], is_share: bool) -> dict[str, Any]:
    return {
        "student": row["student"], "method": row["method"], "teacher": row["teacher"], "filter": row["filter"],
        "init": visible_text(row["init"], 120), "has_score": row["score"]["value"] is not None,
        "score": metric_text(row["score"]["value"], is_share=is_share),
        "range": interval_range(row["score"], is_share=is_share),
        "gap": percent(row["gap_recovered"]["value"]), "gap_range": interval_range(row["gap_recovered"], is_share=True),
        "kl": number(row["held_out_kl"]), "agreement": percent(row["top1_agreement"]),
        "parameters": compact(row["parameters"]),
        "share": "" if row["share"] is None else f"{percent(row['share'], 0)} of teacher",
        "tokens": compact(row["trained_tokens"]), "seconds": duration(row["training_seconds"]),
    }  # fmt: skip


def _contrast_rows(comparison: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
    contrasts = comparison["contrasts"]
    ends = [abs(found["difference"][end] or 0.0) for found in contrasts for end in ("value", "low", "high")]
    return [
        {
            **difference_row(found["difference"], max(ends), is_share=comparison["is_share"]),
            "change": f"{found['factor']}: {found['from']} → {found['to']}", "pair": contrast_students(found),
        }
        for found in contrasts
    ]  # fmt: skip
