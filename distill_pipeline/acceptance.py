"""Which of a teacher's answers are accepted while it is still asked: by the experiment's scorers, as a filter would count.

Generation asks (:mod:`distill_pipeline.generation.accepting`), scoring scores through the same kept scores as the stage
``scored_outputs``, so that nothing is scored twice, and filtering says what a sufficient score is. This module joins the three.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import groupby

import pyarrow as pa

from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.filtering.spec import FilterRule
from distill_pipeline.filtering.verdicts import Verdict, correct_of_known
from distill_pipeline.generation.accepting import CountAccepted
from distill_pipeline.scoring.chunks import ChunkScores, answer_chunks, keep_new
from distill_pipeline.scoring.opening import open_scorers
from distill_pipeline.scoring.rows import ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec
from distill_pipeline.scoring.stage import scored_chunks, stores_of


def accepted_by_scores(
    scorers: Mapping[str, Sequence[ScorerSpec]], context: ScoringContext, compute: ComputeSpec
) -> CountAccepted:
    """The function that counts accepted completions: finished ones of which every score is known and high enough.

    Each call opens the scorers anew, so that it finds the scores that the calls before it made. It raises what
    :func:`distill_pipeline.scoring.stage.score_outputs` raises.
    """

    def count_accepted(
        prompt_batches: Iterable[pa.RecordBatch], completion_batches: Iterable[pa.RecordBatch], min_score: float
    ) -> Iterator[int]:
        rule = FilterRule(min_score=min_score)
        with ExitStack() as stack:
            opened = open_scorers(scorers, context)
            for store in stores_of(opened):
                stack.callback(store.flush)
            chunks = answer_chunks(prompt_batches, completion_batches)
            for done in stack.enter_context(closing(scored_chunks(chunks, opened, compute))):
                keep_new(done, opened)
                yield from _accepted_of(done, rule)

    return count_accepted


def _accepted_of(done: ChunkScores, rule: FilterRule) -> Iterator[int]:
    """Accepted completions of each prompt of a chunk."""
    scores = {name: list(rows) for name, rows in groupby(done.rows, key=lambda row: row["completion_id"])}
    for _, answers in groupby(done.answers, key=lambda answer: answer.prompt_id):
        finished = [answer.completion_id for answer in answers if answer.finish_reason == "stop"]
        yield correct_of_known([Verdict({}, scores.get(name, [])) for name in finished], rule)[0]
