"""Precision and memory: float16 loses no gradient and repeats what overflows; computing layers again changes nothing."""

import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from distill_pipeline.errors import TrainingError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.nodes import _deciding
from distill_pipeline.training import loop, optim
from distill_pipeline.training.examples import Example
from distill_pipeline.training.layout import compute_dtype
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.optim import GROWTH_STEPS, LossScale
from distill_pipeline.training.spec import StudentSpec, TrainStageSpec
from distill_pipeline.training.stage import checkpoint_activations, train_student

EXAMPLES = [Example("p", (3, 4, 5), ((6, 7, 2), (6, 8, 9, 2))), Example("q", (3, 4), ((9, 9, 8, 7, 2),))]
STAGE = TrainStageSpec(method="logit_kd", ce_weight=0.4, kd_temperature=2.0)
SMALL = {"prune": {"layers": 1}}


@pytest.fixture
def models(random_model: Any) -> ModelPair:
    student, teacher = random_model(layers=3, seed=0), random_model(layers=3, seed=1).requires_grad_(False)
    return ModelPair(student, output_head(student), 40, teacher, output_head(teacher))


def loss_and_gradient(models: ModelPair, **options: Any) -> tuple[float, torch.Tensor]:
    models.student.zero_grad(set_to_none=True)
    result = accumulate_gradients(models, EXAMPLES, STAGE, layout="shared", pad_id=2, device="cpu", **options)
    return result.loss, torch.cat([parameter.grad.flatten() for parameter in models.student.parameters()])


def train(student: StudentSpec, teacher: ModelFolder, batch: Any, folder: Path, **options: Any) -> Any:
    return train_student(
        [batch], folder / "out", folder / "work", student=student, teacher=teacher, init_model=None, system=None,
        device="cpu", seed=0, **{"progress": lambda line: None} | options,
    )  # fmt: skip


def losses(folder: Path) -> list[float]:
    found: list[float] = pq.read_table(folder / "out" / "curve.parquet")["loss"].to_pylist()
    return found


