"""Scores of answers. ``score_answers`` is what others use; the rest is loaded when it is needed."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill_pipeline.scoring.registry import ScoreValue

__all__ = ["score_answers"]


def score_answers(
    kind: str, rows: Iterable[Mapping[str, Any]], *, timeout_seconds: float = 10.0, **options: Any
) -> "list[ScoreValue]":
    """Scores of answers by one scorer, in order.

    Args:
        kind: a built-in kind or ``package.module:function``.
        rows: mappings with ``answer`` and, where there are, ``reference``, ``metadata`` (the prompt's other columns, a
            mapping) and ``prompt`` (the last user message); other keys are left alone.
        options: keyword arguments of the scorer.
    Raises:
        ConfigError: the kind or an option is unknown, or the scorer needs what this machine does not have.
    """
    from distill_pipeline.scoring.isolation import Bench
    from distill_pipeline.scoring.registry import resolve_scorer
    from distill_pipeline.scoring.spec import ScorerSpec

    scorer = resolve_scorer(ScorerSpec(kind=kind, options=options, timeout_seconds=timeout_seconds))
    with Bench(scorer) as bench:
        return [
            bench.score(row.get("reference"), row["answer"], metadata=row.get("metadata"), prompt=row.get("prompt"))
            for row in rows
        ]
