"""Which layout a model can read is found by trial, and packed rows have the loss, the gradient and the borders of plain ones.

Not covered: flash attention's own kernels, which want CUDA. All of transformers' code before and behind them runs here.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
import transformers.modeling_flash_attention_utils as flash
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPTNeoConfig,
    GptOssConfig,
    JambaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from distill_pipeline.models.forward import in_float32
from distill_pipeline.models.load import load_tokenizer
from distill_pipeline.models.output_head import output_head
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.training import stage
from distill_pipeline.training.batches import micro_batches
from distill_pipeline.training.examples import Example
from distill_pipeline.training.layout import choose_layout, hidden_states
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.spec import TrainStageSpec
from distill_pipeline.training.stage import train_student

WINDOW = 6
EXAMPLE = st.builds(
    Example,
    st.uuids().map(str),
    st.lists(st.integers(3, 9), min_size=1, max_size=9).map(tuple),
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=7).map(tuple), min_size=1, max_size=4).map(tuple),
    weight=st.sampled_from([1.0, 0.25]),
)
EXAMPLES = st.lists(EXAMPLE, min_size=1, max_size=4)
SMALL = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
EVERY_METHOD = {
    "sft": TrainStageSpec(method="sft"),
    "logit_kd": TrainStageSpec(method="logit_kd", ce_weight=0.4, kd_temperature=2.0),
    "on_policy": TrainStageSpec(method="on_policy", objective="policy_gradient", divergence="reverse_kl", rollouts={}),
}


def build(config: PreTrainedConfig, attention: str | None = None, seed: int = 0) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def windowed(attention: str = "sdpa", seed: int = 0, window: int = WINDOW, layers: int = 2) -> Any:
    """A random Mistral of 40 ids that sees ``window`` tokens in each layer."""
    return build(MistralConfig(**SMALL | {"num_hidden_layers": layers}, sliding_window=window), attention, seed)


def pair_of(attention: str) -> ModelPair:
    student, teacher = windowed(attention), windowed(attention, seed=1).requires_grad_(False)
    return ModelPair(student, output_head(student), 40, teacher, output_head(teacher))


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def models(request: pytest.FixtureRequest) -> ModelPair:
    return pair_of(request.param)


def trained(models: ModelPair, examples: list[Example], method: str, layout: Any, max_tokens: int) -> list[torch.Tensor]:
    """Loss and gradients, as one list."""
    recipe = EVERY_METHOD[method].model_copy(update={"micro_batch_tokens": max_tokens})
    models.student.zero_grad(set_to_none=True)
    result = accumulate_gradients(models, examples, recipe, layout=layout, pad_id=2, device="cpu")
    return [torch.tensor(result.loss), *(parameter.grad.clone() for parameter in models.student.parameters())]


def assert_same(ours: list[torch.Tensor], others: list[torch.Tensor]) -> None:
    scale = max(1.0, *(float(tensor.abs().max()) for tensor in others))
    for mine, other in zip(ours, others, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5 * scale, rtol=1e-5)


# --- what is exact ----------------------------------------------------------------------------------------------------


@given(examples=EXAMPLES, method=st.sampled_from(sorted(EVERY_METHOD)), max_tokens=st.sampled_from([1, 30, 4096]))
@settings(deadline=None, max_examples=20)
def test_packed_rows_train_as_plain_ones_under_sliding_windows(
    models: ModelPair, examples: list[Example], method: str, max_tokens: int
) -> None:
    assert_same(trained(models, examples, method, "packed", max_tokens), trained(models, examples, method, "plain", 4096))


def test_a_window_shorter_than_the_data_has_a_part_in_that(models: ModelPair) -> None:
    wide = windowed(models.student.config._attn_implementation, window=64)
    examples = [Example("p", tuple(range(3, 15)), ((5, 6, 7),)), Example("q", (4, 4), ((8, 9),))]
    (batch,) = micro_batches(examples, layout="packed", max_tokens=4096, pad_id=2)
    with torch.no_grad():
        narrow_PH, wide_PH = hidden_states(models.student, batch), hidden_states(wide, batch)
    assert float((narrow_PH[:3] - wide_PH[:3]).abs().max()) > 0.01
    torch.testing.assert_close(narrow_PH[3:], wide_PH[3:])


@pytest.fixture
def windowed_teacher(teacher: ModelFolder, tmp_path: Path) -> ModelFolder:
    tokenizer = load_tokenizer(teacher.path)
    config = MistralConfig(**SMALL | {"vocab_size": len(tokenizer), "num_hidden_layers": 3}, sliding_window=16)
    build(config).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    return ModelFolder(tmp_path / "teacher", "windowed", None, "windowed-identity", None)


def test_a_student_of_a_windowed_teacher_trains_packed_as_it_trains_plain(
    windowed_teacher: ModelFolder, make_student: Any, make_rows: Any, make_batch: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    own = {"method": "on_policy", "divergence": "jsd", "rollouts": {"samples": 2, "max_tokens": 8}}
    small = {"micro_batch_tokens": 100, "max_steps": 2}
    student = make_student(
        *(recipe | small for recipe in ({"method": "sft"}, {"method": "logit_kd", "ce_weight": 0.3}, own)),
        held_out={"fraction": 0.3, "every": 1},
    )

    def train(name: str) -> Any:
        return train_student(
            [make_batch(make_rows(10))], tmp_path / name / "out", tmp_path / name / "work", student=student,
            teacher=windowed_teacher, init_model=None, system=None, device="cpu", seed=0, progress=lambda line: None,
        )  # fmt: skip

    facts = train("packed").facts
    assert facts["layout"] == "packed"
    assert "its sliding window of 16 tokens is shorter than the data" in facts["layout_reason"]
    monkeypatch.setattr(stage, "choose_layout", lambda *args: ("plain", "asked"))
    assert train("plain").facts["layout"] == "plain"
    packed, plain = (pq.read_table(tmp_path / name / "out" / "curve.parquet").to_pylist() for name in ("packed", "plain"))
    assert [row["stage"] for row in packed] == [0, 0, 1, 1, 2, 2]
    for ours, theirs in zip(packed, plain, strict=True):
        for key in ("loss", "ce", "kl", "grad_norm", "held_out_kl"):
            assert ours[key] == (None if theirs[key] is None else pytest.approx(theirs[key], abs=1e-5, rel=1e-5)), key


# --- what is chosen ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_layout_is_packed_for_windows_shorter_than_the_data_and_shared_for_longer_ones(
    random_model: Any, attention: str
) -> None:
    model = windowed(attention, window=16)
    assert choose_layout([model], longest=15)[0] == "shared"
    layout, reason = choose_layout([random_model(layers=1, seed=0), model], longest=20)
    assert layout == "packed"
    assert "not shared: MistralForCausalLM: its sliding window of 16 tokens is shorter than the data (20)" in reason


def test_a_window_of_another_name_that_a_tree_is_longer_than_is_found_though_no_text_is() -> None:
    config = {"vocab_size": 40, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "initializer_range": 0.2}
    local = {"attention_types": [[["global", "local"], 1]], "window_size": 64}
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_layout([build(GPTNeoConfig(**config, **local)).to(dtype)], longest=10)[0] == "packed"
    assert choose_layout([build(GPTNeoConfig(**config, attention_types=[[["global"], 2]]))], longest=10)[0] == "shared"


def test_layout_is_packed_for_a_teacher_in_bfloat16_too() -> None:
    assert choose_layout([windowed(window=16).to(torch.bfloat16)], longest=20)[0] == "packed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layout_is_shared_for_deep_models_in_half_precision_too(random_model: Any, dtype: torch.dtype) -> None:
    model = random_model(layers=12, seed=0).to(dtype)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    assert choose_layout([model], 60)[0] == "shared"
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, before[name])


def test_a_model_in_float32_for_a_while_says_what_its_wide_twin_says_and_is_narrow_again(random_model: Any) -> None:
    model = random_model(layers=3, seed=0).to(torch.bfloat16)
    twin, ids = copy.deepcopy(model).float(), torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad(), in_float32(model):
        assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)
        with pytest.raises(IndexError):
            model(input_ids=ids + 1000)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_layout_is_shared_under_eager_attention_too(random_model: Any) -> None:
    model = random_model(layers=2, seed=0)
    model.set_attn_implementation("eager")
    assert choose_layout([model], longest=7)[0] == "shared"


@pytest.mark.parametrize(
    ("config", "longest"),
    [
        (MambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=1), 20),
        (JambaConfig(**SMALL, num_experts=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1), 20),
        # Its masks are made without the position ids, as are those of the next, which takes none at all.
        (GptOssConfig(**SMALL, head_dim=8, sliding_window=16, num_local_experts=2, num_experts_per_tok=1), 20),
        (BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2), 7),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_layout_is_plain_for_models_in_which_packed_sequences_see_each_other(config: PreTrainedConfig, longest: int) -> None:
    layout, reason = choose_layout([windowed(window=16), build(config)], longest)
    assert layout == "plain"
    assert "not packed: " in reason
    assert "saw another one" in reason


def damaged(kind: str) -> Any:
    """A model in which packed sequences do not see each other, and yet are read otherwise, or not at all."""
    model = windowed(window=16)
    original = model.model.forward

    def forward(**inputs: Any) -> Any:
        if inputs["attention_mask"] is None:
            if kind == "refuses":
                raise TypeError("no position_ids here\nand more")
            positions = inputs["position_ids"]
            if kind == "past its window":
                positions = positions + (positions > 16).long()
            elif kind == "second sequence":
                second = (positions[0] == 0).long().cumsum(0) > 1
                positions = positions + (positions > 0).long() * second * 3
            inputs["position_ids"] = positions
        return original(**inputs)

    model.model.forward = forward
    return model


@pytest.mark.parametrize("kind", ["past its window", "second sequence"])
def test_layout_is_plain_where_a_trial_past_the_window_has_other_hidden_states(kind: str) -> None:
    layout, reason = choose_layout([damaged(kind)], longest=40)
    assert layout == "plain"
    assert reason.endswith("a trial with 24 tokens gave other hidden states packed than alone")


def test_a_model_that_refuses_packed_rows_is_quoted() -> None:
    layout, reason = choose_layout([damaged("refuses")], longest=40)
    assert layout == "plain"
    assert reason.endswith("a trial of packed sequences failed with TypeError: no position_ids here")


def test_a_trial_leaves_the_model_in_training_as_it_was() -> None:
    model = windowed(window=16).train()
    assert choose_layout([model], longest=20)[0] == "packed"
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# --- flash attention --------------------------------------------------------------------------------------------------


@given(examples=EXAMPLES, max_tokens=st.integers(1, 200))
@settings(deadline=None, max_examples=40)
def test_flash_attention_finds_exactly_our_borders_in_a_packed_row(examples: list[Example], max_tokens: int) -> None:
    for batch in micro_batches(examples, layout="varlen", max_tokens=max_tokens, pad_id=2):
        position_ids = batch.position_ids_ST
        starts = [place for place, end in enumerate([0, *batch.end_ST[0].tolist()][:-1]) if place == end]
        assert bool(flash._is_packed_sequence(position_ids, len(position_ids))) == (len(starts) > 1)
        (borders_q, borders_k), (longest_q, _) = flash.prepare_fa_kwargs_from_position_ids(position_ids)
        assert borders_q.tolist() == borders_k.tolist() == [*starts, position_ids.shape[1]]
        assert int(longest_q) == int(position_ids.max()) + 1


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention of one sequence: q, k and v are (tokens, heads, width), in groups."""
    place = torch.arange(len(q))
    seen = (place[:, None] >= place) & ((place[:, None] - place <= window) if window >= 0 else True)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1)


