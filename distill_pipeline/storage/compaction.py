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
from distill_pipeline.storage.parts import part_files, part_name, read_part, write_part

SMALL_BYTES = 4 << 20
LARGE_BYTES = 16 << 20
"""Parts below the first are merged into parts of at most the second: readers have a whole part in memory."""
LARGE_ROWS = 40_000
"""Nor do merged parts have more rows than this: answers that are much alike take few bytes on disk, all of them in memory."""
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
        notes_of_all = [read_part(part, [], what=what).schema.metadata for part in part_files(folder)]
        _remove(folder, (name for found in notes_of_all for name in replaced_by(found)))  # Left by one that was killed.
        groups = _small_groups(_sizes(folder), min_parts, what)
        for group in groups:
            tables = [read_part(part, None, what=what) for part in group]
            notes = merge_notes([table.schema.metadata or {} for table in tables])
            notes[_REPLACES] = json.dumps([part.name for part in group])
            merged = pa.concat_tables(tables, promote_options="default").replace_schema_metadata(notes)
            write_part(folder / part_name(group[0].name.split("-")[1]), merged)
            _remove(folder, (part.name for part in group))
    return bool(groups)


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
            own = len(read_part(part, [], what=what))
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
