"""Deciding about the completions of one prompt: every reason each has, which are kept, and in which rank.

Decisions depend on the prompt's completions alone, and among equals on ``sample_index``: not on batches, nor on row order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill_pipeline.filtering import rules
from distill_pipeline.filtering.languages import other_language
from distill_pipeline.filtering.lengths import TokenCounters
from distill_pipeline.filtering.screening import UNSCREENED, Screened
from distill_pipeline.filtering.similarity import Shingles, completion_shingles, is_alike, is_more_alike
from distill_pipeline.filtering.spec import TEACHER_TOKENIZER, DifficultySpec, FilterRule, LengthSpec
from distill_pipeline.prompts.contamination import ContaminationIndex

REJECT_REASONS = (
    "failed", "heldout", "empty", "truncated", "refusal", "self_reference", "repetition", "language", "too_short", "too_long",
    "contaminated", "duplicate", "unknown_difficulty", "too_easy", "too_hard", "unknown_score", "below_min_score",
    "near_duplicate", "not_diverse", "not_best", "over_max_per_prompt",
)  # fmt: skip
"""All reasons, in the order in which the first one counts: no answer, the prompt, the text, the prompt's difficulty, scores,
and what depends on better completions: one with an earlier reason is never compared, so it has none of the last four."""

_ROUNDING = 1e-9
_SCREEN_SLACK = 1e-6


@dataclass(slots=True)
class Verdict:
    """What was decided about one completion. ``detail`` says more about contamination, language, length and likeness."""

    row: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    reasons: list[str] = field(default_factory=list)
    rank: int | None = None
    detail: str = ""
    screened: Screened = UNSCREENED

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


def correct_of_known(verdicts: Sequence[Verdict], rule: FilterRule) -> tuple[int, int]:
    """How many completions are correct (no score below the rule's), of how many whose scores are all known."""
    worst = [min(verdict.known_scores) for verdict in verdicts if not verdict.has_failed and verdict.is_known]
    return sum(score >= rule.correct_score for score in worst), len(worst)


def judge_prompt(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Sequence[Mapping[str, Any]]],
    *,
    is_heldout: bool,
    rule: FilterRule,
    protected: ContaminationIndex | None,
    counters: TokenCounters,
    screened: Sequence[Screened] | None = None,
) -> list[Verdict]:
    """Verdicts on a prompt's completions, in the order given.

    Args:
        rows: completions (``COMPLETION_SCHEMA``) of one prompt.
        scores: the scores of each.
        rule: that of the prompt's domain.
        protected: what completions must not contain; used when ``rule.drop`` names ``contaminated``.
        counters: who counts tokens, by the reference that ``rule.length`` may name.
        screened: what a first look left open about each; decides nothing, saves time.
    """
    looks = screened or [UNSCREENED] * len(rows)
    verdicts = [Verdict(row, given, screened=look) for row, given, look in zip(rows, scores, looks, strict=True)]
    in_order = sorted(verdicts, key=lambda verdict: (verdict.row["sample_index"], verdict.row["completion_id"]))
    seen: set[tuple[str, str]] = set()
    may_be_copy = _share_ends(in_order) if "duplicate" in rule.drop else set()
    for verdict in in_order:
        if verdict.row["finish_reason"] == "error":
            verdict.reasons = ["failed"]
            continue
        verdict.reasons = ["heldout"] if is_heldout else []
        _judge_text(verdict, rule, protected, counters)
        if verdict.row["completion_id"] in may_be_copy:
            key = rules.content_key(verdict.row["reasoning"], verdict.row["answer"])
            if key in seen:
                verdict.reasons.append("duplicate")
            elif not verdict.reasons:
                seen.add(key)
    answered = [verdict for verdict in in_order if not verdict.has_failed]
    difficulty = None if rule.difficulty is None else _difficulty_reason(answered, rule, rule.difficulty)
    for verdict in answered:
        if difficulty is not None:
            verdict.reasons.append(difficulty)
        _judge_scores(verdict, rule)
    _choose([verdict for verdict in answered if not verdict.reasons], rule)
    return verdicts


def _judge_text(verdict: Verdict, rule: FilterRule, protected: ContaminationIndex | None, counters: TokenCounters) -> None:
    row, drop, reasons = verdict.row, rule.drop, verdict.reasons
    reasoning, answer = row["reasoning"], row["answer"]
    if "empty" in drop and rules.is_empty(answer):
        reasons.append("empty")
    if "truncated" in drop and rules.is_truncated(row["finish_reason"], row["raw_text"]):
        reasons.append("truncated")
    if "refusal" in drop and rules.is_refusal(answer):
        reasons.append("refusal")
    if "self_reference" in drop and rules.is_self_reference(answer):
        reasons.append("self_reference")
    if "repetition" in drop and verdict.screened.may_repeat and rules.is_repetitive(reasoning, answer, rule.repetition):
        reasons.append("repetition")
    if "language" in drop and rule.language is not None:
        found = (other_language(text, rule.language) for text in (reasoning, answer) if text)
        if (other := next(filter(None, found), None)) is not None:
            reasons.append("language")
            verdict.detail = f"written in {other}"
    if rule.length is not None:
        _judge_length(verdict, rule.length, counters)
    if "contaminated" in drop and protected is not None and verdict.screened.may_match:
        match = protected.match_any(text for text in (reasoning, answer) if text)
        if match is not None and not match.is_flag:
            reasons.append("contaminated")
            verdict.detail = str(match)


