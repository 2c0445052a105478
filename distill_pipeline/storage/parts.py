"""Folders of Parquet parts that only grow: a writer that gathers rows into parts, and a small index of the keys in them.

Parts are never changed and appear whole under a name of their own, so several runs may write at once and a crash loses only
what was not written yet; :mod:`distill_pipeline.storage.compaction` merges small ones. The index holds 16 bytes a row.
"""

import os
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.errors import IntegrityError
from distill_pipeline.storage.files import sync, write_whole

_ABANDONED_SECONDS = 86_400
"""A temporary file this old belongs to no living writer."""


def part_files(folder: Path) -> list[Path]:
    """The parts of a folder, oldest first; listed until two listings agree, since one may miss what is just being replaced."""
    parts = sorted(folder.glob("part-*.parquet"))
    while (again := sorted(folder.glob("part-*.parquet"))) != parts:
        parts = again
    return parts


def write_part(folder: Path, table: pa.Table, *, stamp: str | None = None) -> Path:
    """Add a part; once this returns a crash cannot lose it. ``stamp`` is its place in the order, else it is the newest."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{stamp or f'{time.time_ns():020d}'}-{uuid.uuid4().hex[:12]}.parquet"
    temporary, part = folder / f".tmp-{name}", folder / f"part-{name}"
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, part)
    sync(folder)
    return part


def read_part(part: Path, columns: Sequence[str] | None, *, what: str) -> pa.Table:
    """Columns of a part (None: all). Raises IntegrityError that names it; ``what`` says what it is a part of."""
    try:
        return pq.read_table(part, columns=columns and list(columns), partitioning=None)
    except (pa.ArrowInvalid, OSError) as err:
        raise IntegrityError(
            f"the part {part} of the {what} cannot be read: {err}. Restore it, or remove it: what it held is then made again."
        ) from err


def remove_abandoned(folder: Path) -> None:
    """Remove what writers left that were killed long ago."""
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue


class PartWriter:
    """Rows on their way to a folder of parts. Nothing is written before the first row is.

    Args:
        about: name and text of a file that says what the folder holds; written before its first part.
        flush_rows: :meth:`flush_if_due` writes when so many rows wait,
        flush_seconds: or when the last write is so long ago.
    """

    def __init__(
        self, folder: Path, schema: pa.Schema, *, about: tuple[str, str], flush_rows: int, flush_seconds: float
    ) -> None:
        self._folder, self._schema, self._about = folder, schema, about
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._waiting: list[Mapping[str, Any]] = []
        self._notes: dict[str, str] = {}
        self._flushed_at = time.monotonic()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows for the next part."""
        self._waiting.extend(rows)

    def note(self, name: str, text: str) -> None:
        """Put a text into the metadata of the next part, which is then written also without rows."""
        self._notes[name] = text

    def flush_if_due(self) -> Path | None:
        """Call between batches: the part that was written, if it was time."""
        is_due = len(self._waiting) >= self._flush_rows or time.monotonic() - self._flushed_at >= self._flush_seconds
        return self.flush() if is_due else None

    def flush(self) -> Path | None:
        """Write what waits as one part; once this returns a crash cannot lose it. None where nothing waits."""
        self._flushed_at = time.monotonic()
        if not self._waiting and not self._notes:
            return None
        name, text = self._about
        if not (self._folder / name).exists():
            write_whole(self._folder / name, text)
        schema = self._schema.with_metadata(self._notes) if self._notes else self._schema
        part = write_part(self._folder, pa.Table.from_pylist(self._waiting, schema=schema))
        self._waiting.clear()
        self._notes.clear()
        return part


class KeyIndex:
    """Where the row of each key is, by the key's first 64 bits: of 10 million rows two share them with p < 3e-6.

    A key that comes again keeps its first place. Readers compare the whole key.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.uint64)
        self._places = np.empty((0, 2), np.uint32)

    def add(self, parts: Sequence[tuple[int, Sequence[str], np.ndarray[Any, Any]]]) -> None:
        """Take parts given as (number, hexadecimal keys, numbers of the keys' rows)."""
        keys, places = [self._keys], [self._places]
        for number, texts, rows in parts:
            keys.append(_short(texts))
            places.append(np.stack([np.full(len(rows), number), rows], axis=1).astype(np.uint32))
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def has(self, keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each key whether it is there."""
        wanted = _short(keys)
        if not len(self._keys):
            return np.zeros(len(wanted), np.bool_)
        found = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.asarray(self._keys[found] == wanted)

    def rows_by_part(self, keys: Sequence[str]) -> dict[int, np.ndarray[Any, Any]]:
        """Row numbers of the given keys that are there, by part."""
        there = [key for key, found in zip(keys, self.has(keys), strict=True) if found]
        places = self._places[np.searchsorted(self._keys, _short(there))]
        return {int(part): np.unique(places[places[:, 0] == part, 1]) for part in np.unique(places[:, 0])}


def _short(keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array([int(key[:16], 16) for key in keys], dtype=np.uint64)
