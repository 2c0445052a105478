"""LoRA: only adapters are trained, and at the end there is a plain model that is the sum of both."""

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from distill_pipeline.errors import ConfigError, MissingExtraError
from distill_pipeline.hashing import file_sha256
from distill_pipeline.learning import LoraSpec
from distill_pipeline.models.load import load_model
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training import loop
from distill_pipeline.training.adapters import add_adapters
from distill_pipeline.training.checkpoints import model_tensors, optimizer_tensors
from distill_pipeline.training.examples import Example
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.optim import make_optimizer
from distill_pipeline.training.spec import StudentSpec, TrainStageSpec
from distill_pipeline.training.stage import train_student

PROBE = torch.tensor([[3, 4, 5, 6, 7]])
EXAMPLES = [Example("p", (3, 4, 5), ((6, 7, 2), (6, 8, 9, 2)))]
SMALL = LoraSpec(rank=2, alpha=8.0)


def gradients_of(model: Any, teacher: Any) -> dict[str, torch.Tensor]:
    pair = ModelPair(model, output_head(model), 40, teacher, output_head(teacher))
    accumulate_gradients(
        pair, EXAMPLES, TrainStageSpec(method="logit_kd", ce_weight=0.4), layout="shared", pad_id=2, device="cpu"
    )
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_student_with_new_adapters_is_the_student_and_only_they_have_gradients_and_state(random_model: Any) -> None:
    model, teacher = random_model(layers=2, seed=0), random_model(layers=2, seed=1).requires_grad_(False)
    with torch.no_grad():
        before = model(PROBE).logits
    adapters = add_adapters(model, SMALL, seed=0)
    with torch.no_grad():
        assert torch.equal(model(PROBE).logits, before)
    gradients = gradients_of(model, teacher)
    assert gradients.keys() == model_tensors(model).keys()
    assert all("lora_" in name for name in gradients)
    assert adapters.facts["layers"] == 2 * 7
    assert adapters.facts["trained_parameters"] == sum(gradient.numel() for gradient in gradients.values())
    optimizer = make_optimizer(model, TrainStageSpec(method="sft"))
    optimizer.step()
    moments = [tensor for name, tensor in optimizer_tensors(optimizer).items() if "exp_avg" in name]
    assert sum(tensor.numel() for tensor in moments) == 2 * adapters.facts["trained_parameters"]


def test_the_gradient_of_an_adapter_is_that_of_its_layers_weight_through_the_other_one(random_model: Any) -> None:
    plain, teacher = random_model(layers=1, seed=0), random_model(layers=2, seed=1).requires_grad_(False)
    whole = gradients_of(plain, teacher)["model.layers.0.mlp.up_proj.weight"]
    model = random_model(layers=1, seed=0)
    add_adapters(model, SMALL, seed=0)
    found = gradients_of(model, teacher)
    layer = model.model.layers[0].mlp.up_proj
    expected = 4.0 * whole @ layer.lora_A["default"].weight.detach().T  # alpha / rank = 4, dL/dB = dL/dW A^T
    torch.testing.assert_close(found["model.layers.0.mlp.up_proj.lora_B.default.weight"], expected, rtol=1e-4, atol=1e-6)


def test_merging_leaves_a_plain_model_with_the_same_logits_and_tied_embedding(random_model: Any, tmp_path: Path) -> None:
    model, original = random_model(layers=2, seed=0), random_model(layers=2, seed=0)
    adapters = add_adapters(model, SMALL, seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        before = model(PROBE).logits
    merged = adapters.merge(model)
    assert type(merged) is type(original)
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    with torch.no_grad():
        torch.testing.assert_close(merged(PROBE).logits, before, rtol=1e-5, atol=1e-5)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, original.lm_head.weight)
    merged.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"config.json", "generation_config.json", "model.safetensors"}
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path)(PROBE).logits, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_embedding_and_head_take_no_adapter(random_model: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is the embedding or the head, which take none"):
        add_adapters(random_model(layers=1, seed=0), LoraSpec(target_modules=("q_proj", name)), seed=0)


def test_a_layer_that_is_not_there_is_named_beside_those_that_are(random_model: Any) -> None:
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM has no layer query; its linear layers: down_proj, gate_proj"):
        add_adapters(random_model(layers=1, seed=0), LoraSpec(target_modules=("query",)), seed=0)


def test_without_peft_the_error_names_it_and_the_command(random_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=r"lora needs the package peft\. .*distill-pipeline\[lora\]"):
        add_adapters(random_model(layers=1, seed=0), SMALL, seed=0)


def test_a_lora_student_trains_resumes_exactly_and_is_a_plain_folder_with_its_embedding_as_it_was(
    make_student: Any, make_rows: Any, make_batch: Any, teacher: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"method": "logit_kd", "epochs": 4, "lr": 1e-2}
    student: StudentSpec = make_student(
        stage, init={"prune": {"layers": 1}}, lora={"rank": 4, "dropout": 0.1, "target_modules": ["q_proj", "down_proj"]}
    )

    def train(name: str) -> Any:
        return train_student(
            [make_batch(make_rows(12))], tmp_path / name / "out", tmp_path / name / "work", student=student, teacher=teacher,
            init_model=None, system=None, device="cpu", seed=0, progress=lambda line: None, checkpoint_seconds=0.0,
        )  # fmt: skip

    monkeypatch.setattr(loop, "CHECKPOINT_SHARE", math.inf)
    original = loop.TrainingRun._train_step
    sizes: list[int] = []

    def cut(run: Any, index: int, position: Any, *args: Any) -> None:
        if position.step == 5 and run.first_tokens == 0:
            newest = max((tmp_path / "cut" / "work" / "checkpoints").glob("step-*"))
            sizes.append((newest / "model.safetensors").stat().st_size)
            raise KeyboardInterrupt
        original(run, index, position, *args)

    outcome = train("whole")
    monkeypatch.setattr(loop.TrainingRun, "_train_step", cut)
    with pytest.raises(KeyboardInterrupt):
        train("cut")
    assert train("cut").facts["resumed_from_step"] == 5
    whole, again = (tmp_path / name / "out" for name in ("whole", "cut"))
    for name in ("model.safetensors", "curve.parquet"):
        assert file_sha256(whole / name) == file_sha256(again / name), name
    assert sizes[0] < 0.2 * (whole / "model.safetensors").stat().st_size
    assert outcome.facts["final_loss"] < outcome.facts["initial_loss"]
    assert outcome.facts["lora"]["rank"] == 4
    with safe_open(whole / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "lora" in name or "base_layer" in name]  # noqa: SIM118
    assert "peft" not in json.dumps(json.loads((whole / "config.json").read_text()))
    trained, first = load_model(whole), load_model(teacher.path)
    kept = outcome.facts["kept_layers"][0]
    ours, theirs = trained.model.layers[0], first.model.layers[kept]
    assert torch.equal(trained.model.embed_tokens.weight, first.model.embed_tokens.weight)
    assert torch.equal(ours.self_attn.k_proj.weight, theirs.self_attn.k_proj.weight)
    assert not torch.equal(ours.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight)
