"""Checkpoints of a running training: everything needed to go on as if nothing had happened.

A checkpoint is a folder ``step-00000012`` with ``model.safetensors``, ``optimizer.safetensors``, ``random.safetensors`` and
``state.json``, which holds the data position, the curve so far and the SHA-256 of the three. It is written under another name,
synced and renamed, so that it is whole or absent; one whose hashes do not fit is skipped with a word. Nothing is pickled.
The last two are kept. A checkpoint of other data or settings is not used: its run key differs. It holds whole tensors, however
many processes train: the first of them writes, all read, and another number of them may go on.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_pipeline.hashing import file_sha256
from distill_pipeline.outcome import Progress
from distill_pipeline.storage.files import sync
from distill_pipeline.training.parallel import ALONE, Processes, is_parted, parted_like, whole_tensors

KEPT = 2
STATE = "state.json"
PREFIX = "step-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. ``state`` is what the trainer gave to ``save_checkpoint``."""

    folder: Path
    state: dict[str, Any]

    def restore(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Put weights, optimizer state and random state back, bit for bit."""
        own = model_tensors(model)
        device = "cpu" if is_parted(own.values()) else str(model.device)
        saved = load_file(self.folder / "model.safetensors", device=device)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(parted_like(saved[name], tensor))
        if optimizer is not None:
            _load_optimizer(optimizer, load_file(self.folder / "optimizer.safetensors", device=device))
        random = load_file(self.folder / "random.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])


def save_checkpoint(
    folder: Path, step: int, model: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any],
    processes: Processes = ALONE,
) -> Path:  # fmt: skip
    """Write the checkpoint of ``step`` (over all stages) below ``folder`` and drop older ones; returns its folder."""
    final, temporary = folder / f"{PREFIX}{step:08d}", folder / f".tmp-{step:08d}-{os.getpid()}"
    weights = whole_tensors(model_tensors(model), keep=processes.is_first)
    moments = whole_tensors(optimizer_tensors(optimizer), keep=processes.is_first)
    if not processes.is_first:
        return final
    for path in (temporary, final):
        shutil.rmtree(path, ignore_errors=True)
    temporary.mkdir(parents=True)
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and model.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    files = {"model.safetensors": weights, "optimizer.safetensors": moments, "random.safetensors": random}
    hashes = {}
    for name, tensors in files.items():
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, temporary / name)
        sync(temporary / name)
        hashes[name] = file_sha256(temporary / name)
    (temporary / STATE).write_text(json.dumps({"files": hashes, "state": dict(state)}), encoding="utf-8")
    sync(temporary / STATE)
    sync(temporary)
    os.replace(temporary, final)
    sync(folder)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path, run_key: str, progress: Progress) -> Checkpoint | None:
    """The newest whole checkpoint whose state has this ``run_key``; others are named and passed over."""
    for path in reversed(_folders(folder)):
        checkpoint = _read(path)
        if checkpoint is None:
            progress(f"checkpoint {path} is torn (files do not match their hashes): skipped")
        elif checkpoint.state.get("run_key") != run_key:
            progress(f"checkpoint {path} belongs to other data or settings: not used")
        else:
            return checkpoint
    return None


def remove_checkpoints(folder: Path) -> None:
    """Remove all checkpoints, whole or half written."""
    shutil.rmtree(folder, ignore_errors=True)


def model_tensors(model: Any) -> dict[str, Tensor]:
    """Parameters (tied ones once) and saved buffers by name."""
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors: ``<parameter number>.<name>``."""
    return {
        f"{index}.{name}": value
        for index, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    parameters = list(_parameters(optimizer))
    optimizer.state.clear()
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        optimizer.state[parameter][name] = parted_like(value, parameter)


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def _read(path: Path) -> Checkpoint | None:
    try:
        document = json.loads((path / STATE).read_text(encoding="utf-8"))
        whole = all(file_sha256(path / name) == sha256 for name, sha256 in document["files"].items())
        return Checkpoint(path, document["state"]) if whole and document["files"] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
