"""What loading the definitions costs, and what a user sees when the experiment is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.loading import chosen_executor, chosen_experiment
from distill_pipeline.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ["torch", "transformers", "lm_eval", "matplotlib", "pandas", "datasets"]


def dagster(*words: str, cwd: Path = REPOSITORY, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", "dagster", *words]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_definitions_load_without_any_heavy_package():
    code = f"import assets.definitions, json, sys; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert json.loads(found.stdout) == []


def test_validate_accepts_the_quickstart(tmp_path):
    result = dagster("definitions", "validate")
    assert result.returncode == 0, result.stderr
    assert "Validation successful for code location distill_pipeline" in result.stderr + result.stdout


def test_validate_shows_every_fault_of_a_wrong_experiment(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    text = (REPOSITORY / "experiments" / "quickstart.yaml").read_text()
    wrong.write_text(text.replace("smollm2/verified", "smollm2/verifid").replace("min_score: 1.0", "min_score: 2.0"))
    result = dagster("definitions", "validate", DISTILL_EXPERIMENT=str(wrong))
    said = result.stderr + result.stdout
    assert result.returncode != 0
    assert "unknown filter 'verifid'; known: unfiltered, verified" in said
    assert "filters.verified.min_score" in said


def test_the_experiment_is_the_one_that_the_environment_names(monkeypatch, tmp_path):
    assert chosen_experiment().name == "quickstart"
    other = tmp_path / "other.yaml"
    other.write_text((REPOSITORY / "experiments" / "quickstart.yaml").read_text().replace("name: quickstart", "name: other"))
    monkeypatch.setenv("DISTILL_EXPERIMENT", str(other))
    assert chosen_experiment().name == "other"
    monkeypatch.setenv("DISTILL_EXPERIMENT", "experiments/none.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the experiment file .*experiments/none\.yaml"):
        chosen_experiment()


def test_the_executor_is_the_one_that_the_environment_names(monkeypatch):
    monkeypatch.delenv("DISTILL_EXECUTOR", raising=False)
    assert chosen_executor().name == "multiprocess_one_model_at_a_time"
    monkeypatch.setenv("DISTILL_EXECUTOR", "in_process")
    assert chosen_executor() is dg.in_process_executor
    monkeypatch.setenv("DISTILL_EXECUTOR", "threads")
    with pytest.raises(ValueError, match="DISTILL_EXECUTOR is 'threads'; it must be one of multiprocess, in_process"):
        chosen_executor()


@pytest.mark.parametrize("wrong", ["0", "two", "-1"])
def test_a_wrong_number_of_model_steps_is_refused(monkeypatch, wrong):
    monkeypatch.setenv("DISTILL_MODEL_STEPS", wrong)
    with pytest.raises(ValueError, match=f"DISTILL_MODEL_STEPS is '{wrong}'"):
        chosen_executor()
