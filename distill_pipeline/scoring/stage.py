"""Scoring a teacher's outputs: one row per completion and scorer, unknown included, and the verifier's own statistics.

Prompts and completions are walked side by side, in chunks of whole prompts. Failed completions and domains without scorers
get no score rows; they are counted, so that nothing is missing without a reason. Scores are kept by content: a scorer that
did not change is not run again on a row that did not change.

Decided: this process alone reads and writes the kept scores, so that whoever scores needs no folder in common with it, and a
model that scores is loaded here once; everything else can be scored by other processes, on other machines too.
"""

import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.compute.ordered import ordered_map
from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.outcome import Outcome
from distill_pipeline.records import SCORE_SCHEMA
from distill_pipeline.scoring.chunks import ChunkAtWork, ChunkScores, answer_chunks, keep_new
from distill_pipeline.scoring.kept import KeptScores
from distill_pipeline.scoring.opening import DomainScorers, open_scorers
from distill_pipeline.scoring.pieces import Piece, PieceScorer
from distill_pipeline.scoring.rows import AnswerRow, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.tally import Tally
from distill_pipeline.shards import ShardWriter

SMALL_PIECES = 32
"""Fewer pieces are scored in this process when the number of workers is ``auto``: most scorers are fast."""

_NEWS_SECONDS = 5.0
_ALONE = ComputeSpec(workers=1)
_LOST = {"timeout": "timeouts", "crash": "crashes", "error": "errors"}


def score_outputs(
    prompt_batches: Iterable[pa.RecordBatch],
    completion_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    *,
    scorers: Mapping[str, Sequence[ScorerSpec]],
    context: ScoringContext,
    compute: ComputeSpec = _ALONE,
) -> Outcome:
    """Score completions and write ``part-*.parquet`` (``SCORE_SCHEMA``) into ``out_dir``, in the completions' order.

    Args:
        prompt_batches: the pool, in its order.
        completion_batches: a teacher's outputs, in the pool's order.
        scorers: scorers by domain; ``*`` serves every domain that has no list of its own.
        context: the models that scorers ask, and where scores are kept for the next run.
        compute: who scores; the files are the same whoever does. In this process by default, and here always where a scorer
            asks a model.
    Returns:
        Counts ``completions == scored + unknown + unscored + failed``: every score known, at least one unknown, no scorer
        for the domain, no answer; ``reused`` and ``scored_anew`` count scores. Facts: means and histograms by domain and
        scorer, how many scores were reused and made anew, and lost rows by cause where there are any.
    Raises:
        ConfigError: a scorer's module or function cannot be loaded, or its model is not of its kind.
        IntegrityError: a completion's prompt is not in the pool, or not in this order; or a part of the kept scores cannot
            be read.
        MissingExtraError: the package of a scorer, or Ray where it is to work, is not installed.
        ComputeError: a worker was lost.
    """
    counts: Counter[str] = Counter()
    tallies: dict[tuple[str, str], Tally] = {}
    last_news = time.monotonic()
    with ExitStack() as stack:
        opened = open_scorers(scorers, context)
        for store in stores_of(opened):
            stack.callback(store.flush)
        writer = stack.enter_context(ShardWriter(out_dir, "part", SCORE_SCHEMA))
        chunks = answer_chunks(prompt_batches, completion_batches)
        for done in stack.enter_context(closing(scored_chunks(chunks, opened, compute))):
            keep_new(done, opened)
            writer.extend(done.rows)
            counts.update(done.counts)
            for place, tally in done.tallies.items():
                tallies.setdefault(place, Tally()).merge(tally)
            if time.monotonic() - last_news > _NEWS_SECONDS:
                last_news = time.monotonic()
                context.progress(f"scored {counts.total():,} completions ({counts['unknown']:,} unknown)")
    return _outcome(counts, tallies)


def scored_chunks(
    chunks: Iterable[Sequence[AnswerRow]], scorers: DomainScorers, compute: ComputeSpec
) -> Generator[ChunkScores, None, None]:
    """Each chunk's scores, in order: its pieces answered by whoever works, the rest here, while others go on."""
    at_work: deque[ChunkAtWork] = deque()

    def pieces() -> Iterator[Piece]:
        for rows in chunks:
            at_work.append(ChunkAtWork(rows, scorers))
            yield from at_work[-1].pieces

    places = {(domain, name): scorer for domain, named in scorers.items() for name, scorer in named.items()}
    prepare = partial(PieceScorer, {place: scorer for place, scorer in places.items() if scorer.is_movable})
    with (
        closing(PieceScorer({place: scorer for place, scorer in places.items() if not scorer.is_movable})) as here,
        closing(ordered_map(prepare, pieces(), compute, small_chunks=SMALL_PIECES)) as answered,
    ):
        for _, answers in answered:
            at_work[0].take(answers)
            if at_work[0].is_answered:
                chunk = at_work.popleft()
                yield chunk.scores(here(chunk.rest))


def stores_of(scorers: DomainScorers) -> list[KeptScores]:
    """Every store of the scorers, once."""
    stores = [scorer.kept for named in scorers.values() for scorer in named.values() if scorer.kept is not None]
    return list({id(store): store for store in stores}.values())


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
