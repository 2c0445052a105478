"""Laws 1 and 5 for scored outputs: each completion is scored, unknown, unscored or failed, and each score has its row."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_pipeline.errors import IntegrityError
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.stage import score_outputs


def prompts(rows: Sequence[Mapping[str, Any]], size: int = 2) -> Iterator[pa.RecordBatch]:
    fill = {"messages": [{"role": "user", "content": "q"}], "reference": None, "domain": "d", "source": "s", "license": "l"}
    full = [fill | {"split": "train", "metadata": "{}"} | dict(row) for row in rows]
    yield from pa.Table.from_pylist(full, schema=PROMPT_SCHEMA).to_batches(max_chunksize=size)


def completions(rows: Sequence[tuple[str, str, str]], size: int = 3) -> Iterator[pa.RecordBatch]:
    full = [
        {
            "completion_id": f"c{number}", "prompt_id": prompt_id, "teacher": "t", "sample_index": number, "answer": answer,
            "raw_text": answer, "finish_reason": finish, "prompt_tokens": 1, "completion_tokens": 1, "request_key": "k",
        }
        for number, (prompt_id, answer, finish) in enumerate(rows)
    ]  # fmt: skip
    yield from pa.Table.from_pylist(full, schema=COMPLETION_SCHEMA).to_batches(max_chunksize=size)


PROMPTS = [
    {"prompt_id": "a", "reference": "Paris"},
    {"prompt_id": "heldout", "reference": "Rome", "split": "heldout"},
    {"prompt_id": "b", "domain": "other", "reference": None},
    {"prompt_id": "c", "domain": "bare", "reference": "x"},
]
COMPLETIONS = [
    ("a", "Paris.", "stop"), ("a", "Rome.", "stop"), ("a", "", "error"), ("b", "Paris", "length"), ("c", "x", "stop"),
]  # fmt: skip
SCORERS: dict[str, list[ScorerSpec]] = {
    "d": [
        ScorerSpec(kind="contains_answer"),
        ScorerSpec(kind="exact"),
        ScorerSpec(kind="exact", options={"case_sensitive": True}),
    ],
    "bare": [],
    "*": [ScorerSpec(kind="contains_answer"), ScorerSpec(kind="regex", options={"pattern": "^P"})],
}


def scored(
    folder: Path, size: int = 3, rows: Sequence[tuple[str, str, str]] = COMPLETIONS
) -> tuple[Outcome, list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    outcome = score_outputs(prompts(PROMPTS, size), completions(rows, size), folder, scorers=SCORERS, context=ScoringContext())
    table = pq.ParquetFile(folder / "part-00000.parquet").read()
    assert table.schema == SCORE_SCHEMA
    return outcome, table.to_pylist()


def test_each_completion_gets_a_row_per_scorer_of_its_domain_and_failed_ones_none(tmp_path: Path) -> None:
    outcome, rows = scored(tmp_path)
    assert outcome.counts == {
        "completions": 5,
        "scored": 2,
        "unknown": 1,
        "unscored": 1,
        "failed": 1,
        "reused": 0,
        "scored_anew": 8,
    }
    assert [(row["completion_id"], row["scorer"], row["score"]) for row in rows] == [
        ("c0", "contains_answer", 1.0), ("c0", "exact", 1.0), ("c0", "exact#2", 1.0),
        ("c1", "contains_answer", 0.0), ("c1", "exact", 0.0), ("c1", "exact#2", 0.0),
        ("c3", "contains_answer", None), ("c3", "regex", 1.0),
    ]  # fmt: skip
    facts = outcome.facts["scores"]["d"]["contains_answer"]
    assert facts == {"mean": 0.5, "known": 2, "unknown": 0, "histogram": [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]}
    assert outcome.facts["lost"] == {}


def test_batches_leave_no_trace(tmp_path: Path) -> None:
    for size in (1, 2, 100):
        scored(tmp_path / str(size), size)
    files = {(tmp_path / str(size) / "part-00000.parquet").read_bytes() for size in (1, 2, 100)}
    assert len(files) == 1


@pytest.mark.parametrize("rows", [[("nowhere", "x", "stop")], [("b", "x", "stop"), ("a", "x", "stop")]])
def test_completions_of_another_pool_are_an_error(rows: list[tuple[str, str, str]], tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="which the pool does not hold, or not in this order"):
        scored(tmp_path, rows=rows)
