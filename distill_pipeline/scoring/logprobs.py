"""``teacher_logprob``: how sure the teacher was of its own completion."""

import math
from collections.abc import Sequence

from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer


class TeacherLogprob(OpenedScorer):
    """exp of the mean log-probability of the completion's tokens: their geometric mean probability, in [0, 1].

    The probabilities are those of the distribution that was sampled from, so scores of two temperatures do not compare.
    """

    is_worth_keeping = False

    def keys(self, rows: Sequence[AnswerRow]) -> list[str]:
        return [row.completion_id for row in rows]

    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        return [_score(row) for row in rows]


def _score(row: AnswerRow) -> ScoreValue:
    if row.logprob is None or row.completion_tokens < 1:
        return ScoreValue(None, "the completion has no log-probability")
    mean = row.logprob / row.completion_tokens
    if math.isnan(mean):
        return ScoreValue(None, "the completion's log-probability is not a number")
    return ScoreValue(min(1.0, math.exp(min(mean, 0.0))), f"{mean:.3f} nats a token")
