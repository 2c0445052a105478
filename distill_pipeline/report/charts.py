"""Small PNG charts for the orchestrator's pages, which take images but no style sheets. The HTML report draws its own."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.records import FUNNEL
from distill_pipeline.report.funnel import histogram_rows, largest_domains, reason_rows
from distill_pipeline.report.text import metric_text, one_line

INK, MUTED, RULE = "#1f2933", "#6b7280", "#d9dde3"
ROLE_COLORS = {"student": "#0f766e", "teacher": "#4f46e5", "untrained": "#9aa3af"}
OTHER_COLOR = "#b45309"
DOMAIN_COLORS = ("#0f766e", "#4f46e5", "#b45309", "#be185d", "#0369a1", "#4d7c0f")
DPI = 110
MAX_REASONS = 16


def loss_curve_png(curve: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss by optimizer step, as PNG bytes (under 60 KB). Rows need ``step`` and ``loss``; no row gives an empty chart.

    Where rows have a ``held_out_kl``, it is drawn beside the loss.
    """
    figure, axes = _figure(6.0, 2.6)
    steps = [row["step"] for row in curve if row.get("loss") is not None]
    losses = [row["loss"] for row in curve if row.get("loss") is not None]
    axes.plot(steps, losses, color=ROLE_COLORS["student"], linewidth=1.6, marker="o" if len(steps) < 3 else None)
    if held_out := [(row["step"], row["held_out_kl"]) for row in curve if row.get("held_out_kl") is not None]:
        axes.plot(
            *zip(*held_out, strict=True), color=OTHER_COLOR, linewidth=1.6, marker=".", label="held-out KL to the teacher"
        )
        axes.legend(fontsize=7, frameon=False)
    axes.set_xlabel("optimizer step", color=MUTED, fontsize=9)
    axes.set_ylabel("loss (nats/token)", color=MUTED, fontsize=9)
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    if losses and min(losses) >= 0:
        axes.set_ylim(bottom=0)
    return _png(figure)


def accuracy_png(report: Mapping[str, Any]) -> bytes:
    """The headline number of each model with its interval, as PNG bytes (under 60 KB)."""
    from distill_pipeline.report.comparison import is_share_headline

    models = {name: found for name, found in report["headline"]["models"].items() if found["value"] is not None}
    figure, axes = _figure(6.0, 0.9 + 0.42 * max(1, len(models)))
    names = list(models)[::-1]
    is_share = is_share_headline(report)
    for row, name in enumerate(names):
        found = models[name]
        axes.barh(row, found["value"], height=0.55, color=ROLE_COLORS.get(name, OTHER_COLOR))
        if found["low"] is not None:
            axes.plot([found["low"], found["high"]], [row, row], color=INK, linewidth=1.4)
        end = max(found["value"], found["high"] or 0.0)
        axes.annotate(
            metric_text(found["value"], is_share=is_share), (end, row), xytext=(6, 0), textcoords="offset points",
            va="center", fontsize=9, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names, fontsize=9)
    if is_share:
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel(report["headline"]["label"].replace("$", r"\$"), color=MUTED, fontsize=9)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    return _png(figure)


def funnel_png(facts: Mapping[str, Any]) -> bytes:
    """What a filter decided (``filter_facts``), as PNG bytes (under 80 KB): stages by domain, reasons, accepted per prompt."""
    reasons = reason_rows(facts)[1][:MAX_REASONS]
    figure, panels = _figure(9.0, max(2.6, 0.7 + 0.24 * len(reasons)), columns=3)
    _stages_panel(panels[0], facts)
    names = [_label(reason.replace("_", " ")) for reason, _ in reasons]
    panels[1].barh(range(len(reasons)), [counts[0] for _, counts in reasons], height=0.6, color=OTHER_COLOR)
    panels[1].set_yticks(range(len(reasons)), names, fontsize=8)
    panels[1].invert_yaxis()
    accepted = histogram_rows(facts)
    panels[2].bar(range(len(accepted)), [prompts for _, prompts in accepted], width=0.7, color=ROLE_COLORS["student"])
    panels[2].set_xticks(range(len(accepted)), [count for count, _ in accepted], fontsize=8)
    for axes, said in zip(panels, ("completions", "rejected, by first reason", "prompts by accepted completions"), strict=True):
        axes.set_xlabel(said, color=MUTED, fontsize=9)
    return _png(figure)


def _stages_panel(axes: Any, facts: Mapping[str, Any]) -> None:
    """Completions that reached each stage, one colour a domain while colours last."""
    coloured, num_others, others = largest_domains(facts, len(DOMAIN_COLORS))
    start = [0] * len(FUNNEL[1:])
    for (domain, found), color in zip(
        [*coloured, *([(f"{num_others} others", others)] if num_others else [])], [*DOMAIN_COLORS, RULE], strict=False
    ):
        widths = [found[stage] for stage in FUNNEL[1:]]
        axes.barh(range(len(widths)), widths, left=start, height=0.6, color=color, label=_label(domain))
        start = [before + width for before, width in zip(start, widths, strict=True)]
    axes.set_yticks(range(len(FUNNEL[1:])), FUNNEL[1:], fontsize=8)
    axes.invert_yaxis()
    if len(facts["funnel"]) > 1:
        axes.legend(fontsize=7, frameon=False, loc="lower right")


def _label(text: str) -> str:
    """A short text as a chart can draw it: characters that every font has, and no formula."""
    return one_line(text, 24).encode("latin-1", "replace").decode("latin-1").replace("$", r"\$")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure outside pyplot, which would keep it in a global list and choose a backend for the whole process.

    With several columns the second value is one pair of axes a column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        axes.tick_params(colors=MUTED, labelsize=9, length=0)
    return figure, panels if columns > 1 else panels[0]


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
