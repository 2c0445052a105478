"""Scoring one chunk: a function of its rows and the opened scorers alone, whoever answers and in whatever pieces.

A chunk holds whole prompts. What was scored before is looked up, rows of equal content are scored once, and the rest is put
to the scorers: those that can be moved get it in pieces, for anybody to answer; the others, which hold a model or cost less
than a row's way to another process, get all of it at once where the chunk is.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.alignment import CHUNK_ROWS, PromptChunk, prompt_chunks
from distill_pipeline.records import SCORE_SCHEMA
from distill_pipeline.scoring.kept import storable
from distill_pipeline.scoring.opening import DomainScorers
from distill_pipeline.scoring.pieces import PIECE_ROWS, Answers, Piece, Place
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer
from distill_pipeline.scoring.tally import Tally
from distill_pipeline.spec import ANY_DOMAIN

_READ_COLUMNS = (
    "completion_id", "prompt_id", "answer", "raw_text", "finish_reason", "completion_tokens", "logprob",
)  # fmt: skip
_PROMPT_COLUMNS = ("domain", "messages", "reference", "metadata")


@dataclass
class ChunkScores:
    """A chunk's answers and score rows in the completions' order, its counts, tallies by (domain, name), and the new scores by
    key."""

    answers: Sequence[AnswerRow] = ()
    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    new: dict[Place, list[tuple[str, ScoreValue]]] = field(default_factory=dict)


def answer_chunks(
    prompt_batches: Iterable[pa.RecordBatch], completion_batches: Iterable[pa.RecordBatch], *, max_rows: int = CHUNK_ROWS
) -> Iterator[list[AnswerRow]]:
    """Completions with their prompts, in order, in the chunks of :func:`prompt_chunks`.

    Raises:
        IntegrityError: a completion's prompt is not in the pool, or not in this order.
    """
    for chunk in prompt_chunks(prompt_batches, completion_batches, max_rows=max_rows):
        yield _answer_rows(chunk)


class ChunkAtWork:
    """A chunk on its way to its scores: what was known before, what the scorers are asked, and what they answered.

    ``pieces`` is for scorers that can be moved, at least one and maybe an empty one; ``rest`` is for the others.
    """

    def __init__(self, rows: Sequence[AnswerRow], scorers: DomainScorers, *, piece_rows: int = PIECE_ROWS) -> None:
        """
        Args:
            rows: all completions of some prompts.
            scorers: by domain; ``*`` serves every domain that has no list of its own.
        Raises:
            IntegrityError: a part of the kept scores cannot be read.
        """
        self._rows = rows
        numbers: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if not row.has_failed:
                numbers.setdefault(row.domain if row.domain in scorers else ANY_DOMAIN, []).append(number)
        self._questions = [
            _Question((listed, name), scorer, rows, served)
            for listed, served in numbers.items()
            for name, scorer in scorers.get(listed, {}).items()
        ]
        movable = [question for question in self._questions if question.scorer.is_movable and question.asked]
        ranges = _prompt_ranges(rows, piece_rows) if movable else [(0, 0)]
        self.pieces = [Piece.of(rows, {question.place: question.part(*ends) for question in movable}) for ends in ranges]
        self.rest = Piece.of(rows, {each.place: each.asked for each in self._questions if not each.scorer.is_movable})
        self._num_open = len(self.pieces)

    @property
    def is_answered(self) -> bool:
        """Whether every piece has its answers."""
        return self._num_open == 0

    def take(self, answers: Answers) -> None:
        """The answers to the next piece, in the order of the pieces."""
        self._num_open -= 1
        self._add(answers)

    def scores(self, rest: Answers) -> ChunkScores:
        """The chunk's scores, from the answers to its pieces and those to its rest. Writes nothing."""
        assert self.is_answered, self._num_open
        self._add(rest)
        done = ChunkScores(self._rows)
        given: list[list[tuple[_Question, ScoreValue]]] = [[] for _ in self._rows]
        for question in self._questions:
            new = question.new_values()
            done.new[question.place] = list(new.items())
            for number, key in zip(question.numbers, question.keys, strict=True):
                value = new[key] if key in new else question.known[key]
                tally = done.tallies.setdefault((self._rows[number].domain, question.place[1]), Tally())
                tally.add(value, is_reused=key not in new)
                given[number].append((question, value))
        for row, values in zip(self._rows, given, strict=True):
            done.counts[_fate(row, [value for _, value in values])] += 1
            for question, value in values:
                fields = (row.completion_id, question.place[1], question.scorer.version, value.score, storable(value.detail))
                done.rows.append(dict(zip(SCORE_SCHEMA.names, fields, strict=True)))
        return done

    def _add(self, answers: Answers) -> None:
        for question in self._questions:
            question.answers += answers.get(question.place, ())


