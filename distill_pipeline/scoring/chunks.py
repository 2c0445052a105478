"""Scoring one chunk: a function of its rows and the opened scorers alone, so chunks can be scored anywhere and in any order.

A chunk holds whole prompts. What was scored before is looked up, rows of equal content are scored once, and the rest is
given to the scorers together.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from distill_pipeline.alignment import PromptCursor
from distill_pipeline.records import SCORE_SCHEMA
from distill_pipeline.scoring.kept import KeptScores, storable
from distill_pipeline.scoring.opening import DomainScorers
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer
from distill_pipeline.spec import ANY_DOMAIN

HISTOGRAM_BINS = 10

CHUNK_ROWS = 2048
"""A chunk ends with the first prompt that fills it so far."""

_READ_COLUMNS = (
    "completion_id", "prompt_id", "answer", "raw_text", "finish_reason", "completion_tokens", "logprob",
)  # fmt: skip


@dataclass
class Tally:
    """What one scorer said in one domain. The histogram's bins are a tenth wide; the last one holds 1.0 too.

    ``reused`` scores were looked up, ``anew`` were made; ``lost`` counts unknowns that are tried again, by their cause.
    """

    known: int = 0
    unknown: int = 0
    total: float = 0.0
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)
    reused: int = 0
    anew: int = 0
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, value: ScoreValue, *, is_reused: bool) -> None:
        """Count one row's score."""
        self.reused += is_reused
        self.anew += not is_reused
        if value.lost:
            self.lost[value.lost] += 1
        if value.score is None:
            self.unknown += 1
            return
        self.known += 1
        self.total += value.score
        self.histogram[min(int(value.score * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1

    def merge(self, other: "Tally") -> None:
        """Add what another tally counted."""
        self.known, self.unknown, self.total = self.known + other.known, self.unknown + other.unknown, self.total + other.total
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]
        self.reused, self.anew = self.reused + other.reused, self.anew + other.anew
        self.lost += other.lost

    def facts(self) -> dict[str, Any]:
        """Mean, counts and histogram as JSON."""
        mean = round(self.total / self.known, 6) if self.known else None
        return {"mean": mean, "known": self.known, "unknown": self.unknown, "histogram": self.histogram}


@dataclass
class ChunkScores:
    """A chunk's score rows in the completions' order, its counts, and the new scores by scorer's (domain, name) and key."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)
    new: dict[tuple[str, str], list[tuple[str, ScoreValue]]] = field(default_factory=dict)


def answer_chunks(
    prompt_batches: Iterable[pa.RecordBatch], completion_batches: Iterable[pa.RecordBatch], chunk_rows: int = CHUNK_ROWS
) -> Iterator[list[AnswerRow]]:
    """Completions with their prompts, in order, in chunks that never part a prompt and do not depend on the batches.

    Raises:
        IntegrityError: a completion's prompt is not in the pool, or not in this order.
    """
    cursor = PromptCursor(prompt_batches)
    chunk: list[AnswerRow] = []
    prompt, messages, metadata = None, list[dict[str, str]](), ""
    for batch in completion_batches:
        columns = (batch.column(name).to_pylist() for name in _READ_COLUMNS)
        for completion_id, prompt_id, *answer in zip(*columns, strict=True):
            if prompt is None or prompt.prompt_id != prompt_id:
                if len(chunk) >= chunk_rows:
                    yield chunk
                    chunk = []
                prompt = cursor.seek(prompt_id)
                messages, metadata = prompt.messages(), prompt.metadata_json()
            chunk.append(AnswerRow(completion_id, prompt_id, prompt.domain, messages, prompt.reference, metadata, *answer))
    if chunk:
        yield chunk


def score_chunk(rows: Sequence[AnswerRow], scorers: DomainScorers) -> ChunkScores:
    """Score the completions of whole prompts. Writes nothing: the new scores are in the result.

    Args:
        rows: all completions of some prompts.
        scorers: opened scorers by domain; ``*`` serves every domain that has no list of its own.
    """
    done = ChunkScores()
    given: list[dict[str, ScoreValue]] = [{} for _ in rows]
    by_domain: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        if not row.has_failed:
            by_domain.setdefault(row.domain, []).append(number)
    for domain, numbers in by_domain.items():
        listed = domain if domain in scorers else ANY_DOMAIN
        for name, scorer in scorers.get(listed, {}).items():
            values, new = _values(scorer, [rows[number] for number in numbers])
            done.new.setdefault((listed, name), []).extend(new.items())
            tally = done.tallies.setdefault((domain, name), Tally())
            for number, (key, value) in zip(numbers, values, strict=True):
                given[number][name] = value
                tally.add(value, is_reused=key not in new)
    for row, values_of_row in zip(rows, given, strict=True):
        done.counts[_fate(row, values_of_row)] += 1
        named = scorers.get(row.domain, scorers.get(ANY_DOMAIN, {}))
        for name, value in values_of_row.items():
            fields = (row.completion_id, name, named[name].version, value.score, storable(value.detail))
            done.rows.append(dict(zip(SCORE_SCHEMA.names, fields, strict=True)))
    return done


def keep_new(done: ChunkScores, scorers: DomainScorers) -> None:
    """Hand a chunk's new scores to the stores of their scorers."""
    for (domain, name), new in done.new.items():
        if (kept := scorers[domain][name].kept) is not None:
            kept.add(new)


def stores_of(scorers: DomainScorers) -> list[KeptScores]:
    """Every store of the opened scorers, once."""
    stores = [scorer.kept for named in scorers.values() for scorer in named.values() if scorer.kept is not None]
    return list({id(store): store for store in stores}.values())


def _fate(row: AnswerRow, values: dict[str, ScoreValue]) -> str:
    if row.has_failed:
        return "failed"
    if not values:
        return "unscored"
    return "unknown" if any(value.score is None for value in values.values()) else "scored"


def _values(scorer: OpenedScorer, rows: Sequence[AnswerRow]) -> tuple[list[tuple[str, ScoreValue]], dict[str, ScoreValue]]:
    """(key, score) of each row, and by key those that were not known."""
    keys = scorer.keys(rows)
    known = scorer.kept.read(keys) if scorer.kept is not None else {}
    missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in known}
    asked = list(missing.items())
    if scorer.scores_whole_prompts and missing:
        prompts = {row.prompt_id for row in missing.values()}
        asked = [(key, row) for key, row in zip(keys, rows, strict=True) if row.prompt_id in prompts]
    values = scorer.score([row for _, row in asked]) if asked else []
    made = {key: value for (key, _), value in zip(asked, values, strict=True)}
    new = {key: made[key] for key in missing}
    return [(key, new[key] if key in new else known[key]) for key in keys], new
