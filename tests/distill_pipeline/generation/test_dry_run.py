"""Laws of the plan: a dry run says what a teacher will need and give, and neither spends nor changes anything unasked."""

import json
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.dry_run import evenly, mean_a_prompt
from distill_pipeline.experiment import parse_experiment
from distill_pipeline.pipeline import Pipeline
from distill_pipeline.plan_lines import PlanLine, plan_text
from distill_pipeline.planning import plan_experiment
from distill_pipeline.storage.artifacts import ArtifactStore

ELEMENTARY = str(Path(__file__).parents[3] / "examples/elementary/tasks")
N, NUM_PROMPTS = 4, 60


def document(folder: Path, **teacher: Any) -> dict[str, Any]:
    lines = [json.dumps({"prompt": f"what is {i} plus {i * i}?", "reference": "e"}) for i in range(NUM_PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    init = {"model": "student"} if teacher.get("engine") == "openai" else {"scratch": {"layers": 2}}
    return {
        "name": "planned",
        "prompt_pool": {
            "sources": [{"path": str(folder / "prompts.jsonl"), "domain": "sums", "license": "cc0-1.0"}],
            "holdout_fraction": 0.0, "dedup": {"exact": True}, "decontaminate": {"against": None},
        },
        "teachers": {"some": {"license": "mit", "sampling": {"n": N, "temperature": 1.0, "max_tokens": 8}} | teacher},
        "scorers": {"*": [{"kind": "contains_answer"}]},
        "filters": {"all": {}, "right": {"min_score": 1.0, "max_per_prompt": 2}},
        "students": {"small": {"data": ["some/right"], "init": init,
                               "stages": [{"method": "sft", "batch_prompts": 4}]}},
        "evaluation": {"tasks": ["elementary_heldout"], "include_path": ELEMENTARY},
    }  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("part-*.parquet")}


@pytest.fixture
def open_plan(tmp_path: Path) -> Callable[..., Pipeline]:
    def opened(edit: Callable[[dict[str, Any]], None] | None = None, **teacher: Any) -> Pipeline:
        changed = document(tmp_path, **teacher)
        if edit is not None:
            edit(changed)
        pipeline = Pipeline(
            parse_experiment(changed), ArtifactStore(tmp_path / "store"), teacher_device="cpu", student_device="cpu",
            progress=lambda line: None,
        )  # fmt: skip
        pipeline.make("prompt_pool")
        return pipeline

    return opened


def lines_of(pipeline: Pipeline, **options: Any) -> dict[str, PlanLine]:
    return {line.node: line for line in plan_experiment(pipeline, **options)}


@pytest.fixture
def served(server: Any) -> dict[str, Any]:
    """A teacher whose answers are right half of the time, in 3 or 5 tokens each."""

    def script(prompt: str, body: dict[str, Any]) -> dict[str, Any]:
        chance = random.Random(prompt)
        texts = [chance.choice(["e", "no"]) for _ in range(body.get("n", 1))]
        usage = {"prompt_tokens": 10, "completion_tokens": sum(3 if text == "e" else 5 for text in texts)}
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"} for text in texts], "usage": usage}

    server.script = script
    return {"model": "fake-model", "engine": "openai", "server": {"base_url": server.url}}


PRICES = {"max_usd": 5.0, "usd_per_million_prompt_tokens": 1000.0, "usd_per_million_completion_tokens": 2000.0}


def test_a_teacher_here_is_measured_and_nothing_is_stored(
    open_plan: Callable[..., Pipeline], tiny_teacher_dir: Path, tmp_path: Path
) -> None:
    pipeline = open_plan(model=str(tiny_teacher_dir))
    before = files_in(tmp_path / "store")
    lines = lines_of(pipeline)
    assert files_in(tmp_path / "store") == before
    outputs, every, right = (
        lines[f"{name}"] for name in ("teacher_outputs/some", "filtered_set/some/all", "filtered_set/some/right")
    )
    assert outputs.rows == NUM_PROMPTS * N
    assert outputs.seconds is not None
    assert outputs.seconds > 0
    assert 0 < outputs.tokens <= NUM_PROMPTS * N * 8
    assert "0 of 240 stored; " in outputs.note
    assert (every.rows, every.interval) == (240, (201, 240)), "all of 80: Wilson's 0.839 of the prompts at least"
    assert "4.00 a prompt: 80 of 80 accepted in a dry run of 20 prompts" in every.note
    assert right.interval is not None
    assert right.interval[0] <= right.rows <= right.interval[1] <= NUM_PROMPTS * 2
    made = {name: pipeline.make(name) for name in ("teacher_outputs/some", "scored_outputs/some", "filtered_set/some/right")}
    assert made["teacher_outputs/some"].manifest.counts["generated"] == NUM_PROMPTS * N
    assert lines["student_checkpoint/small"].note.startswith("if its filters accept as in the dry run")


def test_a_served_teacher_is_asked_only_by_request_and_its_answers_are_paid_once(
    open_plan: Callable[..., Pipeline], served: dict[str, Any], server: Any
) -> None:
    pipeline = open_plan(**served, budget=PRICES)
    shy = lines_of(pipeline)["teacher_outputs/some"]
    assert server.asked == 0
    assert "lengths, time and yield unknown: --dry-run-served asks it for a few prompts" in shy.note
    assert "tokens at most" in shy.note
    assert shy.tokens == NUM_PROMPTS * N * 8
    assert lines_of(pipeline)["filtered_set/some/right"].note == "at most; yield unknown"
    bold = lines_of(pipeline, dry_run_served=True)
    assert server.asked == 20
    line, right = bold["teacher_outputs/some"], bold["filtered_set/some/right"]
    assert line.usd is not None
    assert line.usd == pytest.approx((60 * 10 * 1000 + line.tokens * 2000) / 1e6)
    assert line.seconds is not None
    assert right.interval is not None
    outputs = pipeline.make("teacher_outputs/some")
    assert (outputs.manifest.counts["reused"], outputs.manifest.counts["generated"]) == (20 * N, 40 * N)
    assert server.asked == NUM_PROMPTS
    assert abs(outputs.manifest.facts["completion_tokens"] - line.tokens) < 0.25 * line.tokens
    pipeline.make("scored_outputs/some")
    accepted = pipeline.make("filtered_set/some/right").manifest.counts["accepted"]
    assert right.interval[0] <= accepted <= right.interval[1]
    again = lines_of(pipeline, dry_run_served=True)["teacher_outputs/some"]
    assert (again.rows, again.usd, again.seconds, server.asked) == (0, 0.0, None, NUM_PROMPTS)


def test_a_dry_run_never_passes_the_budget_and_says_where_it_ended(
    open_plan: Callable[..., Pipeline], served: dict[str, Any], server: Any
) -> None:
    pipeline = open_plan(**served, budget=PRICES | {"max_usd": 0.5})
    line = lines_of(pipeline, dry_run_served=True)["teacher_outputs/some"]
    assert 0 < server.asked < 20
    assert "the dry run ended early: the budget is reached: " in line.note
    assert " of max_usd 0.5 are spent" in line.note
    assert "tokens at most" in line.note


def test_a_judge_behind_a_server_is_asked_only_by_request(
    open_plan: Callable[..., Pipeline], tiny_teacher_dir: Path, served: dict[str, Any], server: Any
) -> None:
    def judged(changed: dict[str, Any]) -> None:
        changed["teachers"]["big"] = served | {"license": "mit", "domains": ["nothing"]}
        changed["scorers"] = {"*": [{"kind": "judge", "options": {"model": "big", "rubric": "helpful"}}]}

    lines = lines_of(open_plan(judged, model=str(tiny_teacher_dir)))
    assert server.asked == 0
    assert lines["filtered_set/some/right"].note == "at most; yield unknown"
    assert lines["teacher_outputs/some"].seconds is not None
    assert lines["teacher_outputs/big"].note == "no training prompt is in its domains"


def test_other_settings_are_named_with_the_rows_they_redo_before_anything_is_asked(
    open_plan: Callable[..., Pipeline], served: dict[str, Any], server: Any
) -> None:
    open_plan(**served).make("teacher_outputs/some")
    server.bodies.clear()
    changed = {"sampling": {"n": N, "temperature": 0.25, "max_tokens": 8}, "system": "be brief", "revision": "june"}
    note = lines_of(open_plan(**served, **changed))["teacher_outputs/some"].note
    for said in ("temperature 1.0 -> 0.25", "system None -> 'be brief'", "revision None -> 'june'"):
        assert said in note
    assert "other settings than in its last run" in note
    assert "0 of 240 stored, 240 made anew" in note
    assert not server.bodies
    lines_of(open_plan(**served, **changed), dry_run_served=True)
    again = lines_of(open_plan(**served, **changed))["teacher_outputs/some"].note
    assert "80 of 240 stored, 160 made anew" in again, "a dry run does not make settings those of the last run"


def test_a_target_is_planned_with_the_samples_it_took(
    open_plan: Callable[..., Pipeline], served: dict[str, Any], server: Any
) -> None:
    target = {"accepted": 3, "at_most": 12}
    pipeline = open_plan(**served, budget=PRICES | {"max_usd": 50.0, "accept_target": target})
    assert lines_of(pipeline, probe=False)["teacher_outputs/some"].rows == NUM_PROMPTS * 12
    line = lines_of(pipeline, dry_run_served=True)["teacher_outputs/some"]
    assert line.interval is not None
    assert "a prompt are enough in a dry run of 20" in line.note
    outputs = pipeline.make("teacher_outputs/some").manifest
    assert outputs.counts["reused"] > 20 * N
    assert line.interval[0] <= outputs.counts["expected"] <= line.interval[1]


def test_prompts_of_a_dry_run_are_evenly_spaced_over_all() -> None:
    rows = [{"number": number} for number in range(47)]
    chosen = [row["number"] for row in evenly(rows)]
    assert len(chosen) == 20
    assert chosen[0] == 0
    assert chosen[-1] >= 44
    assert {b - a for a, b in pairwise(chosen)} == {2, 3}
    assert evenly(rows[:3]) == rows[:3]


def test_the_interval_of_a_yield_holds_the_truth_and_is_never_a_point() -> None:
    chance, held = random.Random(0), 0
    for _ in range(200):
        values = [sum(chance.random() < skill for _ in range(4)) for skill in (chance.random() for _ in range(20))]
        mean = mean_a_prompt(values, 4)
        assert 0 <= mean["low"] <= mean["value"] <= mean["high"] <= 4
        held += mean["low"] <= 2.0 <= mean["high"]
    assert held >= 180, "a 95 % interval of 20 prompts by bootstrap"
    for value in (0, 2, 4):
        mean = mean_a_prompt([value] * 20, 4)
        assert mean["value"] == value
        assert mean["high"] - mean["low"] > 0.5


def test_dollars_and_intervals_stand_in_the_table_where_they_are_known() -> None:
    lines = [PlanLine("a", 1200, 10, 2000, 3.0, "note", 1.5, (1000, 1400)), PlanLine("b", 7, 0, 0, None)]
    head, first, second, total = plan_text(lines).splitlines()
    assert head.split() == ["node", "rows", "tokens", "bytes", "time", "USD"]
    assert " ".join(first.split()) == "a 1,200 (1,000 to 1,400) 10 2.0 kB 3 s 1.50 note"
    assert second.split() == ["b", "7", "-", "-", "-", "-"]
    assert total.split() == ["total", "10", "2.0", "kB", "3", "s", "1.50"]
    assert "USD" not in plan_text(lines[1:])
