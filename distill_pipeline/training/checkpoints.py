"""Checkpoints of a running training: everything needed to go on as if nothing had happened.

A checkpoint is a folder ``step-00000012`` with ``model.safetensors``, ``optimizer.safetensors``, ``random.safetensors``, in a
stage that may stop early ``best.safetensors`` (its best weights so far), and
``state.json``, which holds the data position, the curve so far and the SHA-256 of the others. It is written under another name,
synced and renamed, so that it is whole or absent; one whose hashes do not fit is skipped with a word. Nothing is pickled.
The last two are kept, also where the disk is too full for a third. A checkpoint of other data or settings is not used: its
run key differs. It holds whole tensors, however many processes train: the first of them writes, all of them read, and another
number of them may go on.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.outcome import Progress
from distill_pipeline.storage.files import sync
from distill_pipeline.training.parallel import ALONE, Processes, is_parted, parted_like, whole_tensors

KEPT = 2
STATE = "state.json"
BEST = "best.safetensors"
PREFIX = "step-"
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. ``state`` is what the trainer gave to ``save_checkpoint``."""

    folder: Path
    state: dict[str, Any]

    def restore(self, model: Any, optimizer: torch.optim.Optimizer | None) -> None:
        """Put weights, optimizer state and random state back, bit for bit."""
        device = "cpu" if is_parted(model.parameters()) else str(model.device)
        put_tensors(model, load_file(self.folder / "model.safetensors", device=device))
        if optimizer is not None:
            _load_optimizer(optimizer, load_file(self.folder / "optimizer.safetensors", device=device))
        random = load_file(self.folder / "random.safetensors")
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and torch.cuda.is_available():
            torch.cuda.set_rng_state(random["cuda"])

    def best_tensors(self) -> dict[str, Tensor] | None:
        """What was given to ``save_checkpoint`` as ``best``."""
        return load_file(self.folder / BEST) if (self.folder / BEST).exists() else None


def save_checkpoint(
    folder: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    best: Mapping[str, Tensor] | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write the checkpoint of ``step`` (over all stages) below ``folder`` and drop older ones; returns its folder.

    Raises:
        TrainingError: the disk is full or fails; older checkpoints are untouched.
    """
    final, temporary = folder / f"{PREFIX}{step:08d}", folder / f"{TEMPORARY}{step:08d}-{os.getpid()}"
    files = {
        "model.safetensors": whole_tensors(model_tensors(model), keep=processes.is_first),
        "optimizer.safetensors": whole_tensors(optimizer_tensors(optimizer), keep=processes.is_first),
        "random.safetensors": _random_state(model),
    }
    if best is not None:
        files[BEST] = dict(best)
    if not processes.is_first:
        return final
    for torn in folder.glob(f"{TEMPORARY}*"):  # of a run that was killed while it wrote
        shutil.rmtree(torn, ignore_errors=True)
    with written_or_removed(temporary, f"the checkpoint of step {step}", folder):
        temporary.mkdir(parents=True)
        _write_files(temporary, files, state)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        sync(folder)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


@contextmanager
def written_or_removed(target: Path, what: str, checkpoints: Path) -> Iterator[None]:
    """What is written inside to ``target``, a folder, is gone again if the disk fails, and the error says what remains.

    Raises:
        TrainingError: from the error of the disk.
    """
    try:
        yield
    except (OSError, SafetensorError) as err:
        shutil.rmtree(target, ignore_errors=True)
        kept = _folders(checkpoints)
        remains = f"The run goes on from {kept[-1]} when it is started again" if kept else "No checkpoint was written before"
        free = shutil.disk_usage(next(path for path in target.parents if path.exists())).free
        raise TrainingError(
            f"{what} could not be written to {target.parent}: {err} ({free:,} bytes are free). {remains}. Make room first."
        ) from err


def _random_state(model: Any) -> dict[str, Tensor]:
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and model.device.type == "cuda":
        random["cuda"] = torch.cuda.get_rng_state()
    return random


def _write_files(folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    hashes = {}
    for name, tensors in files.items():
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, folder / name)
        sync(folder / name)
        hashes[name] = file_sha256(folder / name)
    (folder / STATE).write_text(json.dumps({"files": hashes, "state": dict(state)}), encoding="utf-8")
    sync(folder / STATE)
    sync(folder)


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
    """What training changes, by name: parameters that are trained (tied ones once) and saved buffers."""
    saved = set(model.state_dict())
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad} | buffers


def put_tensors(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy into a model what :func:`model_tensors` gave of it, or of one like it."""
    with torch.no_grad():
        for name, tensor in model_tensors(model).items():
            tensor.copy_(parted_like(tensors[name], tensor))


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
