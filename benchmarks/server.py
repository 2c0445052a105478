"""The stage ``teacher_outputs`` against an instant OpenAI-compatible server, and a bare client against the same.

    python benchmarks/server.py --rows 200000

The server runs in a process of its own and answers every request with the same ``n`` completions of 4 KB at once, so what is
measured is the client: sending, reading, storing, and writing the artifact's rows. The bare client sends the same requests
with the same HTTP library and reads the JSON. Prints rows a second of both, their ratio, and the stage's peak memory.
"""

import argparse
import asyncio
import json
import multiprocessing
import random
import resource
import tempfile
import time
from collections.abc import Iterator
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
BARE_CONCURRENCY = 32


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


def pool(num_prompts: int) -> Iterator[pa.RecordBatch]:
    known = {"reference": None, "domain": "sums", "source": "made", "license": "cc0-1.0", "split": "train", "metadata": "{}"}
    for start in range(0, num_prompts, 1024):
        messages = [messages_of(number) for number in range(start, min(start + 1024, num_prompts))]
        rows = [{"prompt_id": prompt_id(each), "messages": each, **known} for each in messages]
        yield pa.RecordBatch.from_pylist(rows, schema=PROMPT_SCHEMA)


def run_stage(url: str, num_prompts: int, folder: Path) -> float:
    """Rows a second of the whole stage."""
    teacher = TeacherSpec.model_validate(
        {"model": MODEL, "engine": "openai", "server": {"base_url": url}, "sampling": {"n": SAMPLES, "max_tokens": 2048}}
    )
    assert teacher.server is not None
    out_dir = folder / "out"
    out_dir.mkdir(parents=True)
    started = time.monotonic()
    outcome = generate_outputs(
        pool(num_prompts), out_dir, teacher_name="instant", teacher=teacher, model=ServedModel(MODEL, None, teacher.server),
        generations_dir=folder / "generations", device="cpu", seed=0, progress=print,
    )  # fmt: skip
    return outcome.counts["stopped"] / (time.monotonic() - started)


async def run_bare(url: str, num_prompts: int) -> float:
    """Rows a second of a client that throws away what it gets."""
    import httpx2

    numbers, rows = iter(range(num_prompts)), 0
    fixed = {"model": MODEL, "max_tokens": 2048, "temperature": 0.7, "top_p": 0.95, "n": SAMPLES}

    async def worker(client: httpx2.AsyncClient) -> int:
        rows = 0
        for number in numbers:
            reply = await client.post(f"{url}/chat/completions", json=fixed | {"messages": messages_of(number), "seed": number})
            rows += len(json.loads(reply.content)["choices"])
        return rows

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(limits=limits) as client:
        started = time.monotonic()
        rows = sum(await asyncio.gather(*[worker(client) for _ in range(BARE_CONCURRENCY)]))
        return rows / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--completion-bytes", type=int, default=4096)
    options = parser.parse_args()
    num_prompts = options.rows // SAMPLES
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, options.completion_bytes), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ours.recv()}/v1"
    bare = asyncio.run(run_bare(url, num_prompts))
    with tempfile.TemporaryDirectory() as folder:
        ours_rate = run_stage(url, num_prompts, Path(folder))
    server.terminate()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"bare client  {bare:8,.0f} rows/s")
    print(f"stage        {ours_rate:8,.0f} rows/s  ({ours_rate / bare:.2f} of the bare client), peak memory {peak:,.0f} MB")


if __name__ == "__main__":
    main()
