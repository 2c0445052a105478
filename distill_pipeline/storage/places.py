"""Files and folders on any fsspec filesystem, with what the stores ask of a path; on this machine they stay plain paths.

Files appear whole. An object store has no rename, and what is put there is there whole or not at all, so the bytes are put at
once; elsewhere they are written under another name and moved. Listings never come from fsspec's cache, since other machines
write too, and only the asked ranges of a file are read.

Decided: a write that fails is tried again for half a minute, under the same name, so that one whose answer was lost on the way
is there once. Gave up: locks, which object stores have not, and any word of when bytes reach a disk elsewhere.
"""

import io
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem

from distill_pipeline.errors import StorageError

RETRY_SECONDS = (1.0, 5.0, 20.0)
"""Waits before a failed write is tried again."""

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci", "hf"})
_IN_VAIN = (PermissionError, FileNotFoundError, NotImplementedError)
"""Errors that trying again does not mend."""


@dataclass(frozen=True)
class RemotePath:
    """A file or folder of a filesystem."""

    filesystem: AbstractFileSystem
    path: str

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.filesystem, f"{self.path}/{name}")

    def __str__(self) -> str:
        return str(self.filesystem.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return RemotePath(self.filesystem, self.path.rpartition("/")[0])

    def glob(self, pattern: str) -> "list[RemotePath]":
        """What is in the folder now under such names, by name; nothing where there is no folder."""
        with reaching(self, "list"):
            self.filesystem.invalidate_cache(self.path)
            try:
                found = self.filesystem.ls(self.path, detail=False)
            except FileNotFoundError:
                return []
        names = sorted(path.rstrip("/").rpartition("/")[2] for path in found)
        return [self / name for name in names if fnmatchcase(name, pattern)]

    def read_bytes(self, start: int | None = None, end: int | None = None) -> bytes:
        """A file's content, or a range of it. Raises FileNotFoundError."""
        with reaching(self, "read"):
            return bytes(self.filesystem.cat_file(self.path, start=start, end=end))

    def size(self) -> int:
        """A file's bytes. Raises FileNotFoundError."""
        with reaching(self, "read"):
            return int(self.filesystem.size(self.path))

    def open(self) -> "RangeReader":
        """A file for reading here and there. Raises FileNotFoundError."""
        return RangeReader(self)

    def write_bytes(self, data: bytes) -> None:
        """Write or replace a file, making its folder: nobody sees half of it. Raises StorageError where no try helped."""
        for seconds in (*RETRY_SECONDS, None):
            try:
                return self._put(data)
            except Exception as err:  # What filesystems raise has no common class.
                if seconds is None or isinstance(err, _IN_VAIN):
                    raise storage_error(self, "write", err) from err
            time.sleep(seconds)

    def remove(self) -> None:
        """Remove a file, if it is there."""
        with reaching(self, "remove"):
            try:
                self.filesystem.rm_file(self.path)
            except FileNotFoundError:
                return

    def _put(self, data: bytes) -> None:
        if _puts_whole(self.filesystem):
            self.filesystem.pipe_file(self.path, data)
            return
        self.filesystem.makedirs(self.parent.path, exist_ok=True)
        temporary = self.parent / f".tmp-{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        self.filesystem.pipe_file(temporary.path, data)
        if self.filesystem.exists(self.path):  # Not every rename replaces.
            with suppress(FileNotFoundError):
                self.filesystem.rm_file(self.path)
        self.filesystem.mv(temporary.path, self.path)


Place = Path | RemotePath
"""Where a store may lie."""


class RangeReader(io.RawIOBase):
    """A remote file open for reading: every read asks for just its range."""

    def __init__(self, place: RemotePath) -> None:
        self._place, self._size, self._at = place, place.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        data = self._place.read_bytes(self._at, end) if self._at < end else b""
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def storage_error(place: Place, doing: str, err: Exception) -> StorageError:
    """What is said where a place cannot be listed, read or written."""
    if isinstance(err, PermissionError):
        advice = "Give this user or these credentials the right to list, read and write there"
    elif isinstance(err, FileNotFoundError):
        advice = "Make the bucket or folder first, or correct the root (DISTILL_ROOT)"
    elif isinstance(place, Path):
        advice = "Make room on the disk, or choose another root (DISTILL_ROOT)"
    else:
        advice = "Look at the credentials, the network and the service"
    return StorageError(f"cannot {doing} {place}: {str(err) or type(err).__name__}. {advice}, then run the same again.")


@contextmanager
def reaching(place: Place, doing: str) -> Iterator[None]:
    """Have what a filesystem raises say where that was and what to do, but for a file that is not there."""
    try:
        yield
    except (FileNotFoundError, StorageError):
        raise
    except Exception as err:  # What filesystems raise has no common class.
        raise storage_error(place, doing, err) from err


def _puts_whole(filesystem: AbstractFileSystem) -> bool:
    """Whether what is put appears whole: in object stores, which are those that are known and those without a rename."""
    protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
    return bool(protocols & _OBJECT_STORES) or type(filesystem).mv is AbstractFileSystem.mv
