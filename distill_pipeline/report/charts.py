"""Small PNG charts for the orchestrator's pages, which take images but no style sheets. The HTML report draws its own."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.report.text import metric_text

INK, MUTED, RULE = "#1f2933", "#6b7280", "#d9dde3"
ROLE_COLORS = {"student": "#0f766e", "teacher": "#4f46e5", "untrained": "#9aa3af"}
OTHER_COLOR = "#b45309"
DPI = 110


def loss_curve_png(curve: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss by optimizer step, as PNG bytes (under 60 KB). Rows need ``step`` and ``loss``; no row gives an empty chart."""
    figure, axes = _figure(6.0, 2.6)
    steps = [row["step"] for row in curve if row.get("loss") is not None]
    losses = [row["loss"] for row in curve if row.get("loss") is not None]
    axes.plot(steps, losses, color=ROLE_COLORS["student"], linewidth=1.6, marker="o" if len(steps) < 3 else None)
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


def _figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure outside pyplot, which would keep it in a global list and choose a backend for the whole process."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(RULE)
    axes.tick_params(colors=MUTED, labelsize=9, length=0)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()
