"""The chunked head against plain autograd over all logits, and what it refuses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_pipeline import losses
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.training import head
from distill_pipeline.training.head import Targets, head_loss


def make_targets(pairs: list[tuple[int, int, int]], positions: int) -> Targets:
    """From (position, target, weight), every position present at least once."""
    pairs = sorted(pairs)
    position, target, weight = (torch.tensor(column) for column in zip(*pairs, strict=True))
    bounds = [0, *torch.bincount(position, minlength=positions).cumsum(0).tolist()]
    weight_P = torch.zeros(positions).index_add_(0, position, weight.float())
    return Targets(bounds, position, target, weight.float(), weight_P)


def all_logits(hidden: Tensor, head: OutputHead) -> Tensor:
    """The head's formula on everything at once, as plain autograd."""
    logits = F.linear(hidden, head.weight_VH, head.bias_V) * head.scale
    return logits if head.cap is None else torch.tanh(logits / head.cap) * head.cap


def plain_loss(
    hidden: Tensor, student: OutputHead, teacher_hidden: Tensor, teacher: OutputHead, targets: Targets, *, num_tokens: float,
    kd_temperature: float, ce_weight: float,
) -> Tensor:  # fmt: skip
    """The same loss by autograd over all logits at once."""
    logits, teacher_logits = all_logits(hidden, student), all_logits(teacher_hidden, teacher)
    log_q, log_p = (F.log_softmax(x / kd_temperature, dim=-1) for x in (logits, teacher_logits))
    kl = (F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1) * targets.weight_P).sum() * kd_temperature**2
    log_q1 = F.log_softmax(logits, dim=-1)
    ce = -(log_q1[targets.pair_position_N, targets.pair_target_N] * targets.pair_weight_N).sum()
    return ((1 - ce_weight) * kl + ce_weight * ce) / num_tokens


Form = tuple[bool, float, float | None]
"""Whether a head has a bias, its scale, and its cap."""
FORM = st.tuples(st.booleans(), st.sampled_from([1.0, 0.25, 2.0]), st.sampled_from([None, 3.0, 30.0]))


