"""Laws of finding tasks and reading their documents."""

import logging

import pytest

from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation import tasks as tasks_module
from distill_pipeline.evaluation.tasks import evaluation_documents, load_tasks, task_fault


def test_documents_hold_question_and_answer_under_task_and_number(task_folder: str) -> None:
    documents = evaluation_documents(["written"], task_folder)
    assert [name for name, _ in documents] == ["written:0", "written:1", "written:2"]
    assert documents[0][1] == "what is the capital of France?\nParis"


def test_reading_documents_logs_nothing(task_folder: str, caplog: pytest.LogCaptureFixture) -> None:
    evaluation_documents(["written", "choice"], task_folder)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_documents_of_a_multiple_choice_task_hold_its_choices(task_folder: str) -> None:
    assert evaluation_documents(("choice",), task_folder)[1][1] == "what is the plural of mouse?\ncold\nmice\nParis"


def test_groups_are_expanded_and_no_document_comes_twice(task_folder: str) -> None:
    names = [name for name, _ in evaluation_documents(["everything", "written"], task_folder)]
    assert names == [f"{task}:{index}" for task in ("written", "choice") for index in range(3)]


def test_local_tasks_are_found_without_reading_lm_evals_own_folder(task_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    manager = tasks_module._manager
    monkeypatch.setattr(tasks_module, "_manager", lambda path, full: asked.append(full) or manager(path, full))
    assert task_fault(["written", "everything"], task_folder) is None
    load_tasks(["everything"], task_folder)
    assert set(asked) == {False}


def test_unknown_task_names_the_local_ones_and_the_closest_of_lm_eval(
    task_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = tasks_module._known
    monkeypatch.setattr(
        tasks_module, "_known", lambda path, full: known(path, False) | ({"hellaswag", "arc_easy"} if full else set())
    )
    fault = task_fault(["written", "hellaswagg"], task_folder)
    assert fault is not None
    assert "unknown task 'hellaswagg'" in fault
    assert "beams, broken, choice" in fault
    assert "closest of lm-eval: hellaswag" in fault
    with pytest.raises(ConfigError, match="hellaswagg"):
        evaluation_documents(["hellaswagg"], task_folder)


def test_data_set_that_cannot_be_read_is_one_clear_error(task_folder: str) -> None:
    with pytest.raises(ConfigError, match=r"task broken cannot be loaded: FileNotFoundError: .*absent\.jsonl"):
        evaluation_documents(["written", "broken"], task_folder)


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known_and_close_names_suggested() -> None:
    assert task_fault("arc_easy", None) is None
    fault = task_fault("arc_eazy", None)
    assert fault is not None
    assert "arc_easy" in fault
    assert "no include_path is set" in fault
