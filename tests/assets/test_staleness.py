"""Which assets Dagster calls unsynced after a change of the experiment. Its resolver is private: wrapped once, here."""

import dagster as dg
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from assets.definitions import build_definitions
from assets.naming import asset_key
from distill_pipeline.experiment import Experiment
from distill_pipeline.nodes import experiment_nodes

FILTERED = "filtered_set/smollm2/verified"


def stale_assets(instance: dg.DagsterInstance, experiment: Experiment) -> set[str]:
    graph = build_definitions(experiment).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, loading_context=LoadingContextForTest(instance))
    return {name for name in experiment_nodes(experiment) if resolver.get_status(asset_key(name)) != StaleStatus.FRESH}


@pytest.fixture
def stricter(quickstart: Experiment) -> Experiment:
    """The quickstart with another threshold in one filter."""
    document = quickstart.model_dump()
    document["filters"]["verified"]["min_score"] = 0.5
    return Experiment.model_validate(document)


def test_after_a_whole_run_nothing_is_stale(materialize, script, instance, quickstart):
    assert materialize("*").success
    assert stale_assets(instance, quickstart) == set()


def test_another_threshold_makes_that_filter_stale_and_neither_teacher_nor_other_filters(
    materialize, script, instance, stricter
):
    assert materialize("*").success
    assert stale_assets(instance, stricter) == {FILTERED}


def test_another_correction_makes_all_of_its_teacher_stale(materialize, script, instance, quickstart):
    document = quickstart.model_dump()
    document["teachers"]["smollm2"]["correction"] = {"lr": 1e-5}
    assert materialize("*", Experiment.model_validate(document)).success
    document["teachers"]["smollm2"]["correction"] = {"lr": 1e-4}
    stale = stale_assets(instance, Experiment.model_validate(document))
    assert {name.split("/")[0] for name in stale} == {
        "corrected_teacher", "teacher_outputs", "student_checkpoint", "eval_report",
    }  # fmt: skip


def test_students_are_stale_once_their_filtered_set_has_other_content(materialize, script, instance, stricter):
    assert materialize("*").success
    script.salt[FILTERED] = "other rows"
    assert materialize('key:"filtered_set__smollm2__verified"', stricter).success
    assert stale_assets(instance, stricter) == {f"student_checkpoint/{student}" for student in ("kl", "sft", "scratch")}


def test_a_filter_that_decides_the_same_leaves_its_students_fresh(materialize, script, instance, stricter):
    assert materialize("*").success
    assert materialize('key:"filtered_set__smollm2__verified"', stricter).success
    assert stale_assets(instance, stricter) == set()
