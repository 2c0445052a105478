"""Scoring a teacher's outputs: one row per completion and scorer, unknown included, and the verifier's own statistics.

Prompts and completions are walked side by side. Failed completions and domains without scorers get no score rows; they are
counted, so that nothing is missing without a reason.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.alignment import PromptCursor
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.records import SCORE_SCHEMA
from distill_pipeline.scoring.isolation import Bench
from distill_pipeline.scoring.registry import resolve_scorer
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.shards import ShardWriter

ANY_DOMAIN = "*"
HISTOGRAM_BINS = 10

_NEWS_SECONDS = 5.0


class _Tally:
    """What one scorer said in one domain. The histogram's bins are a tenth wide; the last one holds 1.0 too."""

    def __init__(self) -> None:
        self.known = self.unknown = 0
        self.total = 0.0
        self.histogram = [0] * HISTOGRAM_BINS

    def add(self, score: float | None) -> None:
        if score is None:
            self.unknown += 1
            return
        self.known += 1
        self.total += score
        self.histogram[min(int(score * HISTOGRAM_BINS), HISTOGRAM_BINS - 1)] += 1

    def facts(self) -> dict[str, Any]:
        mean = round(self.total / self.known, 6) if self.known else None
        return {"mean": mean, "known": self.known, "unknown": self.unknown, "histogram": self.histogram}


def score_outputs(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    *,
    scorers: Mapping[str, Sequence[ScorerSpec]],
    progress: Progress,
) -> Outcome:
    """Score completions and write ``part-*.parquet`` (``SCORE_SCHEMA``) into ``out_dir``, in the completions' order.

    Args:
        prompt_batches: the pool, in its order.
        completion_batches: a teacher's outputs, in the pool's order.
        scorers: scorers by domain; ``*`` serves every domain that has no list of its own.
    Returns:
        Counts ``completions == scored + unknown + unscored + failed``: every score known, at least one unknown, no scorer
        for the domain, no answer. Facts: means and histograms by domain and scorer, timeouts and crashes by scorer.
    Raises:
        ConfigError: a scorer's module or function cannot be loaded.
        IntegrityError: a completion's prompt is not in the pool, or not in this order.
    """
    counts: Counter[str] = Counter()
    tallies: dict[str, dict[str, _Tally]] = {}
    cursor = PromptCursor(prompt_batches)
    last_news = time.monotonic()
    with ExitStack() as stack:
        benches = {domain: _benches(listed, stack) for domain, listed in scorers.items()}
        writer = stack.enter_context(ShardWriter(out_dir, "part", SCORE_SCHEMA))
        for batch in completion_batches:
            names = ("completion_id", "prompt_id", "answer", "finish_reason")
            for completion_id, prompt_id, answer, finish in zip(*(batch.column(n).to_pylist() for n in names), strict=True):
                counts["completions"] += 1
                prompt = cursor.seek(prompt_id)
                used = benches.get(prompt.domain, benches.get(ANY_DOMAIN, {}))
                if finish == "error" or not used:
                    counts["failed" if finish == "error" else "unscored"] += 1
                    continue
                is_unknown = False
                for name, bench in used.items():
                    value = bench.score(prompt.reference, answer, metadata=prompt.metadata, prompt=prompt.last_user_message)
                    is_unknown |= value.score is None
                    tallies.setdefault(prompt.domain, {}).setdefault(name, _Tally()).add(value.score)
                    row = (completion_id, name, bench.scorer.version, value.score, _storable(value.detail))
                    writer.add(dict(zip(SCORE_SCHEMA.names, row, strict=True)))
                counts["unknown" if is_unknown else "scored"] += 1
                if time.monotonic() - last_news > _NEWS_SECONDS:
                    last_news = time.monotonic()
                    progress(f"scored {counts['completions']:,} completions ({counts['unknown']:,} unknown)")
        lost = {
            f"{domain}/{name}": {"timeouts": bench.num_timeouts, "crashes": bench.num_crashes}
            for domain, named in benches.items()
            for name, bench in named.items()
            if bench.scorer.is_isolated
        }
    return _outcome(counts, tallies, lost)


def _benches(listed: Sequence[ScorerSpec], stack: ExitStack) -> dict[str, Bench]:
    """A domain's scorers by the name they have in the rows: the kind, and a number behind it when it comes again."""
    benches: dict[str, Bench] = {}
    for spec in listed:
        same = sum(bench.scorer.kind == spec.kind for bench in benches.values())
        name = spec.kind if not same else f"{spec.kind}#{same + 1}"
        benches[name] = stack.enter_context(Bench(resolve_scorer(spec)))
    return benches


def _storable(detail: str) -> str:
    """A text that UTF-8 can hold, whatever a scorer wrote."""
    return detail.encode("utf-8", "replace").decode("utf-8")


def _outcome(counts: Counter[str], tallies: Mapping[str, Mapping[str, _Tally]], lost: dict[str, Any]) -> Outcome:
    total = {name: counts[name] for name in ("completions", "scored", "unknown", "unscored", "failed")}
    assert total["completions"] == sum(total[name] for name in ("scored", "unknown", "unscored", "failed")), total
    means = {
        domain: {name: tally.facts() for name, tally in sorted(named.items())} for domain, named in sorted(tallies.items())
    }
    return Outcome(total, {"scores": means, "lost": lost})
