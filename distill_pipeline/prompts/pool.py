"""The prompt pool: every usable prompt once, in the order of its sources, and every other row with the reason it is not there.

Two passes. The first reads the sources into a spool on disk and keeps a few numbers a row; then repeated rows are found for
the pool as a whole; the second pass splits, decontaminates and writes. Files: ``part-*.parquet`` (``PROMPT_SCHEMA``) and
``rejected-*.parquet`` (``REJECTED_SCHEMA``).

Decided: equal messages are one prompt whatever the settings, for a prompt's id is its messages. Contamination is asked of
training prompts only: held-out prompts are themselves evaluation.
"""

import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distill_pipeline.ngrams import text_hash
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.prompts.contamination import ContaminationIndex, Match
from distill_pipeline.prompts.near_dedup import Indices, NearDuplicates, first_occurrences
from distill_pipeline.prompts.sources import BadRow, SourceRow, read_source
from distill_pipeline.prompts.spec import DedupSpec, SourceSpec
from distill_pipeline.prompts.split import split_of
from distill_pipeline.records import MESSAGE, PROMPT_SCHEMA, prompt_id
from distill_pipeline.shards import ShardWriter

REJECTED_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("line", pa.int64(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
"""A row of a source that is not in the pool. ``prompt`` is its last message, null where it could not be read; ``line`` is 0
where a whole file could not; ``detail`` says which prompt it repeats or what it shares with the evaluation."""

REJECT_REASONS = ("malformed", "duplicate", "near_duplicate", "contaminated")

_SPOOL_SCHEMA = pa.schema(
    [
        pa.field("messages", pa.list_(MESSAGE)),
        *(pa.field(name, pa.string()) for name in ("prompt_id", "reference", "domain", "source", "license", "metadata")),
        pa.field("line", pa.int64()),
    ]
)
_LISTED = 50
_NEWS_SECONDS = 5.0


def build_pool(
    sources: Sequence[SourceSpec],
    out_dir: Path,
    *,
    resolve_path: Callable[[str], str],
    holdout_frac: float,
    dedup: DedupSpec,
    protected: ContaminationIndex | None,
    progress: Progress,
) -> Outcome:
    """Read the sources and write the pool into ``out_dir``.

    Args:
        resolve_path: turns a path of the experiment file into one that can be opened.
        protected: what training prompts must not match; None checks nothing.
    Returns:
        Counts ``seen == kept + malformed + duplicate + near_duplicate + contaminated`` and ``kept == train + heldout``;
        ``flagged`` are kept training prompts that share an 8-gram with the evaluation. Facts list the first bad rows,
        contamination with its span, licences and domains.
    Raises:
        SourceError: a source matches nothing or has no usable row.
    """
    spool_dir = out_dir / ".spool"
    spool_dir.mkdir(parents=True)
    try:
        with ShardWriter(out_dir, "rejected", REJECTED_SCHEMA) as rejected:
            build = _Build(out_dir, spool_dir, dedup, protected, holdout_frac, rejected, progress)
            build.read(sources, resolve_path)
            build.write()
    finally:
        shutil.rmtree(spool_dir, ignore_errors=True)
    return build.outcome()


class _Build:
    """The state of one pool in the making."""

    def __init__(
        self, out_dir: Path, spool_dir: Path, dedup: DedupSpec, protected: ContaminationIndex | None, holdout_frac: float,
        rejected: ShardWriter, progress: Progress,
    ) -> None:  # fmt: skip
        self._out_dir, self._spool_dir, self._protected = out_dir, spool_dir, protected
        self._holdout_frac, self._rejected, self._progress = holdout_frac, rejected, progress
        self._near = NearDuplicates(spool_dir, dedup.near.threshold) if dedup.near else None
        self._counts: Counter[str] = Counter()
        self._bad_rows: list[dict[str, Any]] = []
        self._contamination: list[dict[str, Any]] = []
        self._flags: list[dict[str, Any]] = []
        self._domains: dict[str, Counter[str]] = {}
        self._licenses: dict[str, str] = {}
        self._files: dict[str, int] = {}
        self._file_of, self._line_of = array("L"), array("Q")
        self._prompt_keys, self._id_keys = (array("Q"), array("Q")), array("Q")
        self._named: list[int] = []
        self._last_news = time.monotonic()

    def read(self, sources: Sequence[SourceSpec], resolve_path: Callable[[str], str]) -> None:
        """First pass: sources to spool."""
        with ShardWriter(self._spool_dir, "spool", _SPOOL_SCHEMA) as spool:
            for number, source in enumerate(sources):
                self._licenses[source.path] = source.license
                for row in read_source(source, resolve_path):
                    self._counts["seen"] += 1
                    if isinstance(row, BadRow):
                        self._reject_bad(row)
                    else:
                        spool.add(self._spooled(number, source, row))
                    self._news("read")

    def _spooled(self, number: int, source: SourceSpec, row: SourceRow) -> dict[str, Any]:
        fields = row.fields
        key = prompt_id(fields.messages)
        self._prompt_keys[0].append(int(key[:16], 16))
        self._prompt_keys[1].append(int(key[16:32], 16))
        index = len(self._line_of)
        # Rows without an id get a number of their own, so that no two of them look alike.
        self._id_keys.append(index if fields.source_id is None else text_hash(f"{number}:{fields.source_id}"))
        if fields.source_id is not None:
            self._named.append(index)
        self._file_of.append(self._files.setdefault(row.file, len(self._files)))
        self._line_of.append(row.line)
        if self._near is not None:
            self._near.add(fields.messages, fields.reference)
        return {
            "prompt_id": key, "messages": fields.messages, "reference": fields.reference, "domain": fields.domain,
            "source": row.file, "license": source.license, "metadata": fields.metadata, "line": row.line,
        }  # fmt: skip

    def write(self) -> None:
        """Second pass: spool to pool."""
        id_first, same_first, near_first = self._repeats()
        names = list(self._files)
        index = -1
        with ShardWriter(self._out_dir, "part", PROMPT_SCHEMA) as pool:
            for row in self._spool_rows():
                index += 1
                same, other, near = int(same_first[index]), int(id_first[index]), int(near_first[index])
                if same != index:
                    self._reject(row, "duplicate", f"same prompt as {self._place(same, names)}")
                elif other != index:
                    self._reject(row, "malformed", f"its id is already that of {self._place(other, names)}")
                elif near >= 0:
                    self._reject(row, "near_duplicate", f"nearly the same prompt as {self._place(near, names)}")
                else:
                    self._keep_or_drop(row, pool)
                self._news("written")
        if self._near is not None:
            self._near.close()

    def _repeats(self) -> tuple[Indices, Indices, Indices]:
        """For each row the first with its id, the first with its prompt, and the kept one it nearly repeats (or -1)."""
        high, low = (np.array(part, dtype=np.uint64) for part in self._prompt_keys)
        count = len(high)
        same = first_occurrences(high, low)
        other = np.arange(count)
        named = np.array(self._named, dtype=np.int64)
        is_first = same == other
        named = named[is_first[named]]
        other[named] = named[first_occurrences(np.array(self._id_keys, dtype=np.uint64)[named])]
        is_usable = is_first & (other == np.arange(count))
        near = np.full(count, -1, dtype=np.int64) if self._near is None else self._near.find(is_usable)
        return other, same, near

    def _spool_rows(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._spool_dir.glob("spool-*.parquet")):
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()

    def _keep_or_drop(self, row: dict[str, Any], pool: ShardWriter) -> None:
        split = split_of(row["prompt_id"], self._holdout_frac)
        match = None
        if self._protected is not None and split == "train":
            match = self._protected.match_any(message["content"] for message in row["messages"])
        if match is not None:
            self._note(row, match)
        if match is not None and not match.is_flag:
            self._reject(row, "contaminated", str(match))
            return
        self._counts["kept"] += 1
        self._counts[split] += 1
        self._domains.setdefault(row["domain"], Counter())[split] += 1
        pool.add({name: row[name] for name in PROMPT_SCHEMA.names if name != "split"} | {"split": split})

    def _note(self, row: dict[str, Any], match: Match) -> None:
        self._counts["flagged"] += match.is_flag
        listed = self._flags if match.is_flag else self._contamination
        if len(listed) < _LISTED:
            prompt = {"prompt_id": row["prompt_id"], "prompt": row["messages"][-1]["content"][:300]}
            listed.append(prompt | {"item": match.document_id, "rule": match.rule, "span": match.span})

    def _reject_bad(self, row: BadRow) -> None:
        self._counts["malformed"] += 1
        self._list_bad(row.file, row.line, row.reason)
        self._write_rejected(None, None, row.file, row.line, "malformed", row.reason)

    def _reject(self, row: dict[str, Any], reason: str, detail: str) -> None:
        self._counts[reason] += 1
        if reason == "malformed":
            self._list_bad(row["source"], row["line"], detail)
        prompt = row["messages"][-1]["content"]
        self._write_rejected(row["prompt_id"], prompt, row["source"], row["line"], reason, detail)

    def _write_rejected(self, *values: Any) -> None:
        self._rejected.add(dict(zip(REJECTED_SCHEMA.names, values, strict=True)))

    def _list_bad(self, file: str, line: int, reason: str) -> None:
        if len(self._bad_rows) < _LISTED:
            self._bad_rows.append({"file": file, "line": line, "reason": reason})

    def _place(self, index: int, names: list[str]) -> str:
        return f"{names[self._file_of[index]]}:{self._line_of[index]}"

    def _news(self, verb: str) -> None:
        if time.monotonic() - self._last_news > _NEWS_SECONDS:
            self._last_news = time.monotonic()
            done = self._counts["seen"] if verb == "read" else self._counts["kept"]
            self._progress(f"prompt_pool: {done:,} prompts {verb}")

    def outcome(self) -> Outcome:
        """Counts that add up, and facts."""
        names = ("seen", "kept", "train", "heldout", *REJECT_REASONS, "flagged")
        counts = {name: self._counts[name] for name in names}
        assert counts["seen"] == counts["kept"] + sum(counts[reason] for reason in REJECT_REASONS), counts
        assert counts["kept"] == counts["train"] + counts["heldout"], counts
        assert self._rejected.num_rows == counts["seen"] - counts["kept"], counts
        facts = {
            "bad_rows": self._bad_rows,
            "contaminated": self._contamination,
            "flagged": self._flags,
            "protected_items": self._protected.num_items if self._protected else 0,
            "licenses": self._licenses,
            "domains": {domain: dict(sorted(splits.items())) for domain, splits in sorted(self._domains.items())},
        }
        self._progress(f"prompt_pool: kept {counts['kept']:,} of {counts['seen']:,} rows")
        return Outcome(counts, facts)
