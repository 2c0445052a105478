from pathlib import Path

import dagster as dg
import pytest

from distill_pipeline.experiment import load_experiment

REPOSITORY = Path(__file__).resolve().parents[2]
FILTERED = "filtered_set/smollm2/verified"
TO_STUDENT = '+key:"student_checkpoint__kl"'


def checks(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {f"{check.asset_key.to_user_string()}.{check.check_name}": check for check in result.get_asset_check_evaluations()}


def made(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.asset_key.to_user_string() for event in result.get_asset_materialization_events()}


@pytest.mark.parametrize(
    ("name", "counts", "said"),
    [
        ("prompt_pool", {"seen": 3, "kept": 1, "malformed": 1}, "seen 3 is not kept 1 + malformed 1"),
        ("teacher_outputs/smollm2", {"expected": 4, "stopped": 2, "failed": 1}, "expected 4 is not stopped 2"),
        ("scored_outputs/smollm2", {"completions": 2, "scored": 1}, "completions 2 is not scored 1"),
        (FILTERED, {"completions": 5, "accepted": 2, "rejected": 2}, "completions 5 is not accepted 2 + rejected 2"),
        (
            FILTERED,
            {"completions": 5, "accepted": 2, "rejected": 3, "rejected_refusal": 1, "rejected_too_hard": 1},
            "rejected 3 is not the sum of its first reasons, 2",
        ),
        ("student_checkpoint/kl", {"completions": 2, "trained_completions": 1}, "completions 2 is not trained_completions 1"),
    ],
)
def test_a_lost_row_stops_everything_downstream(materialize, script, name, counts, said):
    script.counts[name] = counts
    result = materialize('+key:"eval_report__kl"')
    assert not result.success
    check = checks(result)[f"{name.replace('/', '__')}.rows_are_conserved"]
    assert not check.passed
    assert check.description.startswith(said)
    assert "eval_report__kl" not in made(result)


def test_a_manifest_without_the_count_fails_the_claim(materialize, script):
    script.counts["prompt_pool"] = {"rows": 3}
    assert "has no count 'seen'" in checks(materialize("prompt_pool"))["prompt_pool.rows_are_conserved"].description


def test_an_empty_filtered_set_stops_its_students_and_gives_the_reason(materialize, script, store):
    reason = "filtered_set is empty: 0 of 5 teacher outputs passed. Lower min_score."
    script.counts[FILTERED] = {"completions": 5, "accepted": 0, "rejected": 5}
    script.failed_gate[FILTERED] = reason
    result = materialize(TO_STUDENT)
    assert not result.success
    check = checks(result)["filtered_set__smollm2__verified.accepted_rows_exist"]
    assert (check.passed, check.severity, check.description) == (False, dg.AssetCheckSeverity.ERROR, reason)
    assert "student_checkpoint__kl" not in made(result)


def test_a_failed_gate_stops_training_in_a_later_run_too(materialize, script):
    script.counts[FILTERED] = {"completions": 5, "accepted": 0, "rejected": 5}
    script.failed_gate[FILTERED] = "nothing was accepted"
    materialize(TO_STUDENT)
    later = materialize('key:"student_checkpoint__kl"')
    (failure,) = [event for event in later.all_events if event.is_step_failure]
    assert "did not pass its gate: nothing was accepted" in failure.step_failure_data.user_failure_data.description
    assert "student_checkpoint/kl" not in script.made


def test_a_teacher_that_changed_during_training_fails_the_student(materialize, script):
    terms = {"name": "smollm2", "license": "apache-2.0"}
    script.facts["student_checkpoint/kl"] = {"teachers": [terms], "teacher_sha256_before": "a", "teacher_sha256_after": "b"}
    check = checks(materialize(TO_STUDENT))["student_checkpoint__kl.teacher_is_unchanged"]
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.ERROR


def test_logit_distillation_that_kept_no_hash_of_its_teacher_fails_and_plain_fine_tuning_needs_none(materialize, script):
    terms = {"name": "smollm2", "license": "apache-2.0"}
    for student in ("kl", "sft"):
        script.facts[f"student_checkpoint/{student}"] = {"teachers": [terms]}
    found = checks(materialize('+key:"student_checkpoint__kl" or +key:"student_checkpoint__sft"'))
    assert not found["student_checkpoint__kl.teacher_is_unchanged"].passed
    assert found["student_checkpoint__sft.teacher_is_unchanged"].passed


def test_a_student_of_stored_signals_needs_no_hash_of_a_teacher_and_its_signals_show_their_size(materialize, script):
    script.facts["student_checkpoint/topk"] = {"teachers": [{"name": "smollm2", "license": "apache-2.0"}]}
    result = materialize('+key:"student_checkpoint__topk"', load_experiment(REPOSITORY / "experiments" / "offline.yaml"))
    assert result.success
    assert checks(result)["student_checkpoint__topk.teacher_is_unchanged"].passed
    (event,) = result.asset_materializations_for_node("teacher_signals__smollm2__verified")
    assert event.metadata["bytes_a_token_topk"].value == 38.0
    assert event.metadata["kept_mass_by_temperature_1_0"].value == 0.97


def test_outputs_without_a_recorded_licence_are_not_used(materialize, script):
    script.facts["teacher_outputs/smollm2"] = {"teacher": {"name": "smollm2", "license": None}}
    result = materialize(TO_STUDENT)
    assert not checks(result)["teacher_outputs__smollm2.licence_is_recorded"].passed
    assert "filtered_set__smollm2__verified" not in made(result)


def test_all_claims_hold_of_a_sound_run(materialize, script):
    result = materialize(TO_STUDENT)
    assert result.success
    assert all(check.passed for check in checks(result).values())


def test_a_report_without_its_baselines_is_refused(materialize, script):
    del script.num_right["untrained"]
    result = materialize('+key:"eval_report__kl"')
    check = checks(result)["eval_report__kl.student_names_its_baselines"]
    assert not result.success
    assert (check.passed, check.description) == (False, "not beside every result: untrained")


def test_a_student_that_learned_nothing_is_a_warning_and_the_comparison_goes_on(materialize, script):
    script.num_right |= {"student": 1, "untrained": 2}
    result = materialize("*")
    check = checks(result)["eval_report__kl.student_beats_untrained"]
    assert result.success
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert check.description == "t, acc: student 0.1000, untrained 0.2000"
    assert "comparison" in made(result)


def test_a_comparison_that_lacks_a_student_is_refused(materialize, script):
    script.counts["comparison"] = {"students": 2}
    check = checks(materialize("*"))["comparison.every_student_is_compared"]
    assert (check.passed, check.description) == (False, "2 of 3 students are in the comparison")
