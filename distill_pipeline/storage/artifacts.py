"""The artifact store: immutable, content-addressed results with a manifest each.

Layout: ``<root>/<name>/<version>/{manifest.json, files}`` and ``<root>/<name>/latest.json``, where the name is for instance
``filtered_set/smollm2/verified`` and the version is the hash of the files' content. The manifest is written last, so a
folder without one is not an artifact. Equal content made in two ways is stored once and its manifest keeps both ways.

Decided: versions come from content alone, so that work that changes nothing makes nothing downstream stale. Given up: a
version does not tell how it was made; its manifest does.
"""

import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from distill_pipeline.errors import ConfigError, IntegrityError, MissingExtraError, MissingInputError
from distill_pipeline.hashing import file_sha256, files_version, version_of
from distill_pipeline.spec import NAME_PATTERN
from distill_pipeline.storage.files import text_of, user_cache, write_whole
from distill_pipeline.storage.places import Place, RemotePath, reaching

MANIFEST = "manifest.json"
LATEST = "latest.json"


class FileEntry(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)
    path: str
    sha256: str
    bytes: int
    rows: int | None = None


class Making(BaseModel):
    """How an artifact was made: everything its content depends on, and what it cost."""

    model_config = ConfigDict(frozen=True)
    experiment: str
    spec: dict[str, Any]
    code_version: str
    inputs: dict[str, str]
    """Versions of the artifacts it was made from, by name; other inputs (source files, a model) have a name with a colon."""
    seed: int = 0
    created_at: str = ""
    wall_seconds: float = 0.0
    packages: dict[str, str] = {}

    @property
    def input_key(self) -> str:
        """What decides whether work can be skipped: code version, inputs and seed."""
        return version_of({"code": self.code_version, "inputs": self.inputs, "seed": self.seed})


class Ancestor(BaseModel):
    """One artifact that another was made from, at any distance: enough to tell its story without the store."""

    model_config = ConfigDict(frozen=True)
    name: str
    version: str
    spec: dict[str, Any]
    inputs: dict[str, str]
    counts: dict[str, int]
    teacher: dict[str, Any] | None = None


class Manifest(BaseModel):
    """What ``manifest.json`` holds."""

    model_config = ConfigDict(frozen=True)
    name: str
    version: str
    status: Literal["ok", "failed"] = "ok"
    reason: str | None = None
    made: Making
    also_made: list[Making] = []
    counts: dict[str, int] = {}
    facts: dict[str, Any] = {}
    files: list[FileEntry] = []
    lineage: list[Ancestor] = []
    """All ancestors, nearest first."""


@dataclass(frozen=True)
class Artifact:
    """A stored result: where it lies and what its manifest says. ``reused`` is true when no work was done for it now."""

    store: "ArtifactStore"
    manifest: Manifest
    reused: bool = False

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def as_ancestor(self) -> Ancestor:
        """What descendants record of it."""
        manifest = self.manifest
        return Ancestor(
            name=manifest.name, version=manifest.version, spec=manifest.made.spec, inputs=manifest.made.inputs,
            counts=manifest.counts, teacher=manifest.facts.get("teacher"),
        )  # fmt: skip

    @property
    def uri(self) -> str:
        """Where its files are."""
        return self.store.uri_of(self.name, self.version)

    def read_json(self, path: str) -> Any:
        """A JSON file of the artifact."""
        return json.loads(self.store.filesystem.cat_file(f"{self.uri}/{path}"))

    def batches(self, columns: list[str] | None = None, *, prefix: str = "part-", rows: int = 4096) -> Iterator[pa.RecordBatch]:
        """The rows of its Parquet files in order, at most ``rows`` at a time: memory does not grow with the artifact."""
        for entry in self.manifest.files:
            if entry.path.startswith(prefix) and entry.path.endswith(".parquet"):
                with self.store.filesystem.open(f"{self.uri}/{entry.path}", "rb") as file:
                    yield from pq.ParquetFile(file).iter_batches(batch_size=rows, columns=columns)

    def rows(self, columns: list[str] | None = None, *, prefix: str = "part-") -> Iterator[dict[str, Any]]:
        """The same rows as dictionaries, for where convenience beats speed."""
        for batch in self.batches(columns, prefix=prefix):
            yield from batch.to_pylist()

    def local_dir(self) -> Path:
        """A folder of this machine with the artifact's files; fetched once from a remote store."""
        return self.store.fetch(self)

    def verify(self) -> None:
        """Raises IntegrityError naming the first file whose content differs from the manifest."""
        for entry in self.manifest.files:
            path = self.local_dir() / entry.path
            if not path.is_file():
                raise IntegrityError(
                    f"{self.name} {self.version}: {entry.path} is missing. Restore it or make the artifact again."
                )
            if file_sha256(path) != entry.sha256:
                raise IntegrityError(
                    f"{self.name} {self.version}: {entry.path} differs from its manifest (sha256 {entry.sha256[:16]}...). "
                    f"Restore it, or remove {self.uri} and make the artifact again."
                )


