"""Heads of real architectures: described as their own logits confirm it, trained as their own forward pass, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from distill_pipeline.errors import TrainingError
from distill_pipeline.models.output_head import OutputHead, output_head
from distill_pipeline.training.examples import Example
from distill_pipeline.training.loop import ModelPair, accumulate_gradients
from distill_pipeline.training.spec import TrainStageSpec

SIZES: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip
EXAMPLES = [Example("p", (3, 4, 5), ((6, 7, 2), (6, 8, 9, 2))), Example("q", (3, 9), ((4, 4, 2),))]


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for name, parameter in model.named_parameters():
            if name == "lm_head.bias":
                torch.nn.init.normal_(parameter)
        return model


def gpt2(kind: Any = GPT2LMHeadModel) -> Any:
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return seeded(lambda: kind(config))


def gemma2(cap: float | None = 2.0) -> Any:
    return seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=cap)))


def phi() -> Any:
    return seeded(lambda: PhiForCausalLM(PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0)))


def granite() -> Any:
    return seeded(lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)))


def cohere() -> Any:
    return seeded(lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)))


KNOWN: dict[str, tuple[Callable[[], Any], tuple[bool, float, float | None]]] = {
    "a matrix": (gpt2, (False, 1.0, None)), "a soft-cap": (gemma2, (False, 1.0, 2.0)),
    "a factor": (cohere, (False, 0.25, None)), "a divisor": (granite, (False, 0.25, None)), "a bias": (phi, (True, 1.0, None)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KNOWN)
def test_a_head_is_described_as_the_models_own_logits_confirm(kind: str) -> None:
    build, (has_bias, scale, cap) = KNOWN[kind]
    model = build()
    head = output_head(model)
    assert (head.bias_V is not None, head.scale, head.cap) == (has_bias, scale, cap)
    assert head.weight_VH is model.get_output_embeddings().weight
    assert head.is_plain == (kind == "a matrix")
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("student", KNOWN)
@pytest.mark.parametrize("teacher", ["a matrix", "a soft-cap", "a bias"])
def test_loss_and_gradient_are_those_of_the_models_own_forward_passes(student: str, teacher: str) -> None:
    ours, frozen = KNOWN[student][0](), KNOWN[teacher][0]().requires_grad_(False)
    stage = TrainStageSpec(method="logit_kd", ce_weight=0.4, kd_temperature=2.0)
    pair = ModelPair(ours, output_head(ours), 40, frozen, output_head(frozen))
    found = accumulate_gradients(pair, EXAMPLES, stage, layout="plain", pad_id=2, device="cpu").loss
    gradients = [parameter.grad.clone() for parameter in ours.parameters()]
    ours.zero_grad(set_to_none=True)
    loss = torch.stack([by_hand(ours, frozen, e.prompt, ids) for e in EXAMPLES for ids in e.completions]).sum() / 10
    loss.backward()
    assert found == pytest.approx(loss.item(), abs=1e-5 * max(1.0, loss.item()))
    for gradient, parameter in zip(gradients, ours.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=2e-5, rtol=1e-4)


def by_hand(student: Any, teacher: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """0.6 KL + 0.4 cross-entropy of a completion at temperature 2 from the models' own logits, by plain autograd."""
    ids, where = torch.tensor([[*prompt, *completion]]), slice(len(prompt) - 1, -1)
    logits, expected = (model(input_ids=ids).logits[0, where].float() for model in (student, teacher))
    kl = F.kl_div((logits / 2).log_softmax(-1), (expected / 2).log_softmax(-1), log_target=True, reduction="sum") * 4
    return 0.6 * kl + 0.4 * F.cross_entropy(logits, torch.tensor(completion), reduction="sum")


@pytest.mark.parametrize("kind", KNOWN)
def test_a_head_in_bfloat16_is_the_same_head(kind: str) -> None:
    build, (has_bias, scale, cap) = KNOWN[kind]
    head = output_head(build().bfloat16())
    assert (head.bias_V is not None, head.scale, head.cap) == (has_bias, scale, cap)


def test_a_cap_is_seen_although_the_models_logits_are_small() -> None:
    model = gemma2(30.0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-3)
    assert output_head(model).cap == 30.0
    model.config.final_logit_softcapping = None  # read by the forward pass, too: now it has none
    assert output_head(model).cap is None


def test_a_cap_that_the_model_does_not_apply_is_not_believed() -> None:
    model = gpt2()
    model.config.final_logit_softcapping, model.config.logit_scale = 30.0, 0.5
    assert output_head(model).is_plain


class Doubled(GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


class Bounded(GPT2LMHeadModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 50.0) * 50.0
        return output


@pytest.mark.parametrize("kind", [Doubled, Bounded])
def test_whatever_else_happens_to_the_logits_is_refused(kind: Any) -> None:
    with pytest.raises(TrainingError, match=f"logits of {kind.__name__} are not its last hidden states times"):
        output_head(gpt2(kind))


def test_weights_that_are_not_numbers_are_named_as_such() -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = torch.nan
    with pytest.raises(TrainingError, match="the logits of GPT2LMHeadModel are not numbers on the tokens 2 to 9"):
        output_head(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(TrainingError, match="GPT2Model has no output embedding"):
        output_head(gpt2().base_model)


def test_a_cut_head_keeps_its_form_and_its_gradient() -> None:
    head = OutputHead(torch.randn(6, 3, requires_grad=True), torch.randn(6, requires_grad=True), 0.5, 3.0)
    cut = head.cut(4)
    assert (len(cut), cut.scale, cut.cap) == (4, 0.5, 3.0)
    assert head.cut(6) is head
    hidden = torch.randn(2, 3)
    torch.testing.assert_close(cut.logits(hidden), head.logits(hidden)[:, :4])
    assert cut.bias_V is not None
    assert cut.bias_V.requires_grad
    assert not head.detached().weight_VH.requires_grad
