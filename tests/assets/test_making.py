from typing import Any

import dagster as dg

from assets.making import library_failure
from assets.naming import asset_key
from distill_pipeline.errors import ConfigError, LicenseError
from distill_pipeline.launching import Launch
from distill_pipeline.nodes import experiment_nodes

FILTERED = "filtered_set/smollm2/verified"
UPSTREAM_OF_FILTERED = '+key:"filtered_set__smollm2__verified"'


def last(instance: dg.DagsterInstance, name: str) -> dg.AssetMaterialization:
    event = instance.get_latest_materialization_event(asset_key(name))
    assert event is not None
    assert event.asset_materialization is not None
    return event.asset_materialization


def test_an_asset_is_materialised_with_the_artifacts_content_hash_as_its_data_version(materialize, script, store, instance):
    assert materialize("prompt_pool").success
    artifact = store.latest("prompt_pool")
    assert last(instance, "prompt_pool").tags["dagster/data_version"] == artifact.version


def test_a_second_run_does_no_work_and_says_so(materialize, script, instance):
    assert materialize(UPSTREAM_OF_FILTERED).success
    worked = list(script.made)
    assert materialize(UPSTREAM_OF_FILTERED).success
    assert script.made == worked
    metadata = last(instance, FILTERED).metadata
    assert metadata["reused"].value is True
    assert metadata["news"].value == "nothing to do: the manifest matches"


def test_force_does_the_work_again_through_run_config(materialize, script):
    assert materialize("prompt_pool").success
    assert materialize("prompt_pool", run_config={"ops": {"prompt_pool": {"config": {"force": True}}}}).success
    assert script.made == ["prompt_pool", "prompt_pool"]


def test_an_error_of_the_library_is_not_retried(quickstart):
    node = experiment_nodes(quickstart)["prompt_pool"]
    assert library_failure(ConfigError("wrong"), node).allow_retries is False


def test_an_error_of_the_library_becomes_a_failure_with_the_same_text(materialize, script):
    text = "teacher smollm2: licence llama2 forbids training on its outputs."
    script.errors["teacher_outputs/smollm2"] = LicenseError(text)
    result = materialize('key:"prompt_pool" or key:"teacher_outputs__smollm2"')
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    details: Any = failure.step_failure_data
    assert details.user_failure_data.description == text
    assert details.user_failure_data.metadata["error"].value == "LicenseError"


def test_a_missing_input_says_which_command_makes_it(materialize, script):
    result = materialize('key:"scored_outputs__smollm2"')
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "Make it first: distill prompts EXPERIMENT" in failure.step_failure_data.user_failure_data.description


def test_how_students_are_trained_reaches_their_asset_and_no_other(materialize, script, monkeypatch):
    monkeypatch.setenv("DISTILL_TRAIN_PROCESSES", "2")
    materialize('+key:"student_checkpoint__kl"')
    assert script.launches["student_checkpoint/kl"] == Launch(2)
    assert script.launches["filtered_set/smollm2/verified"] is None


def test_a_device_of_a_resource_reaches_the_stage_that_uses_it(materialize, script, monkeypatch):
    monkeypatch.setenv("DISTILL_TEACHER_DEVICE", "cuda:1")
    monkeypatch.setenv("DISTILL_STUDENT_DEVICE", "cuda:0")
    materialize('+key:"student_checkpoint__kl"')
    assert script.devices["teacher_outputs/smollm2"][0] == "cuda:1"
    assert script.devices["student_checkpoint/kl"][1] == "cuda:0"
