"""Stored signals laid out for training: the numbers of any position at once, in any order, from flat files on the disk.

Parquet gives back whole row groups, training asks for single rows of a shuffled set. So the columns are unpacked once into
flat files beside the checkpoints and read through memory maps: memory does not grow with the set. A completion is found by
its id, and its token ids are compared with those that training rendered.

Axes: P positions, K stored tokens of the fullest position.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from distill_pipeline.errors import IntegrityError, SignalMismatchError
from distill_pipeline.signals.files import SignalHeader, Wanted, check_header, file_prefix, read_header
from distill_pipeline.signals.spec import SignalKind
from distill_pipeline.sparse_losses import SparseTargets, sampled_targets, topk_targets

Array = np.ndarray[Any, np.dtype[Any]]
Place = tuple[int, bytes]
"""A completion's first row, and a digest of the tokens it was captured with."""

READ_ROWS = 256


@dataclass(frozen=True)
class SignalSource:
    """A folder of signal files, its name in messages, and the identity of the teacher that wrote the completions.

    ``system`` is the system prompt they were captured under, where the student's conversations carry their own.
    """

    name: str
    folder: Path
    teacher: str
    system: str | None = None


@dataclass(frozen=True)
class StoredSignals:
    """Everything that a student's stages need of teachers that are not there."""

    tables: Mapping[tuple[SignalKind, float], "TopkTable | SampledTable"]
    places: dict[str, Place]

    def row(self, completion_id: str, prompt: Sequence[int], completion: Sequence[int]) -> int:
        """Where a completion's signals start.

        Raises:
            SignalMismatchError: there are none, or they were captured on other tokens.
        """
        found = self.places.get(completion_id)
        if found is None:
            raise SignalMismatchError(
                f"completion {completion_id} has no teacher signals. Capture them again, for these rows and this max_length."
            )
        if found[1] != digest([*prompt, *completion], len(prompt)):
            raise SignalMismatchError(
                f"completion {completion_id} has other tokens than when its teacher signals were captured. Capture them again."
            )
        return found[0]

    def targets(self, kind: SignalKind, kd_temperature: float, row_P: Array) -> SparseTargets:
        """What is stored in the given rows."""
        return self.tables[kind, kd_temperature].targets(row_P, kd_temperature)


def digest(token_ids: Sequence[int] | Array, start: int) -> bytes:
    """Eight bytes that tell a completion's tokens, prompt included, from others."""
    ids = np.asarray(token_ids, dtype=np.int32)
    return hashlib.blake2b(ids.tobytes() + start.to_bytes(8, "little"), digest_size=8).digest()


def open_signals(
    sources: Sequence[SignalSource], wanted: Sequence[Wanted], folder: Path, template_under: Callable[[str | None], str]
) -> StoredSignals:
    """Check signals against what is wanted and lay them out in ``folder``.

    Args:
        wanted: what the stages ask for; each kind and temperature once.
        template_under: from a source's own system prompt to what its files must say of the template.
    Raises:
        SignalMismatchError: a file is missing, or says that it holds something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables: dict[tuple[SignalKind, float], TopkTable | SampledTable] = {}
    places: dict[str, Place] | None = None
    for want in wanted:
        kind, temperature = want.kind, want.kd_temperature
        files = [file for source in sources for file in _checked_files(source, want, template_under)]
        table = _TABLES[kind]
        columns = {name: folder / f"{kind}-t{temperature!r}-{name}.bin" for name in table.COLUMNS}
        found = _unpack(files, columns)
        if places is not None and places != found:
            raise IntegrityError("files of one capture hold different completions. Capture the teacher signals again.")
        places = found
        tables[kind, temperature] = table(columns, files[0][1])
    return StoredSignals(tables, places or {})


def _checked_files(
    source: SignalSource, want: Wanted, template_under: Callable[[str | None], str]
) -> list[tuple[Path, SignalHeader]]:
    if source.system is not None:
        want = replace(want, template_sha256=template_under(source.system))
    prefix = file_prefix(want.kind, want.kd_temperature)
    files = [(path, read_header(path)) for path in sorted(source.folder.glob(f"{prefix}*.parquet"))]
    if not files:
        other = sorted(source.folder.glob(f"{want.kind}-*.parquet"))
        stored = ", ".join(map(str, read_header(other[0]).temperatures)) if other else "none"
        raise SignalMismatchError(
            f"the teacher signals {source.name} hold no {want.kind} signals at kd_temperature {want.kd_temperature} "
            f"(stored: {stored}). Add it to signals.temperatures and capture them again."
        )
    for _, header in files:
        check_header(header, want, teacher=source.teacher, where=source.name)
    return files


def _unpack(files: Iterable[tuple[Path, SignalHeader]], columns: Mapping[str, Path]) -> dict[str, Place]:
    """Append every column's numbers to its flat file; returns where each completion starts."""
    places: dict[str, Place] = {}
    row = 0
    outputs = {name: path.open("wb") for name, path in columns.items()}
    try:
        for path, _ in files:
            for batch in pq.ParquetFile(path).iter_batches(batch_size=READ_ROWS):
                for name, output in outputs.items():
                    output.write(_flat(batch.column(name)).tobytes())
                row = _note_places(batch, row, places)
    finally:
        for output in outputs.values():
            output.close()
    return places


