"""One node to be made, with everything its stage may ask for: stored inputs, devices, models, evaluation documents."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import Node, corrected_name
from distill_pipeline.outcome import Progress
from distill_pipeline.scoring.registry import scorer_models
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore

if TYPE_CHECKING:
    from distill_pipeline.generation.opening import TeacherModel
    from distill_pipeline.models.resolve import ModelFolder
    from distill_pipeline.prompts.contamination import ContaminationIndex
    from distill_pipeline.training.parallel import Processes


@dataclass(frozen=True)
class Work:
    """One node to be made: its stored inputs and where to run it."""

    experiment: Experiment
    store: ArtifactStore
    node: Node
    inputs: Mapping[str, Artifact]
    teacher_device: str
    student_device: str
    progress: Progress
    force: bool = False
    processes: "Processes | None" = None
    """Those that train a student together, seen from this one; None where it is alone."""

    def model(self, reference: str, revision: str | None = None) -> "ModelFolder":
        """The local folder of a model the experiment names; fetched and converted once."""
        from distill_pipeline.models.resolve import resolve_model

        return resolve_model(
            reference, models_dir=self.store.local_folder("models"), base_dir=self.experiment.base_dir, revision=revision,
            progress=self.progress,
        )  # fmt: skip

    @property
    def teacher_name(self) -> str:
        """The node's teacher; for a student the one it imitates."""
        if self.node.student is not None:
            return self.experiment.teacher_of(self.node.student)
        assert self.node.teacher is not None, f"{self.node.name} has no teacher"
        return self.node.teacher

    def teacher_model(self) -> "ModelFolder | None":
        """The folder of the node's teacher; None for one that is only an API."""
        teacher = self.experiment.teachers[self.teacher_name]
        if teacher.engine == "openai":
            return self.model(teacher.weights) if teacher.weights else None
        return self._weights_here(self.teacher_name)

    def original_model(self) -> "ModelFolder":
        """The folder of the node's teacher as it is before its correction."""
        teacher = self.experiment.teachers[self.teacher_name]
        return self.model(teacher.model, teacher.revision)

    def correction_facts(self, name: str) -> dict[str, Any]:
        """What a corrected teacher's facts say instead: its original's revision, and what the correction did; else nothing."""
        if not self.experiment.corrects(name):
            return {}
        manifest = self.inputs[corrected_name(name)].manifest
        original = {key: manifest.facts["teacher"][key] for key in ("model", "revision", "identity")}
        losses = {key: manifest.facts[key] for key in ("untrained_loss", "initial_loss", "final_loss")}
        size = {"references": manifest.counts["used"], "steps": manifest.counts["steps"]}
        return {"revision": original["revision"], "correction": original | size | losses}

    def _weights_here(self, name: str, revision: str | None = None) -> "ModelFolder":
        """The folder of a teacher that runs here: its corrected weights, whose identity is their content, where it has any."""
        from distill_pipeline.models.resolve import ModelFolder

        teacher = self.experiment.teachers[name]
        if teacher.correction is None:
            return self.model(teacher.model, revision or teacher.revision)
        made = self.inputs[corrected_name(name)]
        declared = made.manifest.facts["teacher"]["declared_license"]
        return ModelFolder(made.local_dir(), f"{teacher.model} (corrected)", None, made.version, declared)

    def teacher_weights(self) -> "ModelFolder":
        """The folder of the node's teacher, for what looks into it. Raises ConfigError for one that is only an API."""
        folder = self.teacher_model()
        if folder is None:
            raise ConfigError(
                f"teacher {self.teacher_name} is only an API, and this needs its weights: set "
                f"teachers.{self.teacher_name}.weights to the same model as a Hub id or folder."
            )
        return folder

    def teacher_terms(self, name: str) -> dict[str, Any]:
        """The licence facts of a teacher, decided before its model is loaded or asked.

        Raises:
            LicenseError: see :func:`distill_pipeline.licenses.check_license`.
        """
        from distill_pipeline.licenses import check_license
        from distill_pipeline.models.resolve import declared_license

        teacher = self.experiment.teachers[name]
        urls = teacher.server.base_url if teacher.server is not None else ()
        stated = check_license(name, teacher.license, teacher.accept, base_urls=urls) if teacher.license else None
        model, revision = (teacher.model, teacher.revision) if teacher.server is None else (teacher.weights, None)
        if model is None:
            return stated or check_license(name, None, teacher.accept, base_urls=urls)
        declared = declared_license(
            model, models_dir=self.store.local_folder("models"), base_dir=self.experiment.base_dir, revision=revision,
            progress=self.progress,
        )  # fmt: skip
        return check_license(name, teacher.license, teacher.accept, declared=declared, base_urls=urls)

    def answering_model(self, name: str, revision: str | None = None) -> "TeacherModel":
        """A teacher as it answers: a folder, or a model at a server; ``revision`` goes before its own."""
        from distill_pipeline.generation.served import ServedModel

        teacher = self.experiment.teachers[name]
        if teacher.server is None:
            return self._weights_here(name, revision)
        counting = teacher.tokenizer or teacher.weights
        revision = revision or teacher.revision
        return ServedModel(teacher.model, revision, teacher.server, self.model(counting).path if counting else None)

    def scoring_models(self) -> "dict[tuple[str, str | None], TeacherModel]":
        """The models that the experiment's scorers ask: named as a teacher, or by a reference."""
        teachers, wanted = self.experiment.teachers, scorer_models(self.experiment.scorers)
        return {
            (name, revision): self.answering_model(name, revision) if name in teachers else self.model(name, revision)
            for name, revision in wanted
        }

    def input(self, prefix: str) -> Artifact:
        """The only input whose name begins so."""
        (found,) = (artifact for name, artifact in self.inputs.items() if name.split("/")[0] == prefix)
        return found


@lru_cache(maxsize=8)
def _documents(tasks: tuple[str, ...], include_path: str | None) -> tuple[tuple[str, str], ...]:
    from distill_pipeline.evaluation.tasks import evaluation_documents

    return tuple(evaluation_documents(tasks, include_path))


def evaluation_documents_of(experiment: Experiment) -> tuple[tuple[str, str], ...]:
    """(id, text) of every document of the experiment's evaluation tasks."""
    folder = experiment.evaluation.include_path
    return _documents(experiment.evaluation.tasks, experiment.resolve_path(folder) if folder else None)


def protected_documents(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """What training data must not resemble: evaluation documents and the items of the listed files."""
    from distill_pipeline.prompts.protected import protected_items

    rule = experiment.prompt_pool.decontaminate
    if rule.against == "evaluation":
        yield from evaluation_documents_of(experiment)
    for name in rule.files:
        yield from protected_items(experiment.resolve_path(name), name)


def protected_index(experiment: Experiment) -> "ContaminationIndex | None":
    from distill_pipeline.prompts.contamination import ContaminationIndex

    documents = list(protected_documents(experiment))
    return ContaminationIndex.build(documents) if documents else None
