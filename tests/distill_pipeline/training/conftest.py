"""What the tests of training share: one thread (tiny models gain nothing from two), rows, and a student's recipe."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from distill_pipeline.models.load import load_tokenizer
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.records import TRAINING_SCHEMA
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.spec import StudentSpec


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def teacher(tiny_teacher_dir: Path) -> ModelFolder:
    return ModelFolder(tiny_teacher_dir, "tiny-teacher", None, "teacher-identity", None)


@pytest.fixture(scope="session")
def small_model(tiny_model_dir: Path) -> ModelFolder:
    return ModelFolder(tiny_model_dir, "tiny-model", None, "model-identity", None)


@pytest.fixture(scope="session")
def renderer(tiny_teacher_dir: Path) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(tiny_teacher_dir))


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Any]:
    """``random_model(layers=, seed=)``: a random Llama of 40 ids with grouped-query attention, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(*, layers: int, seed: int) -> Any:
        config = LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.2,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()

    return build


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[dict[str, Any]]]:
    return rows_of


@pytest.fixture(scope="session")
def make_batch() -> Callable[[list[dict[str, Any]]], pa.RecordBatch]:
    return batch_of


@pytest.fixture(scope="session")
def make_student() -> Callable[..., StudentSpec]:
    return student_of


def rows_of(count: int = 20, completions: int = 3) -> list[dict[str, Any]]:
    """Training rows of ragged lengths, some completions cut at their limit."""
    return [
        {
            "prompt_id": f"prompt-{i:03d}",
            "messages": [{"role": "user", "content": "what is " + "the opposite of " * (i % 4) + f"{i}?"}],
            "reference": None,
            "domain": "test",
            "completions": [
                {"completion_id": f"{i}-{j}", "raw_text": "the answer is " * (j + i % 2) + f"{i * j}", "finish_reason": reason}
                for j, reason in zip(range(completions), ["stop", "length", "stop", "stop", "length"], strict=False)
            ],
        }
        for i in range(count)
    ]


def batch_of(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=TRAINING_SCHEMA)


def student_of(*stages: dict[str, Any], init: dict[str, Any] | None = None, **options: Any) -> StudentSpec:
    """A recipe with small steps; each stage is a dict of TrainStageSpec fields."""
    small = {"batch_prompts": 4, "lr": 1e-3}
    return StudentSpec.model_validate(
        {"data": ["teacher/all"], "init": init or {"prune": {"layers": 2}},
         "stages": [small | stage for stage in stages or ({"method": "logit_kd"},)], **options}
    )  # fmt: skip
