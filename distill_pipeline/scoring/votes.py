"""``majority_vote``: the samples of a prompt vote on its answer; no reference is needed.

Decided: answers are put into classes by a verifier, not by their strings. An answer that was cut, or that the verifier does
not find equal to itself, does not vote but counts in the total; failed requests are no samples. A tie has no winner.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import groupby

from distill_pipeline.hashing import sha256_of
from distill_pipeline.scoring.numbers import Quantity, final_part, quantities
from distill_pipeline.scoring.registry import Scorer, ScoreValue, equality_of, resolve_scorer
from distill_pipeline.scoring.rows import AnswerRow, BenchScorer, ScoringContext
from distill_pipeline.scoring.scorers import chosen_letter
from distill_pipeline.scoring.spec import ScorerSpec


class MajorityVote(BenchScorer):
    """1.0 for answers of the winning class, 0.0 for those of other classes, unknown for others and where none wins.

    Options: ``by``, the scorer that tells answers equal (default ``exact``, on the final answer) and ``by_options``;
    ``min_votes`` (2) and ``min_share`` of all samples (0.5) that the winner needs.
    """

    scores_whole_prompts = True

    def __init__(self, scorer: Scorer, context: ScoringContext) -> None:
        spec = ScorerSpec(kind=scorer.kind, options=dict(scorer.options), timeout_seconds=scorer.timeout_seconds)
        self._by = resolve_scorer(equality_of(spec))
        super().__init__(scorer, context, self._by)
        self._min_votes = scorer.options.get("min_votes", 2)
        self._min_share = scorer.options.get("min_share", 0.5)

    def keys(self, rows: Sequence[AnswerRow]) -> list[str]:
        """A score depends on all samples of the prompt, whatever their order."""
        found = []
        for prompt_id, group in groupby(rows, lambda row: row.prompt_id):
            ballots = [[row.answer, _is_cut(row)] for row in group]
            election = sha256_of([prompt_id, sorted(ballots)])
            found += [sha256_of([election, ballot])[:32] for ballot in ballots]
        return found

    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        return [value for _, group in groupby(rows, lambda row: row.prompt_id) for value in self._elect(list(group))]

    def _elect(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        """One prompt's scores."""
        finals = [None if _is_cut(row) else final_answer(row.answer, self._by) for row in rows]
        classes, lost = self._classes({text for text in finals if text is not None})
        if lost:
            return [ScoreValue(None, f"the vote was not counted: {lost.detail}", lost.lost)] * len(rows)
        ballots = [None if text is None else classes.get(text) for text in finals]
        votes = {name: ballots.count(name) for name in set(ballots) - {None}}
        most = max(votes.values(), default=0)
        leaders = [name for name, number in votes.items() if number == most]
        total = len(rows)
        wins = len(leaders) == 1 and most >= self._min_votes and most / total >= self._min_share
        why = "" if wins else _no_winner(leaders, most, total)
        return [self._value(ballot, votes, leaders[0] if wins else None, total, why) for ballot in ballots]

    def _value(self, ballot: int | None, votes: dict[int | None, int], winner: int | None, total: int, why: str) -> ScoreValue:
        if ballot is None:
            return ScoreValue(None, "cut or not to be read, so it has no vote")
        if winner is None:
            return ScoreValue(None, why)
        won = ballot == winner
        lead = "" if won else f"; the winner has {votes[winner]}"
        return ScoreValue(float(won), f"{votes[ballot]} of {total} votes{lead}")

    def _classes(self, texts: set[str]) -> tuple[dict[str, int], ScoreValue | None]:
        """The class of each distinct final answer that can vote; or the score of a comparison that was lost."""
        heads: list[str] = []
        found: dict[str, int] = {}
        for text in sorted(texts):
            itself = self._bench.score(text, text)
            if itself.lost:
                return {}, itself
            if itself.score != 1.0:
                continue
            for number, head in enumerate(heads):
                verdict = self._bench.score(head, text)
                if verdict.lost:
                    return {}, verdict
                if verdict.score == 1.0:
                    found[text] = number
                    break
            else:
                found[text] = len(heads)
                heads.append(text)
        return found, None


def final_answer(answer: str, by: Scorer) -> str | None:
    """The part of an answer that votes, in a form the verifier takes as a reference; None where there is none.

    The marked part (``\\boxed{}``, ``####``) where there is one, else the whole answer, of which ``numeric`` takes the last
    number and ``multiple_choice`` the letter it settles on.
    """
    marked = final_part(answer)
    text = (answer if marked is None else marked).strip()
    if by.kind == "multiple_choice":
        return chosen_letter(answer, by.options.get("letters", "ABCDE"))
    if by.kind == "numeric":
        found = quantities(text) or quantities(answer)
        return _written(found[-1]) if found else None
    if by.kind == "exact":
        text = text.replace("|", "\u00a6")  # in a reference the bar parts alternatives
    return text or None


def _written(quantity: Quantity) -> str:
    value: Fraction = quantity.value
    number = str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"
    return f"{number}{'%' if quantity.is_percent else ''}{f' {quantity.unit}' if quantity.unit else ''}"


def _is_cut(row: AnswerRow) -> bool:
    return row.finish_reason == "length"


def _no_winner(leaders: Sequence[int | None], most: int, total: int) -> str:
    if len(leaders) > 1:
        return f"no winner: {len(leaders)} answers have {most} of {total} votes each"
    return f"no winner: the first has {most} of {total} votes"
