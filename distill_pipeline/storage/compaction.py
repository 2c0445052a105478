"""Fewer, larger parts: neighbours among a folder's small parts become one part, while others read and write.

The new part takes the place of the first one it replaces in the order of parts, so that of two rows with one key the same one
stays the first. Its metadata names the parts it replaces: from the moment it appears, whole, they no longer count, so a crash
before they are removed neither loses a row nor counts anything twice. One process at a time merges a folder's parts, by a lock
that ends with the process. Whoever has an index of the old parts finds them gone, and lists the folder again.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path

import pyarrow as pa

from distill_pipeline.storage.files import sync
from distill_pipeline.storage.parts import opened_part, part_files, part_name, write_part

SMALL_BYTES = 4 << 20
LARGE_BYTES = 16 << 20
"""Parts below the first are merged into parts of at most the second, which remote readers would have in memory."""
LARGE_ROWS = 100_000
"""Nor do merged parts have more rows than this, whose keys are read together."""
PIECE_ROWS = 2048
"""Rows of a merged part that are read and written together: what is in memory, however much alike they are on disk."""
MIN_PARTS = 16
"""So many small neighbours are worth one merge: a row is then written anew a few times in all."""

_REPLACES = "replaces"

Notes = Mapping[bytes, bytes]
"""A part's metadata."""


def replaced_by(notes: Notes | None) -> frozenset[str]:
    """Names of the parts that a part with this metadata took the place of; where they are still there, they do not count."""
    return frozenset(json.loads((notes or {}).get(_REPLACES.encode(), b"[]")))


def merge_small_parts(
    folder: Path, *, what: str, merge_notes: Callable[[Sequence[Notes]], dict[str, str]], min_parts: int = MIN_PARTS
) -> bool:
    """Merge small neighbours where there are ``min_parts`` of them; False where nothing was done, or another one is at it.

    Args:
        what: what the folder is, for messages.
        merge_notes: the metadata of a part that replaces parts with these.
    Raises:
        IntegrityError: a part cannot be read; the message names it.
    """
    if sum(size < SMALL_BYTES for size in _sizes(folder).values()) < min_parts:
        return False
    with _alone(folder) as is_alone:
        if not is_alone:
            return False
        notes_of_all = [_schema(part, what).metadata for part in part_files(folder)]
        _remove(folder, (name for found in notes_of_all for name in replaced_by(found)))  # Left by one that was killed.
        groups = _small_groups(_sizes(folder), min_parts, what)
        for group in groups:
            schemas = [_schema(part, what) for part in group]
            notes = merge_notes([schema.metadata or {} for schema in schemas])
            notes[_REPLACES] = json.dumps([part.name for part in group])
            schema = pa.unify_schemas(schemas).with_metadata(notes)
            write_part(folder / part_name(group[0].name.split("-")[1]), _pieces(group, schema, what), schema)
            _remove(folder, (part.name for part in group))
    return bool(groups)


def _schema(part: Path, what: str) -> pa.Schema:
    with opened_part(part, what=what) as file:
        return file.schema_arrow


def _pieces(parts: Sequence[Path], schema: pa.Schema, what: str) -> Iterator[pa.Table]:
    """The rows of some parts in order, with all columns of ``schema``, in pieces of PIECE_ROWS or a little more."""
    waiting = [schema.empty_table()]
    for part in parts:
        with opened_part(part, what=what) as file:
            for number in range(file.num_row_groups):
                waiting.append(file.read_row_group(number))
                if sum(map(len, waiting)) >= PIECE_ROWS:
                    yield pa.concat_tables(waiting, promote_options="default")
                    del waiting[1:]
    if len(waiting) > 1:
        yield pa.concat_tables(waiting, promote_options="default")


def _sizes(folder: Path) -> dict[Path, int]:
    """Bytes of each part, oldest first, but for those that another process takes away meanwhile."""
    found: dict[Path, int] = {}
    for part in part_files(folder):
        with suppress(FileNotFoundError):
            found[part] = part.stat().st_size
    return found


def _small_groups(sizes: Mapping[Path, int], min_parts: int, what: str) -> list[list[Path]]:
    """Neighbours to be merged: each of them small, together not too large, and enough of them."""
    groups: list[list[Path]] = []
    for is_small, run in groupby(sizes, key=lambda part: sizes[part] < SMALL_BYTES):
        filled, num_rows = LARGE_BYTES, LARGE_ROWS
        for part in run if is_small else ():
            with opened_part(part, what=what) as file:
                own = file.metadata.num_rows
            if filled + sizes[part] > LARGE_BYTES or num_rows + own > LARGE_ROWS:
                groups.append([])
                filled = num_rows = 0
            groups[-1].append(part)
            filled, num_rows = filled + sizes[part], num_rows + own
    return [group for group in groups if len(group) >= min_parts]


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
    sync(folder)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether no other process merges this folder's parts; none does until this is left."""
    import fcntl  # Not on every system, and only needed here.

    with (folder / ".merging").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # Somebody is at it, or this file system has no locks: then small parts just stay.
            yield False
        else:
            yield True
