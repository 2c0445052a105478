"""The files of teacher signals: Parquet, one row a completion, and a header that says what they can be compared with.

columns of every file
    ``completion_id``; ``token_ids`` of the prompt and the completion; ``completion_start``, the place of the completion's first
    token. Every other column holds, for one completion token after the other, what the teacher said before it saw that token.
``topk-*``
    ``ids`` and ``log_probs`` at temperature 1, k a token, likeliest first; for each temperature of the header, one after the
    other, ``log_tail`` (log of the probability outside the k: 1 minus the sum of rounded probabilities can be 0 or less) and
    ``log_z`` (log of the sum over the vocabulary of p ** (1 / temperature): 0 at temperature 1).
``sampled-t<temperature>-*``
    ``num_ids`` distinct tokens drawn at that temperature; their ``ids`` in rising order and ``counts``; ``entropy`` of the
    distribution that was drawn from, in nats.

The header is JSON under the key ``teacher_signals`` of the file's metadata: ``SignalHeader``.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from distill_pipeline.errors import IntegrityError, SignalMismatchError
from distill_pipeline.signals.spec import SignalKind
from distill_pipeline.storage.files import sync

HEADER = b"teacher_signals"


class SignalHeader(BaseModel):
    """What a file of signals says of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = 1
    kind: SignalKind
    teacher: str
    """Identity of the teacher's content; ``model`` and ``revision`` are what the experiment called it."""
    model: str
    revision: str | None
    tokenizer_sha256: str
    template_sha256: str
    """Of chat template, system prompt and end token."""
    vocab_size: int
    """The tokenizer's ids; padding columns of the head are cut."""
    engine: str
    engine_version: str
    model_dtype: str
    dtype: str
    temperatures: tuple[float, ...]
    k: int | None = None
    draws: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What training needs signals to be: its own tokens, and what its stages ask for."""

    kind: SignalKind
    tokenizer_sha256: str
    template_sha256: str
    vocab_size: int
    kd_temperature: float
    size: int
    """k, or draws."""


def file_prefix(kind: SignalKind, temperature: float) -> str:
    """How the names of the files begin that hold a kind of signals for a temperature."""
    return "topk-" if kind == "topk" else f"sampled-t{temperature!r}-"


def signal_schema(header: SignalHeader) -> pa.Schema:
    """Columns of a file, with its header as metadata."""
    numbers = pa.float16() if header.dtype == "float16" else pa.float32()
    own = {
        "topk": [("ids", pa.int32()), ("log_probs", numbers), ("log_tail", numbers), ("log_z", pa.float32())],
        "sampled": [("num_ids", pa.uint8()), ("ids", pa.int32()), ("counts", pa.uint8()), ("entropy", numbers)],
    }[header.kind]
    fields = [
        pa.field("completion_id", pa.string(), nullable=False), _list("token_ids", pa.int32()),
        pa.field("completion_start", pa.int32(), nullable=False), *(_list(name, kind) for name, kind in own),
    ]  # fmt: skip
    return pa.schema(fields, metadata={HEADER: header.model_dump_json().encode()})


def _list(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, list_type(kind), nullable=False)


def list_type(kind: pa.DataType) -> pa.DataType:
    """A list in which every element is there."""
    return pa.list_(pa.field("element", kind, nullable=False))


def write_signals(path: Path, table: pa.Table) -> None:
    """Write a file that is whole or absent, also after a crash."""
    temporary = path.with_name(f".tmp-{path.name}")
    split = [f"{name}.list.element" for name in ("ids", "log_probs", "log_tail", "entropy") if name in table.column_names]
    small = ["counts.list.element", "num_ids.list.element"]
    with temporary.open("wb") as file:
        pq.write_table(
            table, file, compression="zstd", compression_level=9, use_dictionary=small, write_statistics=False,
            column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        )  # fmt: skip
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def read_header(path: Path) -> SignalHeader:
    """What a file says of itself. Raises IntegrityError where it says nothing that can be read."""
    try:
        metadata: dict[bytes, Any] = pq.read_schema(path).metadata or {}
        return SignalHeader.model_validate_json(metadata[HEADER])
    except (OSError, pa.ArrowInvalid, KeyError, ValidationError) as err:
        raise IntegrityError(f"{path} cannot be read as teacher signals: {err}. Capture them again.") from err


def check_header(header: SignalHeader, wanted: Wanted, *, teacher: str, where: str) -> None:
    """Compare what is stored with what training needs.

    Args:
        teacher: the identity of the model that wrote the completions.
        where: the signals' name in messages.
    Raises:
        SignalMismatchError: they differ; the message gives both values of everything that does.
    """
    pairs = {
        "kind": (header.kind, wanted.kind),
        "teacher": (header.teacher, teacher),
        "tokenizer": (header.tokenizer_sha256, wanted.tokenizer_sha256),
        "chat template, system prompt or end token": (header.template_sha256, wanted.template_sha256),
        "vocabulary size": (header.vocab_size, wanted.vocab_size),
        "k" if wanted.kind == "topk" else "draws": (header.k if wanted.kind == "topk" else header.draws, wanted.size),
    }
    faults = [f"{name}: stored {stored}, wanted {own}" for name, (stored, own) in pairs.items() if stored != own]
    if wanted.kd_temperature not in header.temperatures:
        stored = ", ".join(map(str, header.temperatures))
        faults.append(f"kd_temperature {wanted.kd_temperature} was not stored, only {stored}; add it to signals.temperatures")
    if faults:
        raise SignalMismatchError(f"the teacher signals {where} do not fit: {'; '.join(faults)}. Capture them again.")