class ArtifactStore:
    """All artifacts under one root, a folder or any fsspec URL. Its methods raise StorageError where that cannot be reached."""

    def __init__(self, root: str | Path) -> None:
        """
        Raises:
            MissingExtraError: the URL's filesystem needs a package that is not installed.
            ConfigError: no filesystem is known for the URL.
        """
        try:
            self.filesystem, path = fsspec.core.url_to_fs(str(root))
        except ImportError as err:
            raise MissingExtraError(f"the root {root} needs another package: {err}.") from err
        except ValueError as err:
            raise ConfigError(f"the root {root} is no folder and no URL that fsspec knows: {err}.") from err
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.root = path.rstrip("/")

    @property
    def address(self) -> str:
        """What opens the same store in another process: an absolute path, or a URL."""
        return str(Path(self.root).absolute()) if self.is_local else str(self.filesystem.unstrip_protocol(self.root))

    def uri_of(self, name: str, version: str = "") -> str:
        """The folder of an artifact. Raises ConfigError for a name that could leave the store."""
        parts = name.split("/")
        if not all(re.fullmatch(NAME_PATTERN, part) for part in parts):
            raise ConfigError(
                f"{name!r} is no artifact name: its parts have lower-case letters, digits and single underscores."
            )
        return "/".join([self.root, *parts, *([version] if version else [])])

    def versions(self, name: str) -> list[str]:
        """Versions of an artifact that were completely written."""
        folder = self.uri_of(name)
        with reaching(self._at(folder), "list"):
            self.filesystem.invalidate_cache(folder)
            found = self.filesystem.glob(f"{folder}/*/{MANIFEST}")
        return sorted(path.split("/")[-2] for path in found if re.fullmatch(r"[0-9a-f]{16}", path.split("/")[-2]))

    def open(self, name: str, version: str) -> Artifact:
        """One version. Raises MissingInputError when it is not there, IntegrityError when its manifest cannot be read."""
        path = f"{self.uri_of(name, version)}/{MANIFEST}"
        try:
            text = text_of(self._at(path))
            if text is None:
                raise MissingInputError(f"{name} has no version {version} under {self.root}.")
            return Artifact(self, Manifest.model_validate_json(text))
        except ValueError as err:
            raise IntegrityError(f"{path} cannot be read as a manifest: {err}. Remove {self.uri_of(name, version)}.") from err

    def latest(self, name: str) -> Artifact | None:
        """The version made or confirmed last, or None."""
        pointer = text_of(self._at(f"{self.uri_of(name)}/{LATEST}"))
        return None if pointer is None else self.open(name, json.loads(pointer)["version"])

    def find(self, name: str, input_key: str) -> Artifact | None:
        """The stored result of exactly these inputs and this code, or None; makes it the latest."""
        for version in self.versions(name):
            artifact = self.open(name, version)
            ways = [artifact.manifest.made, *artifact.manifest.also_made]
            if any(way.input_key == input_key for way in ways):
                self._point(name, version)
                return Artifact(self, artifact.manifest, reused=True)
        return None

    def require(self, name: str, code_version: str, command: str) -> Artifact:
        """The latest version made under these settings, as the input of another stage.

        Raises:
            MissingInputError: there is none, or only one made under other settings; the message gives the command.
            IntegrityError: its quality gate failed.
        """
        artifact = self.latest(name)
        if artifact is None:
            raise MissingInputError(f"{name} is not in {self.root} yet. Make it first: {command}")
        ways = [artifact.manifest.made, *artifact.manifest.also_made]
        if not any(way.code_version == code_version for way in ways):
            raise MissingInputError(
                f"{name} in {self.root} was made under other settings (code version {artifact.manifest.made.code_version}, "
                f"the experiment now says {code_version}). Make it again first: {command}"
            )
        if artifact.manifest.status == "failed":
            raise IntegrityError(f"{name} did not pass its gate: {artifact.manifest.reason}")
        return artifact

    @contextmanager
    def draft(self) -> Iterator[Path]:
        """A fresh local folder to write an artifact's files in; gone afterwards unless committed."""
        parent = Path(self.root, ".drafts") if self.is_local else Path(tempfile.gettempdir())
        folder = parent / f"draft-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def shared_folder(self, name: str) -> Place:
        """A folder under the root, wherever that is: one for all machines that have this root."""
        return self.local_folder(name) if self.is_local else self._at(self.root) / name

    def local_folder(self, *parts: str) -> Path:
        """A folder of this machine alone: under the root, or in the user's cache for a remote one."""
        folder = (Path(self.root) if self.is_local else user_cache() / version_of(self.root)).joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def work_dir(self, name: str, input_key: str) -> Path:
        """A local folder that survives crashes, for the checkpoints of unfinished work on exactly these inputs."""
        return self.local_folder(".work", name.replace("/", "__"), input_key)

    def clear_work(self, name: str, input_key: str) -> None:
        """Remove what :meth:`work_dir` kept, once the work is committed."""
        shutil.rmtree(self.work_dir(name, input_key), ignore_errors=True)

    def commit(
        self,
        folder: Path,
        name: str,
        made: Making,
        *,
        counts: Mapping[str, int],
        facts: Mapping[str, Any],
        status: Literal["ok", "failed"] = "ok",
        reason: str | None = None,
        inputs: Iterable[Artifact] = (),
        unhashed: frozenset[str] = frozenset(),
    ) -> Artifact:
        """Make a draft's files an artifact and its latest version.

        Args:
            inputs: the artifacts it was made from; their ancestors become its own.
            unhashed: files that do not count for the version (renderings whose bytes carry times), still listed with hashes.
        """
        entries = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        version = files_version({e.path: e.sha256 for e in entries if e.path not in unhashed})
        made = made.model_copy(update={"created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
        target = self.uri_of(name, version)
        earlier = self.open(name, version).manifest if self.filesystem.exists(f"{target}/{MANIFEST}") else None
        also = [] if earlier is None else [w for w in (earlier.made, *earlier.also_made) if w.input_key != made.input_key]
        manifest = Manifest(
            name=name, version=version, status=status, reason=reason, made=made, also_made=also, counts=dict(counts),
            facts=dict(facts), files=entries, lineage=_lineage(inputs),
        )  # fmt: skip
        if earlier is None or unhashed:
            self._place(folder, target)
        self._write(f"{target}/{MANIFEST}", manifest.model_dump_json(indent=1))
        self._point(name, version)
        return Artifact(self, manifest)

    def retell(self, artifact: Artifact, folder: Path, facts: Mapping[str, Any], *, inputs: Iterable[Artifact]) -> Artifact:
        """Replace what is told of an artifact: its facts, and the files in ``folder``, which must not count for its version."""
        told = {entry.path: entry for entry in (_entry(folder, path) for path in folder.rglob("*") if path.is_file())}
        files = {entry.path: entry for entry in artifact.manifest.files} | told
        changed = {"facts": dict(facts), "files": [files[path] for path in sorted(files)], "lineage": _lineage(inputs)}
        manifest = artifact.manifest.model_copy(update=changed)
        target = self.uri_of(artifact.name, artifact.version)
        self._place(folder, target)
        self._write(f"{target}/{MANIFEST}", manifest.model_dump_json(indent=1))
        return Artifact(self, manifest, reused=True)

    def fetch(self, artifact: Artifact) -> Path:
        """See :meth:`Artifact.local_dir`."""
        if self.is_local:
            return Path(artifact.uri)
        folder = self.work_dir(artifact.name, artifact.version)
        if not (folder / MANIFEST).exists():
            with reaching(self._at(artifact.uri), "read"):
                self.filesystem.get(f"{artifact.uri}/", f"{folder}/", recursive=True)
        return folder

    def _place(self, folder: Path, target: str) -> None:
        """Move a draft's files to their place; leftovers of a crash there are replaced."""
        if self.is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            if Path(target).exists():
                shutil.copytree(folder, target, dirs_exist_ok=True)
            else:
                folder.rename(target)
        else:
            with reaching(self._at(target), "write"):
                self.filesystem.put(f"{folder}/", f"{target}/", recursive=True)

    def _point(self, name: str, version: str) -> None:
        self._write(f"{self.uri_of(name)}/{LATEST}", json.dumps({"version": version}))

    def _write(self, path: str, text: str) -> None:
        """Replace a small file; readers see the old or the new one, never half of it."""
        write_whole(self._at(path), text)

    def _at(self, path: str) -> Place:
        return Path(path) if self.is_local else RemotePath(self.filesystem, path)


def _lineage(inputs: Iterable[Artifact]) -> list[Ancestor]:
    """The inputs, then their ancestors, each once."""
    inputs = list(inputs)
    found = [artifact.as_ancestor for artifact in inputs]
    for artifact in inputs:
        found += artifact.manifest.lineage
    return list({(ancestor.name, ancestor.version): ancestor for ancestor in reversed(found)}.values())[::-1]


def _entry(folder: Path, path: Path) -> FileEntry:
    rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    return FileEntry(path=str(path.relative_to(folder)), sha256=file_sha256(path), bytes=path.stat().st_size, rows=rows)
