"""Prompt sources: files, folders, globs and fsspec URLs, read row by row.

A file is named in results as the experiment file names its source (``examples/x/prompts.jsonl``, never this machine's full
path), so that the same experiment gives the same artifact everywhere. Nothing a row says is ever used as a path.
"""

import hashlib
import io
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import fsspec

from distill_pipeline.errors import SourceError
from distill_pipeline.prompts.readers import READERS, Fault, read_rows
from distill_pipeline.prompts.rows import MalformedRow, PromptFields, parse_row
from distill_pipeline.prompts.spec import SourceSpec

ResolvePath = Callable[[str], str]

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = "*?["
_HASH_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used; ``line`` is 0 where the whole file cannot."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A usable row and where it stands."""

    file: str
    line: int
    fields: PromptFields


@dataclass(frozen=True)
class _SourceFile:
    filesystem: Any
    path: str
    label: str
    suffix: str


def source_files(source: SourceSpec, resolve_path: ResolvePath, *, only: Collection[str] | None = None) -> dict[str, str]:
    """SHA-256 of each file of a source, by its path as the experiment file would write it, in reading order.

    Args:
        only: read just the files of these paths; None reads all.
    Raises:
        SourceError: the path matches nothing, or something that is no JSONL, JSON, CSV or Parquet file.
    """
    files = _locate(source, resolve_path)
    return {file.label: _sha256(source, file) for file in files if only is None or file.label in only}


def source_stamps(source: SourceSpec, resolve_path: ResolvePath) -> dict[str, tuple[str, float | None]]:
    """What the storage says of each file of a source without reading it, by the same paths.

    Returns:
        A text that changes when the file does (size, and time, version or checksum where the storage has one), and when it
        was changed, in Unix seconds; None where the storage does not say.
    Raises:
        SourceError: as :func:`source_files`, and for a file that is gone by the time it is looked at.
    """
    try:
        return {file.label: _stamp(file.filesystem.info(file.path)) for file in _locate(source, resolve_path)}
    except OSError as err:
        raise SourceError(f"prompt_pool source {source.path}: a file cannot be looked at: {err}") from err


def _stamp(info: dict[str, Any]) -> tuple[str, float | None]:
    changed: Any = next((info[key] for key in ("mtime", "LastModified", "last_modified", "updated") if info.get(key)), None)
    seconds = changed.timestamp() if hasattr(changed, "timestamp") else changed
    marks = [info.get(key) for key in ("size", "ino", "ETag", "etag", "md5Hash", "blob_id")]
    return "|".join(str(mark) for mark in (*marks, changed) if mark is not None), seconds if isinstance(
        seconds, float | int
    ) else None


def read_source(source: SourceSpec, resolve_path: ResolvePath) -> Iterator[SourceRow | BadRow]:
    """The rows of a source, in the order of its files' names.

    Raises:
        SourceError: the path matches nothing, a file cannot be opened, or no row at all is usable.
    """
    columns = source.columns.model_dump()
    num_good = 0
    first_bad: BadRow | None = None
    for file in _locate(source, resolve_path):
        for row in _file_rows(source, file, columns):
            if isinstance(row, BadRow):
                first_bad = first_bad or row
            else:
                num_good += 1
            yield row
    if num_good == 0:
        where = f"{first_bad.file}, line {first_bad.line}: {first_bad.reason}" if first_bad else "its files hold no rows"
        raise SourceError(
            f"prompt_pool source {source.path} has no usable row: {where}. Mend the file, or name its columns under columns:."
        )


def _file_rows(source: SourceSpec, file: _SourceFile, columns: dict[str, str]) -> Iterator[SourceRow | BadRow]:
    try:
        # Files of some file systems, the Hub's among them, cannot read a line up to a limit; a buffer can.
        with file.filesystem.open(file.path, "rb", compression="infer") as stream, io.BufferedReader(stream) as buffered:
            for line, row in read_rows(buffered, file.suffix):
                yield _checked(file.label, line, row, columns, source.domain)
    except (OSError, EOFError) as err:
        if isinstance(err, FileNotFoundError | PermissionError):
            raise SourceError(f"prompt_pool source {source.path}: cannot read {file.label}: {err}") from err
        yield BadRow(file.label, 0, f"the file cannot be read to its end: {err}")


def _checked(label: str, line: int, row: dict[str, Any] | Fault, columns: dict[str, str], domain: str) -> SourceRow | BadRow:
    if isinstance(row, Fault):
        return BadRow(label, line, row.reason)
    try:
        return SourceRow(label, line, parse_row(row, columns, domain))
    except (MalformedRow, RecursionError) as err:
        return BadRow(label, line, str(err) or "nested too deeply")


def _locate(source: SourceSpec, resolve_path: ResolvePath) -> list[_SourceFile]:
    """The files of a source, sorted by name."""
    resolved = resolve_path(source.path)
    try:
        filesystem, root = fsspec.core.url_to_fs(resolved)
        found, given_base, root_base = _matches(filesystem, root, source.path)
    except (OSError, ValueError, ImportError) as err:
        raise SourceError(f"prompt_pool source {source.path} cannot be opened: {err}. Check the path.") from err
    if not found:
        known = ", ".join(READERS)
        raise SourceError(
            f"prompt_pool source {source.path} matches no file ({resolved}). Check the path; known file types: {known}."
        )
    files = []
    for path in sorted(found):
        suffix = _suffix(path)
        if suffix not in READERS:
            raise SourceError(f"prompt_pool source {source.path}: {path} has no known file type; known: {', '.join(READERS)}.")
        label = f"{given_base}{path.removeprefix(root_base)}"
        files.append(_SourceFile(filesystem, path, label, suffix))
    return files


def _matches(filesystem: Any, root: str, given: str) -> tuple[list[str], str, str]:
    """Paths found, and the beginnings that a path has in the experiment file and in the file system."""
    if filesystem.isfile(root):
        return [root], given, root
    if filesystem.isdir(root):
        folder = root.rstrip("/")
        inside = [path for path in filesystem.find(folder) if _suffix(path) in READERS and not _is_hidden(path, folder)]
        return inside, given.rstrip("/"), folder
    if any(char in root for char in _MAGIC):
        matched = [path for path in filesystem.glob(root) if filesystem.isfile(path)]
        return matched, _before_magic(given), _before_magic(root)
    return [], given, root


def _before_magic(pattern: str) -> str:
    """The part of a glob up to the last folder without a wildcard."""
    first = min(pattern.index(char) for char in _MAGIC if char in pattern)
    return pattern[: pattern.rfind("/", 0, first) + 1]


def _is_hidden(path: str, folder: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(path.removeprefix(folder).lstrip("/")).parts)


def _suffix(path: str) -> str:
    pure = PurePosixPath(path.lower())
    return PurePosixPath(pure.stem).suffix if pure.suffix in _COMPRESSED else pure.suffix


def _sha256(source: SourceSpec, file: _SourceFile) -> str:
    digest = hashlib.sha256()
    try:
        with file.filesystem.open(file.path, "rb") as stream:
            while chunk := stream.read(_HASH_CHUNK):
                digest.update(chunk)
    except OSError as err:
        raise SourceError(f"prompt_pool source {source.path}: cannot read {file.label}: {err}") from err
    return digest.hexdigest()
