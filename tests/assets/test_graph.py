"""The quickstart's graph, written down: what a user sees, selects and stars in the UI."""

from pathlib import Path

import dagster as dg
import pytest

from assets.definitions import build_definitions
from assets.naming import MODEL_STEP_TAG, tag_value
from distill_pipeline.experiment import Experiment, load_experiment
from distill_pipeline.launching import Launch

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = ["prompt_pool", "scored_outputs__smollm2", "teacher_outputs__smollm2"]
STUDENT_CHECKS = ["licence_is_recorded", "quality_gate_is_passed", "rows_are_conserved", "teacher_is_unchanged"]
REPORT_CHECKS = ["student_beats_untrained", "student_names_its_baselines"]

GRAPH = {
    "prompt_pool": ("prompts", [], ["quality_gate_is_passed", "rows_are_conserved"]),
    "teacher_outputs__smollm2": (
        "teachers", ["prompt_pool"], ["licence_is_recorded", "quality_gate_is_passed", "rows_are_conserved"],
    ),
    "scored_outputs__smollm2": ("data", ["prompt_pool", "teacher_outputs__smollm2"], ["rows_are_conserved"]),
    "filtered_set__smollm2__unfiltered": ("data", DATA, ["accepted_rows_exist", "rows_are_conserved"]),
    "filtered_set__smollm2__verified": ("data", DATA, ["accepted_rows_exist", "rows_are_conserved"]),
    "student_checkpoint__kl": ("students", ["filtered_set__smollm2__verified"], STUDENT_CHECKS),
    "student_checkpoint__sft": ("students", ["filtered_set__smollm2__verified"], STUDENT_CHECKS),
    "student_checkpoint__scratch": ("students", ["filtered_set__smollm2__verified"], STUDENT_CHECKS),
    "eval_report__kl": ("evaluation", ["prompt_pool", "student_checkpoint__kl"], REPORT_CHECKS),
    "eval_report__sft": ("evaluation", ["prompt_pool", "student_checkpoint__sft"], REPORT_CHECKS),
    "eval_report__scratch": ("evaluation", ["prompt_pool", "student_checkpoint__scratch"], REPORT_CHECKS),
    "comparison": (
        "evaluation", ["eval_report__kl", "eval_report__scratch", "eval_report__sft"], ["every_student_is_compared"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def definitions() -> dg.Definitions:
    from assets.definitions import defs

    return defs


def test_the_definitions_load(definitions):
    dg.Definitions.validate_loadable(definitions)


def graph_of(graph) -> dict[str, tuple[str, list[str], list[str]]]:
    """Each asset's group, parents and checks."""
    seen = {}
    for key in graph.get_all_asset_keys():
        node = graph.get(key)
        checks = sorted(check.name for check in graph.get_check_keys_for_assets({key}))
        seen[key.to_user_string()] = (node.group_name, sorted(parent.to_user_string() for parent in node.parent_keys), checks)
    return seen


def test_the_graph_of_the_quickstart_is_the_one_written_down_here(definitions):
    assert graph_of(definitions.resolve_asset_graph()) == GRAPH


def test_signals_are_a_node_between_the_filtered_set_and_the_students_that_read_them():
    definitions = build_definitions(load_experiment(REPOSITORY / "experiments" / "offline.yaml"))
    graph = definitions.resolve_asset_graph()
    signals = graph.get(dg.AssetKey("teacher_signals__smollm2__verified"))
    assert (signals.group_name, [key.to_user_string() for key in signals.parent_keys]) == (
        "data", ["filtered_set__smollm2__verified"],
    )  # fmt: skip
    assert {key.to_user_string() for key in signals.child_keys} == {"student_checkpoint__topk", "student_checkpoint__sampled"}
    checks = {check.name for check in graph.get_check_keys_for_assets({signals.key})}
    assert checks == {"rows_are_conserved", "quality_gate_is_passed", "licence_is_recorded"}
    (asset,) = [asset for asset in definitions.assets if asset.key == signals.key]
    assert asset.op.pool == "teacher_gpu"
    assert MODEL_STEP_TAG in asset.op.tags


@pytest.fixture
def with_correction(quickstart: Experiment) -> Experiment:
    """The quickstart with a corrected teacher."""
    document = quickstart.model_dump()
    document["teachers"]["smollm2"]["correction"] = {"max_steps": 20}
    return Experiment.model_validate(document)


def test_a_corrected_teacher_is_a_node_before_whatever_needs_its_weights(with_correction: Experiment):
    graph = build_definitions(with_correction).resolve_asset_graph()
    corrected = "corrected_teacher__smollm2"
    dependent = {"teacher_outputs__smollm2"} | {key for key in GRAPH if key.startswith(("student_checkpoint", "eval_report"))}
    expected = {key: (group, sorted([*parents, corrected] if key in dependent else parents), checks)
                for key, (group, parents, checks) in GRAPH.items()}  # fmt: skip
    expected[corrected] = ("teachers", ["prompt_pool"], ["licence_is_recorded", "quality_gate_is_passed", "rows_are_conserved"])
    assert graph_of(graph) == expected
    node = graph.get(dg.AssetKey(corrected))
    assert (node.kinds, node.tags["distill/teacher"]) == ({"pytorch", "huggingface"}, "smollm2")
    (asset,) = [asset for asset in build_definitions(with_correction).assets if asset.key == node.key]
    assert (asset.op.pool, MODEL_STEP_TAG in asset.op.tags) == ("student_gpu", True)


def test_a_correction_is_made_where_students_are_and_its_curve_is_shown(
    with_correction: Experiment, materialize, script, monkeypatch
):
    monkeypatch.setenv("DISTILL_STUDENT_DEVICE", "cuda:0")
    monkeypatch.setenv("DISTILL_TRAIN_PROCESSES", "2")
    result = materialize('+key:"teacher_outputs__smollm2"', with_correction)
    assert result.success
    assert script.made == ["prompt_pool", "corrected_teacher/smollm2", "teacher_outputs/smollm2"]
    assert script.devices["corrected_teacher/smollm2"][1] == "cuda:0"
    assert script.launches["corrected_teacher/smollm2"] == Launch(2)
    (made,) = (e for e in result.get_asset_materialization_events() if e.asset_key.path[0].startswith("corrected"))
    assert made.materialization.metadata["training_curve"].value.startswith("![loss by step](data:image/png")
    script.counts["corrected_teacher/smollm2"] = {"prompts": 5, "used": 1, "held_out": 1}
    script.salt["corrected_teacher/smollm2"] = "a lost row"
    assert not materialize('+key:"teacher_outputs__smollm2"', with_correction).success


def test_only_what_a_student_lacks_is_a_warning_and_every_other_claim_blocks(definitions):
    specs = [spec for asset in definitions.assets for spec in asset.check_specs]
    assert {spec.name for spec in specs if not spec.blocking} == {"student_beats_untrained"}


def test_a_student_is_found_by_teacher_filter_and_method(definitions):
    tags = definitions.resolve_asset_graph().get(dg.AssetKey("student_checkpoint__kl")).tags
    assert {name: value for name, value in tags.items() if name.startswith("distill/")} == {
        "distill/teacher": "smollm2", "distill/filter": "verified", "distill/method": "logit_kd", "distill/student": "kl",
    }  # fmt: skip


def test_tag_values_are_legal_and_distinct_for_long_joined_names():
    names = ["smollm2+qwen", "Qwen/Qwen2.5-0.5B", "+".join(["a" * 40, "b" * 40]), "+".join(["a" * 40, "b" * 41])]
    values = [tag_value(name) for name in names]
    assert values[0] == "smollm2.qwen"
    assert len(set(values)) == len(names)
    for value in values:
        dg.AssetSpec("x", tags={"distill/teacher": value})


def test_steps_that_load_a_model_take_their_place_in_a_pool(definitions):
    pools = {asset.key.to_user_string(): asset.op.pool for asset in definitions.assets}
    assert {key: pool for key, pool in pools.items() if pool} == {
        "teacher_outputs__smollm2": "teacher_gpu",
        **{
            f"{stage}__{student}": "student_gpu"
            for stage in ("student_checkpoint", "eval_report")
            for student in ("kl", "sft", "scratch")
        },
    }
    assert all((MODEL_STEP_TAG in asset.op.tags) == (asset.op.pool is not None) for asset in definitions.assets)


def test_nothing_starts_by_itself(definitions):
    assert all(sensor.default_status == dg.DefaultSensorStatus.STOPPED for sensor in definitions.sensors)
    assert all(schedule.default_status == dg.DefaultScheduleStatus.STOPPED for schedule in definitions.schedules)


def test_new_prompts_reach_everything_made_from_them(definitions):
    job = definitions.resolve_job_def("prompts_to_comparison")
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == set(GRAPH)


def test_the_weekly_run_really_measures_again(definitions):
    job = definitions.resolve_job_def("reevaluation")
    keys = {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
    assert keys == {key for key in GRAPH if key.startswith("eval_report") or key == "comparison"}
    assert job.run_config["ops"] == {key: {"config": {"force": True}} for key in keys}
    (schedule,) = definitions.schedules
    assert (schedule.job_name, schedule.cron_schedule) == ("reevaluation", "0 4 * * 1")


def test_two_teachers_two_filters_and_a_student_of_both_are_all_in_the_graph(quickstart: Experiment):
    document = quickstart.model_dump()
    document["teachers"]["big"] = document["teachers"]["smollm2"]
    document["students"]["both"] = document["students"]["sft"] | {"data": ("smollm2/verified", "big/unfiltered")}
    experiment = Experiment.model_validate(document)
    graph = build_definitions(experiment).resolve_asset_graph()
    node = graph.get(dg.AssetKey("student_checkpoint__both"))
    assert {key.to_user_string() for key in node.parent_keys} == {
        "filtered_set__smollm2__verified",
        "filtered_set__big__unfiltered",
    }
    assert node.tags["distill/teacher"] == "smollm2.big"
