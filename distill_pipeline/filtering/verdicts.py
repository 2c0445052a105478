"""Deciding about the completions of one prompt: every reason each has, which are kept, and in which rank.

Decisions depend on the prompt's completions alone, and among equals on ``sample_index``: not on batches, nor on row order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_pipeline.filtering import rules
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.prompts.contamination import ContaminationIndex

REJECT_REASONS = (
    "failed", "heldout", "empty", "truncated", "refusal", "repetition", "contaminated", "duplicate", "unknown_score",
    "below_min_score", "not_best", "over_max_per_prompt",
)  # fmt: skip
"""All reasons, in the order in which the first one counts."""


@dataclass(slots=True)
class Verdict:
    """What was decided about one completion. ``detail`` says more about contamination."""

    row: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    reasons: list[str] = field(default_factory=list)
    rank: int | None = None
    detail: str = ""

    @property
    def known_scores(self) -> list[float]:
        """Scores that are known."""
        return [score["score"] for score in self.scores if score["score"] is not None]

    @property
    def has_failed(self) -> bool:
        """Whether the teacher gave no answer at all."""
        return self.reasons[:1] == ["failed"]

    @property
    def is_known(self) -> bool:
        """Whether every one of at least one scorer could tell."""
        return bool(self.scores) and len(self.known_scores) == len(self.scores)

    @property
    def mean_score(self) -> float:
        """Mean of the known scores; -1 where there is none, which ranks last."""
        known = self.known_scores
        return sum(known) / len(known) if known else -1.0


def judge_prompt(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[Mapping[str, Any]]],
    *,
    is_heldout: bool,
    rule: FilterSpec,
    protected: ContaminationIndex | None,
) -> list[Verdict]:
    """Verdicts on a prompt's completions, in the order given.

    Args:
        rows: completions (``COMPLETION_SCHEMA``) of one prompt.
        scores: the scores of each.
        protected: what completions must not contain; used when ``rule.drop`` names ``contaminated``.
    """
    verdicts = [Verdict(row, given) for row, given in zip(rows, scores, strict=True)]
    in_order = sorted(verdicts, key=lambda verdict: (verdict.row["sample_index"], verdict.row["completion_id"]))
    seen: set[tuple[str, str]] = set()
    for verdict in in_order:
        if verdict.row["finish_reason"] == "error":
            verdict.reasons = ["failed"]
            continue
        verdict.reasons = ["heldout"] if is_heldout else []
        _judge_text(verdict, rule, protected)
        if "duplicate" in rule.drop:
            key = rules.content_key(verdict.row["reasoning"], verdict.row["answer"])
            if key in seen:
                verdict.reasons.append("duplicate")
            elif not verdict.reasons:
                seen.add(key)
        _judge_scores(verdict, rule)
    _choose([verdict for verdict in in_order if not verdict.reasons], rule)
    return verdicts


def _judge_text(verdict: Verdict, rule: FilterSpec, protected: ContaminationIndex | None) -> None:
    row = verdict.row
    reasoning, answer = row["reasoning"], row["answer"]
    if "empty" in rule.drop and rules.is_empty(answer):
        verdict.reasons.append("empty")
    if "truncated" in rule.drop and rules.is_truncated(row["finish_reason"], row["raw_text"]):
        verdict.reasons.append("truncated")
    if "refusal" in rule.drop and rules.is_refusal(answer):
        verdict.reasons.append("refusal")
    if "repetition" in rule.drop and rules.is_repetitive(reasoning, answer):
        verdict.reasons.append("repetition")
    if "contaminated" in rule.drop and protected is not None:
        match = protected.match_any(text for text in (reasoning, answer) if text)
        if match is not None and not match.is_flag:
            verdict.reasons.append("contaminated")
            verdict.detail = str(match)


def _judge_scores(verdict: Verdict, rule: FilterSpec) -> None:
    if rule.min_score is None:
        return
    if not verdict.is_known:
        verdict.reasons.append("unknown_score")
    if any(score < rule.min_score for score in verdict.known_scores):
        verdict.reasons.append("below_min_score")


def _choose(eligible: list[Verdict], rule: FilterSpec) -> None:
    """Keep what ``keep`` and ``max_per_prompt`` allow of completions without a reason, and rank the kept ones."""
    ranked = sorted(eligible, key=lambda v: (-v.mean_score, *_length(v)))
    preferred = sorted(eligible, key=lambda v: (*_length(v)[:1], -v.mean_score, v.row["sample_index"]))
    order = preferred if rule.keep == "shortest" else ranked
    limit = rule.max_per_prompt or (len(order) if rule.keep == "all" else 1)
    for verdict in order[limit:]:
        verdict.reasons.append("over_max_per_prompt" if rule.keep == "all" else "not_best")
    for rank, verdict in enumerate(verdict for verdict in ranked if not verdict.reasons):
        verdict.rank = rank


def _length(verdict: Verdict) -> tuple[int, int, str]:
    return verdict.row["completion_tokens"], verdict.row["sample_index"], verdict.row["completion_id"]