class _Question:
    """What one scorer is asked about a chunk.

    ``numbers`` are the rows it serves and ``keys`` theirs; ``known`` the scores that were looked up; ``asked`` the rows it is
    asked about, in order, and ``answers`` what it said so far, in that order.
    """

    def __init__(self, place: Place, scorer: OpenedScorer, rows: Sequence[AnswerRow], numbers: Sequence[int]) -> None:
        self.place, self.scorer, self.numbers = place, scorer, numbers
        served = [rows[number] for number in numbers]
        self.keys = scorer.keys(served)
        self.known = scorer.kept.read(self.keys) if scorer.kept is not None else {}
        missing: dict[str, int] = {}
        for number, key in zip(numbers, self.keys, strict=True):
            if key not in self.known:
                missing.setdefault(key, number)
        self.asked = list(missing.values())
        if scorer.scores_whole_prompts and missing:
            prompts = {rows[number].prompt_id for number in self.asked}
            self.asked = [number for number in numbers if rows[number].prompt_id in prompts]
        self.answers: list[ScoreValue] = []

    def part(self, begin: int, end: int) -> Sequence[int]:
        """The rows that are asked about among those of a range."""
        return self.asked[bisect_left(self.asked, begin) : bisect_left(self.asked, end)]

    def new_values(self) -> dict[str, ScoreValue]:
        """By key the scores that were not known."""
        keys = dict(zip(self.numbers, self.keys, strict=True))
        made = {keys[number]: value for number, value in zip(self.asked, self.answers, strict=True)}
        return {key: value for key, value in made.items() if key not in self.known}


def keep_new(done: ChunkScores, scorers: DomainScorers) -> None:
    """Hand a chunk's new scores to the stores of their scorers."""
    for (domain, name), new in done.new.items():
        if (kept := scorers[domain][name].kept) is not None:
            kept.add(new)


def _answer_rows(chunk: PromptChunk) -> list[AnswerRow]:
    prompts = zip(*(chunk.prompts.column(name).to_pylist() for name in _PROMPT_COLUMNS), strict=True)
    columns = (chunk.completions.column(name).to_pylist() for name in _READ_COLUMNS)
    answers = zip(*columns, strict=True)
    return [
        AnswerRow(completion_id, prompt_id, *prompt, *answer)
        for prompt, number in zip(prompts, np.diff(chunk.starts), strict=True)
        for completion_id, prompt_id, *answer in islice(answers, int(number))
    ]


def _prompt_ranges(rows: Sequence[AnswerRow], num_rows: int) -> list[tuple[int, int]]:
    """Ranges of rows that never part a prompt; each but the last ends with the first prompt that fills it."""
    ends = [0]
    for number in range(1, len(rows)):
        if number - ends[-1] >= num_rows and rows[number].prompt_id != rows[number - 1].prompt_id:
            ends.append(number)
    return list(pairwise([*ends, len(rows)]))


def _fate(row: AnswerRow, values: Sequence[ScoreValue]) -> str:
    if row.has_failed:
        return "failed"
    if not values:
        return "unscored"
    return "unknown" if any(value.score is None for value in values) else "scored"
