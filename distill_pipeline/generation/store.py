"""The generation store: every answer a teacher ever gave, under its request's key, outliving artifacts and experiments.

Layout: ``<root>/<family>/part-<time>-<random>.parquet`` and ``<root>/<family>/family.json`` with the readable settings. Parts
are never changed and appear whole, so several runs may write at once and a crash loses only what was not flushed. Of two
answers to one request the first stays. Failed requests are not kept: the next run asks again. A part's metadata holds what
was paid since the part before it, failed requests included, so ``paid`` is the cost of a family over all runs.

Decided: an answer that ended by itself serves every ``max_tokens`` that holds it; one that was cut serves only the
``max_tokens`` that cut it, unless the model's context did. Gave up: a database; the index of keys is 20 bytes a row in memory.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.storage.files import write_whole
from distill_pipeline.storage.parts import KeyIndex, part_files, read_part, remove_abandoned, write_part

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

_WHAT = "generation store"
_PAID = b"paid"


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
        remove_abandoned(self.folder)
        self._parts = part_files(self.folder)
        self._index = KeyIndex()
        self.paid, self._unsaved = Usage(), Usage()
        self._take(enumerate(self._parts))

    def has(self, keys: Sequence[str]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """For each key whether a usable answer is on disk."""
        return self._index.has(keys)

    def read(self, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
        """The usable answers to the given keys that are on disk; others are left out."""
        rows: dict[str, dict[str, Any]] = {}
        for part, numbers in self._index.rows_by_part(keys).items():
            table = read_part(self._parts[part], STORED_SCHEMA.names, what=_WHAT).take(pa.array(numbers))
            rows.update((row["request_key"], row) for row in table.to_pylist())
        return {key: rows[key] for key in keys if key in rows}

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

    def pay(self, usage: Usage) -> None:
        """Take what answers cost for the next flush; :attr:`paid` is what the parts on disk say."""
        self._unsaved += usage

    def flush_if_due(self) -> None:
        """Call between batches: writes when enough rows wait or enough time has gone by."""
        if len(self._waiting) >= self._flush_rows or time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Write the waiting rows as one part; after this call a crash cannot lose them."""
        self._flushed_at = time.monotonic()
        if not self._waiting and self._unsaved == Usage():
            return
        if not (self.folder / "family.json").exists():
            write_whole(self.folder / "family.json", json.dumps(self._settings, indent=1, sort_keys=True))
        schema = STORED_SCHEMA.with_metadata({_PAID: json.dumps(asdict(self._unsaved)).encode()})
        part = write_part(self.folder, pa.Table.from_pylist(self._waiting, schema=schema))
        self._waiting.clear()
        self._unsaved = Usage()
        self._parts.append(part)
        self._take([(len(self._parts) - 1, part)])

    def _take(self, parts: Iterable[tuple[int, Path]]) -> None:
        """Add the usable rows of parts to the index."""
        found = []
        for number, part in parts:
            table = read_part(part, ["request_key", "finish_reason", "completion_tokens", "max_tokens"], what=_WHAT)
            self.paid += Usage(**json.loads((table.schema.metadata or {}).get(_PAID, b"{}")))
            usable = self._usable(table).nonzero()[0]
            found.append((number, table["request_key"].take(pa.array(usable)).to_pylist(), usable))
        self._index.add(found)

    def _usable(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        tokens, limit = table["completion_tokens"].to_numpy(), table["max_tokens"].to_numpy()
        stopped = table["finish_reason"].to_numpy() == "stop"
        cut_by_context = tokens < limit
        fits = (tokens <= self.max_tokens) & (stopped | cut_by_context)
        return np.asarray(fits | (~stopped & (tokens == self.max_tokens)), np.bool_)
