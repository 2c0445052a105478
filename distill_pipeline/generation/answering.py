"""One run over the pool's windows: has what is missing made, stores it as it comes, writes the rows, counts everything.

A window's rows are written when its last completion is there. Engines may have several windows open, so that a server is
never left idle while the slowest completions of one window are waited for.
"""

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.errors import GenerationError, IntegrityError
from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.families import Families
from distill_pipeline.generation.protocol import Asked, Completion, Engine
from distill_pipeline.generation.spool import Prompt
from distill_pipeline.generation.store import TOKEN_COLUMNS, GenerationStore
from distill_pipeline.generation.tallies import Tallies
from distill_pipeline.hashing import sha256_of
from distill_pipeline.outcome import Progress
from distill_pipeline.reasoning import split_reasoning
from distill_pipeline.records import COMPLETION_SCHEMA

PROGRESS_SECONDS = 5.0
ROWS_AT_ONCE = 4096
"""Rows of a window that are in memory while they are written."""

TOKEN_SCHEMA = pa.schema([COMPLETION_SCHEMA.field("completion_id"), *TOKEN_COLUMNS])
"""Files ``tokens-*.parquet``, beside the rows of a teacher with ``top_logprobs``: one row a completion with known tokens."""


@dataclass
class _Window:
    """Prompts whose rows go into one file, or are written later, and how many of their completions are still to come."""

    path: Path | None
    prompts: Sequence[Prompt]
    outstanding: int