def _share_ends(verdicts: Sequence[Verdict]) -> set[str]:
    """Ids of the completions that begin and end as another does; no other can be a duplicate."""
    alike: dict[tuple[str, str], list[str]] = {}
    for verdict in verdicts if len(verdicts) > 1 else ():
        alike.setdefault(rules.ends(verdict.row["answer"]), []).append(verdict.row["completion_id"])
    return {name for names in alike.values() if len(names) > 1 for name in names}


def _judge_length(verdict: Verdict, length: LengthSpec, counters: TokenCounters) -> None:
    row, name = verdict.row, length.tokenizer
    tokens = row["completion_tokens"] if name == TEACHER_TOKENIZER else counters[name].count(row["raw_text"])
    if length.min_tokens is not None and tokens < length.min_tokens:
        verdict.reasons.append("too_short")
        verdict.detail = f"{tokens} tokens, min_tokens={length.min_tokens}"
    elif length.max_tokens is not None and tokens > length.max_tokens:
        verdict.reasons.append("too_long")
        verdict.detail = f"{tokens} tokens, max_tokens={length.max_tokens}"


def _difficulty_reason(answered: Sequence[Verdict], rule: FilterRule, band: DifficultySpec) -> str | None:
    """Why a prompt lies outside the band of pass rates, or None."""
    correct, known = correct_of_known(answered, rule)
    if not known:
        return "unknown_difficulty"
    # Whole numbers are compared, not quotients: 0.3 must hold 3 of 10.
    if correct < band.min * known - _ROUNDING:
        return "too_hard"
    return "too_easy" if correct > band.max * known + _ROUNDING else None


def _judge_scores(verdict: Verdict, rule: FilterRule) -> None:
    if rule.min_score is None:
        return
    if not verdict.is_known:
        verdict.reasons.append("unknown_score")
    if any(score < rule.min_score for score in verdict.known_scores):
        verdict.reasons.append("below_min_score")


def _choose(eligible: list[Verdict], rule: FilterRule) -> None:
    """Keep what the rule allows of completions that have no reason, and rank the kept ones, best first."""
    likeness = _Likeness()
    ranked = sorted(eligible, key=lambda v: (-v.mean_score, *_length(v)))
    if rule.near_duplicate is not None and "near_duplicate" in rule.drop:
        _drop_near_duplicates(ranked, rule.near_duplicate.threshold, likeness)
    by_length = sorted(ranked, key=lambda v: (*_length(v)[:1], -v.mean_score, v.row["sample_index"]))
    order = [verdict for verdict in (by_length if rule.keep == "shortest" else ranked) if not verdict.reasons]
    limit = rule.most_per_prompt
    kept: list[Verdict] = []
    for verdict in order:
        if limit is not None and len(kept) >= limit:
            verdict.reasons.append("over_max_per_prompt" if rule.keep == "all" else "not_best")
        elif rule.diversity is not None and likeness.has_closer(verdict, kept, rule.diversity.max_similarity):
            verdict.reasons.append("not_diverse")
        else:
            kept.append(verdict)
    for rank, verdict in enumerate(verdict for verdict in ranked if not verdict.reasons):
        verdict.rank = rank


def _drop_near_duplicates(ranked: Sequence[Verdict], threshold: float, likeness: "_Likeness") -> None:
    """The best of those that are alike stays; each is compared with the ones that stay."""
    kept: list[Verdict] = []
    for verdict in ranked if len(ranked) > 1 else ():
        twin = likeness.first_twin(verdict, kept, threshold)
        if twin is None:
            kept.append(verdict)
        else:
            verdict.reasons.append("near_duplicate")
            verdict.detail = f"like sample {twin.row['sample_index']}"


class _Likeness:
    """Compares the completions of one prompt; each is cut into shingles once, when it is first asked for."""

    def __init__(self) -> None:
        self._shingles: dict[str, Shingles] = {}

    def first_twin(self, verdict: Verdict, others: Sequence[Verdict], threshold: float) -> Verdict | None:
        """The first of the others that is at least so similar."""
        near = self._open(verdict, others, threshold)
        return next((other for other in near if is_alike(self._of(verdict), self._of(other), threshold)), None)

    def has_closer(self, verdict: Verdict, others: Sequence[Verdict], most: float) -> bool:
        """Whether any of the others is more similar than this."""
        near = self._open(verdict, others, most)
        return any(is_more_alike(self._of(verdict), self._of(other), most) for other in near)

    @staticmethod
    def _open(verdict: Verdict, others: Sequence[Verdict], similarity: float) -> list[Verdict]:
        """Those of the others that may be so similar, after a first look at both."""
        least = similarity - _SCREEN_SLACK
        if verdict.screened.most_alike < least:
            return []
        return [other for other in others if other.screened.most_alike >= least]

    def _of(self, verdict: Verdict) -> Shingles:
        found = self._shingles.get(verdict.row["completion_id"])
        if found is None:
            found = completion_shingles(verdict.row["reasoning"], verdict.row["answer"])
            self._shingles[verdict.row["completion_id"]] = found
        return found


def _length(verdict: Verdict) -> tuple[int, int, str]:
    return verdict.row["completion_tokens"], verdict.row["sample_index"], verdict.row["completion_id"]
