"""Reading records of several stages side by side: completions follow the order of the pool, scores that of the completions.

So a stage that needs prompts and completions walks both once, and memory holds a batch of each, whatever the number of rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from distill_pipeline.errors import IntegrityError
from distill_pipeline.records import SCORE_SCHEMA

CHUNK_ROWS = 1024
CHUNK_BYTES = 8 << 20
"""A chunk ends with the prompt before the one that would fill it over either: as fast as larger ones, and long traces fit."""

Places = NDArray[np.int64]


def by_prompt(completion_batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches that never part the completions of one prompt."""
    held: list[pa.RecordBatch] = []
    for batch in completion_batches:
        if not batch.num_rows:
            continue
        ids = batch.column("prompt_id")
        last = ids[-1].as_py()
        cut = batch.num_rows
        while cut and ids[cut - 1].as_py() == last:
            cut -= 1
        if cut or (held and held[-1].column("prompt_id")[-1].as_py() != last):
            yield _joined([*held, batch.slice(0, cut)])
            held = []
        held.append(batch.slice(cut))
    if held:
        yield _joined(held)


@dataclass(frozen=True)
class PromptChunk:
    """Some prompts with all their completions, in order.

    ``prompts`` are rows of the pool, ``completions`` a teacher's outputs. The completions of prompt ``i`` are rows
    ``starts[i]`` to ``starts[i + 1]``.
    """

    prompts: pa.RecordBatch
    completions: pa.RecordBatch
    starts: Places


