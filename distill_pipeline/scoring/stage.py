"""Scoring a teacher's outputs: one row per completion and scorer, unknown included, and the verifier's own statistics.

Prompts and completions are walked side by side, in chunks of whole prompts. Failed completions and domains without scorers
get no score rows; they are counted, so that nothing is missing without a reason. Scores are kept by content: a scorer that
did not change is not run again on a row that did not change.
"""

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.outcome import Outcome
from distill_pipeline.records import SCORE_SCHEMA
from distill_pipeline.scoring.chunks import Tally, answer_chunks, keep_new, score_chunk, stores_of
from distill_pipeline.scoring.opening import open_scorers
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.shards import ShardWriter

_NEWS_SECONDS = 5.0
_LOST = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}


def score_outputs(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    *,
    scorers: Mapping[str, Sequence[ScorerSpec]],
    context: ScoringContext,
) -> Outcome:
    """Score completions and write ``part-*.parquet`` (``SCORE_SCHEMA``) into ``out_dir``, in the completions' order.

    Args:
        prompt_batches: the pool, in its order.
        completion_batches: a teacher's outputs, in the pool's order.
        scorers: scorers by domain; ``*`` serves every domain that has no list of its own.
        context: the models that scorers ask, and where scores are kept for the next run.
    Returns:
        Counts ``completions == scored + unknown + unscored + failed``: every score known, at least one unknown, no scorer
        for the domain, no answer; ``reused`` and ``scored_anew`` count scores. Facts: means and histograms by domain and
        scorer, how many scores were reused and made anew, and lost rows by cause where there are any.
    Raises:
        ConfigError: a scorer's module or function cannot be loaded, or its model is not of its kind.
        IntegrityError: a completion's prompt is not in the pool, or not in this order; or a part of the kept scores cannot
            be read.
    """
    counts: Counter[str] = Counter()
    tallies: dict[tuple[str, str], Tally] = {}
    last_news = time.monotonic()
    with ExitStack() as stack:
        opened = open_scorers(scorers, context, stack)
        for store in stores_of(opened):
            stack.callback(store.flush)
        writer = stack.enter_context(ShardWriter(out_dir, "part", SCORE_SCHEMA))
        for rows in answer_chunks(prompt_batches, completion_batches):
            done = score_chunk(rows, opened)
            keep_new(done, opened)
            writer.extend(done.rows)
            counts.update(done.counts)
            for place, tally in done.tallies.items():
                tallies.setdefault(place, Tally()).merge(tally)
            if time.monotonic() - last_news > _NEWS_SECONDS:
                last_news = time.monotonic()
                context.progress(f"scored {counts.total():,} completions ({counts['unknown']:,} unknown)")
    return _outcome(counts, tallies)


def _outcome(counts: Counter[str], tallies: Mapping[tuple[str, str], Tally]) -> Outcome:
    fates = {name: counts[name] for name in ("scored", "unknown", "unscored", "failed")}
    assert counts.total() == sum(fates.values()), counts
    work = {"reused": sum(t.reused for t in tallies.values()), "scored_anew": sum(t.anew for t in tallies.values())}
    scores: dict[str, dict[str, Any]] = {}
    reuse: dict[str, dict[str, Any]] = {}
    lost: dict[str, dict[str, int]] = {}
    for (domain, name), tally in sorted(tallies.items()):
        scores.setdefault(domain, {})[name] = tally.facts()
        reuse.setdefault(domain, {})[name] = {"reused": tally.reused, "scored_anew": tally.anew}
        if tally.lost:
            lost[f"{domain}/{name}"] = {_LOST[cause]: number for cause, number in sorted(tally.lost.items())}
    return Outcome({"completions": counts.total(), **fates, **work}, {"scores": scores, "reuse": reuse, "lost": lost})
