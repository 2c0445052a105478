"""Completions from OpenAI-compatible servers: streams prompts to them, and answers back in the order in which they come.

Decided: one event loop in a thread of its own, which runs only while the stage waits for it, so that no state is shared and a
notebook's own loop is left alone. All samples of a prompt go in one request where the server takes ``n``, else one by one.
Hedging (a second request for a slow one) is left out: it pays twice.
"""

import asyncio
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any, TypeVar

from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.protocol import Asked, Completion
from distill_pipeline.generation.requests import SERVER_ENGINE, family_settings
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.server.asking import ServedRequests
from distill_pipeline.generation.server.probe import http_client, key_of
from distill_pipeline.generation.server.traffic import Traffic
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.outcome import Progress, silent

T = TypeVar("T")


class ServerEngine:
    """Engine ``openai``: see :class:`distill_pipeline.generation.protocol.Engine`."""

    def __init__(
        self,
        model: ServedModel,
        *,
        name: str,
        sampling: SamplingSpec,
        seed: int,
        system: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        logprobs: bool = False,
        top_logprobs: int | None = None,
        progress: Progress = silent,
    ) -> None:
        """
        Args:
            name: what messages call the teacher.
            extra_body: more fields of each request; null takes one out.
            logprobs: ask for the log-probability of each token; their sum is the completion's.
            top_logprobs: ask also for so many likeliest tokens at each place, named by their ids where the server can.
        """
        self._model, self._name, self._progress = model, name, progress
        self._requests = ServedRequests(
            model, sampling, system=system, extra_body=extra_body or {}, logprobs=logprobs, top_logprobs=top_logprobs
        )
        self._traffic: Traffic | None = None
        self.settings = family_settings(
            identity=model.identity, revision=model.revision, engine=SERVER_ENGINE, dtype=None, system=system,
            rendering="the server's", sampling=sampling, seed=seed, top_logprobs=top_logprobs,
        ) | {"extra_body": dict(extra_body or {}), "logprobs": logprobs}  # fmt: skip

    def answer(self, windows: Iterable[Sequence[Asked]], spending: Spending) -> Generator[list[Completion], None, None]:
        """Everything in flight at once; see the protocol."""
        waiting = iter(windows)
        first = next((window for window in waiting if window), None)
        if first is None:
            return
        http, key = http_client(), key_of(f"teacher {self._name}", self._model.server.api_key_env)
        earlier, traffic = (
            self._traffic,
            Traffic(
                http,
                key,
                self._model,
                self._requests,
                chain([first], waiting),
                spending,
                name=self._name,
                progress=self._progress,
            ),
        )
        if earlier is not None:
            traffic.follow(earlier)
        self._traffic = traffic
        with _Loop() as loop:
            try:
                loop.run(traffic.open())
                while (completions := loop.run(traffic.next())) is not None:
                    yield completions
            finally:
                loop.run(traffic.close())

    def facts(self) -> dict[str, Any]:
        """Addresses, and how asking went."""
        asked = {} if self._traffic is None else self._traffic.facts()
        return {"base_urls": list(self._model.server.base_url), "device": None, "dtype": None, "asking": asked}


class _Loop:
    """An event loop in another thread that runs one coroutine at a time, while the caller waits."""

    def __enter__(self) -> "_Loop":
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="server-engine")
        self._loop = asyncio.new_event_loop()
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Its result, or what it raises."""
        return self._thread.submit(self._loop.run_until_complete, coroutine).result()

    def __exit__(self, *_: object) -> None:
        self._thread.submit(self._loop.close).result()
        self._thread.shutdown()
