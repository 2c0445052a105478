"""Laws of the comparison."""

from collections.abc import Callable
from typing import Any

import pytest

from distill_pipeline.report.build import build_comparison
from distill_pipeline.report.html import comparison_html, student_html
from distill_pipeline.report.markdown import comparison_markdown, comparison_text, student_markdown

MakeReport = Callable[..., dict[str, Any]]
MakeEvaluation = Callable[..., dict[str, Any]]


@pytest.fixture
def reports(make_report: MakeReport, make_evaluation: MakeEvaluation) -> list[dict[str, Any]]:
    """kl beats sft; scratch starts from other weights and has no teacher beside it."""
    others = {"teacher": make_evaluation(72), "untrained": make_evaluation(6)}
    return [
        make_report(student="sft", method="sft", evaluations={"student": make_evaluation(50), **others}),
        make_report(student="kl", evaluations={"student": make_evaluation(60), **others}),
        make_report(
            student="scratch", method="sft", init={"scratch": {"layers": 20}}, evaluations={"student": make_evaluation(3)},
            held_out=None, curve=(), cost=None,
        ),
    ]  # fmt: skip


def test_leaderboard_is_sorted_by_score_and_holds_every_student(reports: list[dict[str, Any]]) -> None:
    assert [row["student"] for row in build_comparison(reports)["leaderboard"]] == ["kl", "sft", "scratch"]


def test_order_of_reports_changes_nothing(reports: list[dict[str, Any]]) -> None:
    assert comparison_html(build_comparison(reports)) == comparison_html(build_comparison(reports[::-1]))


def test_contrasts_compare_students_that_differ_in_one_thing(reports: list[dict[str, Any]]) -> None:
    contrasts = build_comparison(reports)["contrasts"]
    assert [(c["factor"], c["from"], c["to"]) for c in contrasts] == [
        ("method", "sft", "logit_kd"), ("init", "random, 20 layers", "pruned to 20 layers")
    ]  # fmt: skip
    assert contrasts[0]["difference"]["value"] == pytest.approx(10 / 120)
    assert contrasts[0]["difference"]["low"] > 0


def test_each_filtered_set_has_one_line_with_funnel_rates_and_reasons(reports: list[dict[str, Any]]) -> None:
    comparison = build_comparison(reports)
    (row,) = comparison["filters"]
    assert (row["name"], row["prompts"], row["completions"], row["accepted"]) == ("smollm2/verified", 120, 480, 200)
    assert row["reasons"] == {"below_min_score": 240, "truncated": 36, "failed": 4}
    assert row["per_prompt"] == pytest.approx(200 / 120)
    for page in (comparison_html(comparison), comparison_markdown(comparison)):
        assert "below min score 240" in page
    assert "| 41\\.7 % |" in comparison_markdown(comparison)


def test_contrasts_say_on_how_much_each_student_was_trained(reports: list[dict[str, Any]]) -> None:
    reports[0]["cost"]["trained_tokens"] = 9_100
    comparison = build_comparison(reports[:2])
    assert comparison["contrasts"][0]["trained_tokens"] == [9_100, 4_000]
    assert "sft (9.1K tokens) → kl (4.0K tokens)" in comparison_html(comparison)


def test_missing_baselines_are_dashes_and_warnings_never_errors(reports: list[dict[str, Any]]) -> None:
    comparison = build_comparison(reports[2:])
    assert comparison["references"] == []
    assert comparison["leaderboard"][0]["gap_recovered"]["reason"] == "not evaluated: teacher and untrained"
    for page in (comparison_html(comparison), comparison_markdown(comparison), comparison_text(comparison)):
        assert "scratch" in page


def test_text_table_is_aligned_and_names_the_baselines(reports: list[dict[str, Any]]) -> None:
    lines = comparison_text(build_comparison(reports)).splitlines()
    header = next(line for line in lines if line.startswith("student"))
    for name in ("kl", "sft", "teacher smollm2", "untrained, pruned to 20 layers"):
        row = next(line for line in lines if line.startswith(f"{name} "))
        column = header.index("score")
        assert row[column - 1] == " "
        assert row[column].isdigit()


def test_a_corrected_teacher_is_called_so_wherever_it_is_named(make_report: MakeReport) -> None:
    report = make_report(teacher="smollm2+other")
    correction = {"references": 40, "untrained_loss": 2.5, "final_loss": 1.25}
    report["teachers"][0]["correction"] = correction
    comparison = build_comparison([report])
    assert comparison["leaderboard"][0]["teacher"] == "smollm2 (corrected)+other"
    for page in (comparison_html(comparison), comparison_text(comparison), student_html(report)):
        assert "smollm2 (corrected)" in page
    assert "on 40 references: loss 2.5 before, 1.25 at the end" in student_html(report)
    for text in (comparison_markdown(comparison), student_markdown(report)):
        assert "smollm2 \\(corrected\\)" in text
    assert "corrected" not in student_html(make_report()).lower()


def test_text_table_says_on_how_many_tokens_each_student_was_trained(reports: list[dict[str, Any]]) -> None:
    reports[0]["cost"]["trained_tokens"] = 9_100
    lines = comparison_text(build_comparison(reports)).splitlines()
    header = next(line for line in lines if line.startswith("student"))
    column = header.index("trained tokens")
    shown = {line.split()[0]: line[column:].split()[0] for line in lines if line.startswith(("kl ", "sft ", "scratch "))}
    assert shown == {"kl": "4.0K", "sft": "9.1K", "scratch": "\u2013"}


def test_comparison_of_no_student_is_a_page(reports: list[dict[str, Any]]) -> None:
    assert "0 students side by side" in comparison_html(build_comparison([]))
