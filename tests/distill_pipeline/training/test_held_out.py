"""Held-out prompts: they train nothing, measuring moves nothing, and a stage that stops early ends with its best weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from distill_pipeline.errors import TrainingError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models.load import load_model
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.outcome import Outcome
from distill_pipeline.training import loop
from distill_pipeline.training.examples import Example, ExampleSet, encode_examples
from distill_pipeline.training.held_out import BestWeights, has_settled, split_held_out, teacher_agreement
from distill_pipeline.training.reading import REASONING_TASK
from distill_pipeline.training.spec import EarlyStopSpec, HeldOutSpec, StudentSpec
from distill_pipeline.training.stage import train_student

KD = {"method": "logit_kd", "epochs": 2, "schedule": "constant"}
WILD = KD | {"lr": 0.3, "epochs": 12, "early_stop": {"patience": 2}}
"""A rate at which the divergence first falls and then rises."""
HELD_OUT = {"fraction": 0.3, "every": 2}
SMALL = {"prune": {"layers": 1}}


@pytest.fixture
def train(teacher: ModelFolder, make_rows: Any, make_batch: Any, tmp_path: Path) -> Callable[..., Outcome]:
    def run(student: StudentSpec, name: str = "run", **options: Any) -> Outcome:
        folder = tmp_path / name
        return train_student(
            [make_batch(make_rows(12))], folder / "out", folder / "work", student=student, teacher=teacher, init_model=None,
            system=None, device="cpu", seed=0, **{"progress": lambda line: None} | options,
        )  # fmt: skip

    return run


def rows_of(folder: Path, name: str = "curve") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "out" / f"{name}.parquet").to_pylist()
    return rows


def examples_of(*prompt_ids: str) -> tuple[ExampleSet, dict[str, int]]:
    examples = ExampleSet()
    for name in prompt_ids:
        examples.append(Example(name, (3, 4), ((5, 6), (7,))))
    rows = len(prompt_ids)
    return examples, {"trained_rows": rows, "trained_completions": 2 * rows, "data_tokens": 3 * rows}


def test_a_prompt_stays_on_its_side_when_others_come_and_nothing_is_lost() -> None:
    names = [f"prompt-{i}" for i in range(200)]
    part = HeldOutSpec(fraction=0.25)
    _, few, _ = split_held_out(*examples_of(*names[:100]), part)
    training, many, counts = split_held_out(*examples_of(*names), part)
    held = {example.prompt_id for example in many}
    assert {example.prompt_id for example in few} == held & set(names[:100])
    assert {training[i].prompt_id for i in range(len(training))} == set(names) - held
    assert 30 < len(held) < 70
    _, tasks, _ = split_held_out(*examples_of(*(f"{name}{REASONING_TASK}" for name in names)), part)
    assert {example.prompt_id.removesuffix(REASONING_TASK) for example in tasks} == held
    assert counts["held_out_rows"] + counts["trained_rows"] == 200
    assert counts["held_out_completions"] + counts["trained_completions"] == 400
    assert counts["data_tokens"] == 3 * len(training)


@pytest.mark.parametrize("fraction", [1e-9, 1.0 - 1e-9])
def test_a_side_without_prompts_is_an_error(fraction: float) -> None:
    with pytest.raises(TrainingError, match=r"held_out\.fraction .* of 3 prompts, and both training and comparing need one"):
        split_held_out(*examples_of("a", "b", "c"), HeldOutSpec(fraction=fraction))


def test_a_model_agrees_with_itself(random_model: Any) -> None:
    model, examples = random_model(layers=1, seed=0), [Example("p", (3, 4), ((5, 6), (5, 7, 2)))]
    options = {"layout": "shared", "pad_id": 2, "vocab_size": 40, "device": "cpu"}
    found = teacher_agreement(model, model, examples, **options)
    assert abs(found.forward_kl) < 1e-6
    assert (found.top1_agreement, found.num_tokens) == (1.0, 5)
    assert teacher_agreement(random_model(layers=1, seed=1), model, examples, **options).forward_kl > 0.01


def test_models_agree_alike_in_every_layout(random_model: Any) -> None:
    examples = [Example(str(i), (3, 4, *range(5, 5 + i % 4)), ((5, 6), (5, 7, 2), tuple(range(3, 9 + i)))) for i in range(7)]
    student, teacher = random_model(layers=1, seed=0), random_model(layers=2, seed=1)
    options = {"pad_id": 2, "vocab_size": 40, "device": "cpu"}
    plain = teacher_agreement(student, teacher, examples, layout="plain", **options)
    for layout in ("shared", "packed", "varlen"):
        found = teacher_agreement(student, teacher, examples, layout=layout, **options)
        assert found.forward_kl == pytest.approx(plain.forward_kl, abs=1e-6)
        assert (found.top1_agreement, found.num_tokens) == (plain.top1_agreement, plain.num_tokens)


@given(
    divergences=st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), max_size=8),
    patience=st.integers(1, 4),
    min_delta=st.sampled_from([0.0, 0.125, 0.3]),
)
def test_a_stage_has_settled_when_none_of_the_last_comparisons_was_progress(
    divergences: list[float], patience: int, min_delta: float
) -> None:
    progress = [x < min(divergences[:i], default=math.inf) - min_delta for i, x in enumerate(divergences)]
    expected = len(progress) >= patience and not any(progress[-patience:])
    assert has_settled(divergences, EarlyStopSpec(patience=patience, min_delta=min_delta)) == expected


def test_the_best_weights_are_those_of_the_first_least_divergence(random_model: Any) -> None:
    model, best = random_model(layers=1, seed=0), BestWeights()
    weights = []
    for count, _ in enumerate(found := [0.5, 0.2, 0.3, 0.2], start=1):
        with torch.no_grad():
            model.model.norm.weight.fill_(count)
        best.offer(model, found[:count])
        weights.append(model.model.norm.weight.clone())
    best.restore(model)
    assert torch.equal(model.model.norm.weight, weights[1])
    assert best.tensors is None
    best.restore(model)  # nothing kept, nothing changed
    assert torch.equal(model.model.norm.weight, weights[1])


def test_held_out_prompts_train_nothing_and_are_compared_when_due(
    train: Any, make_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[str] = set()
    original = loop.accumulate_gradients
    monkeypatch.setattr(
        loop, "accumulate_gradients", lambda models, batch, *args, **options: seen.update(e.prompt_id for e in batch)
        or original(models, batch, *args, **options),
    )  # fmt: skip
    said: list[str] = []
    outcome = train(make_student(KD, init=SMALL, held_out=HELD_OUT), progress=said.append)
    rows, speed, counts = rows_of(tmp_path / "run"), rows_of(tmp_path / "run", "speed"), outcome.counts
    assert len(seen) == counts["trained_rows"] == 12 - counts["held_out_rows"]
    assert rows[-1]["tokens"] == 2 * counts["data_tokens"]
    assert [row["step"] for row in rows if row["held_out_kl"] is not None] == [2, 4, *([len(rows)] if len(rows) % 2 else [])]
    assert all(0.0 <= row["held_out_top1"] <= 1.0 for row in rows if row["held_out_kl"] is not None)
    assert outcome.facts["held_out"][0]["last_kl"] == round(rows[-1]["held_out_kl"], 6) < rows[1]["held_out_kl"]
    assert [row["step"] for row in speed] == [row["step"] for row in rows]
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_bytes"] > 1e7 for row in speed)
    assert f"held-out KL {rows[-1]['held_out_kl']:.4f}, same likeliest token" in said[-1]
    assert "GB at most" in said[-1]


def test_measuring_more_often_trains_the_same_weights(train: Any, make_student: Any, tmp_path: Path) -> None:
    for every in (1, 1000):
        train(make_student({"method": "sft"}, init=SMALL, held_out=HELD_OUT | {"every": every}), str(every))
    often, seldom = (tmp_path / name / "out" for name in ("1", "1000"))
    assert file_sha256(often / "model.safetensors") == file_sha256(seldom / "model.safetensors")
    assert [row["loss"] for row in rows_of(tmp_path / "1")] == [row["loss"] for row in rows_of(tmp_path / "1000")]


def test_a_stage_that_stops_early_ends_with_its_best_weights_also_after_an_interruption(
    train: Any, make_student: Any, make_rows: Any, make_batch: Any, renderer: Any, teacher: ModelFolder, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    student = make_student(WILD, init=SMALL, held_out=HELD_OUT)
    said: list[str] = []
    outcome = train(student, "whole", progress=said.append)
    rows = rows_of(tmp_path / "whole")
    measured = [(row["step"], row["held_out_kl"]) for row in rows if row["held_out_kl"] is not None]
    least_step, least = min(measured, key=lambda pair: pair[1])
    assert len(measured) < 12, "it ran its whole way"
    assert all(kl >= least for _, kl in measured[-2:]), measured
    assert rows[-1]["step"] == least_step + 4
    assert outcome.facts["held_out"][0]["least_kl_step"] == least_step
    assert any("stopped early; held-out KL" in line for line in said)
    _, held, _ = split_held_out(*encode_examples([make_batch(make_rows(12))], renderer, max_length=2048), student.held_out)
    found = teacher_agreement(
        load_model(tmp_path / "whole" / "out"), load_model(teacher.path), held, layout="shared",
        pad_id=renderer.end_token_id, vocab_size=renderer.vocab_size, device="cpu",
    )  # fmt: skip
    assert found.forward_kl == pytest.approx(least, abs=1e-6)

    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", math.inf)
    original, cut_at = loop.TrainingRun._train_step, least_step + 1

    def cut(run: Any, index: int, position: Any, *args: Any) -> None:
        if position.step == cut_at and run.first_tokens == 0:
            raise KeyboardInterrupt
        original(run, index, position, *args)

    monkeypatch.setattr(loop.TrainingRun, "_train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        train(student, "cut", checkpoint_seconds=0.0)
    assert train(student, "cut").facts["resumed_from_step"] == cut_at
    assert rows_of(tmp_path / "cut") == rows
    assert file_sha256(tmp_path / "cut/out/model.safetensors") == file_sha256(tmp_path / "whole/out/model.safetensors")


def test_stopping_early_needs_a_held_out_part_and_neither_is_in_a_document_that_does_not_ask(make_student: Any) -> None:
    with pytest.raises(ValidationError, match=r"stages\.0\.early_stop: .* give held_out too"):
        make_student(WILD)
    document = make_student(KD).document()
    assert "held_out" not in document
    assert "early_stop" not in document["stages"][0]
    asked = make_student(WILD, held_out={})
    assert asked.document()["held_out"] == {"fraction": 0.05, "every": 50}
    assert asked.document()["stages"][0]["early_stop"] == {"patience": 2, "min_delta": 0.0}
    assert StudentSpec.model_validate(asked.document()) == asked
    assert make_student(KD | {"signal": "topk"}, held_out={}).needs_teacher