def _note_places(batch: pa.RecordBatch, row: int, places: dict[str, Place]) -> int:
    names, starts = batch.column("completion_id").to_pylist(), batch.column("completion_start").to_pylist()
    for name, start, ids in zip(names, starts, batch.column("token_ids"), strict=True):
        tokens = ids.values.to_numpy(zero_copy_only=False)
        places[name] = (row, digest(tokens, start))
        row += len(tokens) - start
    return row


def _flat(column: pa.ListArray) -> Array:
    flat: Array = column.flatten().to_numpy(zero_copy_only=False)
    return flat


def _map(path: Path, dtype: Any, *shape: int) -> Array:
    """A file as an array; an empty one cannot be mapped and needs not to be."""
    flat: Array = np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
    return flat.reshape(shape) if shape else flat


class TopkTable:
    """The likeliest tokens of every position."""

    COLUMNS = ("ids", "log_probs", "log_tail", "log_z")

    def __init__(self, columns: Mapping[str, Path], header: SignalHeader) -> None:
        assert header.k is not None
        self._temperatures = header.temperatures
        width, numbers = len(header.temperatures), np.dtype(header.dtype)
        self._ids = _map(columns["ids"], np.int32, -1, header.k)
        self._log_probs = _map(columns["log_probs"], numbers, -1, header.k)
        self._log_tail = _map(columns["log_tail"], numbers, -1, width)
        self._log_z = _map(columns["log_z"], np.float32, -1, width)

    def targets(self, row_P: Array, kd_temperature: float) -> SparseTargets:
        """The tokens of some rows at a stored temperature: log p_T = log p / T - log_z."""
        number = self._temperatures.index(kd_temperature)
        log_p_PK = self._log_probs[row_P].astype(np.float32) / kd_temperature - self._log_z[row_P, number][:, None]
        tail_P = self._log_tail[row_P, number].astype(np.float32)
        return topk_targets(
            torch.from_numpy(self._ids[row_P]), torch.from_numpy(log_p_PK), torch.from_numpy(tail_P),
            kd_temperature=kd_temperature,
        )  # fmt: skip


class SampledTable:
    """The tokens that were drawn at every position."""

    COLUMNS = ("num_ids", "ids", "counts", "entropy")

    def __init__(self, columns: Mapping[str, Path], header: SignalHeader) -> None:
        num_ids = _map(columns["num_ids"], np.uint8)
        ends = columns["num_ids"].with_suffix(".ends")
        self._num_ids, self._ends = num_ids, np.memmap(ends, dtype=np.int64, mode="w+", shape=(len(num_ids),))
        np.cumsum(num_ids, dtype=np.int64, out=self._ends)
        self._ids, self._counts = _map(columns["ids"], np.int32), _map(columns["counts"], np.uint8)
        self._entropy = _map(columns["entropy"], np.dtype(header.dtype))

    def targets(self, row_P: Array, kd_temperature: float) -> SparseTargets:
        """The draws of some rows; rows with fewer tokens repeat their first one, counted 0."""
        num_P = self._num_ids[row_P].astype(np.int64)
        place_K = np.arange(num_P.max(initial=1))
        is_there_PK = place_K < num_P[:, None]
        where_PK = (self._ends[row_P] - num_P)[:, None] + np.where(is_there_PK, place_K, 0)
        counts_PK = np.where(is_there_PK, self._counts[where_PK], 0)
        entropy_P = self._entropy[row_P].astype(np.float32)
        return sampled_targets(
            torch.from_numpy(self._ids[where_PK]), torch.from_numpy(counts_PK), torch.from_numpy(entropy_P),
            kd_temperature=kd_temperature,
        )  # fmt: skip


_TABLES: Mapping[SignalKind, type[TopkTable] | type[SampledTable]] = {"topk": TopkTable, "sampled": SampledTable}
