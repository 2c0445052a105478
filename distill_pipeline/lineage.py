"""Where a student comes from, read from its folder alone, and whether the files still are what they were.

A manifest carries all ancestors of its artifact, so the story is told without the store; hashes are checked for the
artifact itself and for every ancestor whose folder is still beside it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distill_pipeline.errors import IntegrityError, MissingInputError
from distill_pipeline.storage.artifacts import LATEST, MANIFEST, Ancestor, Artifact, ArtifactStore, Manifest


@dataclass(frozen=True)
class Lineage:
    """An artifact, its ancestors, and what became of their files: ``verified``, ``absent`` or the first difference."""

    artifact: Artifact
    ancestors: tuple[tuple[Ancestor, str], ...]
    own_state: str

    @property
    def first_difference(self) -> str | None:
        """What first differs from its manifest, nearest artifact first; None where nothing that is still there does."""
        states = (self.own_state, *(state for _, state in self.ancestors))
        return next((state for state in states if state not in {"verified", "absent"}), None)

    @property
    def is_intact(self) -> bool:
        """Nothing that is still there differs from its manifest."""
        return self.first_difference is None


def open_folder(folder: Path) -> Artifact:
    """The artifact in a folder: a version's folder, or the folder above, which points to its latest version.

    Raises:
        MissingInputError: no manifest there.
        IntegrityError: the manifest cannot be read.
    """
    pointer = folder / LATEST
    if not (folder / MANIFEST).is_file() and pointer.is_file():
        folder = folder / str(json.loads(pointer.read_text(encoding="utf-8"))["version"])
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise MissingInputError(f"{folder} holds no {MANIFEST}. Give a student's name or the folder of an artifact.") from err
    except ValueError as err:
        raise IntegrityError(f"{folder / MANIFEST} cannot be read: {err}") from err
    depth = len(manifest.name.split("/"))
    return Artifact(_Folder(folder, folder.resolve().parents[depth]), manifest)


class _Folder(ArtifactStore):
    """A store as seen from one artifact's folder, which may have been copied away from its siblings."""

    def __init__(self, folder: Path, root: Path) -> None:
        super().__init__(root)
        self._folder = folder

    def fetch(self, artifact: Artifact) -> Path:
        return self._folder


def trace(artifact: Artifact) -> Lineage:
    """Check an artifact and everything it was made from."""
    return Lineage(artifact, tuple(_checked_ancestors(artifact)), _state(artifact))


def _checked_ancestors(artifact: Artifact) -> Iterator[tuple[Ancestor, str]]:
    store = ArtifactStore(artifact.store.root) if isinstance(artifact.store, _Folder) else artifact.store
    for ancestor in artifact.manifest.lineage:
        try:
            state = _state(store.open(ancestor.name, ancestor.version))
        except MissingInputError:
            state = "absent"
        except IntegrityError as err:
            state = str(err)
        yield ancestor, state


def _state(artifact: Artifact) -> str:
    try:
        artifact.verify()
    except IntegrityError as err:
        return str(err)
    return "verified"


def lineage_lines(lineage: Lineage) -> Iterator[str]:
    """The story as text, nearest first: artifact, version, counts, licence and state."""
    yield _line(lineage.artifact.as_ancestor, lineage.own_state)
    for ancestor, state in lineage.ancestors:
        yield _line(ancestor, state)
    externals = {
        f"{name} {version}"
        for ancestor in (lineage.artifact.as_ancestor, *(a for a, _ in lineage.ancestors))
        for name, version in ancestor.inputs.items()
        if ":" in name
    }
    yield from (f"  from {external}" for external in sorted(externals))


def _line(ancestor: Ancestor, state: str) -> str:
    counts = ", ".join(f"{name} {number:,}" for name, number in ancestor.counts.items() if number)
    line = f"{ancestor.name}  {ancestor.version}  [{state}]\n    {counts or 'no counts'}"
    if ancestor.teacher:
        teacher = ancestor.teacher
        line += f"\n    teacher {teacher['model']} ({teacher['license'] or 'no licence'}: {teacher['verdict']})"
        line += "".join(f"\n    obligation: {duty}" for duty in teacher["obligations"])
        line += f"\n    accepted because: {teacher['accepted_because']}" if teacher.get("accepted_because") else ""
    return line
