"""The stage ``teacher_outputs`` against an OpenAI-compatible server, and a bare client against the same.

    python benchmarks/server.py --rows 200000                                        # an instant server
    python benchmarks/server.py --url http://127.0.0.1:8000/v1 --model NAME --rows 512 --max-tokens 48 --repeats 2

The instant server runs in a process of its own and answers every request with the same ``n`` completions of 4 KB at once, so
what is measured is the client: sending, reading, storing, and writing the artifact's rows. The bare client sends the same
requests with the same HTTP library and reads the JSON; repeats alternate. Prints rows a second of both, the ratio of their
medians, and the stage's peak memory. A real server must not cache: the two ask different questions.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pyarrow as pa

from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.spec import TeacherSpec
from distill_pipeline.generation.stage import generate_outputs
from distill_pipeline.records import PROMPT_SCHEMA, prompt_id

MODEL = "instant"
SAMPLES = 4


class InstantServer(asyncio.Protocol):
    """Answers each request with prepared bytes: as little work as a server can do."""

    models = completions = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            at = head.find(b"content-length:")
            length = int(head[at + 15 :].split(b"\r\n")[0]) if at >= 0 else 0
            if len(self._buffer) < end + 4 + length:
                return
            self._buffer = self._buffer[end + 4 + length :]
            self._transport.write(self.models if head.startswith(b"get") else self.completions)


def serve(ready: Connection, completion_bytes: int) -> None:
    """Run the server; sends its port."""
    words = random.Random(0)
    letters = "".join(words.choices("abcdefghijklmnopqrstuvwxyz      ", k=completion_bytes))
    choices = [{"index": i, "message": {"content": letters}, "finish_reason": "stop"} for i in range(SAMPLES)]
    usage = {"prompt_tokens": 40, "completion_tokens": SAMPLES * completion_bytes // 4}
    InstantServer.models = _response({"data": [{"id": MODEL}]})
    InstantServer.completions = _response({"choices": choices, "usage": usage})

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(InstantServer, "127.0.0.1", 0)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


def _response(document: dict[str, Any]) -> bytes:
    body = json.dumps(document).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


def messages_of(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {number}: what is {number} times {number + 1}, and why is it so?"}]


def request_of(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """What the bare client asks: what the stage asks too, but for the seed."""
    return {
        "model": options.model, "max_tokens": options.max_tokens, "temperature": 0.7, "top_p": 0.95, "n": SAMPLES,
        "messages": messages_of(number),
    }  # fmt: skip


def pool(first: int, num_prompts: int) -> Iterator[pa.RecordBatch]:
    known = {"reference": None, "domain": "sums", "source": "made", "license": "cc0-1.0", "split": "train", "metadata": "{}"}
    for start in range(first, first + num_prompts, 1024):
        messages = [messages_of(number) for number in range(start, min(start + 1024, first + num_prompts))]
        rows = [{"prompt_id": prompt_id(each), "messages": each, **known} for each in messages]
        yield pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)


def run_stage(options: argparse.Namespace, url: str, first: int, folder: Path) -> float:
    """Rows a second of the whole stage."""
    teacher = TeacherSpec.model_validate({
        "model": options.model, "engine": "openai", "server": {"base_url": url}, "extra_body": {"seed": None},
        "sampling": {"n": SAMPLES, "temperature": 0.7, "max_tokens": options.max_tokens},
    })  # fmt: skip
    assert teacher.server is not None
    out_dir = folder / "out"
    out_dir.mkdir(parents=True)
    started = time.monotonic()
    outcome = generate_outputs(
        pool(first, options.rows // SAMPLES), out_dir, teacher_name="bench", teacher=teacher,
        model=ServedModel(options.model, None, teacher.server), generations_dir=folder / "generations", device="cpu", seed=0,
        progress=print,
    )  # fmt: skip
    seconds = time.monotonic() - started
    assert outcome.counts["failed"] == 0, outcome.facts["errors"]
    return outcome.counts["expected"] / seconds


async def run_bare(options: argparse.Namespace, url: str, first: int) -> float:
    """Rows a second of a client that throws away what it gets."""
    import httpx2

    numbers = iter(range(first, first + options.rows // SAMPLES))

    async def worker(client: httpx2.AsyncClient) -> int:
        rows = 0
        for number in numbers:
            reply = await client.post(f"{url}/chat/completions", json=request_of(options, number), timeout=600.0)
            rows += len(json.loads(reply.content)["choices"])
        return rows

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits) as client:
        started = time.monotonic()
        rows = sum(await asyncio.gather(*[worker(client) for _ in range(options.concurrency)]))
        return rows / (time.monotonic() - started)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server, up to /v1; without it an instant one is started")
    parser.add_argument("--model", default=MODEL, help="its name at the server")
    parser.add_argument("--rows", type=int, default=20_000, help="completions, four a request")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--completion-bytes", type=int, default=4096, help="of the instant server")
    parser.add_argument("--concurrency", type=int, default=32, help="requests in flight of the bare client")
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args()


@contextmanager
def running_server(options: argparse.Namespace) -> Iterator[str]:
    """The address that was given, or that of an instant server."""
    if options.url:
        yield options.url
        return
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options.completion_bytes), daemon=True)
    server.start()
    yield f"http://127.0.0.1:{ours.recv()}/v1"
    server.terminate()


def main() -> None:
    options = parse_options()
    num_prompts, bare, stage = options.rows // SAMPLES, [], []
    with running_server(options) as url, tempfile.TemporaryDirectory() as folder:
        for repeat in range(options.repeats):
            bare.append(asyncio.run(run_bare(options, url, 2 * repeat * num_prompts)))
            stage.append(run_stage(options, url, (2 * repeat + 1) * num_prompts, Path(folder, str(repeat))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    ratio = statistics.median(stage) / statistics.median(bare)
    print(f"bare client  {statistics.median(bare):8,.1f} rows/s")
    print(f"stage        {statistics.median(stage):8,.1f} rows/s  ({ratio:.3f} of the bare client), peak memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()
