"""All requests of one run to its servers: which are sent when and where, which come again, and when to give up."""

import asyncio
import heapq
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from distill_pipeline.errors import GenerationError
from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.generation.protocol import Asked, Completion, failed_completion
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.server.asking import Ask, ServedRequests
from distill_pipeline.generation.server.connections import Connections
from distill_pipeline.generation.server.pacing import Endpoint, RateLimit, full_jitter, retry_after
from distill_pipeline.generation.server.probe import probe, refusal
from distill_pipeline.generation.server.replies import Fault, Reply, read_fault, read_reply
from distill_pipeline.outcome import Progress

OPEN_WINDOWS = 3
"""Windows whose prompts may wait for answers at once: the slowest of one do not hold up the next, and memory is bounded."""
HEARTBEAT_SECONDS = 1.0
GATHER_SECONDS, GATHER_ROWS = 0.02, 256
"""Completions are handed over together that come within so long, or are so many."""
LIMITED_SECONDS = 3600.0
"""How long a server may say 429 to everything."""
SAY_WAIT_SECONDS = 5.0


class Traffic:
    """One run's requests. Every method runs in the thread of the event loop."""

    def __init__(
        self, http: Any, key: str | None, model: ServedModel, requests: ServedRequests,
        windows: Iterator[Sequence[Asked]], spending: Spending, *, name: str, progress: Progress,
    ) -> None:  # fmt: skip
        server, now = model.server, time.monotonic()
        self._http, self._key, self._model, self._server = http, key, model, server
        self._requests, self._windows, self._spending = requests, windows, spending
        self._name, self._progress = name, progress
        self._chance = random.Random(0)
        self._endpoints = [
            Endpoint(
                url.rstrip("/"), server.max_concurrency, server.backoff_seconds, server.max_backoff_seconds, self._chance, now
            )
            for url in server.base_url
        ]
        self._deadline = server.timeout_seconds + server.timeout_seconds_a_token * requests.max_tokens
        self._request_rate = RateLimit(server.requests_per_minute, now) if server.requests_per_minute else None
        self._token_rate = RateLimit(server.tokens_per_minute, now) if server.tokens_per_minute else None
        self._ready: deque[Ask] = deque()
        self._later: list[tuple[float, int, Ask]] = []
        self._tickets = count()
        self._outstanding: Counter[int] = Counter()
        self._num_windows, self._is_drained = 0, False
        self._takes_n = True
        self._tasks: set[asyncio.Task[None]] = set()
        self._done: list[Completion] = []
        self._error: BaseException | None = None
        self._is_dead = False
        self._counts: Counter[str] = Counter()
        self._fingerprints: set[str] = set()
        self._refusals = 0

    def follow(self, earlier: "Traffic") -> None:
        """Go on with what the engine's requests before these counted, and learnt of its servers."""
        self._counts, self._fingerprints, self._takes_n = earlier._counts, earlier._fingerprints, earlier._takes_n

    async def open(self) -> None:
        """Make the client, and probe every server."""
        self._wake = asyncio.Event()
        self._client = Connections(
            self._http, key=self._key, connect_seconds=self._server.connect_seconds, deadline=self._deadline
        )  # fmt: skip
        if self._server.probe:
            for endpoint in self._endpoints:
                try:
                    await probe(
                        self._client, endpoint.url, name=self._name, model=self._model.reference,
                        api_key_env=self._server.api_key_env,
                    )  # fmt: skip
                except Exception as err:
                    raise type(err)(self._clean(str(err))) from None

    async def close(self) -> None:
        """Take back what is in flight."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if hasattr(self, "_client"):
            await self._client.aclose()

    async def next(self) -> list[Completion] | None:
        """Completions that came, perhaps none for a second; None when there are no more. Raises what ends the run,
        once what was in flight has come, unless nobody answers any more."""
        started = time.monotonic()
        first_at: float | None = None
        while True:
            now = time.monotonic()
            soonest = self._dispatch(now)
            if self._done and first_at is None:
                first_at = now
            is_over = not (self._tasks or self._ready or self._later) and self._is_drained
            stops = is_over or (self._error is not None and (self._is_dead or not self._tasks))
            due = first_at is not None and (now - first_at >= GATHER_SECONDS or len(self._done) >= GATHER_ROWS)
            if due or stops or now - started >= HEARTBEAT_SECONDS:
                done, self._done = self._done, []
                if done or not stops:
                    return done
                if self._error is not None:
                    raise self._error
                return None
            until = min(soonest, started + HEARTBEAT_SECONDS, (first_at or now) + GATHER_SECONDS if self._done else soonest)
            self._wake.clear()
            try:
                async with asyncio.timeout(max(0.0, until - now)):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def facts(self) -> dict[str, Any]:
        """How asking went."""
        return {
            **{name: self._counts[name] for name in ("sent", "failed", "limited", "refused")},
            "tokens_from": sorted(self._requests.counted_by), "takes_n": self._takes_n,
            "concurrency": [int(endpoint.limit) for endpoint in self._endpoints],
            "system_fingerprints": sorted(self._fingerprints)[:10],
        }  # fmt: skip

    # --- sending ------------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> float:
        """Send what can be sent; when to look again, unless something comes before."""
        soonest = float("inf")
        while self._error is None:
            while self._later and self._later[0][0] <= now:
                self._ready.appendleft(heapq.heappop(self._later)[2])
            ask = self._peek()
            if ask is None:
                return min(soonest, self._later[0][0] if self._later else soonest)
            endpoint = self._best_endpoint(ask, now)
            if not endpoint.has_room(now):
                paused = [e.paused_until for e in self._endpoints if e.paused_until > now]
                return min([soonest, *paused])
            tokens = self._expected_tokens(ask)
            wait = max(
                self._request_rate.wait(now, 1) if self._request_rate else 0.0,
                self._token_rate.wait(now, tokens) if self._token_rate else 0.0,
            )
            if wait > 0.0:
                return now + wait
            most = self._requests.most(ask)
            if not self._spending.reserve(most):
                if not self._tasks:
                    self._end(self._spending.used_up())
                return soonest
            self._ready.popleft()
            self._send(ask, endpoint, most, tokens)
        return soonest

    def _peek(self) -> Ask | None:
        """The next request, from the next window where none waits."""
        while not self._ready and not self._is_drained and len(self._outstanding) < OPEN_WINDOWS:
            window = next(self._windows, None)
            if window is None:
                self._is_drained = True
                break
            self._num_windows += 1
            for asked in window:
                self._outstanding[self._num_windows] += len(asked.keys)
                self._ready.extend(self._asks(asked, self._num_windows))
        if self._ready and not self._takes_n and len(self._ready[0].asked.keys) > 1:
            self._ready.extendleft(reversed(self._ready.popleft().singles(is_split=False)))
        return self._ready[0] if self._ready else None

    def _asks(self, asked: Asked, window: int) -> Iterator[Ask]:
        """The requests for a prompt's missing samples."""
        size = self._server.samples_per_request or len(asked.keys)
        for start in range(0, len(asked.keys), size):
            yield Ask(Asked(asked.messages, asked.keys[start : start + size]), window)

    def _best_endpoint(self, ask: Ask, now: float) -> Endpoint:
        """The least busy address that does well, at best another one than where the request failed."""
        return min(
            self._endpoints,
            key=lambda e: (not e.has_room(now), e.is_failing, e.url == ask.failed_at, e.in_flight / e.limit),
        )

    def _expected_tokens(self, ask: Ask) -> float:
        """What a request will take of the rate limit: the mean of those before it, at first the most it can."""
        now = self._spending.now
        if now.requests == 0:
            return self._requests.most(ask).tokens
        return now.tokens / now.requests

    def _send(self, ask: Ask, endpoint: Endpoint, most: Usage, tokens: float) -> None:
        now = time.monotonic()
        if self._request_rate:
            self._request_rate.take(now, 1)
        if self._token_rate:
            self._token_rate.take(now, tokens)
        endpoint.in_flight += 1
        self._counts["sent"] += 1
        task = asyncio.get_running_loop().create_task(self._attempt(ask, endpoint, most, tokens))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(error)
        self._wake.set()

    async def _attempt(self, ask: Ask, endpoint: Endpoint, most: Usage, tokens: float) -> None:
        """Send one request and deal with what comes."""
        sent_at = time.monotonic()
        try:
            outcome = await self._outcome(ask, endpoint)
        finally:
            endpoint.in_flight -= 1
            self._spending.release(most)
        now = time.monotonic()
        if isinstance(outcome, Reply):
            self._answered(ask, endpoint, outcome, now, tokens)
        else:
            self._faulted(ask, endpoint, outcome, now, sent_at)

    async def _outcome(self, ask: Ask, endpoint: Endpoint) -> Reply | Fault:
        try:
            async with asyncio.timeout(self._deadline):
                response = await self._client.post(f"{endpoint.url}/chat/completions", self._requests.body(ask))
        except (TimeoutError, self._http.ReadTimeout, self._http.WriteTimeout):
            self._spending.unreported += 1
            return Fault("failed", f"timeout: no answer within {self._deadline:.0f} s", is_overload=True)
        except self._http.ConnectTimeout:
            return Fault("failed", f"connection: no connection within {self._server.connect_seconds:g} s", is_overload=True)
        except self._http.HTTPError as err:
            if not isinstance(err, self._http.ConnectError):
                self._spending.unreported += 1
            return Fault("failed", f"connection: {type(err).__name__}: {self._clean(str(err))}")
        if response.status_code == 200:
            read = read_reply(response.content)
            if isinstance(read, Fault):
                self._spending.unreported += 1
        else:
            wait = retry_after(response.headers.get("retry-after"), time.time())
            read = read_fault(response.status_code, response.content, wait)
        return read

    # --- what comes back ----------------------------------------------------------------------------------------------

    def _answered(self, ask: Ask, endpoint: Endpoint, reply: Reply, now: float, tokens: float) -> None:
        endpoint.succeeded(now)
        completions, usage = self._requests.completions(ask, reply)
        self._spending.pay(usage)
        if self._token_rate:
            self._token_rate.take(now, usage.tokens - tokens)
        if reply.fingerprint:
            self._fingerprints.add(reply.fingerprint)
        left = ask.asked.keys[len(completions) :]
        if left or ask.is_split:
            self._takes_n = False
        if left:
            rest = Ask(Asked(ask.asked.messages, left), ask.window)
            self._ready.extendleft(reversed(rest.singles(is_split=False)))
        self._deliver(ask.window, completions)

    def _faulted(self, ask: Ask, endpoint: Endpoint, fault: Fault, now: float, sent_at: float) -> None:
        error = self._clean(fault.error)
        if fault.kind == "fatal" and endpoint.has_answered and fault.status in {403, 404}:
            fault = Fault("refused", error, status=fault.status)
        self._counts[fault.kind] += 1
        if fault.kind == "fatal":
            said = error.split(": ", 2)[-1]
            status = fault.status or 0
            self._end(refusal(self._name, endpoint.url, status, said, self._model.reference, self._server.api_key_env))
        elif fault.kind == "limited":
            endpoint.was_limited(now, sent_at, fault.wait_seconds)
            self._ready.appendleft(ask)
            self._say_wait(endpoint, now)
            if now - endpoint.last_success >= LIMITED_SECONDS and now < endpoint.paused_until:
                self._end(
                    GenerationError(
                        f"teacher {self._name}: {endpoint.url} has answered every request of the last hour with 429 ({error}). "
                        "What came is stored: lower server.requests_per_minute or raise the account's limit, and run again."
                    )
                )
        elif fault.kind == "refused":
            self._refused(ask, endpoint, error)
        else:
            self._failed(ask, endpoint, fault, error, now, sent_at)

    def _refused(self, ask: Ask, endpoint: Endpoint, error: str) -> None:
        """A prompt that the server will not answer. Where it was asked for several samples, that may be all it refuses."""
        is_too_long = error.startswith("prompt_too_long")
        if len(ask.asked.keys) > 1 and not is_too_long:
            self._ready.extendleft(reversed(ask.singles(is_split=True)))
            return
        self._refusals += not is_too_long
        if self._refusals >= self._server.dead_after_failures and not any(e.has_answered for e in self._endpoints):
            self._end(
                GenerationError(
                    f"teacher {self._name}: {endpoint.url} refuses every request, {self._refusals} so far, the last with "
                    f"{error}. Take fields it does not know out of the requests with extra_body, for instance {{seed: null}}."
                )
            )
        self._deliver(ask.window, [failed_completion(key, error) for key in ask.asked.keys])

    def _failed(self, ask: Ask, endpoint: Endpoint, fault: Fault, error: str, now: float, sent_at: float) -> None:
        server = self._server
        endpoint.failed(now, sent_at, error, is_overload=fault.is_overload, wait_seconds=fault.wait_seconds)
        dead = {"after_failures": server.dead_after_failures, "after_seconds": server.dead_after_seconds}
        if all(other.is_dead(now, **dead) for other in self._endpoints):  # type: ignore[arg-type]
            self._is_dead = True
            listed = "; ".join(
                f"{e.url}: {e.failures} failures in a row, the last with {e.last_error}" for e in self._endpoints
            )
            self._end(
                GenerationError(
                    f"teacher {self._name}: given up, no server answers any more ({listed}). What came is stored: mend "
                    "the server and run again."
                )
            )
        ask.attempts, ask.failed_at = ask.attempts + 1, endpoint.url
        if ask.attempts >= server.max_attempts:
            said = f"{error} ({ask.attempts} attempts)"
            self._deliver(ask.window, [failed_completion(key, said) for key in ask.asked.keys])
        else:
            wait = full_jitter(ask.attempts, server.backoff_seconds, server.max_backoff_seconds, self._chance)
            heapq.heappush(self._later, (now + wait, next(self._tickets), ask))

    def _end(self, error: BaseException) -> None:
        """Send nothing more; the first reason counts."""
        self._error = self._error or error

    def _deliver(self, window: int, completions: list[Completion]) -> None:
        self._done += completions
        self._outstanding[window] -= len(completions)
        if self._outstanding[window] == 0:
            del self._outstanding[window]

    def _say_wait(self, endpoint: Endpoint, now: float) -> None:
        wait = endpoint.paused_until - now
        if wait >= SAY_WAIT_SECONDS:
            self._progress(f"{self._name}: {endpoint.url} asks to wait {wait:.0f} s (429)")

    def _clean(self, text: str) -> str:
        """A text of the server's without the key, should it quote it."""
        return text.replace(self._key, "***") if self._key else text
