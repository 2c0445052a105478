"""One run over the pool's windows: ask for what is missing, store it batch after batch, write the rows, count everything."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.errors import ConfigError, GenerationError, IntegrityError
from distill_pipeline.generation.engine import Completion, Request, TransformersEngine
from distill_pipeline.generation.reasoning import split_reasoning
from distill_pipeline.generation.requests import request_key
from distill_pipeline.generation.sampling import Sampling
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.hashing import sha256_of
from distill_pipeline.outcome import Progress
from distill_pipeline.records import COMPLETION_SCHEMA
from distill_pipeline.rendering import ChatRenderer

PROGRESS_SECONDS = 5.0


@dataclass
class AnsweringRun:
    """One run of the stage: what it needs in every window and what it counts."""

    teacher_name: str
    sampling: SamplingSpec
    family: str
    store: GenerationStore
    renderer: ChatRenderer
    expected: int
    progress: Progress
    missing: int = 0
    engine: TransformersEngine | None = None
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    first_error: str = ""
    generated_tokens: int = 0
    engine_seconds: float = 0.0
    tokens: Counter[str] = field(default_factory=Counter)
    _answered: int = 0
    _said_at: float = field(default_factory=time.monotonic)

    def keys_of(self, prompt_id: str) -> list[str]:
        return [request_key(self.family, prompt_id, index) for index in range(self.sampling.n)]

    def missing_of(self, window: Sequence[dict[str, Any]]) -> list[tuple[int, str]]:
        """(index of the prompt in the window, key) of every request without a stored answer."""
        wanted = [(index, key) for index, prompt in enumerate(window) for key in self.keys_of(prompt["prompt_id"])]
        there = self.store.has([key for _, key in wanted])
        return [request for request, found in zip(wanted, there, strict=True) if not found]

    def answer_window(self, window: Sequence[dict[str, Any]], path: Path) -> None:
        """Ask for what is missing in a window, then write all its rows."""
        missing = self.missing_of(window)
        failed = {} if not missing else self._ask(window, missing)
        self.store.flush()
        keys = [key for prompt in window for key in self.keys_of(prompt["prompt_id"])]
        stored = self.store.read(keys)
        rows = []
        for prompt in window:
            for index, key in enumerate(self.keys_of(prompt["prompt_id"])):
                rows.append(self._row(prompt["prompt_id"], index, key, stored.get(key) or failed.get(key)))
            self.tokens["prompt"] += rows[-1]["prompt_tokens"]
        self.counts["reused"] += len(keys) - len(missing)
        self.counts["generated"] += len(missing) - len(failed)
        pq.write_table(pa.Table.from_pylist(rows, schema=COMPLETION_SCHEMA), path, compression="zstd")

    def _ask(self, window: Sequence[dict[str, Any]], missing: Sequence[tuple[int, str]]) -> dict[str, dict[str, Any]]:
        """Generate, store batch after batch, and return what failed by key."""
        assert self.engine is not None, "the engine is loaded whenever a request is missing"
        sampling, failed = self.sampling, {}
        prompts = {index: rendered(self.renderer, window[index]["messages"]) for index in dict.fromkeys(i for i, _ in missing)}
        requests = []
        for index, key in missing:
            ids = prompts[index]
            if isinstance(ids, str):
                failed[key] = failure(ids)
            else:
                requests.append(Request(key, ids))
        draw = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
        self._answered += len(failed)
        for batch in self.engine.plan_batches(requests, max_tokens=sampling.max_tokens):
            started = time.monotonic()
            completions = self.engine.run_batch(batch, max_tokens=sampling.max_tokens, sampling=draw)
            self.engine_seconds += time.monotonic() - started
            self.generated_tokens += sum(done.completion_tokens for done in completions)
            self._answered += len(batch)
            self.store.add(completions)
            self.store.flush_if_due()
            failed.update(failures(completions))
            self._say()
        return failed

    def _row(self, prompt_id: str, index: int, key: str, answer: dict[str, Any] | None) -> dict[str, Any]:
        if answer is None:
            raise IntegrityError(f"the answer to request {key} is not in {self.store.folder} after it was written. Run again.")
        reasoning, text = split_reasoning(answer["raw_text"])
        reason, error = answer["finish_reason"], answer.get("error")
        self.counts[{"stop": "stopped", "length": "truncated", "error": "failed"}[reason]] += 1
        self.tokens["completion"] += answer["completion_tokens"]
        if error is not None:
            self.errors[error.partition(":")[0]] += 1
            self.first_error = self.first_error or error
        return {
            "completion_id": sha256_of([self.teacher_name, key, reason, answer["raw_text"]]), "prompt_id": prompt_id,
            "teacher": self.teacher_name, "sample_index": index, "reasoning": reasoning, "answer": text,
            "raw_text": answer["raw_text"], "finish_reason": reason, "error": error, "prompt_tokens": answer["prompt_tokens"],
            "completion_tokens": answer["completion_tokens"], "logprob": answer["logprob"], "request_key": key,
        }  # fmt: skip

    def _say(self) -> None:
        if time.monotonic() - self._said_at < PROGRESS_SECONDS:
            return
        self._said_at = time.monotonic()
        left = self.engine_seconds / self._answered * (self.missing - self._answered)
        done = self.expected - self.missing + self._answered
        self.progress(
            f"{self.teacher_name}: {done:,}/{self.expected:,} completions, "
            f"{self.generated_tokens / self.engine_seconds:,.0f} tokens/s, {_duration(left)} left"
        )

    def final_counts(self, num_prompts: int) -> dict[str, int]:
        """The counts, once they add up."""
        counts = {
            "prompts": num_prompts, "samples_per_prompt": self.sampling.n, "expected": self.expected,
            "reused": self.counts["reused"], "generated": self.counts["generated"], "stopped": self.counts["stopped"],
            "truncated": self.counts["truncated"], "failed": self.counts["failed"], "pending": 0,
        }  # fmt: skip
        rows = counts["stopped"] + counts["truncated"] + counts["failed"]
        if counts["expected"] != rows or rows != counts["reused"] + counts["generated"] + counts["failed"]:
            raise IntegrityError(
                f"the rows of {self.teacher_name} do not add up: {counts}. Remove {self.store.folder} and run again."
            )
        if counts["failed"] == self.expected:
            raise GenerationError(
                f"all {self.expected:,} requests to {self.teacher_name} failed, the first with {self.first_error}"
            )
        return counts

    def facts(self) -> dict[str, Any]:
        speed = self.generated_tokens / self.engine_seconds if self.engine_seconds else None
        return {
            "prompt_tokens": self.tokens["prompt"], "completion_tokens": self.tokens["completion"],
            "generated_tokens": self.generated_tokens, "tokens_per_second": speed and round(speed, 1),
            "seconds": round(self.engine_seconds, 3), "errors": dict(self.errors),
            "shares_prefixes": None if self.engine is None else self.engine.shares_prefixes,
        }  # fmt: skip


def rendered(renderer: ChatRenderer, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...] | str:
    """A prompt's ids, or the error of one that cannot be rendered."""
    try:
        return tuple(renderer.prompt_ids(messages))
    except ConfigError as err:
        return f"render_failed: {err}"


def failure(error: str | None, *, prompt_tokens: int = 0, completion_tokens: int = 0) -> dict[str, Any]:
    """A request that failed, in the form of a stored answer, with its error."""
    return {
        "raw_text": "", "finish_reason": "error", "error": error, "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens, "logprob": None,
    }  # fmt: skip


def failures(completions: Iterable[Completion]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, :func:`failure`) of those that failed."""
    for done in completions:
        if done.finish_reason == "error":
            yield done.key, failure(done.error, prompt_tokens=done.prompt_tokens, completion_tokens=done.completion_tokens)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
