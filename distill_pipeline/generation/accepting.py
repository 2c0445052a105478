"""Asking for more until enough is accepted: rounds over the prompts that have too few accepted completions yet.

Round r asks each open prompt for its samples up to number r times ``n``, or ``at_most``; then all its samples are scored, and
it is closed when enough are accepted. So a prompt's rows are its first samples, as many as the rounds took, whatever else is
stored: they follow from the answers and the scorers alone, not from the order in which answers came, nor from who was killed
when. A prompt of which a whole round failed is closed too: what it was refused for once it would be refused for again.

Decided: a round goes over all prompts before anything is scored, so that engines work in large windows and a server's
connections do not wait for scorers. Four bytes a prompt stay in memory, and failed requests until the rows are written.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.generation.answering import AnsweringRun
from distill_pipeline.generation.spec import AcceptTargetSpec
from distill_pipeline.generation.spool import SPOOLED_SCHEMA, Prompt, prompts_in, windows

CountAccepted = Callable[[Iterable[pa.RecordBatch], Iterable[pa.RecordBatch], float], Iterator[int]]
"""From prompts (``SPOOLED_SCHEMA``), all their completions (``COMPLETION_SCHEMA``) in one order, and the least score that is
accepted, to how many of each prompt's completions are accepted."""


class AcceptRounds:
    """The rounds of one run."""

    def __init__(
        self, run: AnsweringRun, spool: Path, num_prompts: int, target: AcceptTargetSpec, count_accepted: CountAccepted
    ) -> None:
        """
        Args:
            run: asks for ``samples_per_prompt`` more in each round.
            spool: the prompts, see :func:`distill_pipeline.generation.spool.spooled`.
        """
        self._run, self._spool, self._target, self._count_accepted = run, spool, target, count_accepted
        self._samples = np.zeros(num_prompts, np.int16)
        self._is_open = np.ones(num_prompts, np.bool_)
        self._rounds: list[dict[str, int]] = []
        self._num_reached = 0

    def answer(self, out_dir: Path, announce: Callable[[], None]) -> None:
        """Have made what the target takes, and write all rows as ``part-*.parquet``, one file a window.

        Args:
            announce: called before the first request, when the run knows what the first round lacks.
        Raises:
            BudgetError, GenerationError: as the engine; whatever came until then is in the store.
        """
        run, target, begin = self._run, self._target, 0
        while self._is_open.any() and begin < target.at_most:
            end = min(begin + run.samples_per_prompt, target.at_most)
            samples = range(begin, end)
            run.expected += int(self._is_open.sum()) * len(samples)
            run.missing += sum(len(one.keys) for window in windows(self._open(samples)) for one in run.missing_of(window))
            if begin == 0:
                announce()
            else:
                run.progress(
                    f"{run.teacher_name}: {self._is_open.sum():,} of {len(self._is_open):,} prompts have fewer than "
                    f"{target.accepted} accepted completions; each is asked for {len(samples)} more"
                )
            self._samples[self._is_open] = end
            run.ask(windows(self._open(samples)))
            self._close(begin, end)
            begin = end
        whole = np.ones_like(self._is_open)
        run.write(windows(self._chosen(whole, lambda number: range(int(self._samples[number])))), out_dir)

    def facts(self) -> dict[str, Any]:
        """The target, how many prompts reached it, and what it saved against ``at_most`` samples of every prompt."""
        fixed, asked = len(self._samples) * self._target.at_most, int(self._samples.sum(dtype=np.int64))
        return {
            **self._target.document(), "prompts_reached": self._num_reached,
            "prompts_short": len(self._samples) - self._num_reached, "rounds": self._rounds,
            "samples": asked, "samples_of_fixed_n": fixed, "samples_saved": fixed - asked,
        }  # fmt: skip

    def _close(self, begin: int, end: int) -> None:
        """Close the prompts that have enough, and those of which no sample of the round came."""
        has_failed: list[bool] = []
        found = self._count_accepted(self._prompt_batches(), self._completions(begin, end, has_failed), self._target.min_score)
        numbers = self._is_open.nonzero()[0]
        accepted = np.fromiter(found, np.int64, count=len(numbers))
        is_reached = accepted >= self._target.accepted
        self._rounds.append({"samples": end - begin, "prompts": len(numbers), "reached": int(is_reached.sum())})
        self._num_reached += int(is_reached.sum())
        self._is_open[numbers[is_reached | np.array(has_failed, np.bool_)]] = False

    def _prompt_batches(self) -> Iterator[pa.RecordBatch]:
        for window in windows(self._open(range(0))):
            yield pa.RecordBatch.from_pylist(window, schema=SPOOLED_SCHEMA)

    def _completions(self, begin: int, end: int, has_failed: list[bool]) -> Iterator[pa.RecordBatch]:
        """All samples of the open prompts so far; notes of each prompt whether every one of the last round failed."""
        for window in windows(self._open(range(end))):
            for batch in self._run.row_batches(window):
                reasons = batch.column("finish_reason").to_pylist()
                has_failed += (
                    all(reason == "error" for reason in reasons[first + begin : first + end])
                    for first in range(0, len(reasons), end)
                )
                yield batch

    def _open(self, samples: range) -> Iterator[Prompt]:
        """The open prompts with the samples that are meant."""
        return self._chosen(self._is_open, lambda number: samples)

    def _chosen(self, chosen: np.ndarray[Any, np.dtype[np.bool_]], samples: Callable[[int], range]) -> Iterator[Prompt]:
        for number, prompt in enumerate(prompts_in(self._spool)):
            if chosen[number]:
                yield {**prompt, "samples": samples(number)}
