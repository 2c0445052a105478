"""Writing rows as numbered Parquet files whose bytes depend on the rows alone.

Rows are regrouped to a fixed size before they are written, so that the batches in which a stage happened to work leave no
trace in the files, and a result keeps its content hash. Memory holds one row group, whatever the number of rows.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 2048
"""Rows held in memory before they are written: 90 MB of reasoning traces of 44 KB."""

GROUPS_PER_FILE = 128


class ShardWriter:
    """Writes ``<prefix>-00000.parquet``, ``<prefix>-00001.parquet``, ... in a folder; at least one file, even if empty.

    Use it as a context manager. ``num_rows`` is the number of rows given so far.
    """

    def __init__(
        self, folder: Path, prefix: str, schema: pa.Schema, *, rows_per_group: int = ROWS_PER_GROUP,
        groups_per_file: int = GROUPS_PER_FILE,
    ) -> None:  # fmt: skip
        self.num_rows = 0
        self._folder, self._prefix, self._schema = folder, prefix, schema
        self._rows_per_group, self._groups_per_file = rows_per_group, groups_per_file
        self._loose: list[Mapping[str, Any]] = []
        self._tables: list[pa.Table] = []
        self._table_rows = 0
        self._num_groups = 0
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._flush(last=True)
            if self._num_groups == 0:
                self._write_group(self._schema.empty_table())
        if self._writer is not None:
            self._writer.close()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append one row given as a mapping."""
        self._loose.append(row)
        self.num_rows += 1
        if len(self._loose) >= self._rows_per_group:
            self._flush()

    def extend(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append rows given as mappings."""
        for row in rows:
            self.add(row)

    def add_batch(self, batch: pa.RecordBatch) -> None:
        """Append the rows of a record batch that has this schema."""
        self._gather()
        self._tables.append(pa.Table.from_batches([batch], schema=self._schema))
        self._table_rows += batch.num_rows
        self.num_rows += batch.num_rows
        self._flush()

    def _gather(self) -> None:
        if self._loose:
            self._tables.append(pa.Table.from_pylist(self._loose, schema=self._schema))
            self._table_rows += len(self._loose)
            self._loose = []

    def _flush(self, *, last: bool = False) -> None:
        self._gather()
        if self._table_rows < self._rows_per_group and not (last and self._table_rows):
            return
        table = pa.concat_tables(self._tables)
        start = 0
        while table.num_rows - start >= self._rows_per_group or (last and start < table.num_rows):
            self._write_group(table.slice(start, self._rows_per_group))
            start += self._rows_per_group
        rest = table.slice(min(start, table.num_rows))
        self._table_rows = rest.num_rows
        self._tables = [rest.combine_chunks()] if rest.num_rows else []

    def _write_group(self, table: pa.Table) -> None:
        if self._num_groups % self._groups_per_file == 0:
            if self._writer is not None:
                self._writer.close()
            name = f"{self._prefix}-{self._num_groups // self._groups_per_file:05d}.parquet"
            self._writer = pq.ParquetWriter(self._folder / name, self._schema, compression="zstd")
        assert self._writer is not None
        self._writer.write_table(table.combine_chunks(), row_group_size=self._rows_per_group)
        self._num_groups += 1
