"""What a filter did, in numbers: counts that add up, yields, reasons with samples, and pass rates.

Pass rates: a completion counts when all its scores are known; it is correct when none is below ``min_score`` (1.0 where the
filter sets none). ``pass@k`` is the unbiased estimate 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv:2107.03374), averaged
over prompts with n >= k. With few samples c and n say more than their ratio, so both are stored. Where a teacher was asked
until enough was accepted, hard prompts have more samples and the last ones are likelier to be correct: then only the first
samples count, for which every prompt was asked (``first_samples``).

The funnel: of a domain's ``prompts`` and their ``completions`` those that ``finished`` (neither failed nor cut), of these the
``scored`` ones (every score known), and those ``accepted``. A filter that asks for no score may accept more than were scored.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import Any

from distill_pipeline.filtering.rules import is_truncated
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import REJECT_REASONS, Verdict, correct_of_known
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import FUNNEL

SAMPLES_PER_REASON = 3
PASS_AT = (1, 2, 4, 8, 16, 32, 64)

_SHOWN_CHARS = 300
_ADVICE = {
    "failed": "Mend the teacher (their errors say how)",
    "heldout": "Lower holdout_fraction",
    "language": "Allow more languages",
    "too_short": "Lower length.min_tokens",
    "too_long": "Raise length.max_tokens",
    "unknown_difficulty": "Give the prompts references, choose another scorer, or remove difficulty",
    "too_easy": "Raise difficulty.max",
    "too_hard": "Lower difficulty.min",
    "unknown_score": "Give the prompts references, choose another scorer, or remove min_score",
}
"""What to do about a filter that accepts nothing, by its largest reason."""


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of ``k`` samples drawn from ``num_samples``, of which some are correct, is correct."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


class Ledger:
    """Counts what is decided, prompt by prompt; ledgers of parts are merged in the order of the prompts."""

    def __init__(self, filter_name: str, rule: FilterSpec, *, first_samples: int | None = None) -> None:
        self._name, self._rule, self._first_samples = filter_name, rule, first_samples
        self._first: Counter[str] = Counter()
        self._all: Counter[str] = Counter()
        self._domains: dict[str, Counter[str]] = {}
        self._reasons: dict[str, Counter[str]] = {}
        self._samples: dict[str, list[dict[str, Any]]] = {}
        self._accepted_per_prompt: Counter[int] = Counter()
        self._correct_of: Counter[tuple[int, int]] = Counter()
        self._num_completions = self._num_accepted = 0
        self._best_score: float | None = None

    @property
    def num_completions(self) -> int:
        """Completions seen so far."""
        return self._num_completions

    def add(self, prompt_text: str, domain: str, verdicts: Sequence[Verdict]) -> tuple[int, int]:
        """Count one prompt's verdicts; returns how many completions were correct, of how many that could be judged."""
        tally = self._domains.setdefault(domain, Counter())
        reasons = self._reasons.setdefault(domain, Counter())
        tally["prompts"] += 1
        num_accepted = 0
        for verdict in verdicts:
            self._num_completions += 1
            tally["completions"] += 1
            if verdict.reasons:
                self._reject(prompt_text, verdict, tally)
                reasons[verdict.reasons[0]] += 1
            else:
                num_accepted += 1
            if not verdict.has_failed and not is_truncated(verdict.row["finish_reason"], verdict.row["raw_text"]):
                tally["finished"] += 1
                tally["scored"] += verdict.is_known
            if not verdict.has_failed and verdict.is_known:
                worst = min(verdict.known_scores)
                self._best_score = worst if self._best_score is None else max(self._best_score, worst)
        rule, most = self._rule.of(domain), self._first_samples
        self._num_accepted += num_accepted
        tally["accepted"] += num_accepted
        self._accepted_per_prompt[num_accepted] += 1
        first = verdicts if most is None else [verdict for verdict in verdicts if verdict.row["sample_index"] < most]
        self._correct_of[correct_of_known(first, rule)] += 1
        return correct_of_known(verdicts, rule)

    def merge(self, later: "Ledger") -> None:
        """Add what another ledger of the same filter counted of the prompts after these."""
        self._first.update(later._first)
        self._all.update(later._all)
        for own, others in ((self._domains, later._domains), (self._reasons, later._reasons)):
            for domain, tally in others.items():
                own.setdefault(domain, Counter()).update(tally)
        for reason, samples in later._samples.items():
            listed = self._samples.setdefault(reason, [])
            listed += samples[: SAMPLES_PER_REASON - len(listed)]
        self._accepted_per_prompt.update(later._accepted_per_prompt)
        self._correct_of.update(later._correct_of)
        self._num_completions += later._num_completions
        self._num_accepted += later._num_accepted
        known = [best for best in (self._best_score, later._best_score) if best is not None]
        self._best_score = max(known, default=None)

    def _reject(self, prompt_text: str, verdict: Verdict, tally: Counter[str]) -> None:
        first = verdict.reasons[0]
        self._first[first] += 1
        self._all.update(verdict.reasons)
        tally["failed" if first == "failed" else "rejected"] += 1
        samples = self._samples.setdefault(first, [])
        if len(samples) < SAMPLES_PER_REASON:
            row = verdict.row
            detail = (row["error"] or "") if first == "failed" else verdict.detail or _scores_text(verdict)
            texts = {"prompt": prompt_text, "answer": row["answer"], "detail": detail}
            shown = {name: text[:_SHOWN_CHARS] for name, text in texts.items()}
            samples.append({"completion_id": row["completion_id"], **shown})

    def outcome(self) -> Outcome:
        """Counts with conservation asserted, facts, and the failed gate of an empty set."""
        rejected = {reason: self._first[reason] for reason in REJECT_REASONS if reason != "failed"}
        counts = {
            "completions": self._num_completions,
            "accepted": self._num_accepted,
            "failed": self._first["failed"],
            "rejected": sum(rejected.values()),
            **{f"rejected_{reason}": number for reason, number in rejected.items()},
            "prompts": self._accepted_per_prompt.total(),
            "prompts_with_accepted": self._accepted_per_prompt.total() - self._accepted_per_prompt[0],
        }
        assert counts["completions"] == counts["accepted"] + counts["failed"] + counts["rejected"], counts
        return Outcome(counts, self._facts(), None if self._num_accepted else self._empty_message())

    def _facts(self) -> dict[str, Any]:
        yields = {
            domain: {name: tally[name] for name in ("accepted", "completions", "failed", "rejected")}
            | {"accepted_frac": round(tally["accepted"] / tally["completions"], 6)}
            for domain, tally in sorted(self._domains.items())
        }
        return {
            "yields": yields,
            "funnel": {domain: {name: tally[name] for name in FUNNEL} for domain, tally in sorted(self._domains.items())},
            "domain_reasons": {
                domain: {reason: found[reason] for reason in REJECT_REASONS if found[reason]}
                for domain, found in sorted(self._reasons.items())
            },
            "reasons": {reason: self._first[reason] for reason in REJECT_REASONS if self._first[reason]},
            "all_reasons": {reason: self._all[reason] for reason in REJECT_REASONS if self._all[reason]},
            "samples": self._samples,
            "accepted_per_prompt": {str(key): self._accepted_per_prompt[key] for key in sorted(self._accepted_per_prompt)},
            "best_score": self._best_score,
            "pass_at": self._pass_rates(),
            "correct_of_known": {f"{c} of {n}": number for (c, n), number in sorted(self._correct_of.items())},
        }

    def _pass_rates(self) -> dict[str, dict[str, float]]:
        rates = {}
        for k in PASS_AT:
            fit = {(c, n): number for (c, n), number in self._correct_of.items() if n >= k}
            if fit:
                prompts = sum(fit.values())
                mean = sum(pass_at_k(n, c, k) * number for (c, n), number in sorted(fit.items())) / prompts
                rates[str(k)] = {"mean": round(mean, 6), "prompts": prompts}
        return rates

    def _empty_message(self) -> str:
        name = self._name if self._name.startswith("filtered_set") else f"filtered_set {self._name}"
        if not self._num_completions:
            return f"{name} is empty: there are no teacher outputs. Check which domains the teacher answers."
        largest = max(REJECT_REASONS, key=lambda reason: self._first[reason])
        facts, advice = f"{self._first[largest]:,}", _ADVICE.get(largest, f"Remove {largest} from drop")
        if largest == "below_min_score":
            wanted = max(rule.min_score or 0.0 for rule in self._rule.rules())
            best = "unknown" if self._best_score is None else f"{self._best_score:.2f}"
            facts += f"; min_score={wanted:.2f}, best score {best}"
            has_better = self._best_score is not None and self._best_score >= wanted
            advice = "Ask the teacher for more samples" if has_better else f"Lower min_score below {best}"
        return (
            f"{name} is empty: 0 of {self._num_completions:,} teacher outputs passed. Largest reject reason: {largest} "
            f"({facts}). {advice}, or read the rejected rows in its part-*.parquet files."
        )


def _scores_text(verdict: Verdict) -> str:
    return "; ".join(
        f"{score['scorer']} {'unknown' if score['score'] is None else format(score['score'], 'g')}: {score['detail']}"
        for score in verdict.scores
    )
