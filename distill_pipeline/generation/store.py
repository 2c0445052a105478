"""The generation store: every answer a teacher ever gave, under its request's key, outliving artifacts and experiments.

Layout: ``<root>/<family>/part-<time>-<random>.parquet`` and ``<root>/<family>/family.json`` with the readable settings. Parts
are never changed and appear whole, so several runs may write at once and a crash loses only what was not flushed. Of two
answers to one request the first stays. Failed requests are not kept: the next run asks again.

Decided: an answer that ended by itself serves every ``max_tokens`` that holds it; one that was cut serves only the
``max_tokens`` that cut it, unless the model's context did. Gave up: a database; the index of keys is 20 bytes a row in memory.
"""

import json
import os
import time
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.errors import IntegrityError
from distill_pipeline.generation.engine import Completion
from distill_pipeline.storage.files import sync, write_whole

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

_ABANDONED_SECONDS = 86_400
"""A temporary file this old belongs to no living writer."""


class GenerationStore:
    """The answers of one family that serve one ``max_tokens``."""

    def __init__(
        self,
        root: Path,
        family: str,
        settings: dict[str, Any],
        *,
        max_tokens: int,
        flush_rows: int = 2048,
        flush_seconds: float = 30.0,
    ) -> None:
        """Open a family and read the index of its keys; nothing is written before the first flush.

        Args:
            flush_rows: :meth:`flush_if_due` writes when so many rows wait,
            flush_seconds: or when the last write is so long ago.
        Raises:
            IntegrityError: a part cannot be read; the message names it.
        """
        self.folder = root / family
        self.max_tokens = max_tokens
        self._flush_rows, self._flush_seconds = flush_rows, flush_seconds
        self._waiting: list[dict[str, Any]] = []
        self._flushed_at = time.monotonic()
        self._settings = settings
        self._remove_abandoned()
        self._parts: list[Path] = sorted(self.folder.glob("part-*.parquet"))
        self._keys = np.empty(0, np.uint64)
        self._places = np.empty((0, 2), np.uint32)
        self._index(enumerate(self._parts))

    def has(self, keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each key whether a usable answer is on disk."""
        wanted = _short(keys)
        if not len(self._keys):
            return np.zeros(len(wanted), np.bool_)
        found = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        return np.asarray(self._keys[found] == wanted)

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The usable answers to the given keys that are on disk; others are left out."""
        wanted = [key for key, there in zip(keys, self.has(keys), strict=True) if there]
        places = self._places[np.searchsorted(self._keys, _short(wanted))]
        rows: dict[str, dict[str, Any]] = {}
        for part in np.unique(places[:, 0]):
            numbers = places[places[:, 0] == part, 1]
            table = self._read_part(self._parts[part], STORED_SCHEMA.names).take(pa.array(numbers))
            rows.update((row["request_key"], row) for row in table.to_pylist())
        return {key: rows[key] for key in wanted if key in rows}

    def add(self, completions: Iterable[Completion]) -> None:
        """Take answers for the next flush; failed ones are not kept."""
        for done in completions:
            if done.finish_reason != "error":
                self._waiting.append(
                    {
                        "request_key": done.key, "raw_text": done.text, "finish_reason": done.finish_reason,
                        "prompt_tokens": done.prompt_tokens, "completion_tokens": done.completion_tokens,
                        "max_tokens": self.max_tokens, "logprob": done.logprob,
                    }
                )  # fmt: skip

    def flush_if_due(self) -> None:
        """Call between batches: writes when enough rows wait or enough time has gone by."""
        if len(self._waiting) >= self._flush_rows or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as one part; after this call a crash cannot lose them."""
        self._flushed_at = time.monotonic()
        if not self._waiting:
            return
        if not (self.folder / "family.json").exists():
            write_whole(self.folder / "family.json", json.dumps(self._settings, indent=1, sort_keys=True))
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}.parquet"
        temporary, part = self.folder / f".tmp-{name}", self.folder / f"part-{name}"
        with temporary.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(self._waiting, schema=STORED_SCHEMA), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, part)
        sync(self.folder)
        self._waiting.clear()
        self._parts.append(part)
        self._index([(len(self._parts) - 1, part)])

    def _index(self, parts: Iterable[tuple[int, Path]]) -> None:
        """Add the usable rows of parts to the index; a key that is there already keeps its first row."""
        keys, places = [self._keys], [self._places]
        for number, part in parts:
            table = self._read_part(part, ["request_key", "finish_reason", "completion_tokens", "max_tokens"])
            usable = self._usable(table).nonzero()[0]
            keys.append(_short(table["request_key"].take(pa.array(usable)).to_pylist()))
            places.append(np.stack([np.full(len(usable), number), usable], axis=1).astype(np.uint32))
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._places = np.concatenate(places)[first]

    def _usable(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        tokens, limit = table["completion_tokens"].to_numpy(), table["max_tokens"].to_numpy()
        stopped = table["finish_reason"].to_numpy() == "stop"
        cut_by_context = tokens < limit
        fits = (tokens <= self.max_tokens) & (stopped | cut_by_context)
        return np.asarray(fits | (~stopped & (tokens == self.max_tokens)), np.bool_)

    def _read_part(self, part: Path, columns: list[str]) -> pa.Table:
        try:
            return pq.read_table(part, columns=columns, partitioning=None)
        except (pa.ArrowInvalid, OSError) as err:
            raise IntegrityError(
                f"the part {part} of the generation store cannot be read: {err}. Restore it, or remove it: its answers are "
                "then asked for again."
            ) from err

    def _remove_abandoned(self) -> None:
        for path in self.folder.glob(".tmp-*"):
            try:
                if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue


def _short(keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 64 bits of hexadecimal keys: 10 million rows share one with p < 3e-6, and reading compares the whole key."""
    return np.array([int(key[:16], 16) for key in keys], dtype=np.uint64)
