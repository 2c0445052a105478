"""Reading records of two stages side by side: completions follow the order of the pool, scores that of the completions.

So a stage that needs prompts and completions walks both once, and memory holds a batch of each, whatever the number of rows.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from distill_pipeline.errors import IntegrityError


@dataclass
class PromptView:
    """The prompt that completions belong to; messages and metadata are converted only when asked for."""

    prompt_id: str
    reference: str | None
    domain: str
    split: str
    batch: pa.RecordBatch
    row: int

    def messages(self) -> list[dict[str, str]]:
        """The prompt's messages."""
        found: list[dict[str, str]] = self.batch.column("messages")[self.row].as_py()
        return found

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """The source's other columns."""
        found: dict[str, Any] = json.loads(self.batch.column("metadata")[self.row].as_py())
        return found

    @cached_property
    def last_user_message(self) -> str | None:
        """What the user said last, or None."""
        said = [message["content"] for message in self.messages() if message["role"] == "user"]
        return said[-1] if said else None


class PromptCursor:
    """Walks the pool forward to the prompts that completions name."""

    def __init__(self, prompt_batches: Iterable[pa.RecordBatch]) -> None:
        self._views = self._walk(prompt_batches)
        self._current: PromptView | None = None

    def seek(self, prompt_id: str) -> PromptView:
        """The prompt of this id, at or after the last one.

        Raises:
            IntegrityError: the pool does not hold it there; the two artifacts do not belong together.
        """
        while self._current is None or self._current.prompt_id != prompt_id:
            self._current = next(self._views, None)
            if self._current is None:
                raise IntegrityError(
                    f"a completion belongs to prompt {prompt_id[:16]}..., which the pool does not hold, or not in this order. "
                    "Make the teacher's outputs again from this prompt pool."
                )
        return self._current

    @staticmethod
    def _walk(batches: Iterable[pa.RecordBatch]) -> Iterator[PromptView]:
        for batch in batches:
            columns = [batch.column(name).to_pylist() for name in ("prompt_id", "reference", "domain", "split")]
            for row in range(batch.num_rows):
                prompt_id, reference, domain, split = (column[row] for column in columns)
                yield PromptView(prompt_id, reference, domain, split, batch, row)


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


def _joined(batches: list[pa.RecordBatch]) -> pa.RecordBatch:
    full = [batch for batch in batches if batch.num_rows]
    if len(full) == 1:
        return full[0]
    return pa.Table.from_batches(full).combine_chunks().to_batches()[0]


class ScoreCursor:
    """Hands out the score rows of one completion after the other."""

    def __init__(self, score_batches: Iterable[pa.RecordBatch]) -> None:
        self._rows = self._walk(score_batches)
        self._next = next(self._rows, None)

    def take(self, completion_id: str) -> list[dict[str, Any]]:
        """The scores of this completion; none if the next scores are of a later one."""
        found = []
        while self._next is not None and self._next[0] == completion_id:
            found.append({"scorer": self._next[1], "score": self._next[2], "detail": self._next[3]})
            self._next = next(self._rows, None)
        return found

    def close(self) -> None:
        """Raises IntegrityError when scores are left that belong to no completion that was asked for."""
        if self._next is not None:
            raise IntegrityError(
                f"the scores name completion {self._next[0][:16]}..., which is not among the teacher's outputs, or not in this "
                "order. Score the outputs again."
            )

    @staticmethod
    def _walk(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[str, str, float | None, str]]:
        for batch in batches:
            columns = (batch.column(name).to_pylist() for name in ("completion_id", "scorer", "score", "detail"))
            yield from zip(*columns, strict=True)
