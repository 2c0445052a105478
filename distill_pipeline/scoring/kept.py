"""Scores that were given before, by content: a scorer is not run again on a row that did not change.

Layout: ``<root>/<identity>/part-<time>-<random>.parquet`` and ``scorer.json`` with the readable identity: the scorer's kind,
code version, options, and model where it asks one; on a local disk or any fsspec filesystem. A row's key is a hash of what its
score depends on. A reader sees the parts that were there when it opened; 16 bytes a row stay in memory. Scores of rows that
were lost are not kept.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.hashing import canonical_json, sha256_of
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.storage.parts import KeyIndex, PartWriter, part_files, read_part, remove_abandoned, several_at_once
from distill_pipeline.storage.places import Place

KEPT_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("detail", pa.string(), nullable=False),
    ]
)

_FLUSH_ROWS = 16_384
_OPEN_PARTS = 8
_WHAT = "store of scores"


def storable(detail: str) -> str:
    """A text that UTF-8 can hold, whatever a scorer wrote."""
    return detail.encode("utf-8", "replace").decode("utf-8")


class KeptScores:
    """The kept scores of one scorer: read at any time, written in parts."""

    def __init__(self, root: Place, identity: Mapping[str, Any], *, flush_rows: int = _FLUSH_ROWS) -> None:
        """Nothing is read before the first :meth:`read`, and nothing written before the first :meth:`add`.

        Args:
            identity: what the scores depend on beside the rows, as JSON values; its hash names the folder.
            flush_rows: a part is written when so many scores wait, or as long after the last as :class:`PartWriter` says.
        """
        self.folder = root / sha256_of(dict(identity))[:32]
        about = "scorer.json", canonical_json(dict(identity))
        self._writer = PartWriter(self.folder, KEPT_SCHEMA, about=about, flush_rows=flush_rows)
        self._index: KeyIndex | None = None
        self._parts: list[Place] = []
        self._tables: OrderedDict[int, pa.Table] = OrderedDict()

    def read(self, keys: Sequence[str]) -> dict[str, ScoreValue]:
        """The kept scores of the given keys; others are left out. Raises IntegrityError that names an unreadable part."""
        if self._index is None:
            self._index = self._indexed()
        wanted, found = set(keys), {}
        for part, numbers in self._index.rows_by_part(keys).items():
            rows = self._table(part).take(pa.array(numbers))
            for key, score, detail in zip(*(rows.column(name).to_pylist() for name in KEPT_SCHEMA.names), strict=True):
                if key in wanted:
                    found[key] = ScoreValue(score, detail)
        return found

    def add(self, scores: Iterable[tuple[str, ScoreValue]]) -> None:
        """Keep new scores under their keys, but for lost ones."""
        self._writer.add(
            {"key": key, "score": value.score, "detail": storable(value.detail)} for key, value in scores if not value.lost
        )
        self._writer.flush_if_due()

    def flush(self) -> None:
        """Write what waits; once this returns a crash cannot lose it. Raises StorageError; then it waits on."""
        self._writer.flush()

    def _indexed(self) -> KeyIndex:
        remove_abandoned(self.folder)
        self._parts = [*part_files(self.folder)]
        index = KeyIndex()
        tables = several_at_once(self.folder, lambda part: read_part(part, ["key"], what=_WHAT), self._parts)
        keys = (table["key"].to_pylist() for table in tables)
        index.add([(number, texts, np.arange(len(texts))) for number, texts in enumerate(keys)])
        return index

    def _table(self, part: int) -> pa.Table:
        """A part's rows; the last few parts stay open, since rows come in much the order in which they were scored."""
        if part not in self._tables:
            self._tables[part] = read_part(self._parts[part], KEPT_SCHEMA.names, what=_WHAT)
            if len(self._tables) > _OPEN_PARTS:
                self._tables.popitem(last=False)
        self._tables.move_to_end(part)
        return self._tables[part]
