"""What one scorer said in one domain, counted."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from distill_pipeline.scoring.registry import ScoreValue

HISTOGRAM_BINS = 10


@dataclass
class Tally:
    """Counts of one scorer in one domain. The histogram's bins are a tenth wide; the last one holds 1.0 too.

    ``reused`` scores were looked up, ``anew`` were made; ``lost`` counts unknowns that are tried again, by their cause.
    """

    known: int = 0
    unknown: int = 0
    total: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)
    reused: int = 0
    anew: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, value: ScoreValue, *, is_reused: bool) -> None:
        """Count one row's score."""
        self.reused += is_reused
        self.anew += not is_reused
        if value.lost:
            self.lost[value.lost] += 1
        if value.score is None:
            self.unknown += 1
            return
        self.known += 1
        self.total += value.score
        self.histogram[min(int(value.score * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1

    def merge(self, other: "Tally") -> None:
        """Add what another tally counted."""
        self.known, self.unknown, self.total = self.known + other.known, self.unknown + other.unknown, self.total + other.total
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.reused, self.anew = self.reused + other.reused, self.anew + other.anew
        self.lost += other.lost

    def facts(self) -> dict[str, Any]:
        """Mean, counts and histogram as JSON."""
        mean = round(self.total / self.known, 6) if self.known else None
        return {"mean": mean, "known": self.known, "unknown": self.unknown, "histogram": self.histogram}
