"""Geometry of the pages' charts: plain numbers that the templates put into SVG attributes, rounded so that pages are equal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.report.text import interval_range, metric_text, number, percent, signed

ROLES = ("student", "teacher", "untrained")
QUARTERS = (25, 50, 75)
CURVE_WIDTH, CURVE_HEIGHT = 1000, 200
MAX_POINTS = 400
"""Points of a curve: more than a screen has pixels for would only make the page heavy."""


def score_chart(rows: Sequence[Mapping[str, Any]], *, is_share: bool) -> dict[str, Any]:
    """Bars from zero with intervals. Rows have ``name``, ``role``, ``interval`` and perhaps ``detail``."""
    tops = [end for row in rows for end in (row["interval"]["value"], row["interval"]["high"]) if end is not None]
    top = 1.0 if is_share else max([*tops, 0.0]) * 1.05 or 1.0
    return {
        "rows": [_score_row(row, top, is_share) for row in rows],
        "scale": [metric_text(top * step / 4, is_share=is_share).replace(".0 %", " %") for step in range(5)],
    }


def _score_row(row: Mapping[str, Any], top: float, is_share: bool) -> dict[str, Any]:
    interval = row["interval"]
    said, ends = metric_text(interval["value"], is_share=is_share), interval_range(interval, is_share=is_share)
    role = row["role"] if row["role"] in ROLES else "other"
    return {
        "name": row["name"], "detail": row.get("detail"), "said": said, "range": ends, "css": f"role-{role}", "start": 0,
        "width": _place(interval["value"], top), "low": _place(interval["low"], top), "high": _place(interval["high"], top),
        "ticks": QUARTERS, "label": f"{row['name']}: {said} {ends}".strip(),
    }  # fmt: skip


def count_rows(kept: tuple[str, int], lost: Mapping[str, int], whole: int) -> list[dict[str, Any]]:
    """Bars of counts as shares of ``whole``: first what was kept, then each reason of loss."""
    listed = [(kept[0], kept[1], "fill-kept"), *((reason.replace("_", " "), n, "fill-lost") for reason, n in lost.items())]
    return [_count_row(name, n, whole, css) for name, n, css in listed]


def histogram_bars(counts: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """Bars of (name, count), as shares of all counts together."""
    whole = sum(n for _, n in counts)
    return [_count_row(name, n, whole, "fill-kept") for name, n in counts]


def _count_row(name: str, n: int, whole: int, css: str) -> dict[str, Any]:
    return {
        "name": name, "said": f"{n:,}", "range": percent(n / whole) if whole else "", "css": css, "start": 0,
        "width": _place(n, whole) if whole else 0, "low": None, "high": None, "ticks": (), "label": f"{name}: {n:,}",
    }  # fmt: skip


def difference_row(difference: Mapping[str, Any], largest: float, *, is_share: bool) -> dict[str, Any]:
    """A bar from the middle of the track: to the right for a gain, to the left for a loss."""
    value, half = difference["value"], 50 / largest if largest else 0
    said = signed(value, is_share=is_share) + (" points" if is_share else "")
    ends = [difference["low"], difference["high"]]
    return {
        "start": round(50 + min(0.0, value) * half, 3), "width": round(abs(value) * half, 3),
        "low": None if ends[0] is None else round(50 + ends[0] * half, 3),
        "high": None if ends[1] is None else round(50 + ends[1] * half, 3), "ticks": (50,),
        "css": "fill-kept" if value >= 0 else "fill-down", "said": said,
        "range": "" if ends[0] is None else f"{signed(ends[0], is_share=is_share)} to {signed(ends[1], is_share=is_share)}",
        "label": f"difference {said}",
    }  # fmt: skip


def gap_ruler(gap: Mapping[str, Any], n: int) -> dict[str, Any] | None:
    """The way from the untrained student (0) to the teacher (1) and how far the student came; None where it is unknown."""
    if gap["value"] is None:
        return None
    low, high = (min(1.0, max(0.0, gap[end])) for end in ("low", "high"))
    said = f"The student recovered {percent(gap['value'])} of the teacher's lead"
    return {
        "value": round(100 * min(1.0, max(0.0, gap["value"])), 3), "low": round(100 * low, 3),
        "span": round(100 * (high - low), 3),
        "label": f"{said} (95 % interval {interval_range(gap, is_share=True)} %, paired over {n:,} documents).",
    }  # fmt: skip


CURVE_PANELS = (
    ("held_out_top1", "Same likeliest token as the teacher, held out", 1.0), ("tokens_per_second", "Tokens a second", 1.0),
    ("peak_memory_bytes", "Most memory so far, GB", 1e-9),
)  # fmt: skip
"""What a training curve may hold beside losses: its column, what a reader calls it, and the factor to the unit in that."""


def curve_plot(curve: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """A loss curve as SVG paths over a 1000 x 200 box, from zero; None without two points.

    ``beside`` is the path of the held-out divergence over the same box, where there is one.
    """
    losses, held_out = _points(curve, "loss"), _points(curve, "held_out_kl")
    return _plot("loss", losses, held_out if len(held_out) > 1 else [])


def curve_panels(curve: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same of what the curve holds beside losses, each with its ``title``."""
    plots = [(title, _plot(title, _points(curve, column, factor), [])) for column, title, factor in CURVE_PANELS]
    return [{**plot, "title": title} for title, plot in plots if plot]


