"""The bundled questions: made from their tables, held out by the pipeline's rule, and scored by the lm-eval task."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from distill_pipeline.prompts.split import split_of
from distill_pipeline.records import prompt_id
from distill_pipeline.scoring.text import contains_phrase

ELEMENTARY = Path(__file__).resolve().parents[2] / "examples" / "elementary"


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ELEMENTARY / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return read_rows("prompts.jsonl")


def test_the_committed_files_are_what_the_tables_make(tmp_path: Path) -> None:
    command = [sys.executable, str(ELEMENTARY / "build.py"), "--check"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_ids_and_prompts_are_unique_and_many(rows: list[dict[str, str]]) -> None:
    assert len(rows) >= 1_000
    assert len({row["id"] for row in rows}) == len({row["prompt"] for row in rows}) == len(rows)
    assert all(re.fullmatch(r"[a-z0-9-]+", row["id"]) for row in rows)


def test_no_kind_is_more_than_a_fifth(rows: list[dict[str, str]]) -> None:
    assert max(Counter(row["kind"] for row in rows).values()) <= 0.2 * len(rows)


def test_no_answer_stands_in_its_question(rows: list[dict[str, str]]) -> None:
    assert [row["id"] for row in rows if contains_phrase(row["prompt"], row["reference"])] == []


def test_every_reference_can_be_answered(rows: list[dict[str, str]]) -> None:
    alternatives = [(row["id"], answer) for row in rows for answer in row["reference"].split("|")]
    assert [id_ for id_, answer in alternatives if not contains_phrase(f"It is {answer}.", answer)] == []


def test_held_out_are_exactly_the_prompts_of_the_hash_rule(rows: list[dict[str, str]]) -> None:
    ids = {row["id"]: prompt_id([{"role": "user", "content": row["prompt"]}]) for row in rows}
    assert read_rows("heldout.jsonl") == [row for row in rows if split_of(ids[row["id"]], 0.2) == "heldout"]


@pytest.mark.filterwarnings("ignore")
def test_the_lm_eval_task_loads_from_any_folder_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.chdir(tmp_path)
    manager = TaskManager(include_path=str(ELEMENTARY / "tasks"), include_defaults=False)
    task = manager.load("elementary_heldout")["tasks"]["elementary_heldout"]

    docs = list(task.test_docs())
    assert docs == read_rows("heldout.jsonl")
    doc = next(doc for doc in docs if doc["kind"] == "plural")
    assert task.doc_to_text(doc) == doc["prompt"]
    assert task.doc_to_target(doc) == doc["reference"]
    assert task.process_results(doc, [f"The plural is **{doc['reference'].upper()}**."]) == {"acc": 1.0}
    assert task.process_results(doc, ["I do not know."]) == {"acc": 0.0}
    assert task.aggregation()["acc"]([1.0, 0.0]) == 0.5
    assert task.higher_is_better() == {"acc": True}
