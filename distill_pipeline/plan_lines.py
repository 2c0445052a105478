"""A plan's lines, one a node, and how they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PlanLine:
    """What one node needs and gives.

    ``seconds`` is None where nothing was measured, ``usd`` where there are no prices. ``interval`` holds ``rows`` with 95 %
    where they are an estimate.
    """

    node: str
    rows: int
    tokens: int
    num_bytes: int
    seconds: float | None
    note: str = ""
    usd: float | None = None
    interval: tuple[int, int] | None = None


def plan_text(lines: Sequence[PlanLine]) -> str:
    """The plan as a table for a terminal."""
    head = ["node", "rows", "tokens", "bytes", "time", "USD", ""]
    table = [[line.node, _rows(line), f"{line.tokens:,}" if line.tokens else "-", _bytes(line.num_bytes),
              _duration(line.seconds), _usd(line.usd), line.note] for line in lines]  # fmt: skip
    seconds = [line.seconds for line in lines if line.seconds is not None]
    usd = [line.usd for line in lines if line.usd is not None]
    total = [["total", "", f"{sum(line.tokens for line in lines):,}", _bytes(sum(line.num_bytes for line in lines)),
              _duration(sum(seconds) if seconds else None), _usd(sum(usd) if usd else None), ""]]  # fmt: skip
    rows = [head, *table, *total]
    if not usd:
        rows = [[*row[:5], row[6]] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:], strict=True)), row[-1]]
        ).rstrip()
        for row in rows
    )


def _rows(line: PlanLine) -> str:
    if line.interval is None:
        return f"{line.rows:,}"
    return f"{line.rows:,} ({line.interval[0]:,} to {line.interval[1]:,})"


def _bytes(number: float) -> str:
    if not number:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _usd(usd: float | None) -> str:
    return "-" if usd is None else f"{usd:,.2f}" if usd >= 1 else f"{usd:.4f}"
