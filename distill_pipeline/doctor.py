"""What is wrong with this machine or this store, found before a long run finds it."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from distill_pipeline.errors import DistillError, StorageError
from distill_pipeline.storage.artifacts import MANIFEST, ArtifactStore
from distill_pipeline.storage.parts import part_files
from distill_pipeline.storage.places import RemotePath

MIN_FREE_BYTES = 5 * 2**30
PACKAGES = {"torch": "", "transformers": "", "pyarrow": "", "lm-eval": "", "dagster": "pip install 'distill-pipeline[dagster]'"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. Bad ones need the user's attention; the text says what to do."""

    what: str
    said: str
    is_bad: bool = False

    @property
    def mark(self) -> str:
        return "BAD " if self.is_bad else "ok  "


def examine(root: str, *, clean: bool = False) -> list[Finding]:
    """Everything worth knowing about this machine and the store at ``root``; ``clean`` removes leftovers of crashes."""
    return [*_packages(), *_machine(root), *_store(root, clean)]


def _packages() -> Iterator[Finding]:
    yield Finding("python", sys.version.split()[0], sys.version_info < (3, 11))
    for package, hint in PACKAGES.items():
        try:
            yield Finding(package, version(package))
        except PackageNotFoundError:
            yield Finding(package, f"not installed; {hint}" if hint else "not installed", is_bad=not hint)


def _machine(root: str) -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            yield Finding(
                f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            )
    else:
        yield Finding("cuda", "none; teacher and student run on the CPU")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(
        "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, {memory / 2**30:.1f} GiB memory"
    )
    if "://" not in root:
        folder = Path(root).resolve()
        while not folder.exists():
            folder = folder.parent
        free_bytes = shutil.disk_usage(folder).free
        said = f"{free_bytes / 2**30:.1f} GiB free at {folder}"
        yield Finding(
            "disk",
            said if free_bytes >= MIN_FREE_BYTES else f"{said}; a 135M student needs about 5 GiB",
            free_bytes < MIN_FREE_BYTES,
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in {"", "0"}
    yield Finding(
        "model hub", "HF_HUB_OFFLINE is set: only cached models are used" if offline else "asked when a model is not cached"
    )


def _store(root: str, clean: bool) -> Iterator[Finding]:
    store = ArtifactStore(root)
    if not store.is_local:
        try:
            yield from _shared(store)
        except StorageError as err:
            yield Finding("store", str(err), is_bad=True)
            return
    broken = 0
    manifests = store.filesystem.glob(f"{store.root}/**/{MANIFEST}") if store.filesystem.exists(store.root) else []
    for path in manifests:
        relative = path.removeprefix(f"{store.root}/").split("/")
        if relative[0].startswith("."):
            continue
        try:
            store.open("/".join(relative[:-2]), relative[-2]).verify()
        except DistillError as err:
            broken += 1
            yield Finding("artifact", str(err), is_bad=True)
    yield Finding("store", f"{len(manifests) - broken} artifacts under {store.root} verified")
    if store.is_local:
        yield from _leftovers(Path(store.root), clean)


def _shared(store: ArtifactStore) -> Iterator[Finding]:
    """What all machines with this root share. Raises StorageError where this one cannot list it, write or remove."""
    for name, what in (("generations", "answers"), ("scores", "kept scores")):
        folder = store.shared_folder(name)
        assert isinstance(folder, RemotePath), store.root
        trial = folder / ".doctor"
        trial.write_bytes(b"")
        trial.remove()
        families = [each for each in folder.glob("*") if each.name != "last"]
        parts = sum(len(part_files(each)) for each in families)
        said = f"{parts:,} parts of {len(families):,} families in {folder}, shared by all machines; this one can write there"
        yield Finding(what, f"{said}. Small parts stay: they are merged in local folders only")


def _leftovers(root: Path, clean: bool) -> Iterator[Finding]:
    """Drafts of processes that are gone, and checkpoints of work that never finished."""
    for draft in sorted(root.glob(".drafts/draft-*")):
        if process_exists(int(draft.name.split("-")[1])):
            continue
        if clean:
            shutil.rmtree(draft)
        yield Finding("leftover", f"{draft} of a process that is gone {'was removed' if clean else '; remove it with --clean'}")
    for work in sorted(root.glob(".work/*/*")):
        age = (time.time() - work.stat().st_mtime) / 86_400
        if clean:
            shutil.rmtree(work)
        what = "was removed" if clean else "continues when its stage runs again; --clean removes it"
        yield Finding("unfinished", f"{work.parent.name}, {age:.1f} days old, {what}")


def process_exists(pid: int) -> bool:
    """Whether this machine has a process of that number, of any user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
