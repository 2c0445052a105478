"""``judge``: a model scores answers by a rubric, or compares each with the reference in both orders."""

from collections.abc import Sequence
from typing import Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.generation.asking import Answer, GreedyAnswers
from distill_pipeline.reasoning import split_reasoning
from distill_pipeline.scoring.registry import Scorer, ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer, ScoringContext, model_of
from distill_pipeline.scoring.rubrics import comparing_prompt, parse_score, parse_verdict, scoring_prompt

_WINS = ({"A": 1.0, "B": 0.0, "tie": 0.5}, {"A": 0.0, "B": 1.0, "tie": 0.5})
"""What a verdict says about the answer where it stands first, and where it stands second."""


class Judge(OpenedScorer):
    """A model's opinion: (N - 1) / (scale - 1) for its ``Score: N``, greedy, through the generation store.

    Options: ``model`` (a teacher's name or a model reference) and ``revision``; ``rubric``, a name or a text; ``scale``, 5 or
    10; ``max_tokens``; ``compare``, with which the answer is compared with the reference: 1.0 where it wins in both orders,
    0.0 where it loses in both, 0.5 for two ties, and unknown where the orders disagree.
    """

    def __init__(self, scorer: Scorer, context: ScoringContext) -> None:
        """Raises ConfigError when the context has no place for the judge's completions."""
        if context.generations_dir is None:
            raise ConfigError("scorers: judge needs a folder for its completions; none was given.")
        options = scorer.options
        self._judge = GreedyAnswers(
            model_of(scorer, context), generations_dir=context.generations_dir, device=context.device,
            max_tokens=options.get("max_tokens", 512),
        )  # fmt: skip
        super().__init__(scorer, context, family=self._judge.family)
        self._rubric, self._scale = options.get("rubric", "correct"), options.get("scale", 5)
        self._compares = options.get("compare", False)

    def score(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        return self._compared(rows) if self._compares else self._scored(rows)

    def _scored(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        options: dict[str, Any] = {"rubric": self._rubric, "scale": self._scale}
        said = self._judge.answer([scoring_prompt(row.messages, row.reference, row.answer, **options) for row in rows])
        return [_reading(answer) or self._score_of(answer) for answer in said]

    def _score_of(self, answer: Answer) -> ScoreValue:
        number = parse_score(_own_words(answer), self._scale)
        if number is None:
            return ScoreValue(None, f"the judge gave no score from 1 to {self._scale}")
        return ScoreValue((number - 1) / (self._scale - 1), f"judged {number} of {self._scale}")

    def _compared(self, rows: Sequence[AnswerRow]) -> list[ScoreValue]:
        able = [row for row in rows if row.reference is not None]
        prompts = []
        for row in able:
            reference = row.reference or ""
            for first, second in ((row.answer, reference), (reference, row.answer)):
                prompts.append(comparing_prompt(row.messages, first, second, rubric=self._rubric))
        said = self._judge.answer(prompts)
        pairs = iter(zip(said[::2], said[1::2], strict=True))
        return [_agreement(next(pairs)) if row.reference is not None else _NO_REFERENCE for row in rows]


_NO_REFERENCE = ScoreValue(None, "the prompt has no reference to compare with")


def _own_words(answer: Answer) -> str:
    """What a judge said after its reasoning."""
    return split_reasoning(answer["raw_text"])[1]


def _reading(answer: Answer) -> ScoreValue | None:
    """Why a judge's completion cannot be read, or None."""
    if answer["finish_reason"] == "error":
        cause = str(answer["error"])
        return ScoreValue(None, f"the judge failed: {cause}", "" if cause.startswith(("prompt_", "render_")) else "error")
    if answer["finish_reason"] == "length":
        return ScoreValue(None, "the judge was cut before its verdict; raise its max_tokens")
    return None


def _agreement(said: tuple[Answer, Answer]) -> ScoreValue:
    """The verdict of two orders."""
    for answer in said:
        if (unread := _reading(answer)) is not None:
            return unread
    verdicts = [parse_verdict(_own_words(answer)) for answer in said]
    if None in verdicts:
        return ScoreValue(None, "the judge gave no verdict")
    first, second = (wins[str(verdict)] for wins, verdict in zip(_WINS, verdicts, strict=True))
    if first != second:
        return ScoreValue(None, f"the judge's verdicts depend on the order: {verdicts[0]}, then {verdicts[1]}")
    return ScoreValue(first, {1.0: "better than the reference", 0.0: "worse than the reference", 0.5: "a tie"}[first])