@given(
    seed=st.integers(0, 10_000), positions=st.integers(1, 12), chunk_tokens=st.sampled_from([1, 3, 5, 100]),
    kd_temperature=st.sampled_from([1.0, 2.5]), ce_weight=st.sampled_from([0.0, 0.3, 1.0]), rows=st.sampled_from([1, 2, 50]),
    ours_form=FORM, teachers_form=FORM,
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_chunked_loss_and_gradients_equal_plain_autograd(
    seed: int, positions: int, chunk_tokens: int, kd_temperature: float, ce_weight: float, rows: int, ours_form: Form,
    teachers_form: Form,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def head_of(width: int, form: Form) -> OutputHead:
        return OutputHead(random(23, width), random(23) if form[0] else None, *form[1:])

    hidden, student = random(positions, 8).requires_grad_(True), head_of(8, ours_form)
    teacher_hidden, teacher = random(positions, 5), head_of(5, teachers_form)
    learned = [x.requires_grad_(True) for x in (hidden, student.weight_VH, student.bias_V) if x is not None]
    pairs = [(i, int(torch.randint(23, (1,), generator=generator)), 1 + i % 3) for i in [*range(positions), 0, positions // 2]]
    targets = make_targets(pairs, positions)
    options: dict[str, Any] = {"num_tokens": 37.0, "kd_temperature": kd_temperature, "ce_weight": ce_weight}
    old, head.BLOCK_ELEMENTS = head.BLOCK_ELEMENTS, rows * 23
    try:
        ours = head_loss(
            hidden, student, targets, teacher_hidden_PH=teacher_hidden, teacher_head=teacher, chunk_tokens=chunk_tokens,
            **options,
        ).loss  # fmt: skip
    finally:
        head.BLOCK_ELEMENTS = old
    plain = plain_loss(hidden, student, teacher_hidden, teacher, targets, **options)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    # A factor behind the loss must reach the gradients too.
    for a, b in zip(torch.autograd.grad(3 * ours, learned), torch.autograd.grad(3 * plain, learned), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", *losses.TOKEN_DIVERGENCES])
@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
def test_head_and_public_function_are_one_divergence(name: str, kd_temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(23, 8)
    teacher_hidden, teacher_weight = torch.randn(6, 5), torch.randn(23, 5)
    options = {"skew_forward_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}, "jsd": {"beta": 0.5}, "akl": {"mu": 0.5}}
    log_q = losses.log_probs((hidden @ weight.T).detach(), kd_temperature)
    log_p = losses.log_probs(teacher_hidden @ teacher_weight.T, kd_temperature)
    loss_N, gradient = losses.divergence_with_gradient(
        name, log_q, log_p, kd_temperature=kd_temperature, **options.get(name, {})
    )
    logits = (hidden @ weight.T).detach().requires_grad_(True)
    public = getattr(losses, name)(
        logits[None],
        (teacher_hidden @ teacher_weight.T)[None],
        torch.zeros(1, 6, dtype=torch.long),
        kd_temperature=kd_temperature,
    )
    torch.testing.assert_close(loss_N.mean(), public, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient / 6, torch.autograd.grad(public, logits)[0], atol=1e-6, rtol=1e-4)


OPTIONS = {"skew_forward_kl": {"alpha": 0.3}, "skew_reverse_kl": {"alpha": 0.3}, "jsd": {"beta": 0.9}, "akl": {"mu": 0.8}}


@pytest.mark.parametrize("name", ["forward_kl", *losses.TOKEN_DIVERGENCES])
def test_every_divergence_trains_with_its_own_number(name: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(23, 8, requires_grad=True)
    teacher_hidden, teacher_weight = torch.randn(6, 5), torch.randn(23, 5)
    pairs = [(i, i, 1 + i % 2) for i in range(6)]
    options = OPTIONS.get(name, {})
    ours = head_loss(
        hidden, OutputHead(weight), make_targets(pairs, 6), num_tokens=9, teacher_hidden_PH=teacher_hidden,
        teacher_head=OutputHead(teacher_weight), divergence=name, options=options, kd_temperature=2.0, ce_weight=0.0,
        chunk_tokens=4,
    ).loss  # fmt: skip
    times = torch.tensor([weight for _, _, weight in pairs])
    public = getattr(losses, name)(
        (hidden @ weight.T).repeat_interleave(times, dim=0)[None],
        (teacher_hidden @ teacher_weight.T).repeat_interleave(times, dim=0)[None],
        torch.zeros(1, 9, dtype=torch.long),
        kd_temperature=2.0,
        **options,
    )
    torch.testing.assert_close(ours, public, atol=1e-6, rtol=1e-5)
    found, expected = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, public))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@given(seed=st.integers(0, 10_000), kd_temperature=st.sampled_from([1.0, 2.0]), ce_weight=st.sampled_from([0.0, 0.3]))
@settings(deadline=None, max_examples=30)
def test_the_mean_policy_gradient_over_drawn_tokens_is_the_gradient_of_reverse_kl(
    seed: int, kd_temperature: float, ce_weight: float
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vocabulary = 5
    hidden, weight = random(2, 3).requires_grad_(True), random(vocabulary, 3).requires_grad_(True)
    teacher_hidden, teacher_weight = random(2, 4), random(vocabulary, 4)
    # Every token that can be drawn, weighted by the chance that it is: the expectation itself, without a sample.
    q = torch.softmax((hidden @ weight.T).detach() / kd_temperature, dim=-1)
    chances = [(i, token, float(q[i, token])) for i in range(2) for token in range(vocabulary)]
    position, target, chance = (torch.tensor(column) for column in zip(*chances, strict=True))
    targets = Targets([0, vocabulary, 2 * vocabulary], position, target, chance, torch.ones(2))
    options: dict[str, Any] = {
        "num_tokens": 2, "teacher_hidden_PH": teacher_hidden, "teacher_head": OutputHead(teacher_weight),
        "kd_temperature": kd_temperature, "ce_weight": ce_weight,
    }  # fmt: skip
    ours = head_loss(hidden, OutputHead(weight), targets, divergence=head.POLICY_GRADIENT, **options).loss
    exact = head_loss(hidden, OutputHead(weight), targets, divergence="reverse_kl", **options).loss
    torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)
    found, expected = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours, exact))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_drawn_token_that_the_teacher_likes_better_becomes_likelier() -> None:
    weight, hidden = torch.eye(3), torch.tensor([[1.0, 0.0, 0.0]], requires_grad=True)
    for teacher, sign in (([0.0, 3.0, 0.0], -1), ([3.0, 0.0, 0.0], 1)):
        loss = head_loss(
            hidden, OutputHead(weight), make_targets([(0, 1, 1)], 1), num_tokens=1, teacher_hidden_PH=torch.tensor([teacher]),
            teacher_head=OutputHead(weight), divergence=head.POLICY_GRADIENT, ce_weight=0.0,
        ).loss  # fmt: skip
        (gradient,) = torch.autograd.grad(loss, hidden)
        assert float(gradient[0, 1]) * sign > 0


def test_teacher_may_come_from_inference_mode_and_bfloat16_gives_no_negative_loss() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        teacher_hidden = torch.randn(5, 8).bfloat16()
    weight = torch.randn(40, 8, requires_grad=True)
    hidden = teacher_hidden.clone().requires_grad_(True)
    targets = make_targets([(i, i, 1) for i in range(5)], 5)
    result = head_loss(
        hidden,
        OutputHead(weight),
        targets,
        num_tokens=5,
        teacher_hidden_PH=teacher_hidden,
        teacher_head=OutputHead(weight.detach()),
        ce_weight=0.0,
    )
    result.loss.backward()
    assert 0.0 <= result.loss.item() < 1e-6
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert weight.grad.abs().max() < 1e-6


def test_no_chunk_of_logits_is_larger_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = head._losses_in_place
    monkeypatch.setattr(head, "_losses_in_place", lambda logits, *rest: seen.append(len(logits)) or original(logits, *rest))
    targets = make_targets([(i, i, 1) for i in range(11)], 11)
    head_loss(torch.randn(11, 4), OutputHead(torch.randn(13, 4)), targets, num_tokens=11, chunk_tokens=4)
    assert seen == [4, 4, 3]


def test_cross_entropy_share_without_teacher_is_refused() -> None:
    targets = make_targets([(0, 0, 1)], 1)
    with pytest.raises(ValueError, match=r"ce_weight is 0\.5, but there is no teacher"):
        head_loss(torch.zeros(1, 2), OutputHead(torch.zeros(3, 2)), targets, num_tokens=1, ce_weight=0.5)


def test_heads_of_different_width_are_refused() -> None:
    targets, hidden = make_targets([(0, 0, 1)], 1), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="the heads have 3 and 4 rows"):
        head_loss(
            hidden, OutputHead(torch.zeros(3, 2)), targets, num_tokens=1, teacher_hidden_PH=hidden,
            teacher_head=OutputHead(torch.zeros(4, 2)),
        )  # fmt: skip


def test_a_bfloat16_head_with_a_cap_is_capped_in_float32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(40, 8)
    targets = make_targets([(i, i, 1) for i in range(5)], 5)
    ours = head_loss(hidden.requires_grad_(True), OutputHead(weight, None, 2.0, 3.0), targets, num_tokens=5)
    logits = 3.0 * torch.tanh((hidden.detach() @ weight.bfloat16().T).float() * 2.0 / 3.0)
    torch.testing.assert_close(ours.loss, F.cross_entropy(logits, torch.arange(5)), atol=1e-6, rtol=1e-6)
    ours.loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16
    assert hidden.grad.isfinite().all()
