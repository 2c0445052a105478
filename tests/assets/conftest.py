"""A scripted pipeline: the real store, nodes and skipping, with rows that are written down instead of made by models."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assets.definitions import build_definitions
from distill_pipeline.errors import DistillError, EmptyResultError
from distill_pipeline.experiment import Experiment, load_experiment
from distill_pipeline.nodes import Node, experiment_nodes
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA, VERDICT_SCHEMA
from distill_pipeline.report.build import build_student_report
from distill_pipeline.report.comparison import build_comparison
from distill_pipeline.storage.artifacts import Artifact, ArtifactStore, Making

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTILE = "<script>alert(1)</script> | `x` [a](javascript:1) ![b](http://c)"
"""What a model may say; no page may interpret it."""


@dataclass
class Script:
    """What the scripted stages count, and what they refuse. Tests change it."""

    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    salt: dict[str, str] = field(default_factory=dict)
    """Changes a stage's content, and so its version."""
    failed_gate: dict[str, str] = field(default_factory=dict)
    errors: dict[str, DistillError] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    """Every node that was worked on, in order; nodes that were skipped are not in it."""
    num_right: dict[str, int] = field(default_factory=lambda: {"student": 6, "teacher": 8, "untrained": 1})
    """Of ten documents, by role."""
    devices: dict[str, tuple[str, str]] = field(default_factory=dict)
    launches: dict[str, Any] = field(default_factory=dict)


PROMPT = {
    "prompt_id": "p1", "messages": [{"role": "user", "content": HOSTILE}], "reference": "x", "domain": "d", "source": "s",
    "license": "cc0-1.0", "split": "train", "metadata": "{}",
}  # fmt: skip
COMPLETION = {
    "completion_id": "c1", "prompt_id": "p1", "teacher": "smollm2", "sample_index": 0, "reasoning": None, "answer": HOSTILE,
    "raw_text": HOSTILE, "finish_reason": "stop", "error": None, "prompt_tokens": 3, "completion_tokens": 4, "logprob": None,
    "request_key": "r1",
}  # fmt: skip
SCORE = {"completion_id": "c1", "scorer": "contains_answer", "scorer_version": "1", "score": 1.0, "detail": HOSTILE}
VERDICT = COMPLETION | {"scores": [], "accepted": True, "reject_reason": None, "reject_reasons": [], "rank": 0}
ROWS: dict[str, tuple[pa.Schema, dict[str, Any]]] = {
    "prompt_pool": (PROMPT_SCHEMA, PROMPT), "teacher_outputs": (COMPLETION_SCHEMA, COMPLETION),
    "scored_outputs": (SCORE_SCHEMA, SCORE), "filtered_set": (VERDICT_SCHEMA, VERDICT),
}  # fmt: skip
TERMS = {
    "name": "smollm2",
    "model": "m",
    "license": "apache-2.0",
    "verdict": "allowed",
    "obligations": [],
    "accepted_because": None,
}
COUNTS = {
    "prompt_pool": {"seen": 1, "kept": 1},
    "teacher_outputs": {"expected": 1, "stopped": 1},
    "scored_outputs": {"completions": 1, "scored": 1},
    "filtered_set": {"completions": 1, "accepted": 1},
    "teacher_signals": {"completions": 1, "captured": 1},
    "student_checkpoint": {"completions": 1, "trained_completions": 1},
    "corrected_teacher": {"prompts": 4, "used": 1, "held_out": 1, "other_domain": 1, "without_reference": 1},
    "comparison": {"students": 3},
}
FACTS: dict[str, dict[str, Any]] = {
    "teacher_outputs": {"teacher": TERMS}, "filtered_set": {"teacher": TERMS},
    "teacher_signals": {"teacher": TERMS, "bytes_a_token": {"topk": 38.0}, "kept_mass_by_temperature": {"1.0": 0.97}},
    "corrected_teacher": {"teacher": TERMS, "final_loss": 1.5},
    "student_checkpoint": {"teachers": [TERMS], "teacher_sha256_before": "h", "teacher_sha256_after": "h"},
}  # fmt: skip


