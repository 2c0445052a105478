"""Filtering a teacher's outputs: a verdict on every completion, and the training set of the accepted ones.

Files: ``part-*.parquet`` (``VERDICT_SCHEMA``, every completion in the order given), ``train-*.parquet`` (``TRAINING_SCHEMA``,
one row per prompt that has accepted completions, best first) and ``passes-*.parquet`` (``PASS_SCHEMA``, every prompt).
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from distill_pipeline.alignment import PromptCursor, PromptView, ScoreCursor, by_prompt
from distill_pipeline.filtering.ledger import Ledger
from distill_pipeline.filtering.lengths import TokenCounters
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import Verdict, judge_prompt
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import COMPLETION_SCHEMA, TRAINING_SCHEMA, VERDICT_SCHEMA
from distill_pipeline.shards import ShardWriter

PASS_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("num_correct", pa.int32(), nullable=False),
        pa.field("num_known", pa.int32(), nullable=False),
    ]
)
"""How often the teacher was right on a prompt, of the completions whose scores are all known: its difficulty."""

_READ_COLUMNS = (
    "completion_id", "sample_index", "reasoning", "answer", "raw_text", "finish_reason", "error", "completion_tokens",
)  # fmt: skip
_NEWS_SECONDS = 5.0


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
) -> Outcome:
    """Judge every completion and write the verdicts and the training set into ``out_dir``.

    Args:
        prompt_batches, completion_batches, score_batches: the pool, a teacher's outputs and their scores, all in the pool's
            order.
        filter_name: for messages.
        protected: what completions must not contain; used when the rule drops ``contaminated``.
        counters: a counter of tokens for each of ``rule.tokenizers()``.
    Returns:
        Counts ``completions == accepted + failed + rejected``, ``rejected == sum of rejected_<reason>`` by first reason.
        ``failed_gate`` says why when nothing was accepted; the verdicts are written all the same.
    Raises:
        IntegrityError: the three do not belong together or are not in one order.
    """
    ledger = Ledger(filter_name, rule)
    prompts, scores = PromptCursor(prompt_batches), ScoreCursor(score_batches)
    last_news = time.monotonic()
    with (
        ShardWriter(out_dir, "part", VERDICT_SCHEMA) as parts,
        ShardWriter(out_dir, "train", TRAINING_SCHEMA) as train,
        ShardWriter(out_dir, "passes", PASS_SCHEMA) as passes,
    ):
        for batch in by_prompt(completion_batches):
            batch = batch.select(COMPLETION_SCHEMA.names)
            judged: list[Verdict] = []
            for prompt, rows in _prompts_of(batch, prompts):
                given = [scores.take(row["completion_id"]) for row in rows]
                verdicts = judge_prompt(
                    rows, given, is_heldout=prompt.split == "heldout", rule=rule.of(prompt.domain), protected=protected,
                    counters=counters,
                )  # fmt: skip
                messages = prompt.messages()
                correct, known = ledger.add(messages[-1]["content"], prompt.domain, verdicts)
                passes.add({"prompt_id": prompt.prompt_id, "num_correct": correct, "num_known": known})
                accepted = sorted((v for v in verdicts if v.rank is not None), key=lambda v: v.rank or 0)
                if accepted:
                    train.add(_training_row(prompt, messages, accepted))
                judged += verdicts
            parts.add_batch(_with_verdicts(batch, judged))
            if time.monotonic() - last_news > _NEWS_SECONDS:
                last_news = time.monotonic()
                progress(f"{filter_name}: judged {ledger.num_completions:,} completions")
    scores.close()
    assert parts.num_rows == ledger.num_completions, (parts.num_rows, ledger.num_completions)
    return ledger.outcome()


def _prompts_of(batch: pa.RecordBatch, prompts: PromptCursor) -> Iterator[tuple[PromptView, list[dict[str, Any]]]]:
    """Each prompt of a batch with its completions' rows."""
    ids = batch.column("prompt_id").to_pylist()
    columns = [batch.column(name).to_pylist() for name in _READ_COLUMNS]
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or ids[end] != ids[start]:
            values = zip(*(column[start:end] for column in columns), strict=True)
            rows = [dict(zip(_READ_COLUMNS, row, strict=True)) for row in values]
            yield prompts.seek(ids[start]), rows
            start = end


def _training_row(prompt: PromptView, messages: list[dict[str, str]], accepted: list[Verdict]) -> dict[str, Any]:
    names = ("completion_id", "raw_text", "finish_reason")
    return {
        "prompt_id": prompt.prompt_id,
        "messages": messages,
        "reference": prompt.reference,
        "domain": prompt.domain,
        "completions": [{name: verdict.row[name] for name in names} for verdict in accepted],
    }


def _with_verdicts(batch: pa.RecordBatch, verdicts: list[Verdict]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "scores": [list(verdict.scores) for verdict in verdicts],
        "accepted": [not verdict.reasons for verdict in verdicts],
        "reject_reason": [verdict.reasons[0] if verdict.reasons else None for verdict in verdicts],
        "reject_reasons": [verdict.reasons for verdict in verdicts],
        "rank": [verdict.rank for verdict in verdicts],
    }
    added = [pa.array(columns[name], type=VERDICT_SCHEMA.field(name).type) for name in columns]
    return pa.RecordBatch.from_arrays([*batch.columns, *added], schema=VERDICT_SCHEMA)
