"""Shards hold the rows in order, and their bytes do not tell in which batches the rows came."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.shards import ShardWriter

SCHEMA = pa.schema([pa.field("x", pa.int64(), nullable=False), pa.field("t", pa.string())])


def written(folder: Path, batches: list[list[int]], *, as_rows: bool) -> dict[str, bytes]:
    with ShardWriter(folder, "part", SCHEMA, rows_per_group=5, groups_per_file=2) as writer:
        for batch in batches:
            rows = [{"x": x, "t": str(x)} for x in batch]
            if as_rows:
                writer.extend(rows)
            else:
                writer.add_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@settings(max_examples=30, deadline=None)
@given(batches=st.lists(st.lists(st.integers(0, 9), max_size=13), max_size=6))
def test_files_depend_on_the_rows_alone(batches: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    flat = [x for batch in batches for x in batch]
    folders = [tmp_path_factory.mktemp("shards") for _ in range(3)]
    one = written(folders[0], batches, as_rows=False)
    assert one == written(folders[1], [flat], as_rows=True) == written(folders[2], [[x] for x in flat], as_rows=False)
    assert [x for name in one for x in pq.ParquetFile(folders[0] / name).read()["x"].to_pylist()] == flat
    assert len(one) == max(1, -(-len(flat) // 10))


def test_no_rows_leave_one_file_with_the_schema(tmp_path: Path) -> None:
    written(tmp_path, [], as_rows=True)
    assert pq.ParquetFile(tmp_path / "part-00000.parquet").schema_arrow == SCHEMA
