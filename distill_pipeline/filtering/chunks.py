"""Filtering one chunk: a function of its rows and the filter's rule alone, so chunks can be judged anywhere and in any order.

A chunk holds whole prompts. What comes back names rows of the chunk and repeats none of its texts.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.alignment import AlignedChunk, Places
from distill_pipeline.filtering.ledger import Ledger
from distill_pipeline.filtering.lengths import TokenCounters
from distill_pipeline.filtering.screening import screen
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import Verdict, judge_prompt
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import VERDICT_SCHEMA

DECISION_SCHEMA = pa.schema([VERDICT_SCHEMA.field(n) for n in ("accepted", "reject_reason", "reject_reasons", "rank")])
"""The columns of a verdict that the filter decides."""

_READ_COLUMNS = (
    "completion_id", "sample_index", "reasoning", "answer", "raw_text", "finish_reason", "error", "completion_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class ChunkVerdicts:
    """What was decided about a chunk.

    ``decisions`` (``DECISION_SCHEMA``) has a row per completion. ``kept`` are the rows of the accepted ones, prompt by prompt
    and best first; ``num_kept``, ``num_correct`` and ``num_known`` have a number per prompt.
    """

    decisions: pa.RecordBatch
    kept: Places
    num_kept: Places
    num_correct: Places
    num_known: Places
    ledger: Ledger


@dataclass(frozen=True)
class ChunkFilter:
    """A filter made ready to judge chunks.

    Args:
        filter_name: for messages.
        protected: what completions must not contain; used where the rule drops ``contaminated``.
        counters: a counter of tokens for each of ``rule.tokenizers()``.
        first_samples: pass rates are of so many first samples of a prompt; None for all.
    """

    rule: FilterSpec
    filter_name: str
    protected: ContaminationIndex | None = None
    counters: TokenCounters = field(default_factory=dict)
    first_samples: int | None = None

    def __call__(self, chunk: AlignedChunk) -> ChunkVerdicts:
        """Judge the completions of whole prompts."""
        ledger = Ledger(self.filter_name, self.rule, first_samples=self.first_samples)
        columns = {name: chunk.completions.column(name).to_pylist() for name in _READ_COLUMNS}
        rows = [dict(zip(_READ_COLUMNS, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        looks = screen(columns["reasoning"], columns["answer"], chunk.starts, rule=self.rule, protected=self.protected)
        scores = _scores_by_completion(chunk)
        judged: list[Verdict] = []
        kept: list[int] = []
        numbers = []
        domains, splits = (chunk.prompts.column(name).to_pylist() for name in ("domain", "split"))
        texts, starts = _last_contents(chunk.prompts), chunk.starts.tolist()
        for number, (text, domain, split) in enumerate(zip(texts, domains, splits, strict=True)):
            begin, end = starts[number], starts[number + 1]
            verdicts = judge_prompt(
                rows[begin:end], scores[begin:end], is_heldout=split == "heldout", rule=self.rule.of(domain),
                protected=self.protected, counters=self.counters, screened=looks[begin:end],
            )  # fmt: skip
            ranks = {verdict.rank: begin + at for at, verdict in enumerate(verdicts) if verdict.rank is not None}
            kept += (ranks[rank] for rank in range(len(ranks)))
            numbers.append((len(ranks), *ledger.add(text, domain, verdicts)))
            judged += verdicts
        num_kept, num_correct, num_known = np.array(numbers, dtype=np.int64).reshape(-1, 3).T
        rows_kept = np.array(kept, dtype=np.int64)
        return ChunkVerdicts(_decisions(judged), rows_kept, num_kept, num_correct, num_known, ledger)


def _scores_by_completion(chunk: AlignedChunk) -> list[list[dict[str, Any]]]:
    columns = (chunk.scores.column(name).to_pylist() for name in ("scorer", "score", "detail"))
    given = [{"scorer": scorer, "score": score, "detail": detail} for scorer, score, detail in zip(*columns, strict=True)]
    starts = chunk.score_starts.tolist()
    return [given[begin:end] for begin, end in pairwise(starts)]


def _last_contents(prompts: pa.RecordBatch) -> list[str]:
    """The text of each prompt's last message."""
    messages = prompts.column("messages")
    last = messages.offsets.to_numpy()[1:] - 1
    found: list[str] = messages.values.field("content").take(pa.array(last)).to_pylist()
    return found


def _decisions(verdicts: list[Verdict]) -> pa.RecordBatch:
    columns = (
        [not verdict.reasons for verdict in verdicts],
        [verdict.reasons[0] if verdict.reasons else None for verdict in verdicts],
        [verdict.reasons for verdict in verdicts],
        [verdict.rank for verdict in verdicts],
    )
    arrays = [pa.array(values, type=column.type) for values, column in zip(columns, DECISION_SCHEMA, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=DECISION_SCHEMA)
