"""Filtering a teacher's outputs: a verdict on every completion, and the training set of the accepted ones.

Files: ``part-*.parquet`` (``VERDICT_SCHEMA``, every completion in the order given), ``train-*.parquet`` (``TRAINING_SCHEMA``,
one row per prompt that has accepted completions, best first) and ``passes-*.parquet`` (``PASS_SCHEMA``, every prompt).
"""

import time
from collections.abc import Iterable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pyarrow as pa

from distill_pipeline.alignment import AlignedChunk, aligned_chunks
from distill_pipeline.compute.ordered import ordered_map
from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.filtering.chunks import ChunkFilter, ChunkVerdicts
from distill_pipeline.filtering.ledger import Ledger
from distill_pipeline.filtering.lengths import TokenCounters
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import COMPLETION_SCHEMA, SCORE_VALUE, TRAINING_COMPLETION, TRAINING_SCHEMA, VERDICT_SCHEMA
from distill_pipeline.shards import ShardWriter

PASS_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("num_correct", pa.int32(), nullable=False),
        pa.field("num_known", pa.int32(), nullable=False),
    ]
)
"""How often the teacher was right on a prompt, of the completions whose scores are all known: its difficulty."""

_PROMPT_COLUMNS = ["prompt_id", "messages", "reference", "domain", "split"]
_NEWS_SECONDS = 5.0
_ALONE = ComputeSpec(workers=1)


def filter_outputs(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    score_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    *,
    rule: FilterSpec,
    filter_name: str,
    protected: ContaminationIndex | None,
    progress: Progress,
    counters: TokenCounters = MappingProxyType({}),
    first_samples: int | None = None,
    compute: ComputeSpec = _ALONE,
) -> Outcome:
    """Judge every completion and write the verdicts and the training set into ``out_dir``.

    Args:
        prompt_batches, completion_batches, score_batches: the pool, a teacher's outputs and their scores, all in the pool's
            order.
        filter_name: for messages.
        protected: what completions must not contain; used when the rule drops ``contaminated``.
        counters: a counter of tokens for each of ``rule.tokenizers()``.
        first_samples: pass rates are of so many first samples of a prompt, where the number of all of them depends on their
            scores; None for all.
        compute: who judges; the files are the same whoever does. In this process by default.
    Returns:
        Counts ``completions == accepted + failed + rejected``, ``rejected == sum of rejected_<reason>`` by first reason.
        ``failed_gate`` says why when nothing was accepted; the verdicts are written all the same.
    Raises:
        IntegrityError: the three do not belong together or are not in one order.
        ComputeError: a worker was lost.
        MissingExtraError: the package of a rule, or Ray where it is to work, is not installed.
    """
    ledger = Ledger(filter_name, rule, first_samples=first_samples)
    last_news = time.monotonic()
    prepare = partial(ChunkFilter, rule, filter_name, protected, dict(counters), first_samples)
    chunks = aligned_chunks(
        (batch.select(_PROMPT_COLUMNS) for batch in prompt_batches),
        (batch.select(COMPLETION_SCHEMA.names) for batch in completion_batches),
        score_batches,
    )
    with (
        ShardWriter(out_dir, "part", VERDICT_SCHEMA) as parts,
        ShardWriter(out_dir, "train", TRAINING_SCHEMA) as train,
        ShardWriter(out_dir, "passes", PASS_SCHEMA) as passes,
        closing(ordered_map(prepare, chunks, compute)) as judged,
    ):
        for chunk, done in judged:
            parts.add_batch(_verdict_rows(chunk, done))
            train.add_batch(_training_rows(chunk, done))
            passes.add_batch(_pass_rows(chunk, done))
            ledger.merge(done.ledger)
            if time.monotonic() - last_news > _NEWS_SECONDS:
                last_news = time.monotonic()
                progress(f"{filter_name}: judged {ledger.num_completions:,} completions")
    assert parts.num_rows == ledger.num_completions, (parts.num_rows, ledger.num_completions)
    return ledger.outcome()


def _verdict_rows(chunk: AlignedChunk, done: ChunkVerdicts) -> pa.RecordBatch:
    values = [chunk.scores.column(column.name) for column in SCORE_VALUE]
    scores = pa.ListArray.from_arrays(
        pa.array(chunk.score_starts, pa.int32()), pa.StructArray.from_arrays(values, fields=list(SCORE_VALUE)),
        type=VERDICT_SCHEMA.field("scores").type,
    )  # fmt: skip
    return pa.RecordBatch.from_arrays([*chunk.completions.columns, scores, *done.decisions.columns], schema=VERDICT_SCHEMA)


def _training_rows(chunk: AlignedChunk, done: ChunkVerdicts) -> pa.RecordBatch:
    """The prompts that keep completions, with these."""
    has_kept = done.num_kept > 0
    prompts = chunk.prompts.filter(pa.array(has_kept))
    kept = chunk.completions.take(pa.array(done.kept))
    struct = pa.StructArray.from_arrays(
        [kept.column(column.name) for column in TRAINING_COMPLETION], fields=list(TRAINING_COMPLETION)
    )
    starts = np.r_[0, np.cumsum(done.num_kept[has_kept])]
    completions = pa.ListArray.from_arrays(pa.array(starts, pa.int32()), struct, type=TRAINING_SCHEMA.field("completions").type)
    columns = {name: prompts.column(name) for name in TRAINING_SCHEMA.names if name != "completions"}
    return pa.RecordBatch.from_arrays([*columns.values(), completions], schema=TRAINING_SCHEMA)


def _pass_rows(chunk: AlignedChunk, done: ChunkVerdicts) -> pa.RecordBatch:
    numbers = [pa.array(values, pa.int32()) for values in (done.num_correct, done.num_known)]
    return pa.RecordBatch.from_arrays([chunk.prompts.column("prompt_id"), *numbers], schema=PASS_SCHEMA)
