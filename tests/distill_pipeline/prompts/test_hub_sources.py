"""Sources on the Hugging Face Hub: read through the real client from a server that answers as the Hub does."""

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

REPO, SHA = "acme/questions", "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """A data set repository with these files, and the paths that were asked of it."""

    files: dict[str, bytes]
    endpoint: str = ""
    asked: list[str] = field(default_factory=list)

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What the tree of a folder lists."""
        inside = folder and f"{folder}/"
        paths = [path for path in self.files if path.startswith(inside)]
        found = [
            self.entry(path) for path in paths if recursive or "/" not in path.removeprefix(inside)
        ]  # fmt: skip
        folders = {f"{inside}{path.removeprefix(inside).split('/')[0]}" for path in paths if "/" in path.removeprefix(inside)}
        return found + [{"type": "directory", "oid": "t" * 40, "size": 0, "path": path} for path in sorted(folders)]

    def entry(self, path: str) -> dict[str, Any]:
        return {"type": "file", "oid": "b" * 40, "size": len(self.files[path]), "path": path}


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            hub.asked.append(url.path)
            head, _, rest = unquote(url.path).partition(f"datasets/{REPO}")
            if head == "/" and rest.startswith("/resolve/main/"):
                self._file(rest.removeprefix("/resolve/main/"))
            elif head == "/api/" and rest.startswith("/tree/main"):
                folder = rest.removeprefix("/tree/main").strip("/")
                entries = hub.entries(folder, "recursive=true" in url.query.lower())
                self._json(entries if entries or not folder else None)
            elif head == "/api/" and rest in {"", "/revision/main"}:
                self._json({"id": REPO, "sha": SHA, "siblings": [], "private": False, "tags": []})
            else:
                self._json(None)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            hub.asked.append(self.path)
            wanted = [unquote(part.partition("=")[2]) for part in body.split("&") if part.startswith("paths=")]
            self._json([hub.entry(path) for path in wanted if path in hub.files])

        def _json(self, document: Any) -> None:
            data = json.dumps({"error": "not found"} if document is None else document).encode()
            self.send_response(404 if document is None else 200)
            if document is None:
                self.send_header("X-Error-Code", "RepoNotFound")
            self._send(data)

        def _file(self, path: str) -> None:
            if path not in hub.files:
                self._json(None)
                return
            data, span = hub.files[path], self.headers.get("Range")
            if span:
                start, _, end = span.removeprefix("bytes=").partition("-")
                data = data[int(start) : int(end) + 1 if end else None]
            self.send_response(206 if span else 200)
            self._send(data)

        def _send(self, data: bytes) -> None:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A Hub of one data set: two JSONL files, one CSV, one Parquet file and a card."""

    def rows(name: str) -> list[dict[str, str]]:
        return [{"prompt": f"{name} question {n}?", "reference": str(n)} for n in range(3)]

    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows("parquet")), parquet)
    lines = {name: "\n".join(json.dumps(row) for row in rows(name)).encode() for name in ("first", "second")}
    table = "prompt,reference\n" + "\n".join(f"{row['prompt']},{row['reference']}" for row in rows("csv"))
    found = Hub({
        "README.md": b"# a card", "data/first.jsonl": lines["first"], "data/deep/second.jsonl": lines["second"],
        "data/table.csv": table.encode(), "data/rows.parquet": parquet.getvalue(),
    })  # fmt: skip
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(found))
    found.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield found
    server.shutdown()
    server.server_close()
    thread.join()


PROGRAM = """
import json, sys
from distill_pipeline.errors import SourceError
from distill_pipeline.prompts.sources import SourceRow, read_source, source_files, source_stamps
from distill_pipeline.prompts.spec import SourceSpec

found = {}
for path in sys.argv[1:]:
    source = SourceSpec(path=path, license="mit")
    try:
        rows = [row for row in read_source(source, str) if isinstance(row, SourceRow)]
        texts = [row.fields.messages[0]["content"] for row in rows]
        found[path] = {"hashes": source_files(source, str), "stamps": len(source_stamps(source, str)), "prompts": texts}
    except SourceError as err:
        found[path] = {"error": str(err)}
print(json.dumps(found))
"""


def test_files_folders_and_globs_of_a_data_set_are_read_from_the_hub(hub: Hub, tmp_path: Path) -> None:
    root = f"hf://datasets/{REPO}"
    paths = [f"{root}/data/first.jsonl", f"{root}/data", f"{root}/data/*.parquet", f"{root}/none.jsonl"]
    environment = {
        "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd()),
        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PROGRAM, *paths], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    file, folder, glob, none = json.loads(done.stdout).values()
    assert file["prompts"] == [f"first question {n}?" for n in range(3)]
    assert list(folder["hashes"]) == [
        f"{root}/data/{name}" for name in ("deep/second.jsonl", "first.jsonl", "rows.parquet", "table.csv")
    ]
    assert folder["stamps"] == 4
    assert folder["prompts"] == [f"{name} question {n}?" for name in ("second", "first", "parquet", "csv") for n in range(3)]
    assert glob["prompts"] == [f"parquet question {n}?" for n in range(3)]
    assert none["error"].startswith(f"prompt_pool source {root}/none.jsonl matches no file")
    assert any("/resolve/main/" in path for path in hub.asked)
