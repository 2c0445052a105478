"""Capture teacher signals: read a filtered set's training rows with the teacher and store what it says of every token.

The teacher reads what a student will read: the same renderer, and where it can trees that share beginnings, so that one
forward pass tells the distributions of all completions of a prompt. Work goes in parts of a fixed number of completion tokens;
the files of a part appear whole in the work folder, so a run that is killed goes on with the part it was at and leaves the
files it would have left. Memory holds one part.

Decided: a part's files depend on the rows and settings alone, never on how the run went. Given up: sharing of draws between
prompts that end alike.

Axes: P positions of a batch, C of a chunk, M (position, row) pairs, V vocabulary, H hidden width.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.hashing import version_of
from distill_pipeline.losses import log_probs
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device
from distill_pipeline.models.output_head import OutputHead, output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome, Progress
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.signals.files import SignalHeader, file_prefix, list_type, signal_schema, write_signals
from distill_pipeline.signals.spec import SignalKind, SignalsSpec
from distill_pipeline.signals.stores import STORES
from distill_pipeline.storage.files import write_whole
from distill_pipeline.training.batches import micro_batches
from distill_pipeline.training.examples import Example, encode_row
from distill_pipeline.training.layout import choose_layout, hidden_states
from distill_pipeline.training.trees import Layout

PART_TOKENS = 65_536
"""Completion tokens after which a part ends: some MB of files, and at most so much work is lost by a kill."""

MICRO_TOKENS = 1024
CHUNK_TOKENS = 64
"""Positions whose distribution over the whole vocabulary exists at once."""

PROGRESS_SECONDS = 5.0
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Part:
    """The examples of a part, and what each completion's rows are: they follow one another from 0."""

    number: int
    examples: list[Example] = field(default_factory=list)
    completion_ids: list[str] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, prompt_id: str, prompt: tuple[int, ...], kept: list[tuple[str, tuple[int, ...]]]) -> None:
        """Append a prompt's completions."""
        rows = []
        for name, ids in kept:
            rows.append(self.num_tokens)
            self.num_tokens += len(ids)
            self.completion_ids.append(name)
        self.examples.append(Example(prompt_id, prompt, tuple(ids for _, ids in kept), tuple(rows)))


@dataclass(frozen=True)
class Capturing:
    """A teacher in memory, and what is stored of it."""

    model: Any
    head: OutputHead
    headers: Mapping[str, SignalHeader]
    """By file prefix."""
    layout: Layout
    pad_id: int
    seed: int


def capture_signals(
    training_batches: Iterable[pa.RecordBatch],
    out_dir: Path,
    work_dir: Path,
    *,
    signals: SignalsSpec,
    kinds: tuple[SignalKind, ...],
    max_length: int,
    teacher: ModelFolder,
    system: str | None,
    device: str,
    seed: int,
    progress: Progress,
    part_tokens: int = PART_TOKENS,
) -> Outcome:
    """Write the signals of all training rows to ``out_dir``.

    Args:
        training_batches: rows of TRAINING_SCHEMA, in a fixed order.
        work_dir: keeps finished parts between runs.
        kinds: what students ask for.
        max_length: longest prompt plus completion in tokens; longer ones are counted and left out.
    Returns:
        Counts ``completions == captured + too_long + no_tokens``; facts ``kept_mass``, ``bytes_a_token`` and more.
    Raises:
        ConfigError: k is larger than the vocabulary.
        TrainingError: the teacher's logits are not numbers, or its head is none that is known.
    """
    device = resolve_device(device)
    renderer = ChatRenderer(load_tokenizer(teacher.path), system=system)
    if "topk" in kinds and signals.k > renderer.vocab_size:
        raise ConfigError(
            f"signals.k is {signals.k} and {teacher.reference} has {renderer.vocab_size} tokens. Ask for at most that many."
        )
    capturing = _load(teacher, renderer, signals, kinds, max_length, device, seed)
    key = version_of({prefix: header.model_dump(mode="json") for prefix, header in capturing.headers.items()})
    counts = dict.fromkeys(("rows", "completions", "captured", "too_long", "no_tokens", "tokens"), 0)
    sums: list[dict[str, Any]] = []
    started = spoke = time.monotonic()
    new_tokens = 0
    for part in _parts(training_batches, renderer, max_length, part_tokens, counts):
        done = _finished(work_dir, part, key)
        if done is None:
            done = _capture_part(capturing, part, work_dir, key)
            new_tokens += part.num_tokens
        sums.append(done)
        if time.monotonic() - spoke > PROGRESS_SECONDS:
            spoke = time.monotonic()
            progress(f"captured {counts['tokens']:,} tokens, {new_tokens / (spoke - started):.0f} tokens/s")
    num_bytes = {prefix: _hand_over(work_dir, out_dir, prefix, len(sums)) for prefix in capturing.headers}
    facts = _facts(capturing, sums, num_bytes, counts["tokens"])
    seconds = time.monotonic() - started
    facts |= {"seconds": round(seconds, 3), "new_tokens": new_tokens, "device": device, "renderer": renderer.fingerprint}
    nothing = f"no token to capture: of {counts['completions']} completions {counts['too_long']} are longer than {max_length}"
    return Outcome(counts, facts, None if counts["tokens"] else nothing)