def prompt_chunks(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    *,
    max_rows: int = CHUNK_ROWS,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[PromptChunk]:
    """The rows of two stages side by side, in chunks of whole prompts and of at most so many completions or bytes.

    A prompt with more completions than that is a chunk of its own. Texts are never turned into Python objects.

    Raises:
        IntegrityError: a completion's prompt is not in the pool, or not in this order.
    """
    prompts = _PromptRows(prompt_batches)
    for batch in by_prompt(completion_batches):
        ids = batch.column("prompt_id")
        is_next = pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False)
        starts = np.r_[0, np.flatnonzero(is_next) + 1, len(ids)]
        limit = max(1, min(max_rows, max_bytes * batch.num_rows // max(1, batch.nbytes)))
        first = 0
        while first < len(starts) - 1:
            end = max(first + 1, int(np.searchsorted(starts, starts[first] + limit, side="right")) - 1)
            part = batch.slice(starts[first], starts[end] - starts[first])
            rows = prompts.take(ids.take(pa.array(starts[first:end])).to_pylist())
            yield PromptChunk(rows, part, starts[first : end + 1] - starts[first])
            first = end


@dataclass(frozen=True)
class AlignedChunk(PromptChunk):
    """A chunk with the scores of its completions, in order. It can travel to another process.

    The scores of completion ``j`` are rows ``score_starts[j]`` to ``score_starts[j + 1]`` of ``scores``.
    """

    scores: pa.RecordBatch
    score_starts: Places

    def __reduce__(self) -> tuple[Any, ...]:
        """Only its own rows travel: a slice of a batch would be pickled with the whole batch."""
        batches = [_ipc_bytes(batch) for batch in (self.prompts, self.completions, self.scores)]
        return _unpacked, (*batches, self.starts, self.score_starts)


def aligned_chunks(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    score_batches: Iterable[pa.RecordBatch],
    *,
    max_rows: int = CHUNK_ROWS,
    max_bytes: int = CHUNK_BYTES,
) -> Iterator[AlignedChunk]:
    """The rows of three stages side by side, in the chunks of :func:`prompt_chunks`.

    Raises:
        IntegrityError: the three do not belong together or are not in one order.
    """
    scores = _ScoreRows(score_batches)
    for chunk in prompt_chunks(prompt_batches, completion_batches, max_rows=max_rows, max_bytes=max_bytes):
        rows, score_starts = scores.take(chunk.completions.column("completion_id").to_pylist())
        yield AlignedChunk(chunk.prompts, chunk.completions, chunk.starts, rows, score_starts)
    scores.close()


class _PromptRows:
    """Walks the pool forward and gives out the rows of the prompts that completions name."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self._batch: pa.RecordBatch | None = None
        self._ids: list[str] = []
        self._at = 0

    def take(self, names: list[str]) -> pa.RecordBatch:
        """The rows of these prompts, at or after the last one. Raises IntegrityError when the pool does not hold one there."""
        pieces: list[pa.RecordBatch] = []
        wanted: list[int] = []
        for name in names:
            while name not in self._ids[self._at : self._at + 1]:
                try:
                    self._at = self._ids.index(name, self._at)
                except ValueError:
                    pieces += self._picked(wanted)
                    wanted = []
                    self._next(name)
            wanted.append(self._at)
        return _joined([*pieces, *self._picked(wanted)])

    def _picked(self, rows: list[int]) -> list[pa.RecordBatch]:
        return [self._batch.take(pa.array(rows))] if self._batch is not None and rows else []

    def _next(self, name: str) -> None:
        self._batch = next(self._batches, None)
        if self._batch is None:
            raise _stray_completion(name)
        self._ids, self._at = self._batch.column("prompt_id").to_pylist(), 0


class _ScoreRows:
    """Walks the scores forward and gives out those of one completion after the other."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self._batches = iter(batches)
        self._batch = _EMPTY_SCORES
        self._ids: list[str] = []
        self._at = 0
        self._fill()

    def take(self, names: list[str]) -> tuple[pa.RecordBatch, Places]:
        """The scores of these completions, and where each one's begin; one has none if the next scores are of a later one."""
        pieces: list[pa.RecordBatch] = []
        starts = [0]
        begin, before = self._at, 0
        for name in names:
            while self._at < len(self._ids) and self._ids[self._at] == name:
                self._at += 1
                if self._at == len(self._ids):
                    pieces.append(self._batch.slice(begin))
                    before += self._at - begin
                    self._fill()
                    begin = self._at
            starts.append(before + self._at - begin)
        return _joined([*pieces, self._batch.slice(begin, self._at - begin)]), np.array(starts, dtype=np.int64)

    def close(self) -> None:
        """Raises IntegrityError when scores are left that belong to no completion that was asked for."""
        if self._at < len(self._ids):
            raise IntegrityError(
                f"the scores name completion {self._ids[self._at][:16]}..., which is not among the teacher's outputs, or not "
                "in this order. Score the outputs again."
            )

    def _fill(self) -> None:
        """Go to the next batch that has rows, or to the end."""
        self._batch, self._ids, self._at = _EMPTY_SCORES, [], 0
        for batch in self._batches:
            if batch.num_rows:
                self._batch = batch.select(SCORE_SCHEMA.names)
                self._ids = self._batch.column("completion_id").to_pylist()
                return


_EMPTY_SCORES = pa.RecordBatch.from_pylist([], schema=SCORE_SCHEMA)


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    full = [batch for batch in batches if batch.num_rows] or batches[:1]
    if len(full) == 1:
        return full[0]
    return pa.Table.from_batches(full).combine_chunks().to_batches()[0]


def _ipc_bytes(batch: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    found: bytes = sink.getvalue().to_pybytes()
    return found


def _unpacked(prompts: bytes, completions: bytes, scores: bytes, starts: Places, score_starts: Places) -> AlignedChunk:
    rows = (pa.ipc.open_stream(part).read_next_batch() for part in (prompts, completions, scores))
    return AlignedChunk(next(rows), next(rows), starts, next(rows), score_starts)


def _stray_completion(prompt_id: str) -> IntegrityError:
    return IntegrityError(
        f"a completion belongs to prompt {prompt_id[:16]}..., which the pool does not hold, or not in this order. "
        "Make the teacher's outputs again from this prompt pool."
    )
