import os
from pathlib import Path

import pytest

from distill_pipeline.launching import Launch
from distill_pipeline.storage.artifacts import ArtifactStore
from resources.artifact_store import REPOSITORY, ArtifactStoreResource
from resources.device import chosen_device
from resources.evaluator import EvaluatorResource
from resources.hub import HubResource
from resources.student_gpu import StudentGpuResource
from resources.teacher_gpu import TeacherGpuResource


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("DISTILL_")]:
        monkeypatch.delenv(name)


def test_a_relative_root_starts_at_the_repository_whatever_the_working_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert ArtifactStoreResource().location() == str(REPOSITORY / "data")
    monkeypatch.setenv("DISTILL_ROOT", "elsewhere")
    assert ArtifactStoreResource().location() == str(REPOSITORY / "elsewhere")


def test_the_root_of_the_configuration_beats_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTILL_ROOT", "/env")
    assert ArtifactStoreResource(root=str(tmp_path)).location() == str(tmp_path)
    assert ArtifactStoreResource(root="s3://bucket/x").location() == "s3://bucket/x"


def test_the_environment_is_read_when_the_store_is_opened(monkeypatch, tmp_path):
    resource = ArtifactStoreResource()
    monkeypatch.setenv("DISTILL_ROOT", str(tmp_path / "later"))
    store = resource.open()
    assert isinstance(store, ArtifactStore)
    assert Path(store.root) == tmp_path / "later"


@pytest.mark.parametrize(
    ("resource", "variable"), [(TeacherGpuResource, "DISTILL_TEACHER_DEVICE"), (StudentGpuResource, "DISTILL_STUDENT_DEVICE")]
)
def test_a_device_comes_from_configuration_else_environment_else_auto(monkeypatch, resource, variable):
    assert resource().device_name() == "auto"
    monkeypatch.setenv(variable, "cuda:3")
    assert resource().device_name() == "cuda:3"
    assert resource(device="cpu").device_name() == "cpu"


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:x", "cpu "])
def test_a_name_that_is_no_device_says_where_it_came_from(monkeypatch, wrong):
    with pytest.raises(ValueError, match="the resource's device is"):
        chosen_device(wrong, "X_DEVICE")
    monkeypatch.setenv("X_DEVICE", wrong)
    with pytest.raises(ValueError, match=r"the environment variable X_DEVICE is .* it must be auto"):
        chosen_device("", "X_DEVICE")


def test_training_starts_as_configuration_else_environment_says(monkeypatch):
    assert StudentGpuResource().launch() is None
    monkeypatch.setenv("DISTILL_TRAIN_PROCESSES", "1")
    assert StudentGpuResource().launch() == Launch(1)
    monkeypatch.setenv("DISTILL_TRAIN_PROCESSES", "4")
    assert StudentGpuResource().launch() == Launch(4)
    monkeypatch.setenv("DISTILL_TRAIN_SHARD", "1")
    assert StudentGpuResource().launch() == Launch(4, shard=True)
    assert StudentGpuResource(training="in_process").launch() is None
    assert StudentGpuResource(training="subprocess").launch() == Launch(1)
    assert StudentGpuResource(training="torchrun:2").launch() == Launch(2)
    assert StudentGpuResource(training="torchrun:2:shard").launch() == Launch(2, shard=True)


@pytest.mark.parametrize("wrong", ["torchrun", "torchrun:1", "torchrun:x", "torchrun:2:shards", "subprocess:2", "slurm"])
def test_a_way_of_training_that_means_nothing_lists_those_that_do(monkeypatch, wrong):
    with pytest.raises(ValueError, match=r"training is .* it must be in_process, subprocess, torchrun:N or torchrun:N:shard"):
        StudentGpuResource(training=wrong).launch()
    monkeypatch.setenv("DISTILL_TRAIN_PROCESSES", "many")
    with pytest.raises(ValueError, match=r"training is 'torchrun:many'.*DISTILL_TRAIN_PROCESSES, a number from 1"):
        StudentGpuResource().launch()
    monkeypatch.setenv("DISTILL_TRAIN_SHARD", "yes")
    with pytest.raises(ValueError, match="DISTILL_TRAIN_SHARD is 'yes'; it must be 0 or 1"):
        StudentGpuResource().launch()


def test_reports_are_measured_beside_the_students_unless_told_otherwise(monkeypatch):
    student = StudentGpuResource(device="cuda:0")
    assert EvaluatorResource().device_name(student) == "cuda:0"
    assert EvaluatorResource(device="cuda:1").device_name(student) == "cuda:1"
    monkeypatch.setenv("DISTILL_EVALUATOR_DEVICE", "cpu")
    assert EvaluatorResource().device_name(student) == "cpu"


def test_an_offline_hub_tells_every_client_and_takes_it_back(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://before")
    with HubResource(offline=True, endpoint="https://mirror").environment():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
        assert os.environ["HF_ENDPOINT"] == "https://mirror"
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_ENDPOINT"] == "https://before"


def test_a_hub_that_is_not_configured_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with HubResource().environment():
        assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_no_field_of_the_hub_holds_a_secret():
    assert set(HubResource.model_fields) == {"offline", "endpoint"}