def _load(
    teacher: ModelFolder, renderer: ChatRenderer, signals: SignalsSpec, kinds: tuple[SignalKind, ...], max_length: int,
    device: str, seed: int,
) -> Capturing:  # fmt: skip
    dtype = "bfloat16" if torch.device(device).type == "cuda" else "float32"
    model = load_model(teacher.path, device=device, dtype=dtype)
    head = output_head(model).cut(renderer.vocab_size)
    common = {
        "teacher": teacher.identity, "model": teacher.reference, "revision": teacher.revision, "engine": "transformers",
        "tokenizer_sha256": renderer.tokenizer_sha256, "template_sha256": renderer.template_sha256,
        "vocab_size": renderer.vocab_size, "engine_version": transformers.__version__, "model_dtype": dtype,
        "dtype": signals.dtype,
    }  # fmt: skip
    headers = {}
    if "topk" in kinds:
        headers[file_prefix("topk", 1.0)] = SignalHeader(kind="topk", k=signals.k, temperatures=signals.temperatures, **common)
    for temperature in signals.temperatures if "sampled" in kinds else ():
        headers[file_prefix("sampled", temperature)] = SignalHeader(
            kind="sampled", draws=signals.draws, seed=seed, temperatures=(temperature,), **common
        )
    layout, _ = choose_layout([model], max_length)
    return Capturing(model, head, headers, layout, renderer.end_token_id, seed)


def _parts(
    batches: Iterable[pa.RecordBatch], renderer: ChatRenderer, max_length: int, part_tokens: int, counts: dict[str, int]
) -> Iterator[Part]:
    part = Part(0)
    for batch in batches:
        for row in batch.to_pylist():
            prompt, kept, left_out = encode_row(row, renderer, max_length=max_length)
            counts["rows"] += 1
            counts["completions"] += len(row["completions"])
            counts["captured"] += len(kept)
            counts["tokens"] += sum(len(ids) for _, ids in kept)
            for reason, number in left_out.items():
                counts[reason] += number
            if kept:
                part.add(row["prompt_id"], prompt, kept)
            if part.num_tokens >= part_tokens:
                yield part
                part = Part(part.number + 1)
    if part.num_tokens or part.number == 0:
        yield part


# --- one part ---------------------------------------------------------------------------------------------------------


