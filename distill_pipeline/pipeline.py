"""Makes the artifacts of an experiment, one node at a time, and never the same one twice.

``Pipeline.make`` finds a node's inputs in the store, skips work whose inputs, code and seed match a stored manifest, runs
the stage otherwise and commits what it wrote. It is the one way to make an artifact: the orchestrator's assets, the command
line and a notebook all call it. It makes no inputs on the way: what runs before what is the orchestrator's business.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from distill_pipeline.errors import ConfigError, EmptyResultError
from distill_pipeline.experiment import Experiment, load_experiment
from distill_pipeline.launching import Launch, train_apart
from distill_pipeline.nodes import STAGE_COMMANDS, Node, Stage, experiment_nodes
from distill_pipeline.outcome import Progress
from distill_pipeline.runners import EXTERNAL_INPUTS, RUNNERS, UNHASHED_FILES, told_anew
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore, Making
from distill_pipeline.work import Work

if TYPE_CHECKING:
    from distill_pipeline.training.parallel import Processes

TRAINED: frozenset[Stage] = frozenset({"corrected_teacher", "student_checkpoint"})
"""Stages that train a model, which processes of their own can do."""

RECORDED_PACKAGES = ("distill-pipeline", "torch", "transformers", "tokenizers", "pyarrow", "numpy", "lm-eval")


@dataclass(frozen=True)
class Pipeline:
    """An experiment, the store it fills, and the devices it may use.

    Args:
        teacher_device, student_device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: takes one line of news at a time.
        force: do the work even where a stored manifest matches.
        launch: start processes of their own that train models; None trains them here.
        processes: those that train here together; None where this one is alone.
    """

    experiment: Experiment
    store: ArtifactStore
    teacher_device: str = "auto"
    student_device: str = "auto"
    progress: Progress = print
    force: bool = False
    launch: Launch | None = None
    processes: "Processes | None" = None

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """All nodes of the experiment by name."""
        return experiment_nodes(self.experiment)

    def node(self, name: str) -> Node:
        """One node. Raises ConfigError that lists the known ones."""
        if name not in self.nodes:
            raise ConfigError(f"{self.experiment.name} has no {name}; it has: {', '.join(self.nodes)}")
        return self.nodes[name]

    def input_of(self, name: str) -> Artifact:
        """A stored artifact made under this experiment's settings, for use as an input. Raises MissingInputError."""
        node = self.node(name)
        return self.store.require(name, node.code_version, node.command)

    def make(self, name: str) -> Artifact:
        """Make an artifact, or find that the store has it (then ``reused`` is true).

        Raises:
            MissingInputError: an input was not made yet, or under other settings; the message says how to make it.
            ConfigError: a filter names a domain that no prompt is in; found before a teacher is asked.
            EmptyResultError: the artifact did not pass its gate. Its rows are stored, and later stages refuse it.
        """
        work = self._work(name)
        making = self.making(work)
        found = None if self.force else self.store.find(name, making.input_key)
        if found is not None:
            found = told_anew(work, found)
            self.progress(f"{name} {found.version}: nothing to do, its manifest matches")
        artifact = found or (self._apart(work, making) if self._trains_apart(work.node) else self._run(work, making))
        if artifact.manifest.status == "failed":
            raise EmptyResultError(f"{artifact.manifest.reason} (stored as {artifact.uri})")
        return artifact

    def train_along(self, name: str) -> None:
        """Train a model as one of several processes of which another makes the artifact; stores nothing.

        Raises:
            What the first process raises in :meth:`make`.
        """
        work = self._work(name)
        with tempfile.TemporaryDirectory() as folder:
            RUNNERS[work.node.stage](work, Path(folder), self.making(work).input_key)

    def _work(self, name: str) -> Work:
        node = self.node(name)
        inputs = {needed: self.input_of(needed) for needed in node.inputs}
        if "prompt_pool" in inputs:
            self.experiment.require_domains(inputs["prompt_pool"].manifest.facts["domains"])
        return Work(
            self.experiment, self.store, node, inputs, self.teacher_device, self.student_device, self.progress, self.force,
            self.processes,
        )  # fmt: skip

    def making(self, work: Work) -> Making:
        """Everything a node's content depends on: what decides whether work can be skipped."""
        versions = {name: artifact.version for name, artifact in work.inputs.items()}
        return Making(
            experiment=self.experiment.name, spec=work.node.spec, code_version=work.node.code_version,
            inputs=versions | EXTERNAL_INPUTS[work.node.stage](work), seed=self.experiment.seed,
        )  # fmt: skip

    def _trains_apart(self, node: Node) -> bool:
        return self.launch is not None and node.stage in TRAINED

    def _apart(self, work: Work, making: Making) -> Artifact:
        """Have processes of their own train a node's model, and find it in the store."""
        assert self.launch is not None
        train_apart(
            self.launch, self.experiment, work.node.target, command=STAGE_COMMANDS[work.node.stage], root=self.store.address,
            device=self.student_device, force=self.force, progress=self.progress,
        )  # fmt: skip
        made = self.store.find(work.node.name, making.input_key)
        if made is None:
            raise ConfigError(f"{self.experiment.file} changed while it was read twice: {work.node.name} was trained under "
                              "other settings than this process knows. Start again.")  # fmt: skip
        return replace(made, reused=False)

    def _run(self, work: Work, making: Making) -> Artifact:
        """Do a node's work in a draft folder and commit it."""
        name = work.node.name
        started = time.monotonic()
        with self.store.draft() as folder:
            outcome = RUNNERS[work.node.stage](work, folder, making.input_key)
            making = making.model_copy(
                update={"wall_seconds": round(time.monotonic() - started, 3), "packages": recorded_packages()}
            )
            artifact = self.store.commit(
                folder, name, making, counts=outcome.counts, facts=outcome.facts,
                status="failed" if outcome.failed_gate else "ok", reason=outcome.failed_gate,
                inputs=work.inputs.values(), unhashed=UNHASHED_FILES,
            )  # fmt: skip
        self.store.clear_work(name, making.input_key)
        self.progress(f"{name} {artifact.version}: made in {making.wall_seconds:.1f} s")
        return artifact


def recorded_packages() -> dict[str, str]:
    """Versions of the packages that decide results, for manifests."""
    found = {}
    for package in RECORDED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def open_pipeline(experiment_path: str | Path, root: str | Path, **options: object) -> Pipeline:
    """A pipeline from the paths of an experiment file and of a store; options as of :class:`Pipeline`."""
    return Pipeline(load_experiment(experiment_path), ArtifactStore(root), **options)  # type: ignore[arg-type]
