"""The prompts a teacher answers, on disk: counted before the first is answered, read in windows, never all in memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa

from distill_pipeline.records import MESSAGE

WINDOW_PROMPTS = 4096
"""Prompts that are planned and written together: bounds memory, and sorting within them already fills batches evenly."""

_SPOOLED = pa.schema([("prompt_id", pa.string()), ("messages", pa.list_(MESSAGE)), ("domain", pa.string())])


@contextmanager
def spooled(
    batches: Iterable[pa.RecordBatch], answered_domains: Sequence[str], folder: Path
) -> Iterator[tuple[Path, int, set[str]]]:
    """The prompts to be answered in a file, their number, and all domains of training prompts."""
    num_prompts, domains = 0, set[str]()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".spool-", dir=folder) as temporary:
        path = Path(temporary, "prompts.arrow")
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SPOOLED) as writer:
            for batch in batches:
                rows = batch.select(["prompt_id", "messages", "split", "domain"]).to_pylist()
                train = [row for row in rows if row["split"] == "train"]
                domains.update(row["domain"] for row in train)
                chosen = [row for row in train if "*" in answered_domains or row["domain"] in answered_domains]
                num_prompts += len(chosen)
                if chosen:
                    writer.write_batch(pa.RecordBatch.from_pylist(chosen, schema=_SPOOLED))
        yield path, num_prompts, domains


def windows(spool: Path) -> Iterator[list[dict[str, Any]]]:
    """The spooled prompts in order, WINDOW_PROMPTS at a time however they were batched."""
    window: list[dict[str, Any]] = []
    with pa.OSFile(str(spool), "rb") as file:
        for batch in pa.ipc.open_stream(file):
            for row in batch.to_pylist():
                window.append(row)
                if len(window) == WINDOW_PROMPTS:
                    yield window
                    window = []
    if window:
        yield window