def _capture_part(capturing: Capturing, part: Part, work_dir: Path, key: str) -> dict[str, Any]:
    """Run the teacher over a part, write its files, and say what was seen: sums over its tokens."""
    generator = torch.Generator().manual_seed(int(version_of([capturing.seed, part.number]), 16) % 2**63)
    stores = {prefix: STORES[header.kind](header, part.num_tokens) for prefix, header in capturing.headers.items()}
    batches = micro_batches(part.examples, layout=capturing.layout, max_tokens=MICRO_TOKENS, pad_id=capturing.pad_id)
    with torch.inference_mode():
        for batch in batches if part.num_tokens else ():
            hidden_PH = hidden_states(capturing.model, batch.to(str(capturing.model.device)))
            position_M, row_M = batch.signals.position_M, batch.signals.row_M
            for start in range(0, len(hidden_PH), CHUNK_TOKENS):
                log_p_CV = log_probs(capturing.head.logits(hidden_PH[start : start + CHUNK_TOKENS]))
                if bool(log_p_CV[:, 0].isnan().any()):
                    names = ", ".join(batch.prompt_ids)
                    raise TrainingError(f"the teacher's logits are not numbers on one of these prompts: {names}")
                in_chunk_M = (position_M >= start) & (position_M < start + len(log_p_CV))
                for store in stores.values():
                    store.take(log_p_CV, position_M[in_chunk_M] - start, row_M[in_chunk_M], generator)
    seen: dict[str, Any] = {"key": key, "tokens": part.num_tokens}
    work_dir.mkdir(parents=True, exist_ok=True)
    for prefix, store in stores.items():
        header = capturing.headers[prefix]
        table = pa.Table.from_arrays([*_text_columns(part), *store.columns(_starts(part))], schema=signal_schema(header))
        write_signals(work_dir / f"{prefix}{part.number:05d}.parquet", table)
        seen |= store.sums()
    write_whole(work_dir / f"part-{part.number:05d}.json", json.dumps(seen))
    return seen


def _finished(work_dir: Path, part: Part, key: str) -> dict[str, Any] | None:
    """What an earlier run wrote down of a part after its files, or None."""
    note = work_dir / f"part-{part.number:05d}.json"
    if not note.is_file():
        return None
    seen: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    return seen if (seen["key"], seen["tokens"]) == (key, part.num_tokens) else None


def _starts(part: Part) -> Array:
    """(completions + 1,) where each completion's tokens start among the part's, and where the last one's end."""
    lengths = [len(ids) for example in part.examples for ids in example.completions]
    starts: Array = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def _text_columns(part: Part) -> list[pa.Array]:
    tokens = [[*example.prompt, *ids] for example in part.examples for ids in example.completions]
    starts = [len(example.prompt) for example in part.examples for _ in example.completions]
    return [pa.array(part.completion_ids, pa.string()), pa.array(tokens, list_type(pa.int32())), pa.array(starts, pa.int32())]


# --- the whole --------------------------------------------------------------------------------------------------------


def _hand_over(work_dir: Path, out_dir: Path, prefix: str, num_parts: int) -> int:
    """Give the finished files of a prefix to the artifact, by a second name where the file system can; returns their bytes."""
    num_bytes = 0
    for number in range(num_parts):
        name = f"{prefix}{number:05d}.parquet"
        try:
            os.link(work_dir / name, out_dir / name)
        except OSError:  # another file system
            shutil.copyfile(work_dir / name, out_dir / name)
        num_bytes += (out_dir / name).stat().st_size
    return num_bytes


def _facts(capturing: Capturing, sums: list[dict[str, Any]], num_bytes: Mapping[str, int], num_tokens: int) -> dict[str, Any]:
    """What a reader wants to know before training on the signals: size, and how much of the teacher they hold."""
    whole = max(num_tokens, 1)
    facts: dict[str, Any] = {
        "layout": capturing.layout,
        "bytes_a_token": {prefix.rstrip("-"): round(size / whole, 2) for prefix, size in num_bytes.items()},
        "headers": {prefix.rstrip("-"): header.model_dump(mode="json") for prefix, header in capturing.headers.items()},
    }
    for header in capturing.headers.values():
        for number, temperature in enumerate(header.temperatures):
            if header.kind == "topk":
                for name in ("kept_mass", "little_mass"):
                    mean = sum(part[name][number] for part in sums) / whole
                    facts.setdefault(f"{name}_by_temperature", {})[str(temperature)] = round(mean, 6)
            else:
                distinct = sum(part[f"distinct_t{temperature!r}"] for part in sums) / whole
                facts.setdefault("distinct_draws_by_temperature", {})[str(temperature)] = round(distinct, 3)
    return facts
