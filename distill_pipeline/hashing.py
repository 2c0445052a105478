"""Content hashes: the identity of everything that is stored.

One canonical JSON form (sorted keys, no white space, UTF-8, no NaN) serves prompts, requests, specs and versions, so that
equal content has one hash on every machine. Files are hashed by content, never by time or name.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION_CHARS = 16
"""Length of a version in hexadecimal characters: 64 bits, so that 10 million artifacts collide with p < 3e-6."""


def canonical_json(value: Any) -> str:
    """The one text form of a JSON value. Raises ValueError for NaN and infinities, TypeError for what JSON cannot hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Any) -> str:
    """SHA-256, in hexadecimal, of a JSON value's canonical form."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def version_of(value: Any) -> str:
    """The short version string of a JSON value: the head of its SHA-256."""
    return sha256_of(value)[:VERSION_CHARS]


def file_sha256(path: Path) -> str:
    """SHA-256, in hexadecimal, of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_version(files: Mapping[str, str]) -> str:
    """The version of a set of files from ``{relative path: sha256}``, whatever their order."""
    return version_of(sorted(files.items()))


def unit_interval(key: str) -> float:
    """A number in [0, 1) that depends on ``key`` alone: for splits and samples that do not move when rows are added."""
    return int(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:13], 16) / 16**13
