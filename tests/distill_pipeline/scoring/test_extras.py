"""A scorer is given the prompt's other columns and its last user message where it has parameters for them."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from distill_pipeline.errors import ConfigError, MissingExtraError
from distill_pipeline.scoring import score_answers
from distill_pipeline.scoring.generated_tasks import require_reasoning_gym
from distill_pipeline.scoring.registry import resolve_scorer, scorer_fault
from distill_pipeline.scoring.spec import ScorerSpec

MODULE = """
def both(reference, answer, metadata, prompt):
    return (1.0, f"{metadata} {prompt}")

def keyword(reference, answer, *, metadata):
    return metadata.get("level") == 3

def plain(reference, answer):
    return 1.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "scorers_with_extras.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return "scorers_with_extras"


def test_metadata_and_prompt_reach_the_functions_that_ask_for_them(module: str) -> None:
    row = {"answer": "a", "metadata": {"level": 3}, "prompt": "why?"}
    assert score_answers(f"{module}:both", [row, {"answer": "a"}])[0].detail == "{'level': 3} why?"
    assert score_answers(f"{module}:both", [{"answer": "a"}])[0].detail == "{} None"
    assert [v.score for v in score_answers(f"{module}:keyword", [row, {"answer": "a"}])] == [1.0, 0.0]
    assert score_answers(f"{module}:plain", [row])[0].score == 1.0


def test_a_schema_in_a_file_is_part_of_the_scorers_version(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    spec = ScorerSpec(kind="json_schema", options={"schema": str(file)})
    file.write_text(json.dumps({"type": "integer"}))
    before = resolve_scorer(spec)
    assert [v.score for v in score_answers("json_schema", [{"answer": "1"}, {"answer": '"1"'}], schema=str(file))] == [1.0, 0.0]
    file.write_text(json.dumps({"type": "string"}))
    assert resolve_scorer(spec).version != before.version


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("json_schema", {"schema": {"type": "nope"}}, "cannot use the schema"),
        ("json_schema", {"schema": {"$ref": "file:///etc/hostname"}}, "only to parts of itself"),
        ("json_schema", {"schema": "nowhere.json"}, "cannot read the schema"),
        ("json_schema", {"schema": 3}, "cannot use 3 as schema"),
        ("python_tests", {"cpu_seconds": 0}, "cpu_seconds above 0"),
        ("python_tests", {"isolation": "none"}, "does not take the option 'isolation'"),
        ("reasoning_gym", {"threshold": 2}, r"threshold in \(0, 1\]"),
    ],
)
def test_faults_are_found_before_anything_runs(kind: str, options: dict[str, object], fault: str) -> None:
    found = scorer_fault(kind, options)
    assert found is not None
    with pytest.raises(ConfigError, match=fault):
        resolve_scorer(ScorerSpec(kind=kind, options=options))


@pytest.mark.parametrize(
    ("kind", "module", "extra"),
    [("math", "math_verify", "scorers"), ("json_schema", "jsonschema_rs", "scorers")],
)
def test_a_missing_package_is_named_with_its_install_command(
    kind: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('no module of that name')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match=rf"{kind} needs the package .*pip install 'distill-pipeline\[{extra}\]'"):
        score_answers(kind, [{"reference": "1", "answer": "1"}])


def test_an_experiment_whose_schema_cannot_be_checked_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema_rs", None)
    with pytest.raises(MissingExtraError, match=r"needs the package jsonschema-rs .*pip install 'distill-pipeline\[scorers\]'"):
        scorer_fault("json_schema", {"schema": {"type": "integer"}})


def test_generated_tasks_name_the_package_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"package reasoning-gym.*pip install 'distill-pipeline\[reasoning-gym\]'"):
        require_reasoning_gym()
