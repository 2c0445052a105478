"""From the scorers of an experiment to objects that score rows."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from importlib import import_module
from types import TracebackType
from typing import Self

from distill_pipeline.hashing import canonical_json
from distill_pipeline.scoring.isolation import Bench
from distill_pipeline.scoring.registry import Scorer, ScoreValue, resolve_scorer
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer, OpenScorer, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec

DomainScorers = Mapping[str, Mapping[str, OpenedScorer]]
"""Scorers by domain and by the name they have in the rows."""


class RowScorer(OpenedScorer):
    """A function of one row, run where it cannot hurt."""

    def __init__(self, scorer: Scorer, context: ScoringContext) -> None:
        super().__init__(scorer, context)
        self._bench = Bench(scorer)

    def __enter__(self) -> Self:
        self._bench.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bench.__exit__(kind, error, trace)

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
    module, _, name = scorer.target.partition(":")
    opened: OpenScorer = getattr(import_module(module), name)
    return opened(scorer, context)


def open_scorers(scorers: Mapping[str, Sequence[ScorerSpec]], context: ScoringContext, stack: ExitStack) -> DomainScorers:
    """All scorers of an experiment, entered; the same scorer of two domains is opened once.

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
                opened[key] = stack.enter_context(open_scorer(spec, context))
            named[spec.kind if number == 1 else f"{spec.kind}#{number}"] = opened[key]
    return found
