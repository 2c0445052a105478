"""What answers cost: tokens that were paid for, over all runs, and what a budget leaves of its limit.

Decided: a budget is never overrun. Before a request is sent the most it can cost is set aside, and afterwards what it did
cost is paid, so that the last requests of a budget are sent one by one. Payments travel to the store with the answers, in
one write, so a crash forgets neither alone. Gave up: requests whose cost nobody reports (a server that hung); they are
counted in ``unreported``.
"""

from dataclasses import dataclass, field

from distill_pipeline.errors import BudgetError
from distill_pipeline.generation.spec import BudgetSpec


@dataclass(frozen=True)
class Usage:
    """Tokens paid for, and the requests they were paid in."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    requests: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens + other.prompt_tokens, self.completion_tokens + other.completion_tokens,
            self.requests + other.requests,
        )  # fmt: skip

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(
            self.prompt_tokens - other.prompt_tokens, self.completion_tokens - other.completion_tokens,
            self.requests - other.requests,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def usd(self, budget: BudgetSpec) -> float:
        """What it costs at the budget's prices."""
        prompts = self.prompt_tokens * budget.usd_per_million_prompt_tokens
        return (prompts + self.completion_tokens * budget.usd_per_million_completion_tokens) / 1e6


@dataclass
class Spending:
    """The account of one family of answers.

    Args:
        before: what earlier runs paid.
        now: what this run paid; ``reserved`` is set aside for requests in flight.
        unreported: requests of this run that ended without a word on their cost.
    """

    budget: BudgetSpec | None = None
    before: Usage = Usage()
    now: Usage = Usage()
    reserved: Usage = Usage()
    unreported: int = 0
    _unsaved: Usage = field(default_factory=Usage)

    def reserve(self, most: Usage) -> bool:
        """Set aside the most a request can cost; False where the budget has no room for it."""
        if self.budget is not None:
            total = self.before + self.now + self.reserved + most
            if self.budget.max_tokens is not None and total.tokens > self.budget.max_tokens:
                return False
            if self.budget.max_usd is not None and total.usd(self.budget) > self.budget.max_usd:
                return False
        self.reserved += most
        return True

    def release(self, most: Usage) -> None:
        """Give back what was set aside."""
        self.reserved -= most

    def pay(self, usage: Usage) -> None:
        """Book what a request cost."""
        self.now += usage
        self._unsaved += usage

    def take_unsaved(self) -> Usage:
        """Payments since the last call: they go to the store with the answers."""
        unsaved, self._unsaved = self._unsaved, Usage()
        return unsaved

    def used_up(self) -> BudgetError:
        """The error of a run that has to stop."""
        assert self.budget is not None, "without a budget nothing is used up"
        total, limits = self.before + self.now, []
        if self.budget.max_usd is not None:
            limits.append(f"{total.usd(self.budget):.4f} of max_usd {self.budget.max_usd:g} are spent")
        if self.budget.max_tokens is not None:
            limits.append(f"{total.tokens:,} of max_tokens {self.budget.max_tokens:,} are used")
        return BudgetError(
            f"the budget is reached: {' and '.join(limits)}, and the next request could cost more than is left. Everything "
            "answered is stored. Raise budget and run again: only the rest is asked."
        )

    def facts(self) -> dict[str, float | int | None]:
        """Tokens and dollars of this run and of all runs; dollars are None without prices."""
        total, budget = self.before + self.now, self.budget
        return {
            "paid_prompt_tokens": self.now.prompt_tokens, "paid_completion_tokens": self.now.completion_tokens,
            "requests": self.now.requests, "requests_of_unknown_cost": self.unreported,
            "usd": None if budget is None else round(self.now.usd(budget), 6),
            "usd_all_runs": None if budget is None else round(total.usd(budget), 6), "tokens_all_runs": total.tokens,
        }  # fmt: skip
