"""Students before training: the right layers, a configuration that says so, and the same weights every time."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from distill_pipeline.errors import ConfigError, TrainingError
from distill_pipeline.models.load import load_model
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training.spec import InitSpec
from distill_pipeline.training.student import angular_distances, block_influence, cut_config, initial_student, keep_layers

CALIBRATION = [[5, 6, 7, 8, 9], [10, 11, 12]]
PROBE = torch.tensor([[3, 4, 5, 6, 7, 8]])


def init(**kind: Any) -> InitSpec:
    return InitSpec.model_validate(kind)


def test_pruning_drops_the_layers_that_turn_their_input_least(teacher: ModelFolder) -> None:
    model = load_model(teacher.path)
    with torch.inference_mode():
        states = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in CALIBRATION]
    # hidden_states holds each layer's input; the last layer's output is found behind the final norm, so it is left out
    by_hand = [
        torch.cat([1 - torch.cosine_similarity(each[i][0], each[i + 1][0], dim=-1) for each in states]).mean() for i in range(3)
    ]
    torch.testing.assert_close(
        torch.tensor(block_influence(model, CALIBRATION)[:3]), torch.stack(by_hand), atol=1e-5, rtol=1e-4
    )
    made = initial_student(init(prune={"layers": 3}), teacher, None, CALIBRATION, 0, "cpu")
    influence = made.facts["block_influence"]
    assert made.facts["kept_layers"] == sorted(set(range(4)) - {influence.index(min(influence))})
    assert made.facts["teacher_parameters"] == sum(p.numel() for p in model.parameters())
    assert made.facts["parameters"] == sum(p.numel() for p in made.model.parameters())
    assert made.facts["share"] == pytest.approx(made.facts["parameters"] / made.facts["teacher_parameters"], abs=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_angular_pruning_drops_the_run_of_layers_that_turns_its_input_least(teacher: ModelFolder, block: int) -> None:
    model = load_model(teacher.path)
    states: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: states.__setitem__(index, args[0]))
        layer.register_forward_hook(lambda _, args, output, index=index: states.__setitem__(index + 1, output))
    angles = []
    for ids in CALIBRATION:
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
        runs = range(4 - block + 1)
        cosine = torch.stack([torch.cosine_similarity(states[i][0], states[i + block][0], dim=-1) for i in runs])
        angles.append(torch.rad2deg(cosine.acos()) / 180)
    by_hand = torch.cat(angles, dim=1).mean(1)
    found = angular_distances(load_model(teacher.path), CALIBRATION, block)
    torch.testing.assert_close(torch.tensor(found), by_hand, atol=1e-5, rtol=1e-4)
    made = initial_student(init(prune={"layers": 4 - block, "by": "angular_distance"}), teacher, None, CALIBRATION, 0, "cpu")
    first = found.index(min(found))
    assert made.facts["kept_layers"] == [layer for layer in range(4) if layer < first or layer >= first + block]
    assert made.facts["angular_distance"] == pytest.approx(found, abs=1e-6)
    assert made.model.config.num_hidden_layers == 4 - block


@pytest.mark.parametrize(("prune", "kept"), [({"keep": [0, 2]}, [0, 2]), ({"drop": [1]}, [0, 2, 3])])
def test_listed_layers_stay_or_go_without_calibration(teacher: ModelFolder, prune: Any, kept: list[int]) -> None:
    made = initial_student(init(prune=prune), teacher, None, [], 0, "cpu")
    assert made.facts["kept_layers"] == kept
    assert made.facts["init"] == {"prune": prune}
    layers = load_model(teacher.path).model.layers
    for ours, theirs in zip(made.model.model.layers, [layers[i] for i in kept], strict=True):
        assert torch.equal(ours.mlp.up_proj.weight, theirs.mlp.up_proj.weight)


@pytest.mark.parametrize(("prune", "message"), [
    ({"keep": [0, 4]}, "layer 4 is listed and tiny-teacher has 4 layers: 0 to 3"),
    ({"drop": [7]}, "layer 7 is listed and tiny-teacher has 4 layers"),
    ({"drop": [0, 1, 2, 3]}, "all 4 layers of tiny-teacher are dropped"),
])  # fmt: skip
def test_layers_that_the_teacher_does_not_have_are_refused(teacher: ModelFolder, prune: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        initial_student(init(prune=prune), teacher, None, [], 0, "cpu")


@pytest.mark.parametrize(("prune", "message"), [
    ({}, r"give exactly one of layers, keep, drop \(given: none\)"),
    ({"layers": 2, "keep": [0]}, r"exactly one of layers, keep, drop \(given: layers, keep\)"),
    ({"keep": [0], "by": "angular_distance"}, "by: not read where keep lists the layers"),
    ({"drop": [2, 1]}, r"drop is \[2, 1\]; list each layer once, in rising order"),
    ({"keep": [1, 1]}, "list each layer once"),
    ({"keep": []}, "at least 1"),
    ({"keep": [-1]}, "greater than or equal to 0"),
])  # fmt: skip
def test_a_pruning_that_says_two_things_or_none_is_refused(prune: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        init(prune=prune)


def test_a_pruning_by_number_has_the_document_that_it_always_had() -> None:
    assert init(prune={"layers": 2}).document()["prune"] == {"layers": 2, "by": "block_influence"}
    for prune in ({"layers": 2, "by": "angular_distance"}, {"keep": [1]}, {"drop": [0, 3]}):
        assert init(prune=prune).document()["prune"] == prune
        assert init(**init(prune=prune).document()) == init(prune=prune)


def test_kept_layers_are_the_teachers_and_survive_saving(teacher: ModelFolder, tmp_path: Path) -> None:
    made = initial_student(init(prune={"layers": 2}), teacher, None, [], 0, "cpu", kept_layers=[0, 3])
    model = load_model(teacher.path)
    for student_layer, teacher_layer in zip(made.model.model.layers, [model.model.layers[i] for i in (0, 3)], strict=True):
        for ours, theirs in zip(student_layer.parameters(), teacher_layer.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert [layer.self_attn.layer_idx for layer in made.model.model.layers] == [0, 1]
    made.model.save_pretrained(tmp_path)
    with torch.inference_mode():
        ours, again = (m(input_ids=PROBE, use_cache=True).logits for m in (made.model, load_model(tmp_path)))
    assert torch.equal(ours, again)


def test_keeping_every_layer_gives_the_teacher(teacher: ModelFolder) -> None:
    made = initial_student(init(prune={"layers": 4}), teacher, None, CALIBRATION, 0, "cpu")
    with torch.inference_mode():
        assert torch.equal(made.model(input_ids=PROBE).logits, load_model(teacher.path)(input_ids=PROBE).logits)


def test_lists_with_one_entry_a_layer_are_cut_with_the_layers() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    keep_layers(model, [1, 3])
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.num_hidden_layers == 2


def test_a_second_call_with_the_kept_layers_gives_the_same_student(teacher: ModelFolder) -> None:
    first = initial_student(init(prune={"layers": 2}), teacher, None, CALIBRATION, 0, "cpu")
    again = initial_student(init(prune={"layers": 2}), teacher, None, [], 0, "cpu", kept_layers=first.facts["kept_layers"])
    for ours, theirs in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_scratch_depends_on_the_seed_alone_and_leaves_the_random_state(teacher: ModelFolder) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    made = [initial_student(init(scratch={"layers": 2}), teacher, None, [], seed, "cpu").model for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    weights = [model.model.layers[0].mlp.up_proj.weight for model in made]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert made[0].config.num_hidden_layers == len(made[0].model.layers) == 2


def test_a_given_model_is_taken_as_it_is(teacher: ModelFolder, small_model: ModelFolder) -> None:
    made = initial_student(init(model="small"), teacher, small_model, [], 0, "cpu")
    assert made.facts["init_model"] == {"reference": "tiny-model", "identity": "model-identity"}
    with torch.inference_mode():
        assert torch.equal(made.model(input_ids=PROBE).logits, load_model(small_model.path)(input_ids=PROBE).logits)


@pytest.mark.parametrize("kind", ["prune", "scratch"])
def test_more_layers_than_the_teacher_has_are_refused(teacher: ModelFolder, kind: str) -> None:
    with pytest.raises(ConfigError, match="the student wants 5 layers and tiny-teacher has 4"):
        initial_student(init(**{kind: {"layers": 5}}), teacher, None, CALIBRATION, 0, "cpu")


@pytest.mark.parametrize("by", ["block_influence", "angular_distance"])
def test_pruning_without_text_is_refused(teacher: ModelFolder, by: str) -> None:
    with pytest.raises(TrainingError, match="needs calibration text"):
        initial_student(init(prune={"layers": 2, "by": by}), teacher, None, [], 0, "cpu")


def test_a_missing_init_folder_is_named(teacher: ModelFolder) -> None:
    with pytest.raises(ConfigError, match="starts from some-model"):
        initial_student(init(model="some-model"), teacher, None, [], 0, "cpu")


def test_a_configuration_without_layer_lists_only_changes_its_number(random_model: Any) -> None:
    config = random_model(layers=3, seed=0).config
    cut_config(config, 3, [0, 2])
    assert config.num_hidden_layers == 2
    assert config.hidden_size == 32