def _points(curve: Sequence[Mapping[str, Any]], column: str, factor: float = 1.0) -> list[tuple[int, float]]:
    """(step, value) where a curve has both; at most so many that a screen can show them, the last one among them."""
    steps = [row for row in curve if row.get(column) is not None and row.get("step") is not None]
    points = [(row["step"], row[column] * factor) for row in steps]
    stride = max(1, -(-len(points) // MAX_POINTS))
    return points[::stride] + ([points[-1]] if points and (len(points) - 1) % stride else [])


def _plot(what: str, points: list[tuple[int, float]], beside: list[tuple[int, float]]) -> dict[str, Any] | None:
    if len(points) < 2:
        return None
    first, last = points[0][0], points[-1][0]
    values = [value for _, value in points + beside]
    bottom = -_round_up(-min(values)) if min(values) < 0 else 0.0
    top = _round_up(max(values) - bottom) + bottom
    across, up = CURVE_WIDTH / ((last - first) or 1), CURVE_HEIGHT / ((top - bottom) or 1)
    line, other = (
        "M" + " L".join(f"{(step - first) * across:.1f} {CURVE_HEIGHT - (value - bottom) * up:.1f}" for step, value in line)
        for line in (points, beside)
    )
    return {
        "line": line, "area": f"{line} L{(last - first) * across:.1f} {CURVE_HEIGHT} L0 {CURVE_HEIGHT} Z",
        "beside": other if beside else None,
        "y_ticks": [number(bottom + (top - bottom) * step / 4) for step in (4, 3, 2, 1, 0)],
        "x_ticks": [f"step {number(first)}", number((first + last) // 2), number(last)],
        "label": f"{what} from {number(points[0][1])} at step {first} to {number(points[-1][1])} at step {last}"
        + (f"; held-out divergence from {number(beside[0][1])} to {number(beside[-1][1])}" if beside else ""),
    }  # fmt: skip


def _round_up(value: float) -> float:
    """The next number whose quarter is 1, 2, 2.5 or 5 times a power of ten, so that the scale's numbers are short."""
    if value <= 0:
        return 1.0
    size = 10.0 ** math.floor(math.log10(value / 4))
    return next(4 * step * size for step in (1.0, 2.0, 2.5, 5.0, 10.0) if 4 * step * size >= value * (1 - 1e-12))


def _place(value: float | None, top: float) -> float | None:
    return None if value is None else round(100 * min(1.0, max(0.0, value / top)), 3)
