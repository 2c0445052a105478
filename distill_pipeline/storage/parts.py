"""Folders of Parquet parts that only grow: a writer that gathers rows into parts, and a small index of the keys in them.

Parts are never changed and appear whole under a name of their own, so several runs may write at once, from several machines
where the folder is on a filesystem that they share, and a crash loses only what was not written yet. In local folders
:mod:`distill_pipeline.storage.compaction` merges small parts; it takes locks, so elsewhere they stay, and a writer there waits
longer between two of them. The index holds 16 bytes a row.
"""

import os
import re
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.errors import IntegrityError, StorageError
from distill_pipeline.storage.files import sync, write_whole
from distill_pipeline.storage.places import Place, RemotePath, storage_error

FLUSH_SECONDS = 30.0
REMOTE_FLUSH_SECONDS = 120.0
"""So long rows wait for their part at most: what a crash can lose, against the number of parts that nobody merges."""

RECENT_BYTES = 256 << 20
"""So much of the remote parts that were read last stays in memory: about those of the answers that are written together."""

_PARTS = "part-*.parquet"
_ABANDONED_SECONDS = 86_400
"""A temporary file this old belongs to no living writer."""
_READERS = 8
"""Remote parts that are read at once: each costs a few round trips."""

T = TypeVar("T")
R = TypeVar("R")


@overload
def part_files(folder: Path) -> list[Path]: ...
@overload
def part_files(folder: Place) -> list[Place]: ...
def part_files(folder: Place) -> Sequence[Place]:
    """The parts of a folder, oldest first.

    A local folder is listed until two listings agree: parts are merged there, and one may miss what is just being replaced.
    """
    if isinstance(folder, RemotePath):
        return [*folder.glob(_PARTS)]
    parts = sorted(folder.glob(_PARTS))
    while (again := sorted(folder.glob(_PARTS))) != parts:
        parts = again
    return parts


def part_name(stamp: str | None = None) -> str:
    """A new part's name; ``stamp`` is its place in the order, else it is the newest."""
    return f"part-{stamp or f'{time.time_ns():020d}'}-{uuid.uuid4().hex[:12]}.parquet"


