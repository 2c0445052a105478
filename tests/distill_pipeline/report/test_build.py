"""Laws of the facts in a student's report."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from distill_pipeline.errors import IntegrityError

MakeReport = Callable[..., dict[str, Any]]
MakeEvaluation = Callable[..., dict[str, Any]]
MODELS = {"student", "teacher", "untrained"}


def test_every_result_stands_beside_teacher_and_untrained_student_with_an_interval(make_report: MakeReport) -> None:
    report = make_report()
    for metrics in report["tasks"].values():
        for models in metrics.values():
            assert set(models) == MODELS
            assert all(found["low"] <= found["value"] <= found["high"] and found["n"] == 120 for found in models.values())
    assert report["gap_recovered"]["value"] == pytest.approx((60 - 6) / (72 - 6))
    assert report["gap_recovered"]["low"] <= report["gap_recovered"]["value"] <= report["gap_recovered"]["high"]


def test_report_has_the_keys_that_machines_read(make_report: MakeReport) -> None:
    report = make_report()
    wanted = {"student", "teacher", "filter", "method", "parameters", "tasks", "gap_recovered", "yields", "input_versions"}
    assert wanted <= report.keys()
    assert report["parameters"] == {"student": 98_620_992, "teacher": 134_515_008, "share": pytest.approx(0.733, abs=1e-3)}
    assert report["yields"] == {
        "smollm2/verified": {"completions": 480, "accepted": 200, "accepted_frac": pytest.approx(200 / 480)}
    }
    assert report["input_versions"] == {"prompt_pool": "b" * 16}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_other_students_stand_beside_under_their_own_names(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    evaluations = {
        name: make_evaluation(right) for name, right in (("student", 60), ("teacher", 72), ("untrained", 6), ("sft", 50))
    }
    assert make_report(evaluations=evaluations)["tasks"]["capitals"]["exact_match"]["sft"]["value"] == pytest.approx(50 / 120)


def test_missing_baseline_is_named_and_the_gap_is_unknown_with_a_reason(
    make_report: MakeReport, make_evaluation: MakeEvaluation
) -> None:
    report = make_report(evaluations={"student": make_evaluation(60), "teacher": make_evaluation(72)})
    assert report["missing_baselines"] == ["untrained"]
    assert report["gap_recovered"] == {"value": None, "low": None, "high": None, "n": 0, "reason": "not evaluated: untrained"}
    assert any("The untrained was not evaluated" in line for line in report["warnings"])


def test_student_above_its_teacher_is_flagged(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    evaluations = {"student": make_evaluation(100), "teacher": make_evaluation(72), "untrained": make_evaluation(6)}
    report = make_report(evaluations=evaluations)
    assert report["headline"]["above_teacher"] == {"flag": True, "beyond_noise": True}
    assert any("above its teacher, by more than noise" in line for line in report["warnings"])
    assert not make_report()["headline"]["above_teacher"]["flag"]


def test_teacher_no_better_than_the_untrained_student_leaves_the_gap_unknown(
    make_report: MakeReport, make_evaluation: MakeEvaluation
) -> None:
    same = make_evaluation(60)
    report = make_report(evaluations={"student": same, "teacher": same, "untrained": same})
    assert report["gap_recovered"]["value"] is None
    assert any("Gap recovered is unknown: the teacher is not above" in line for line in report["warnings"])


def test_one_document_gives_a_report_that_says_how_little_it_knows(
    make_report: MakeReport, make_evaluation: MakeEvaluation
) -> None:
    evaluations = {"student": make_evaluation([1.0]), "teacher": make_evaluation([1.0]), "untrained": make_evaluation([0.0])}
    report = make_report(evaluations=evaluations)
    assert report["gap_recovered"]["value"] is None
    assert any("Only 1 document:" in line for line in report["warnings"])


def test_cut_answers_and_a_limit_are_warned_about(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    evaluations = {"student": make_evaluation(60, finish_reason="length", limit=120), "teacher": make_evaluation(72)}
    warnings = " ".join(make_report(evaluations=evaluations)["warnings"])
    assert "120 of 120 answers of the student were cut" in warnings
    assert "first 120 documents" in warnings


def test_accepted_licence_is_repeated_with_its_reason(make_report: MakeReport) -> None:
    teacher = {"name": "l", "license": "llama2", "verdict": "refused", "accepted_because": "written permission of 3 May"}
    assert any("written permission of 3 May" in line for line in make_report(teachers=[teacher])["warnings"])


def test_models_evaluated_on_other_documents_are_an_error(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    with pytest.raises(IntegrityError, match="not evaluated on the same documents of capitals"):
        make_report(evaluations={"student": make_evaluation(60), "teacher": make_evaluation(72, n=100)})


def test_funnel_loses_no_row(make_report: MakeReport) -> None:
    for stage in make_report()["funnel"]:
        assert stage["in"] == stage["kept"] + sum(stage["lost"].values()), stage


def test_reject_reasons_that_nobody_named_are_shown_as_other(make_report: MakeReport) -> None:
    counts = {"completions": 10, "accepted": 4, "failed": 1}
    report = make_report(filters={"t/f": {"counts": counts, "reject_reasons": {"refusal": 2}}})
    assert report["funnel"][-1]["lost"] == {"other": 3, "refusal": 2, "failed": 1}


def test_metric_that_is_no_mean_over_documents_has_no_interval_and_no_headline(
    make_report: MakeReport, make_evaluation: MakeEvaluation
) -> None:
    evaluations = {name: make_evaluation(right) for name, right in (("student", 60), ("teacher", 72), ("untrained", 6))}
    for evaluation in evaluations.values():
        evaluation["tasks"]["capitals"]["exact_match"]["value"] += 0.01
    report = make_report(evaluations=evaluations)
    assert report["tasks"]["capitals"]["exact_match"]["student"] == {"value": 0.51, "low": None, "high": None, "n": 120}
    assert report["headline"]["label"] == "no metric"
    assert report["gap_recovered"]["reason"] == "no task has a metric that is a mean over documents"


def test_samples_mix_right_and_wrong_and_are_the_same_in_every_run(make_report: MakeReport) -> None:
    report = make_report()
    verdicts = {(row["answers"]["teacher"]["right"], row["answers"]["student"]["right"]) for row in report["samples"]}
    assert len(report["samples"]) == 20
    assert {(True, False), (True, True), (False, False)} <= verdicts
    assert make_report()["samples"] == report["samples"]


def test_long_answers_are_cut_in_samples_and_say_so(make_report: MakeReport, make_evaluation: MakeEvaluation) -> None:
    report = make_report(evaluations={"student": make_evaluation(60, answer="x" * 100_000)})
    assert len(json.dumps(report)) < 60_000
    assert report["samples"][0]["answers"]["student"]["text"].endswith("(98,800 more characters)")