@dataclass
class AnsweringRun:
    """One run of the stage: what it needs in every window and what it counts.

    A prompt is asked for ``samples_per_prompt`` samples, or for those in its own ``samples`` (a range of their numbers).
    """

    teacher_name: str
    samples_per_prompt: int
    store: Families
    engine: Engine
    spending: Spending
    expected: int
    progress: Progress
    opened: str = ""
    """The tag with which the template opens every completion's reasoning, if it does."""
    missing: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    engine_seconds: float = 0.0
    tallies: Tallies = field(init=False)
    thoughts: Counter[str] = field(default_factory=Counter)
    """Completions with reasoning by what became of it; an empty one is a teacher that did not think."""
    _answered: int = 0
    _said_at: float = field(default_factory=time.monotonic)
    _open: dict[str, tuple[_Window, str]] = field(default_factory=dict)
    """The open window and the domain of each completion that is still to come, by key."""
    _failed: dict[str, Completion] = field(default_factory=dict)
    """Failed completions whose rows are not written yet, by key."""

    def __post_init__(self) -> None:
        self.tallies = Tallies(self.spending.budget)

    def samples_of(self, prompt: Prompt) -> range:
        """Numbers of a prompt's samples."""
        samples: range = prompt.get("samples", range(self.samples_per_prompt))
        return samples

    def keys_of(self, prompt: Prompt) -> list[str]:
        """Keys of a prompt's samples."""
        return self.store.keys_of(prompt, self.samples_of(prompt))

    def missing_of(self, window: Sequence[Prompt]) -> list[Asked]:
        """The prompts of a window with the keys that have no stored answer, where there are any."""
        keys = [self.keys_of(prompt) for prompt in window]
        there = iter(self.store.has([key for group in keys for key in group]))
        asked = []
        for prompt, group in zip(window, keys, strict=True):
            if missing := tuple(key for key in group if not next(there)):
                asked.append(Asked(self.store.prompts.carried(prompt["messages"], prompt["domain"]), missing))
        return asked

    def answer(self, windows: Iterable[Sequence[Prompt]], out_dir: Path) -> None:
        """Have everything made that is missing, and write all rows as ``part-*.parquet``, one file a window.

        Raises what the engine raises; whatever came until then is in the store.
        """
        self._have_made(self._asked(windows, out_dir))

    def ask(self, windows: Iterable[Sequence[Prompt]]) -> None:
        """Have everything made that is missing; the rows are for :meth:`write` to write. Raises as :meth:`answer`."""
        self._have_made(self._asked(windows, None))

    def write(self, windows: Iterable[Sequence[Prompt]], out_dir: Path) -> None:
        """Write all rows of prompts whose samples were asked for."""
        for number, prompts in enumerate(windows):
            self._write(_part(out_dir, number), prompts)

    def _have_made(self, windows: Iterable[Sequence[Asked]]) -> None:
        asked_at = time.monotonic()
        with closing(stored_answers(self.engine, windows, self.spending, self.store)) as lists:
            for completions in lists:
                self.engine_seconds += time.monotonic() - asked_at
                self._take(completions)
                asked_at = time.monotonic()

    def _asked(self, windows: Iterable[Sequence[Prompt]], out_dir: Path | None) -> Iterator[list[Asked]]:
        """What is missing, window by window; windows without any are written at once."""
        for number, prompts in enumerate(windows):
            asked = self.missing_of(prompts)
            path = None if out_dir is None else _part(out_dir, number)
            window = _Window(path, prompts, sum(len(one.keys) for one in asked))
            self.counts["reused"] += sum(len(self.samples_of(prompt)) for prompt in prompts) - window.outstanding
            if asked:
                missing = {key for one in asked for key in one.keys}
                for prompt in prompts:
                    keys = [key for key in self.keys_of(prompt) if key in missing]
                    self._open.update(dict.fromkeys(keys, (window, prompt["domain"])))
                    self.store.expect(prompt, keys)
                yield asked
            elif path is not None:
                self._write(path, prompts)

    def _take(self, completions: Sequence[Completion]) -> None:
        """Count completions, and write the windows that have all of theirs."""
        for done in completions:
            window, domain = self._open.pop(done.key)
            window.outstanding -= 1
            if done.finish_reason == "error":
                self._failed[done.key] = done
            else:
                self.tallies.add_generated(domain, done.completion_tokens)
            if window.outstanding == 0:
                self.store.flush()
                if window.path is not None:
                    self._write(window.path, window.prompts)
        self._answered += len(completions)
        self._say()

    def _write(self, path: Path, prompts: Sequence[Prompt]) -> None:
        """All rows of a window, counted."""
        with ExitStack() as files:
            writer = files.enter_context(pq.ParquetWriter(path, COMPLETION_SCHEMA, compression="zstd"))
            tokens = None
            if self.store.has_tokens:
                beside = path.with_name(path.name.replace("part-", "tokens-"))
                tokens = files.enter_context(pq.ParquetWriter(beside, TOKEN_SCHEMA, compression="zstd"))
            for some in self._few_rows(prompts):
                rows = []
                for prompt, found in zip(some, self.rows(some), strict=True):
                    self._count(prompt["domain"], found)
                    rows += found
                writer.write_table(pa.Table.from_pylist(rows, schema=COMPLETION_SCHEMA))
                if tokens is not None:
                    tokens.write_table(self._token_rows(rows))

    def row_batches(self, prompts: Sequence[Prompt]) -> Iterator[pa.RecordBatch]:
        """The rows of prompts whose samples were asked for, in order; they are not counted."""
        for some in self._few_rows(prompts):
            rows = [row for found in self.rows(some) for row in found]
            yield pa.RecordBatch.from_pylist(rows, schema=COMPLETION_SCHEMA)

    def _few_rows(self, prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
        at_once = max(1, ROWS_AT_ONCE // max(len(self.samples_of(prompt)) for prompt in prompts))
        for start in range(0, len(prompts), at_once):
            yield prompts[start : start + at_once]

    def rows(self, prompts: Sequence[Prompt]) -> Iterator[list[dict[str, Any]]]:
        """The rows (``COMPLETION_SCHEMA``) of each prompt, by sample. Raises IntegrityError where one is nowhere."""
        keys = [self.keys_of(prompt) for prompt in prompts]
        stored = self.store.read([key for group in keys for key in group])
        for prompt, group in zip(prompts, keys, strict=True):
            yield [
                self._row(prompt["prompt_id"], index, key, stored.get(key))
                for index, key in zip(self.samples_of(prompt), group, strict=True)
            ]

    def _token_rows(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """TOKEN_SCHEMA of the rows whose tokens the engine knew, in their order."""
        ids = {row["request_key"]: (place, row["completion_id"]) for place, row in enumerate(rows)}
        table = self.store.read_tokens(list(ids))
        places, names = zip(*(ids[key] for key in table["request_key"].to_pylist()), strict=True) if len(table) else ((), ())
        self.counts["with_tokens"] += len(table)
        table = table.set_column(0, TOKEN_SCHEMA.field(0), pa.array(names, pa.string()))
        return table.take(pa.array(np.argsort(places), pa.int64()))

    def _row(self, prompt_id: str, index: int, key: str, answer: dict[str, Any] | None) -> dict[str, Any]:
        if answer is None and key in self._failed:
            answer = stored_form(self._failed[key])
        if answer is None:
            raise IntegrityError(f"the answer to request {key} is not in {self.store.folder} after it was written. Run again.")
        reasoning, text = split_reasoning(answer["raw_text"], opened=self.opened)
        reason, error = answer["finish_reason"], answer.get("error")
        return {
            "completion_id": sha256_of([self.teacher_name, key, reason, answer["raw_text"]]), "prompt_id": prompt_id,
            "teacher": self.teacher_name, "sample_index": index, "reasoning": reasoning, "answer": text,
            "raw_text": answer["raw_text"], "finish_reason": reason, "error": error, "prompt_tokens": answer["prompt_tokens"],
            "completion_tokens": answer["completion_tokens"], "logprob": answer["logprob"], "request_key": key,
        }  # fmt: skip

    def _count(self, domain: str, rows: Sequence[dict[str, Any]]) -> None:
        """Count a prompt's rows that are written, and let go of its failures."""
        self.tallies.add_prompt(domain, rows)
        for row in rows:
            if row["reasoning"] is not None:
                self.thoughts[
                    "empty" if not row["reasoning"] else "without_answer" if not row["answer"] else "with_answer"
                ] += 1
            if row["error"] is not None:
                self.errors[row["error"].partition(":")[0]] += 1
                self.first_error = self.first_error or row["error"]
                self._failed.pop(row["request_key"], None)

    def _say(self) -> None:
        if not self._answered or time.monotonic() - self._said_at < PROGRESS_SECONDS:
            return
        self._said_at = time.monotonic()
        left = self.engine_seconds / self._answered * (self.missing - self._answered)
        done = self.expected - self.missing + self._answered
        self.progress(
            f"{self.teacher_name}: {done:,}/{self.expected:,} completions, "
            f"{self.spending.now.completion_tokens / self.engine_seconds:,.0f} tokens/s, {_duration(left)} left"
        )

    def final_counts(self, num_prompts: int) -> dict[str, int]:
        """The counts, once they add up."""
        total = self.tallies.total
        counts = {
            "prompts": num_prompts, "samples_per_prompt": self.samples_per_prompt, "expected": self.expected,
            "reused": self.counts["reused"], "generated": total("generated"), "stopped": total("stopped"),
            "truncated": total("truncated"), "failed": total("failed"), "pending": 0,
        }  # fmt: skip
        rows = counts["stopped"] + counts["truncated"] + counts["failed"]
        if counts["expected"] != rows or rows != counts["reused"] + counts["generated"] + counts["failed"]:
            raise IntegrityError(
                f"the rows of {self.teacher_name} do not add up: {counts}. Remove {self.store.folder} and run again."
            )
        if counts["failed"] == self.expected:
            raise GenerationError(
                f"all {self.expected:,} requests to {self.teacher_name} failed, the first with {self.first_error}. None of "
                "them is stored: mend the cause and run again."
            )
        return counts

    def facts(self) -> dict[str, Any]:
        generated = self.spending.now.completion_tokens
        speed = generated / self.engine_seconds if generated else None
        return {
            "prompt_tokens": self.tallies.total("prompt_tokens"), "completion_tokens": self.tallies.total("completion_tokens"),
            "domains": self.tallies.facts(),
            "generated_tokens": generated, "tokens_per_second": speed and round(speed, 1),
            "seconds": round(self.engine_seconds, 3), "errors": dict(self.errors), "cost": self.spending.facts(),
            **({"reasoning": dict(self.thoughts)} if self.thoughts else {}),
            **({"with_tokens": self.counts["with_tokens"]} if self.store.has_tokens else {}), **self.engine.facts(),
        }  # fmt: skip


def _part(out_dir: Path, number: int) -> Path:
    return out_dir / f"part-{number:05d}.parquet"


def stored_answers(
    engine: Engine, windows: Iterable[Sequence[Asked]], spending: Spending, store: GenerationStore | Families
) -> Generator[list[Completion], None, None]:
    """What an engine answers, each list in the store's hands before it is given out; at the end, or if it breaks, on disk.

    A run that ends well leaves no crowd of small parts behind on a local disk.

    Raises what the engine raises, and StorageError where the store cannot be written: before anything is asked for, if that can
    be seen, else when what waits could not be written at the end either.
    """
    store.prepare()
    try:
        with closing(engine.answer(windows, spending)) as lists:
            for completions in lists:
                store.add(completions)
                store.pay(spending.take_unsaved())
                store.flush_if_due()
                yield completions
    finally:
        store.pay(spending.take_unsaved())
        store.flush()
    store.compact()


def stored_form(done: Completion) -> dict[str, Any]:
    """A completion in the form of a stored answer, with its error."""
    return {
        "raw_text": done.text, "finish_reason": done.finish_reason, "error": done.error, "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens, "logprob": done.logprob,
    }  # fmt: skip


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
