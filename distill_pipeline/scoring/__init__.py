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
        rows: mappings with ``answer`` and, where there is one, ``reference``. Scorers that read more take ``prompt`` (text) or
            ``messages``, ``metadata`` (the prompt's other columns, a mapping), ``finish_reason``, ``completion_tokens`` and
            ``logprob`` as in the records; rows that follow each other with equal prompts are samples of one prompt. Other keys
            are left alone.
        options: keyword arguments of the scorer. Models and what a judge said are kept in the user's cache folder.
    Raises:
        ConfigError: the kind or an option is unknown.
        MissingExtraError: the scorer's package is not installed.
    """
    from distill_pipeline.scoring.notebook import notebook_context, notebook_rows
    from distill_pipeline.scoring.opening import open_scorer
    from distill_pipeline.scoring.spec import ScorerSpec

    spec = ScorerSpec(kind=kind, options=options, timeout_seconds=timeout_seconds)
    with open_scorer(spec, notebook_context(spec)) as scorer:
        return scorer.score(notebook_rows(rows))
