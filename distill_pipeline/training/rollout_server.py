"""What is said to a vLLM server that draws rollouts, and what comes back: over HTTP, as often as it takes, or an error.

Weights go by ``/collective_rpc``, with which vLLM's development mode calls ``reload_weights`` of its workers: it works on
every device and takes a folder, where the transfer engines want a GPU or two. Keys and values that were computed with the
weights before would answer for prompts that begin alike, so the prefix cache is emptied after each transfer.
"""

import json
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from distill_pipeline.errors import ConfigError, DistillError, TrainingError
from distill_pipeline.generation.server.pacing import full_jitter, retry_after
from distill_pipeline.generation.server.probe import http_client, key_of
from distill_pipeline.generation.server.replies import Fault, brief, read_fault
from distill_pipeline.outcome import Progress
from distill_pipeline.training.spec import RolloutServerSpec

CONNECT_SECONDS = 10.0
POLL_SECONDS = 1.0


class RolloutServer:
    """One server, as one process talks to it.

    Raises:
        ConfigError: the variable that should hold the key is not set.
        MissingExtraError: there is no HTTP client.
    """

    def __init__(self, spec: RolloutServerSpec, *, progress: Progress) -> None:
        self._spec, self._progress = spec, progress
        self._http = http_client("rollouts.server")
        self._key = key_of("rollouts", spec.api_key_env)
        self.url = spec.base_url.rstrip("/")
        self._root = self.url.removesuffix("/v1")
        self._certificates = self._http.create_ssl_context()
        self._chance = random.Random()
        self._model = ""

    def wait(self, *, context_tokens: int) -> None:
        """Wait until it answers, and learn what it calls its model.

        Raises:
            ConfigError: the key is refused, this is no vLLM server, or its context is shorter than ``context_tokens``.
            TrainingError: nobody answers within ``wait_seconds``.
        """
        deadline, has_said = time.monotonic() + self._spec.wait_seconds, False
        with self._client() as client:
            while True:
                reply = self._try(client, "GET", f"{self.url}/models", None)
                if isinstance(reply, bytes):
                    self._model = self._served_model(reply, context_tokens)
                    return
                if reply.kind in {"fatal", "refused"}:
                    raise ConfigError(
                        f"rollouts.server: {self.url} refuses to say what it serves ({reply.error}). Mend base_url, which ends "
                        "with /v1, or api_key_env."
                    )
                command = self._start_command(context_tokens)
                if time.monotonic() >= deadline:
                    raise TrainingError(
                        f"rollouts.server: nobody answers at {self.url} ({reply.error}). Start it with {command}, and run "
                        "again."
                    )
                if not has_said:
                    self._progress(f"rollouts wait for the server at {self.url}; it is started with {command}")
                    has_said = True
                time.sleep(POLL_SECONDS)

    def load(self, folder: Path) -> None:
        """Have it read its weights from a folder, and forget what it computed with others.

        Raises:
            ConfigError: it was started without the development endpoints.
            TrainingError: it cannot read them, or does not empty its prefix cache.
        """
        with self._client() as client:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            self._ask(client, f"{self._root}/collective_rpc", reload, "take new weights")
            for attempt in range(1, self._spec.max_attempts + 1):
                reply = self._ask(client, f"{self._root}/reset_prefix_cache", None, "empty its prefix cache")
                if reply is None or reply.get("success") is not False:  # older servers say nothing
                    return
                time.sleep(self._jitter(attempt))
        raise TrainingError(
            f"rollouts.server: {self.url} does not empty its prefix cache, {self._spec.max_attempts} times in a row: somebody "
            "else asks it. Give training a server of its own."
        )

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
        """The choices of each request for completions, in the requests' order.

        Raises:
            TrainingError: one of them gets no answer; then no more are sent.
        """
        is_over = threading.Event()

        def choices(body: Mapping[str, Any]) -> list[dict[str, Any]]:
            if is_over.is_set():
                return []  # of a request before or after this one the error is raised
            try:
                document = self._ask(client, f"{self.url}/completions", {"model": self._model, **body}, "complete a prompt")
                return list(document["choices"])
            except BaseException as err:
                is_over.set()
                if isinstance(err, DistillError):
                    raise
                raise TrainingError(f"rollouts.server: {self.url} gives no completions: {type(err).__name__}: {err}") from err

        with self._client() as client, ThreadPoolExecutor(max(1, min(len(bodies), self._spec.max_concurrency))) as pool:
            return list(pool.map(choices, bodies))

    # --- one request ---

    def _client(self) -> Any:
        http, unbounded = self._http, self._http.Limits(max_connections=None, max_keepalive_connections=None)
        return http.Client(
            headers={} if self._key is None else {"Authorization": f"Bearer {self._key}"}, verify=self._certificates,
            limits=unbounded, timeout=http.Timeout(self._spec.timeout_seconds, connect=CONNECT_SECONDS),
        )  # fmt: skip

    def _ask(self, client: Any, url: str, body: Mapping[str, Any] | None, what: str) -> Any:
        """The JSON of the reply, None where it is empty; failures that may pass are tried again."""
        for attempt in count(1):
            reply = self._try(client, "POST", url, body)
            if isinstance(reply, bytes):
                return json.loads(reply) if reply else None
            if reply.status == 404 and not url.startswith(self.url):
                raise ConfigError(
                    f"rollouts.server: {url} is not there: start the server with VLLM_SERVER_DEV_MODE=1 in its environment."
                )
            if reply.kind in {"fatal", "refused"} or attempt == self._spec.max_attempts:
                raise TrainingError(
                    f"rollouts.server: {self.url} does not {what} ({reply.error}; attempt {attempt}). Mend the server, and run "
                    "again: training goes on from its last checkpoint."
                )
            time.sleep(reply.wait_seconds or self._jitter(attempt))

    def _try(self, client: Any, method: str, url: str, body: Mapping[str, Any] | None) -> bytes | Fault:
        """The body of a reply, or why there is none. What takes too long is not asked for again: it would take as long."""
        http = self._http
        try:
            response = client.request(method, url, json=body)
        except http.ReadTimeout:
            return Fault("refused", f"timeout: no answer within {self._spec.timeout_seconds:g} s")
        except http.HTTPError as err:
            return Fault("failed", f"connection: {type(err).__name__}: {self._clean(str(err))}")
        if response.status_code == 200:
            return bytes(response.content)
        wait = retry_after(response.headers.get("retry-after"), time.time())
        fault = read_fault(response.status_code, response.content, wait)
        return replace(fault, error=self._clean(fault.error))

    def _jitter(self, attempt: int) -> float:
        return full_jitter(attempt, self._spec.backoff_seconds, self._spec.max_backoff_seconds, self._chance)

    def _clean(self, text: str) -> str:
        """A text of the server's without the key, should it quote it."""
        return text.replace(self._key, "***") if self._key else text

    def _served_model(self, body: bytes, context_tokens: int) -> str:
        try:
            entry = json.loads(body)["data"][0]
            name, context = str(entry["id"]), entry.get("max_model_len")
        except (ValueError, KeyError, TypeError, IndexError) as err:
            raise ConfigError(
                f"rollouts.server: {self.url}/models is no list of models ({brief(body.decode('utf-8', 'replace'))!r})."
            ) from err
        if context is not None and context < context_tokens:
            raise ConfigError(
                f"rollouts.server: the context of {self.url} holds {context} tokens, and a prompt with its rollout may have "
                f"{context_tokens}. Start it with --max-model-len {context_tokens}, or lower max_length."
            )
        return name

    def _start_command(self, context_tokens: int) -> str:
        place = self._http.URL(self._root)
        return (
            f"VLLM_SERVER_DEV_MODE=1 vllm serve {self._spec.folder} --host {place.host} --port {place.port or 80} "
            f"--max-model-len {context_tokens}"
        )