def test_precision_says_what_forward_passes_run_in() -> None:
    assert compute_dtype("auto", "cpu") == torch.float32
    assert compute_dtype("auto", "cuda:1") == torch.bfloat16
    assert [compute_dtype(p, "cuda") for p in ("fp32", "bf16", "fp16")] == [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("scale", [0.25, 1024.0])
def test_a_scaled_gradient_is_the_gradient_times_the_scale_and_the_loss_is_not(models: ModelPair, scale: float) -> None:
    loss, gradient = loss_and_gradient(models)
    scaled_loss, scaled = loss_and_gradient(models, grad_scale=scale)
    assert scaled_loss == loss
    torch.testing.assert_close(scaled, gradient * scale, rtol=1e-5, atol=1e-7 * scale)


def test_float16_with_its_scale_keeps_the_gradient_and_without_it_loses_some(models: ModelPair) -> None:
    _, exact = loss_and_gradient(models)
    tiny = 2.0**-18  # as if the step had 260,000 times as many tokens
    _, lost = loss_and_gradient(models, dtype=torch.float16, grad_scale=tiny)
    _, kept = loss_and_gradient(models, dtype=torch.float16, grad_scale=tiny * 2.0**16)
    assert (lost / tiny - exact).norm() > 0.1 * exact.norm()
    assert (kept / tiny / 2.0**16 - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gives_no_negative_loss(models: ModelPair, dtype: torch.dtype) -> None:
    models.teacher.load_state_dict(models.student.state_dict())
    stage = TrainStageSpec(method="logit_kd")
    near = accumulate_gradients(models, EXAMPLES, stage, layout="shared", pad_id=2, device="cpu", dtype=dtype)
    assert 0.0 <= near.loss < 1e-4


def test_the_scale_halves_on_overflow_and_doubles_after_many_good_steps() -> None:
    scale = LossScale.of(torch.float16)
    assert scale.shrink()
    assert LossScale(**scale.state()) == scale
    for _ in range(GROWTH_STEPS - 1):
        scale.grow()
    assert scale.scale == optim.FIRST_SCALE / 2
    scale.grow()
    assert (scale.scale, scale.good_steps) == (optim.FIRST_SCALE, 0)
    for dtype in (torch.float32, torch.bfloat16):
        fixed = LossScale.of(dtype)
        for _ in range(GROWTH_STEPS):
            fixed.grow()
        assert not fixed.shrink()
        assert fixed.scale == 1.0


def test_a_float16_step_that_overflows_is_repeated_and_the_run_resumes_with_its_scale(
    make_student: Any, make_rows: Any, make_batch: Any, teacher: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, batch = make_student({"method": "logit_kd", "epochs": 2}, init=SMALL, precision="fp16"), make_batch(make_rows(12))
    train(student, teacher, batch, tmp_path / "calm")
    monkeypatch.setattr(optim, "FIRST_SCALE", 2.0**40)  # no float16 holds such gradients
    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", math.inf)
    outcome = train(student, teacher, batch, tmp_path / "whole", checkpoint_seconds=0.0)
    assert outcome.facts["dtype"] == "float16 forward, float32 weights"
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "calm"), rel=1e-2)
    assert losses(tmp_path / "whole")[-1] < 0.9 * losses(tmp_path / "whole")[0]

    original, scales = loop.TrainingRun._train_step, []

    def cut(run: Any, index: int, position: Any, *args: Any) -> None:
        if position.step == 3 and run.first_tokens == 0:
            scales.append(run._loss_scale.state())
            raise KeyboardInterrupt
        if run.first_tokens and len(scales) == 1:
            scales.append(run._loss_scale.state())
        original(run, index, position, *args)

    monkeypatch.setattr(loop.TrainingRun, "_train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        train(student, teacher, batch, tmp_path / "cut", checkpoint_seconds=0.0)
    train(student, teacher, batch, tmp_path / "cut", checkpoint_seconds=0.0)
    assert scales[0] == scales[1]
    assert scales[0]["scale"] < 2.0**40
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert file_sha256(tmp_path / "cut/out/model.safetensors") == file_sha256(tmp_path / "whole/out/model.safetensors")


def test_computing_layers_again_changes_neither_loss_nor_gradient_and_keeps_less(models: ModelPair) -> None:
    def run() -> tuple[float, torch.Tensor, int]:
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {parameter.untyped_storage().data_ptr() for parameter in models.student.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, gradient = loss_and_gradient(models)
        return loss, gradient, sum(size for place, size in kept.items() if place not in weights)

    models.student.train()
    loss, gradient, all_kept = run()
    checkpoint_activations(models.student)
    again, same, few_kept = run()
    assert abs(again - loss) < 1e-6
    torch.testing.assert_close(same, gradient, rtol=0.0, atol=1e-6)
    assert few_kept < 0.5 * all_kept, (few_kept, all_kept)


def test_a_model_that_cannot_compute_layers_again_is_refused(models: ModelPair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(models.student), "supports_gradient_checkpointing", False)
    with pytest.raises(TrainingError, match="LlamaForCausalLM cannot compute its layers again"):
        checkpoint_activations(models.student)


def test_a_student_trained_with_layers_computed_again_is_the_same_student(
    make_student: Any, make_rows: Any, make_batch: Any, teacher: ModelFolder, tmp_path: Path
) -> None:
    for name, options in (("plain", {}), ("again", {"gradient_checkpointing": True})):
        train(make_student({"method": "logit_kd"}, init=SMALL, **options), teacher, make_batch(make_rows(12)), tmp_path / name)
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), abs=1e-6)
    config = (tmp_path / "again/out/config.json").read_text()
    assert config == (tmp_path / "plain/out/config.json").read_text()


def test_what_is_not_asked_for_is_in_no_document_and_memory_decides_nothing(make_student: Any) -> None:
    document = make_student().document()
    assert document.keys() == {"data", "init", "stages", "max_length"}
    asked = make_student(lora={}, precision="fp16", gradient_checkpointing=True)
    assert asked.document()["lora"] == {"rank": 16, "alpha": 32.0, "dropout": 0.0, "target_modules": None}
    assert asked.document()["precision"] == "fp16"
    assert StudentSpec.model_validate(asked.document()) == asked
    assert _deciding(make_student(gradient_checkpointing=True).document()) == _deciding(document)
