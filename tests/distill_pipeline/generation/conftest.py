"""A small OpenAI-compatible server with seeded faults, for the tests of the engine that asks one."""

import asyncio
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any

import pytest

MODEL = "fake-model"
FAULTS = ("500", "429", "hang", "garbage", "reset")


@dataclass
class FakeServer:
    """Answers from a thread of its own. An answer is a function of the prompt and the request's seed.

    Args:
        fault_frac: share of requests that meet one of ``faults``, by chance seeded with the prompt and how often it came:
            what a prompt meets does not depend on the others, nor on who asks.
        seconds: how long an answer takes.
        key_status: what a request without the ``key`` is answered with.
        page: what every address answers with, as a web server that is none of OpenAI's kind would.
    """

    fault_frac: float = 0.0
    faults: tuple[str, ...] = FAULTS
    seconds: float = 0.0
    key: str | None = None
    key_status: int = 401
    page: str | None = None
    models: tuple[str, ...] = (MODEL,)
    takes_n: str = "yes"
    always: tuple[int, str] | None = None
    models_status: int = 200
    gives_usage: bool = True
    script: Any = None
    requests: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)
    most_in_flight: int = 0
    in_flight: int = 0
    met: Counter[str] = field(default_factory=Counter)
    """How often each prompt came."""

    def __enter__(self) -> "FakeServer":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        def serve() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
            started.set()
            self._loop.run_forever()
            server.close()
            for task in asyncio.all_tasks(self._loop):
                task.cancel()
            self._loop.run_until_complete(asyncio.sleep(0.01))
            self._loop.close()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        started.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    @property
    def asked(self) -> int:
        """Requests for completions so far."""
        return self.requests["/v1/chat/completions"]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ")[1]
                length = next((int(line.split(":")[1]) for line in head.lower().split("\r\n") if "content-length" in line), 0)
                body = json.loads(await reader.readexactly(length)) if length else {}
                self.requests[path] += 1
                self.headers.append(head)
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    goes_on = await self._reply(path, head, body, writer)
                finally:
                    self.in_flight -= 1
                if not goes_on:
                    break
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def _reply(self, path: str, head: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> bool:
        if self.page is not None:
            return self._say(writer, 200, self.page)
        if self.key is not None and f"authorization: bearer {self.key}" not in head.replace("Bearer", "bearer").lower():
            key = next((line.split(" ")[-1] for line in head.split("\r\n") if line.lower().startswith("authorization")), "")
            return self._say(writer, self.key_status, {"error": {"message": f"Incorrect API key provided: {key}"}})
        if path == "/v1/models":
            return self._say(writer, self.models_status, {"data": [{"id": model} for model in self.models]})
        if path != "/v1/chat/completions":
            return self._say(writer, 404, {"detail": "Not Found"})
        self.bodies.append(body)
        if self.always is not None:
            return self._say(writer, *self.always)
        prompt = body["messages"][-1]["content"]
        if len(prompt) > 2000:
            said = "This model's maximum context length is 512 tokens. However, you requested 900 tokens."
            return self._say(writer, 400, {"error": {"message": said}})
        if prompt.startswith("forbidden"):
            return self._say(writer, 400, {"error": {"message": "the prompt is against our policy"}})
        if body.get("n", 1) > 1 and self.takes_n == "no":
            return self._say(writer, 400, {"error": {"message": "n must be 1"}})
        chance = random.Random(f"{prompt}/{self.met[prompt]}")
        self.met[prompt] += 1
        if chance.random() < self.fault_frac:
            return await self._fault(chance.choice(self.faults), writer)
        await asyncio.sleep(self.seconds)
        return self._say(writer, 200, self.answer(prompt, body))

    async def _fault(self, fault: str, writer: asyncio.StreamWriter) -> bool:
        self.requests[fault] += 1
        if fault == "500":
            return self._say(writer, 500, {"error": {"message": "it broke"}})
        if fault == "429":
            date = formatdate(time.time(), usegmt=True) if self.requests["429"] % 2 else "0.01"
            return self._say(writer, 429, {"error": {"message": "slow down"}}, f"Retry-After: {date}\r\n")
        if fault == "hang":
            await asyncio.sleep(300)
        if fault == "garbage":
            return self._say(writer, 200, '{"choices": [{"index": 0, "mess')
        writer.transport.abort()
        return False

    def answer(self, prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        if self.script is not None:
            return dict(self.script(prompt, body))
        n = 1 if self.takes_n == "one" else body.get("n", 1)
        choices = []
        for index in range(n):
            words = random.Random(f"{prompt}/{body.get('seed')}/{index}").choices(["yes", "no", "maybe"], k=5)
            message = {"role": "assistant", "content": " ".join(words)}
            choices.append({"index": index, "message": message, "finish_reason": "stop"})
        usage = {"prompt_tokens": 10, "completion_tokens": 6 * n}
        return {"choices": choices} | ({"usage": usage} if self.gives_usage else {})

    def _say(self, writer: asyncio.StreamWriter, status: int, document: Any, header: str = "") -> bool:
        body = (document if isinstance(document, str) else json.dumps(document)).encode()
        writer.write(f"HTTP/1.1 {status} X\r\n{header}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return True


@pytest.fixture
def make_server() -> Iterator[Callable[..., FakeServer]]:
    """Starts servers that run until the test ends."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(FakeServer(**options))


@pytest.fixture
def server(make_server: Callable[..., FakeServer]) -> FakeServer:
    return make_server()