def write_part(part: Place, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """Add a part; once this returns a crash cannot lose it. Each table is a piece that can be read by itself."""
    if isinstance(part, RemotePath):
        buffer = pa.BufferOutputStream()
        _write_tables(buffer, tables, schema)
        part.write_bytes(buffer.getvalue().to_pybytes())
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    temporary = part.with_name(part.name.replace("part-", ".tmp-"))
    try:
        with temporary.open("wb") as file:
            _write_tables(file, tables, schema)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # On a full disk it would be in the way of the next try.
        raise
    os.replace(temporary, part)
    sync(part.parent)


def _write_tables(file: Any, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


Fetch = Callable[[RemotePath], Any]
"""Opens a remote part, so that nothing but some columns is fetched, or as :class:`RecentParts` does."""


@contextmanager
def opened_part(part: Place, *, what: str, fetch: Fetch = RemotePath.open) -> Iterator[pq.ParquetFile]:
    """A part for reading, here and inside.

    Args:
        what: what it is a part of, for messages.
    Raises:
        IntegrityError: it is damaged or gone; the message names it.
        StorageError: its filesystem cannot be reached.
    """
    try:
        with fetch(part) if isinstance(part, RemotePath) else part.open("rb") as file:
            yield pq.ParquetFile(file, pre_buffer=isinstance(part, RemotePath))
    except StorageError:
        raise
    except (pa.ArrowInvalid, OSError) as err:
        raise IntegrityError(
            f"the part {part} of the {what} cannot be read: {err}. Restore it, or remove it: what it held is then made again."
        ) from err


def read_part(part: Place, columns: Sequence[str], *, what: str, fetch: Fetch = RemotePath.open) -> pa.Table:
    """Columns of a part. Raises what :func:`opened_part` raises."""
    with opened_part(part, what=what, fetch=fetch) as file:
        return file.read(columns=list(columns))


def read_rows(
    part: Place, rows: np.ndarray[Any, Any], columns: Sequence[str], *, what: str, fetch: Fetch = RemotePath.open
) -> pa.Table:
    """Columns of some rows, given by their numbers in rising order; one piece of the part is in memory at a time.

    Raises what :func:`opened_part` raises.
    """
    with opened_part(part, what=what, fetch=fetch) as file:
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        piece_of_row = np.searchsorted(starts, rows, side="right") - 1
        pieces = [
            file.read_row_group(int(piece), columns=list(columns)).take(pa.array(rows[piece_of_row == piece] - starts[piece]))
            for piece in np.unique(piece_of_row)
        ]
        return pa.concat_tables(pieces)


class RecentParts:
    """The remote parts that were fetched last, whole: rows of a few parts, read mixed and in many steps, fetch each once."""

    def __init__(self) -> None:
        self._kept: OrderedDict[RemotePath, bytes] = OrderedDict()
        self._lock = Lock()

    def open(self, part: RemotePath) -> pa.BufferReader:
        """A part for reading. Raises FileNotFoundError."""
        with self._lock:
            data = self._kept.pop(part, None)
        if data is None:
            data = part.read_bytes()
        with self._lock:
            self._kept[part] = data
            while len(self._kept) > 1 and sum(map(len, self._kept.values())) > RECENT_BYTES:
                self._kept.popitem(last=False)
        return pa.BufferReader(data)


def several_at_once(folder: Place, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """A function of each of a folder's parts, in order: one by one on a local disk, a few at once where the way is long."""
    if isinstance(folder, Path):
        yield from map(function, items)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        yield from pool.map(function, items)


def remove_abandoned(folder: Place) -> None:
    """Remove what writers left that were killed long ago."""
    for path in folder.glob(".tmp-*"):
        if isinstance(path, RemotePath):
            if (made := re.match(r"\.tmp-(\d{20})-", path.name)) and time.time() - int(made[1]) / 1e9 > _ABANDONED_SECONDS:
                path.remove()
            continue
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue


class PartWriter:
    """Rows on their way to a folder of parts. Nothing is written before the first row is, but for :meth:`prepare`.

    What could not be written waits on, so that a later call may still write it.

    Args:
        about: name and text of a file that says what the folder holds; written before its first part.
        flush_rows: :meth:`flush_if_due` writes when so many rows wait,
        flush_seconds: or when the last write is so long ago; None is FLUSH_SECONDS in a local folder, REMOTE_FLUSH_SECONDS in
            others.
    """

    def __init__(
        self, folder: Place, schema: pa.Schema, *, about: tuple[str, str], flush_rows: int, flush_seconds: float | None = None
    ) -> None:
        self._folder, self._schema, self._about = folder, schema, about
        if flush_seconds is None:
            flush_seconds = FLUSH_SECONDS if isinstance(folder, Path) else REMOTE_FLUSH_SECONDS
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._waiting: list[Mapping[str, Any]] = []
        self._notes: dict[str, str] = {}
        self._name = ""
        """Of the part that is being written, until it is there: a second try replaces what the first may have left."""
        self._is_prepared = False
        self._flushed_at = time.monotonic()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows for the next part."""
        self._waiting.extend(rows)

    def note(self, name: str, text: str) -> None:
        """Put a text into the metadata of the next part, which is then written also without rows."""
        self._notes[name] = text

    def prepare(self) -> None:
        """Find out whether a remote folder can be written, before rows are made at a price. Raises StorageError."""
        if isinstance(self._folder, RemotePath) and not self._is_prepared:
            name, text = self._about
            write_whole(self._folder / name, text)
            self._is_prepared = True

    def flush_if_due(self) -> Place | None:
        """Call between batches: the part that was written, if it was time."""
        is_due = len(self._waiting) >= self._flush_rows or time.monotonic() - self._flushed_at >= self._flush_seconds
        return self.flush() if is_due else None

    def flush(self) -> Place | None:
        """Write what waits as one part; once this returns a crash cannot lose it. None where nothing waits.

        Raises:
            StorageError: it could not be written, and waits on.
        """
        self._flushed_at = time.monotonic()
        if not self._waiting and not self._notes:
            return None
        schema = self._schema.with_metadata(self._notes) if self._notes else self._schema
        table = pa.Table.from_pylist(self._waiting, schema=schema)
        self._name = self._name or part_name()
        part = self._folder / self._name
        self._write(part, table)
        self._name = ""
        self._waiting.clear()
        self._notes.clear()
        return part

    def _write(self, part: Place, table: pa.Table) -> None:
        """Write a part, and before it what the folder holds."""
        if isinstance(part, RemotePath):
            self.prepare()
            write_part(part, [table], table.schema)
            return
        name, text = self._about
        try:
            if not (part.parent / name).exists():
                write_whole(part.parent / name, text)
            write_part(part, [table], table.schema)
        except OSError as err:
            raise storage_error(part, "write", err) from err


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
