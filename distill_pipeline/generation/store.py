"""The generation store: every answer a teacher ever gave, under its request's key, outliving artifacts and experiments.

Layout: ``<root>/<family>/part-<time>-<random>.parquet`` and ``<root>/<family>/family.json`` with the readable settings, on a
local disk or any fsspec filesystem. Parts are never changed and appear whole, so several runs on several machines may write at
once and a crash loses only what was not flushed; on a local disk many small ones are merged into few. Of two answers to one
request the first stays. Failed requests are not kept: the next run asks again. A part's metadata holds what was paid since the
part before it, failed requests included, so ``paid`` is the cost of a family over all runs.

Decided: an answer that ended by itself serves every ``max_tokens`` that holds it; one that was cut serves only the
``max_tokens`` that cut it, unless the model's context did; both serve the one they were asked for, whatever a server counts.
Gave up: a database; the index of keys is 20 bytes a row in memory.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.errors import IntegrityError
from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.storage.compaction import Notes, merge_small_parts, replaced_by
from distill_pipeline.storage.parts import (
    KeyIndex,
    PartWriter,
    RecentParts,
    part_files,
    read_part,
    read_rows,
    remove_abandoned,
    several_at_once,
)
from distill_pipeline.storage.places import Place

STORED_SCHEMA = pa.schema(
    [
        pa.field("request_key", pa.string(), nullable=False),
        pa.field("raw_text", pa.string(), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("completion_tokens", pa.int32(), nullable=False),
        pa.field("max_tokens", pa.int32(), nullable=False),
        pa.field("logprob", pa.float64()),
    ]
)

TOKEN_COLUMNS = pa.schema(
    [
        pa.field("token_ids", pa.list_(pa.int32())),
        pa.field("token_logprobs", pa.list_(pa.float32())),
        pa.field("top_ids", pa.list_(pa.int32())),
        pa.field("top_logprobs", pa.list_(pa.float32())),
    ]
)
"""Further columns of a family with ``top_logprobs``, as :class:`TokenLogprobs` has them; null where the engine knew none."""

_WHAT = "generation store"
_PAID = "paid"


@dataclass(frozen=True)
class _Indexed:
    """What a part has: keys and numbers of its usable rows, what was paid for it, and the parts it took the place of."""

    number: int
    name: str
    keys: list[str]
    rows: np.ndarray[Any, Any]
    paid: Usage
    replaces: frozenset[str]


class GenerationStore:
    """The answers of one family that serve one ``max_tokens``."""

    def __init__(
        self,
        root: Place,
        family: str,
        settings: dict[str, Any],
        *,
        max_tokens: int,
        flush_rows: int = 2048,
        flush_seconds: float | None = None,
    ) -> None:
        """Open a family and read the index of its keys; nothing is written before the first flush or :meth:`prepare`.

        Args:
            settings: of the family; with ``top_logprobs`` among them its answers have TOKEN_COLUMNS.
            flush_rows: :meth:`flush_if_due` writes when so many rows wait,
            flush_seconds: or when the last write is so long ago; see :class:`PartWriter` for None.
        Raises:
            IntegrityError: a part cannot be read; the message names it.
            StorageError: the filesystem cannot be reached.
        """
        self.folder = root / family
        self.max_tokens = max_tokens
        about = "family.json", json.dumps(settings, indent=1, sort_keys=True)
        self.has_tokens = "top_logprobs" in settings
        schema = pa.unify_schemas([STORED_SCHEMA, TOKEN_COLUMNS]) if self.has_tokens else STORED_SCHEMA
        self._writer = PartWriter(self.folder, schema, about=about, flush_rows=flush_rows, flush_seconds=flush_seconds)
        remove_abandoned(self.folder)
        self._unsaved = Usage()
        self._list_parts()

    def has(self, keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each key whether a usable answer is on disk."""
        return self._index.has(keys)

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The usable answers to the given keys that are on disk; others are left out."""
        rows = {row["request_key"]: row for table in self._tables(keys, STORED_SCHEMA.names) for row in table.to_pylist()}
        return {key: rows[key] for key in keys if key in rows}

    def read_tokens(self, keys: Sequence[str]) -> pa.Table:
        """``request_key`` and TOKEN_COLUMNS of the usable answers to the given keys that have tokens, in some order."""
        schema = pa.schema([STORED_SCHEMA.field("request_key"), *TOKEN_COLUMNS])
        tables = self._tables(keys, schema.names)
        table = pa.concat_tables([schema.empty_table(), *(one.cast(schema) for one in tables)])
        return table.filter(table["token_ids"].is_valid())

    def _tables(self, keys: Sequence[str], columns: Sequence[str]) -> list[pa.Table]:
        """Columns of the usable answers to the given keys, a table a part."""
        try:
            return self._read(keys, columns)
        except IntegrityError:  # Another run has merged parts, or written one again whose put was thought to have failed.
            self._list_parts()
            return self._read(keys, columns)

    def _read(self, keys: Sequence[str], columns: Sequence[str]) -> list[pa.Table]:
        def chosen(found: tuple[int, np.ndarray[Any, Any]]) -> pa.Table:
            part, rows = self._parts[found[0]], found[1]
            return read_rows(part, rows, columns, what=_WHAT, fetch=self._recent.open)

        return list(several_at_once(self.folder, chosen, self._index.rows_by_part(keys).items()))

    def add(self, completions: Iterable[Completion]) -> None:
        """Take answers for the next flush; failed ones are not kept."""
        self._writer.add(
            {
                "request_key": done.key, "raw_text": done.text, "finish_reason": done.finish_reason,
                "prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens,
                "max_tokens": self.max_tokens, "logprob": done.logprob, **(_token_row(done) if self.has_tokens else {}),
            }
            for done in completions
            if done.finish_reason != "error"
        )  # fmt: skip

    def pay(self, usage: Usage) -> None:
        """Take what answers cost for the next flush; :attr:`paid` is what the parts on disk say."""
        if usage != Usage():
            self._unsaved += usage
            self._writer.note(_PAID, json.dumps(asdict(self._unsaved)))

    def prepare(self) -> None:
        """Find out whether a remote store can be written, before answers are paid for. Raises StorageError."""
        self._writer.prepare()

    def flush_if_due(self) -> None:
        """Call between batches: writes when enough rows wait or enough time has gone by."""
        self._index_part(self._writer.flush_if_due())

    def flush(self) -> None:
        """Write the waiting rows as one part; after this call a crash cannot lose them.

        Raises:
            StorageError: they could not be written; they wait on, and so does what was paid for them.
        """
        self._index_part(self._writer.flush())

    def compact(self) -> None:
        """Merge small parts of a local store where there are many. Other runs may read and write meanwhile."""
        if isinstance(self.folder, Path) and merge_small_parts(self.folder, what=_WHAT, merge_notes=_merged_notes):
            self._list_parts()

    def _list_parts(self) -> None:
        """Index the parts that are there now. They may be merged or written again while they are read: then once more."""
        failed: set[Place] | None = None
        while True:
            parts: list[Place] = [*part_files(self.folder)]
            self._parts, self._index, self._recent, self.paid = parts, KeyIndex(), RecentParts(), Usage()
            try:
                return self._take(enumerate(parts))
            except IntegrityError:
                if failed is not None and failed <= set(parts):
                    raise
                failed = set(parts)

    def _index_part(self, part: Place | None) -> None:
        if part is not None:
            self._unsaved = Usage()
            self._parts.append(part)
            self._take([(len(self._parts) - 1, part)])

    def _take(self, parts: Iterable[tuple[int, Place]]) -> None:
        """Add the usable rows of parts to the index, but for those of parts that others have taken the place of."""
        found = list(several_at_once(self.folder, self._indexed, parts))
        replaced = frozenset[str]().union(*(part.replaces for part in found))
        counted = [part for part in found if part.name not in replaced]
        self._index.add([(part.number, part.keys, part.rows) for part in counted])
        self.paid = sum((part.paid for part in counted), self.paid)

    def _indexed(self, numbered: tuple[int, Place]) -> _Indexed:
        number, part = numbered
        table = read_part(part, ["request_key", "finish_reason", "completion_tokens", "max_tokens"], what=_WHAT)
        usable, notes = self._usable(table).nonzero()[0], table.schema.metadata
        keys = table["request_key"].take(pa.array(usable)).to_pylist()
        return _Indexed(number, part.name, keys, usable, _paid_in(notes), replaced_by(notes))

    def _usable(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        tokens, limit = table["completion_tokens"].to_numpy(), table["max_tokens"].to_numpy()
        stopped = table["finish_reason"].to_numpy() == "stop"
        cut_by_context = tokens < limit
        fits = (tokens <= self.max_tokens) & (stopped | cut_by_context)
        is_own = limit == self.max_tokens  # whatever tokens a server counts or lets through
        return np.asarray(is_own | fits | (~stopped & (tokens == self.max_tokens)), np.bool_)


def _token_row(done: Completion) -> dict[str, Any]:
    """TOKEN_COLUMNS of a completion."""
    tokens = done.tokens
    columns = (None,) * 4 if tokens is None else (tokens.ids, tokens.logprobs, tokens.top_ids, tokens.top_logprobs)
    return dict(zip(TOKEN_COLUMNS.names, columns, strict=True))


def _paid_in(notes: Notes | None) -> Usage:
    return Usage(**json.loads((notes or {}).get(_PAID.encode(), b"{}")))


def _merged_notes(notes: Sequence[Notes]) -> dict[str, str]:
    return {_PAID: json.dumps(asdict(sum(map(_paid_in, notes), Usage())))}
