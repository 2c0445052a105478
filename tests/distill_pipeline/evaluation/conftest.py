"""Local lm-eval tasks of every kind, and models to measure on them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill_pipeline.evaluation.stage import evaluate_model
from distill_pipeline.models.load import load_model, load_tokenizer

QUESTIONS = [
    {"question": "what is the capital of France?", "answer": "Paris", "choices": ["Paris", "mice", "seven"], "gold": 0},
    {"question": "what is the plural of mouse?", "answer": "mice", "choices": ["cold", "mice", "Paris"], "gold": 1},
    {"question": "what is three plus four?", "answer": "seven", "choices": ["cold", "mice", "seven"], "gold": 2},
]
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
{more}
"""
FILTERS = """
filter_list:
  - {name: strict-match, filter: [{function: take_first}]}
  - {name: flexible, filter: [{function: lowercase}, {function: take_first}]}
"""
CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}
"""
GROUP = """
group: everything
task: [written, choice]
"""


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tasks ``written``, ``described`` (with a system text), ``prefixed``, ``shots``, ``filtered``, ``beams`` and ``unsafe``
    that generate, ``choice``, ``rolling``, and the group ``everything``."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = folder / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    generating = {
        "written": "", "described": 'description: "Answer briefly. "', "prefixed": 'gen_prefix: "It is"',
        "shots": "num_fewshot: 2\nfewshot_split: test\nfewshot_config: {sampler: first_n}", "filtered": FILTERS,
        "unsafe": "unsafe_code: true",
    }  # fmt: skip
    for name, more in generating.items():
        (folder / f"{name}.yaml").write_text(GENERATE.format(name=name, file=questions, more=more), encoding="utf-8")
    beams = GENERATE.format(name="beams", file=questions, more="").replace("do_sample: false", "do_sample: false, num_beams: 4")
    (folder / "beams.yaml").write_text(beams, encoding="utf-8")
    broken = GENERATE.format(name="broken", file=folder / "absent.jsonl", more="")
    (folder / "broken.yaml").write_text(broken, encoding="utf-8")
    for name, text in (("choice", CHOICE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(file=questions), encoding="utf-8")
    (folder / "everything.yaml").write_text(GROUP, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_model_dir: Path) -> Any:
    """The tiny models' tokenizer, with a chat template."""
    return load_tokenizer(tiny_model_dir)


@pytest.fixture(scope="session")
def student(tiny_model_dir: Path) -> Any:
    """A tiny model."""
    return load_model(tiny_model_dir)


@pytest.fixture(scope="session")
def teacher(tiny_teacher_dir: Path) -> Any:
    """Another tiny model with the same tokenizer."""
    return load_model(tiny_teacher_dir)


@pytest.fixture
def evaluate(student: Any, tokenizer: Any, task_folder: str) -> Callable[..., dict[str, Any]]:
    """Evaluates the student on tasks of the folder."""

    def run(*tasks: str, **changes: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": student, "tokenizer": tokenizer, "tasks": tasks, "include_path": task_folder, "system": None,
            "limit": None, "batch_size": 4, "device": "cpu", "progress": lambda line: None,
        }  # fmt: skip
        options |= changes
        return evaluate_model(options.pop("model"), options.pop("tokenizer"), **options)

    return run
