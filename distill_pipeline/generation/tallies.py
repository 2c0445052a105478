"""What a teacher's rows are and cost, by domain: the one place that counts them, so that the parts make up the whole.

A prompt's own tokens count once, however many of its samples there are. Dollars are those of the rows at the budget's prices,
whenever they were paid; what a run paid, and what failed requests cost, is in the teacher's account (``cost``), which knows no
domains.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.spec import BudgetSpec

FATES = {"stop": "stopped", "length": "truncated", "error": "failed"}
"""What a row is counted as, by its finish reason."""

COLUMNS = (
    "prompts", "completions", "stopped", "truncated", "failed", "generated", "prompt_tokens", "completion_tokens",
    "generated_tokens",
)  # fmt: skip
"""What is counted in each domain; ``generated`` and its tokens are of this run, all others of the rows, old and new."""


class Tallies:
    """Counts by domain."""

    def __init__(self, budget: BudgetSpec | None) -> None:
        self._budget = budget
        self._domains: dict[str, Counter[str]] = {}

    def add_generated(self, domain: str, completion_tokens: int) -> None:
        """Count an answer that was made now."""
        self._of(domain).update(generated=1, generated_tokens=completion_tokens)

    def add_prompt(self, domain: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Count a prompt with all its rows (``COMPLETION_SCHEMA``)."""
        tally = self._of(domain)
        tally.update(FATES[row["finish_reason"]] for row in rows)
        tally.update(
            prompts=1, completions=len(rows), prompt_tokens=max((row["prompt_tokens"] for row in rows), default=0),
            completion_tokens=sum(row["completion_tokens"] for row in rows),
        )  # fmt: skip

    def total(self, name: str) -> int:
        """One of ``COLUMNS`` over all domains."""
        return sum(tally[name] for tally in self._domains.values())

    def facts(self) -> dict[str, dict[str, int | float | None]]:
        """``COLUMNS`` and ``usd`` (None without prices) of each domain, by name."""
        return {
            domain: {**{name: tally[name] for name in COLUMNS}, "usd": self._usd(tally)}
            for domain, tally in sorted(self._domains.items())
        }

    def _of(self, domain: str) -> Counter[str]:
        return self._domains.setdefault(domain, Counter())

    def _usd(self, tally: Counter[str]) -> float | None:
        if self._budget is None or not self._budget.has_prices:
            return None
        return round(Usage(tally["prompt_tokens"], tally["completion_tokens"]).usd(self._budget), 6)