def scripted_pipeline(script: Script) -> type:
    """A class with the interface of ``distill_pipeline.pipeline.Pipeline`` that follows a script."""

    @dataclass(frozen=True)
    class ScriptedPipeline:
        experiment: Experiment
        store: ArtifactStore
        teacher_device: str = "auto"
        student_device: str = "auto"
        progress: Callable[[str], None] = print
        force: bool = False
        launch: Any = None

        def make(self, name: str) -> Artifact:
            node = experiment_nodes(self.experiment)[name]
            script.devices[name] = (self.teacher_device, self.student_device)
            script.launches[name] = self.launch
            if name in script.errors:
                raise script.errors[name]
            nodes = experiment_nodes(self.experiment)
            inputs = [self.store.require(i, nodes[i].code_version, nodes[i].command) for i in node.inputs]
            versions = {artifact.name: artifact.version for artifact in inputs} | {"salt:": script.salt.get(name, "")}
            making = Making(experiment="e", spec=node.spec, code_version=node.code_version, inputs=versions)
            artifact = (None if self.force else self.store.find(name, making.input_key)) or self._work(node, making, inputs)
            if artifact.manifest.status == "failed":
                raise EmptyResultError(f"{artifact.manifest.reason} (stored as {artifact.uri})")
            return artifact

        def _work(self, node: Node, making: Making, inputs: list[Artifact]) -> Artifact:
            script.made.append(node.name)
            gate = script.failed_gate.get(node.name)
            with self.store.draft() as folder:
                write_stage(folder, node, script.salt.get(node.name, ""), script)
                return self.store.commit(
                    folder, node.name, making, inputs=inputs, status="failed" if gate else "ok", reason=gate,
                    counts=script.counts.get(node.name, COUNTS.get(node.stage, {})),
                    facts=script.facts.get(node.name, FACTS.get(node.stage, {})),
                )  # fmt: skip

    return ScriptedPipeline


def write_stage(folder: Path, node: Node, salt: str, script: Script) -> None:
    """The files a stage leaves behind."""
    if node.stage in ROWS:
        schema, row = ROWS[node.stage]
        pq.write_table(pa.Table.from_pylist([row], schema=schema), folder / "part-00000.parquet")
    if node.stage in ("student_checkpoint", "corrected_teacher"):
        pq.write_table(pa.table({"step": [1, 2], "loss": [2.0, 1.5]}), folder / "curve.parquet")
    if node.stage == "eval_report":
        (folder / "report.json").write_text(json.dumps(student_report(node.student or "", script)))
    if node.stage == "comparison":
        reports = [student_report(name.split("/")[1], script) for name in node.inputs]
        (folder / "leaderboard.json").write_text(json.dumps(build_comparison(reports)))
    (folder / "marker.json").write_text(json.dumps({"node": node.name, "salt": salt}), encoding="utf-8")


def student_report(student: str, script: Script) -> dict[str, Any]:
    """A real report of scripted results."""
    return build_student_report(
        experiment="e", student=student, teacher="smollm2", filter_name="verified", method="sft",
        evaluations={role: evaluation(num_right) for role, num_right in script.num_right.items()},
        parameters={"student": 10, "teacher": 20},
    )  # fmt: skip


def evaluation(num_right: int) -> dict[str, Any]:
    """What ``evaluate_model`` returns for one task of ten documents."""
    samples = [
        {"task": "t", "doc_id": n, "prompt": HOSTILE, "target": "x", "answer": HOSTILE, "finish_reason": "stop",
         "metrics": {"acc": float(n < num_right)}}
        for n in range(10)
    ]  # fmt: skip
    return {
        "tasks": {"t": {"acc": {"value": num_right / 10, "stderr": 0.1, "n": 10, "higher_is_better": True}}},
        "subtasks": {}, "requested": ["t"], "primary": {"t": "acc"}, "samples": samples, "lm_eval_version": "0", "limit": None,
    }  # fmt: skip


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Every asset is made by the scripted pipeline, as this script says."""
    script = Script()
    monkeypatch.setattr("distill_pipeline.pipeline.Pipeline", scripted_pipeline(script))
    return script


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    """An empty store, which DISTILL_ROOT names."""
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path / "store"))
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def quickstart() -> Experiment:
    return load_experiment(REPOSITORY / "experiments" / "quickstart.yaml")


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def run_selection(selection: str, experiment: Experiment, instance: dg.DagsterInstance, **options: Any) -> Any:
    """Materialise a selection of an experiment's assets in this process."""
    definitions = build_definitions(experiment)
    return dg.materialize(
        list(definitions.assets or []), selection=selection, instance=instance, resources=definitions.resources,
        raise_on_error=False, **options,
    )  # fmt: skip


@pytest.fixture
def materialize(quickstart: Experiment, instance: dg.DagsterInstance, store: ArtifactStore) -> Callable[..., Any]:
    """Materialise a selection of the quickstart's assets into the store."""

    def run(selection: str, experiment: Experiment = quickstart, **options: Any) -> Any:
        return run_selection(selection, experiment, instance, **options)

    return run


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dg.DagsterInstance]:
    """An instance in which the whole scripted quickstart was materialised once."""
    experiment = load_experiment(REPOSITORY / "experiments" / "quickstart.yaml")
    with dg.DagsterInstance.ephemeral() as instance, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILL_ROOT", str(tmp_path_factory.mktemp("store")))
        patch.setattr("distill_pipeline.pipeline.Pipeline", scripted_pipeline(Script()))
        assert run_selection("*", experiment, instance).success
        yield instance
