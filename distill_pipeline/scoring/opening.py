"""From the scorers of an experiment to objects that score rows."""

import json
from collections.abc import Mapping, Sequence

from distill_pipeline.hashing import canonical_json
from distill_pipeline.scoring.registry import Scorer, ScoreValue, resolve_scorer
from distill_pipeline.scoring.rows import AnswerRow, BenchScorer, OpenedScorer, OpenScorer, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.worker import load

DomainScorers = Mapping[str, Mapping[str, OpenedScorer]]
"""Scorers by domain and by the name they have in the rows."""


class RowScorer(BenchScorer):
    """A function of one row, run where it cannot hurt."""

    def __init__(self, scorer: Scorer, context: ScoringContext) -> None:
        super().__init__(scorer, context, scorer)

    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        return [
            self._bench.score(row.reference, row.answer, metadata=json.loads(row.metadata), prompt=row.last_user_message)
            for row in rows
        ]


def open_scorer(spec: ScorerSpec, context: ScoringContext) -> OpenedScorer:
    """A scorer from its part of the experiment; enter it before use.

    Raises:
        ConfigError: the kind or an option is wrong, or the user's module is not found.
    """
    scorer = resolve_scorer(spec)
    if scorer.is_row_function:
        return RowScorer(scorer, context)
    opened: OpenScorer = load(scorer.target)
    return opened(scorer, context)


def open_scorers(scorers: Mapping[str, Sequence[ScorerSpec]], context: ScoringContext) -> DomainScorers:
    """All scorers of an experiment, not yet entered; the same scorer of two domains is one object.

    A scorer's name is its kind, and a number behind it when the kind comes again in its domain.
    """
    opened: dict[str, OpenedScorer] = {}
    found: dict[str, dict[str, OpenedScorer]] = {}
    for domain, listed in scorers.items():
        kinds: list[str] = []
        named = found.setdefault(domain, {})
        for spec in listed:
            kinds.append(spec.kind)
            number = kinds.count(spec.kind)
            key = canonical_json(spec.document())
            if key not in opened:
                opened[key] = open_scorer(spec, context)
            named[spec.kind if number == 1 else f"{spec.kind}#{number}"] = opened[key]
    return found
