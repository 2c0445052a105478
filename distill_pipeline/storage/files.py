"""Files that nobody ever sees half of, also after a crash."""

import os
import tempfile
from pathlib import Path

from distill_pipeline.storage.places import Place, RemotePath


def write_whole(path: Place, text: str) -> None:
    """Write or replace a file, making its folder: readers see the old text or the new one, also after a crash."""
    if isinstance(path, RemotePath):
        path.write_bytes(text.encode())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".tmp-", delete=False, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def text_of(path: Place) -> str | None:
    """What a file says; None where there is none."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        return None


def user_cache() -> Path:
    """This user's cache folder, for what can be made or fetched again; it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distill_pipeline"


def sync(path: Path) -> None:
    """Have a file's content, or a folder's list of names, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