@pytest.fixture
def flash_kernel(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Loops in the place of flash attention's two kernels; the borders of every call of the one for sequences of several."""
    calls: list[list[int]] = []

    def varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        assert causal
        assert cu_seqlens_q.tolist() == cu_seqlens_k.tolist()
        calls.append(cu_seqlens_q.tolist())
        lengths = cu_seqlens_q.diff().tolist()
        return torch.cat([attend(*parts, window_size[0]) for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])

    def dense(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> torch.Tensor:  # fmt: skip
        assert causal
        return torch.stack([attend(*row, window_size[0]) for row in zip(q, k, v, strict=True)])

    for name in ("_loaded_implementation", "_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn",
                 "_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):  # fmt: skip
        monkeypatch.setattr(flash, name, None, raising=False)
    functions = (dense, varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **options: functions)
    return calls


@pytest.fixture
def under_flash() -> Callable[[Any], Any]:
    def switch(model: Any) -> Any:
        model.config._attn_implementation = "flash_attention_2"  # its setter of models asks for CUDA
        return model

    return switch


def test_layout_is_varlen_where_flash_attention_keeps_sequences_apart(flash_kernel: Any, under_flash: Any) -> None:
    layout, reason = choose_layout([under_flash(windowed(window=16))], longest=20)
    assert layout == "varlen"
    assert "attention implementation flash_attention_2 takes no mask of this shape" in reason
    assert [0, 24 - 4, 40, 47, 48] in flash_kernel
    assert choose_layout([under_flash(windowed(window=16)), windowed(window=16)], longest=20)[0] == "packed"


def test_long_rows_under_flash_attention_train_as_plain_ones_by_its_kernel_for_several_sequences(
    flash_kernel: list[list[int]], under_flash: Any
) -> None:
    plain, models = pair_of("sdpa"), pair_of("sdpa")
    under_flash(models.student)
    under_flash(models.teacher)
    examples = [Example(str(i), tuple(range(3, 6 + i)), ((5, 6), (5, 7, 2), tuple(range(3, 9 + i)))) for i in range(5)]
    assert_same(trained(models, examples, "logit_kd", "varlen", 4096), trained(plain, examples, "logit_kd", "plain", 4096))
    (batch,) = micro_batches(examples, layout="varlen", max_tokens=4096, pad_id=2)
    starts = (batch.position_ids_ST[0] == 0).nonzero().flatten().tolist()
    assert len(starts) == 15
    assert flash_kernel == [[*starts, batch.token_ids_ST.shape[1]]] * 4  # two layers of two models
