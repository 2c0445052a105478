"""What a model is, as a hash of its content, and a memory of it so that large files are read once.

Decided: the hash covers weights, configuration, tokenizer and code, and nothing that only tells who wrote a file: the same
model saved by another version of transformers keeps its identity, and so do all answers it gave.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distill_pipeline.hashing import file_sha256, sha256_of, version_of
from distill_pipeline.storage.files import write_whole

MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Patterns of the files that make a model; weights in pickles are never among them."""

_NOT_THE_MODEL = {"resolved.json", "trainer_state.json"}
_PROVENANCE = {"transformers_version", "_name_or_path", "name_or_path"}


def model_files(folder: Path) -> list[Path]:
    """The files that make the model of a folder, sorted."""
    found = {path for pattern in MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.name not in _NOT_THE_MODEL)


def folder_identity(folder: Path, memory: Path) -> str:
    """SHA-256 over the model's files; ``memory`` is a folder that remembers it by the files' names, sizes and times."""
    files = model_files(folder)
    key = [str(folder.resolve()), _stamps(files)]
    return remembered(key, memory, lambda: sha256_of([[file.name, _content(file)] for file in files]))


def remembered_sha256(file: Path, memory: Path) -> str:
    """SHA-256 of a file, remembered by its path, size and time."""
    return remembered([str(file.resolve()), _stamps([file])], memory, lambda: file_sha256(file))


def remembered(key: Any, memory: Path, compute: Callable[[], str]) -> str:
    """A text computed once a key; written so that readers see a whole one or none."""
    path = memory / f"{version_of(key)}.txt"
    if path.is_file() and (text := path.read_text(encoding="utf-8")):
        return text
    result = compute()
    write_whole(path, result)
    return result


def _stamps(files: list[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _content(file: Path) -> str:
    """A file's hash; a JSON mapping is hashed without the entries that only tell who wrote it."""
    if file.suffix == ".json":
        try:
            document = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return file_sha256(file)
        if isinstance(document, dict):
            return sha256_of({key: value for key, value in document.items() if key not in _PROVENANCE})
    return file_sha256(file)
