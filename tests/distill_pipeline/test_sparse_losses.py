"""Law 13: what is stored of a distribution gives a divergence below the full one, and draws give it on average."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_pipeline import losses
from distill_pipeline.sparse_losses import (
    sampled_forward_kl,
    sampled_targets,
    sparse_divergence,
    sparse_divergence_with_gradient,
    topk_forward_kl,
    topk_targets,
)

TEACHER = torch.tensor([[[4.0, 3.0, 1.0, 0.0, -1.0]]])
STUDENT = torch.tensor([[[3.0, 3.5, 0.0, 0.5, -1.0]]])
SEEDS = st.integers(0, 10_000)


def stored(teacher: Tensor, k: int, kd_temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest tokens, their log-probabilities and the log of the rest, by definition, in float64."""
    log_p = (teacher.double() / kd_temperature).log_softmax(-1)
    values, ids = log_p.topk(k, dim=-1)
    rest = log_p.scatter(-1, ids, -math.inf)
    return ids, values.float(), torch.logsumexp(rest, -1).float()


def pair(seed: int, vocabulary: int, *, positions: int = 4, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, positions, vocabulary, generator=generator) * spread for _ in range(2))
    return student, teacher, torch.zeros(1, positions, dtype=torch.int64)


@pytest.mark.parametrize(("k", "value"), [(1, 0.232476), (2, 0.244082), (3, 0.256108), (4, 0.256501), (5, 0.256501)])
def test_values_with_a_tail_bucket_are_those_of_the_reference_table(k: int, value: float) -> None:
    labels = torch.zeros(1, 1, dtype=torch.int64)
    assert topk_forward_kl(STUDENT, *stored(TEACHER, k), labels).item() == pytest.approx(value, abs=1e-6)


def bucketed(logits: Tensor, k: int) -> Tensor:
    """Log-probabilities of the teacher's k likeliest tokens and of all others together."""
    log_p = logits.double().log_softmax(-1)
    ids = TEACHER.topk(k, dim=-1).indices
    rest = torch.logsumexp(log_p.scatter(-1, ids, -math.inf), -1, keepdim=True)
    return torch.cat([log_p.gather(-1, ids), rest], dim=-1)


@pytest.mark.parametrize(("k", "forward", "reverse"), [(1, 0.232476, 0.238390), (2, 0.244082, 0.258264), (3, 0.256108, None)])
def test_the_tail_bucket_is_the_divergence_of_the_two_distributions_seen_through_it(
    k: int, forward: float, reverse: float | None
) -> None:
    labels = torch.zeros(1, 1, dtype=torch.int64)
    seen = bucketed(STUDENT, k), bucketed(TEACHER, k)
    assert losses.forward_kl(*seen, labels).item() == pytest.approx(forward, abs=1e-6)
    assert topk_forward_kl(STUDENT, *stored(TEACHER, k), labels).item() == pytest.approx(forward, abs=1e-6)
    if reverse is not None:
        assert losses.reverse_kl(*seen, labels).item() == pytest.approx(reverse, abs=1e-6)


@pytest.mark.parametrize(("k", "cut", "one_renormalised", "both_renormalised"), [
    (1, 0.459340, 1.029230, 0.0), (2, 0.245837, 0.312556, 0.257403), (3, 0.268706, 0.290973, 0.254442),
    (4, 0.258076, 0.263969, 0.257403),
])  # fmt: skip
def test_the_divergence_is_none_of_those_that_drop_or_spread_the_tail(
    k: int, cut: float, one_renormalised: float, both_renormalised: float
) -> None:
    ids = TEACHER.topk(k, dim=-1).indices
    p, q = (x.double().softmax(-1).gather(-1, ids) for x in (TEACHER, STUDENT))
    wrong = {
        "cut": ((p * (p / q).log()).sum().item(), cut),
        "one": ((p / p.sum() * (p / p.sum() / q).log()).sum().item(), one_renormalised),
        "both": ((p / p.sum() * (p / p.sum() / (q / q.sum())).log()).sum().item(), both_renormalised),
    }
    ours = topk_forward_kl(STUDENT, *stored(TEACHER, k), torch.zeros(1, 1, dtype=torch.int64)).item()
    for value, tabulated in wrong.values():
        assert value == pytest.approx(tabulated, abs=1e-6)
        assert abs(value - ours) > 8e-4
    if k == 1:
        assert (q * (q / p).log()).sum().item() == pytest.approx(-0.236771, abs=1e-6)  # and no divergence at all


@pytest.mark.parametrize(("kd_temperature", "value"), [(2.0, 0.265576), (4.0, 0.255424)])
def test_the_square_of_the_temperature_is_in_value_and_gradient(kd_temperature: float, value: float) -> None:
    labels = torch.zeros(1, 1, dtype=torch.int64)
    student = STUDENT.clone().requires_grad_(True)
    loss = topk_forward_kl(student, *stored(TEACHER, 5, kd_temperature), labels, kd_temperature=kd_temperature)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == pytest.approx(value, abs=1e-6)
    assert gradient.norm().item() == pytest.approx({2.0: 0.419260, 4.0: 0.357968}[kd_temperature], abs=1e-6)


@given(seed=SEEDS, vocabulary=st.integers(2, 40), kd_temperature=st.sampled_from([0.5, 1.0, 3.0]))
@settings(deadline=None, max_examples=40)
def test_the_divergence_never_falls_as_k_grows_and_ends_at_the_full_one(
    seed: int, vocabulary: int, kd_temperature: float
) -> None:
    student, teacher, labels = pair(seed, vocabulary)
    full = losses.forward_kl(student, teacher, labels, kd_temperature=kd_temperature).item()
    values = [
        topk_forward_kl(student, *stored(teacher, k, kd_temperature), labels, kd_temperature=kd_temperature).item()
        for k in range(1, vocabulary + 1)
    ]
    slack = 2e-6 * max(1.0, full)
    assert all(0.0 <= value <= full + slack for value in values)
    assert all(after >= before - slack for before, after in pairwise(values))
    assert values[-1] == pytest.approx(full, abs=5 * slack)


@given(seed=SEEDS, vocabulary=st.integers(2, 40), share=st.floats(0.01, 1.0), spread=st.sampled_from([0.1, 3.0, 20.0]))
@settings(deadline=None, max_examples=40)
def test_divergence_and_gradient_vanish_when_student_equals_teacher(
    seed: int, vocabulary: int, share: float, spread: float
) -> None:
    _, teacher, labels = pair(seed, vocabulary, spread=spread)
    student = teacher.clone().requires_grad_(True)
    loss = topk_forward_kl(student, *stored(teacher, max(1, int(vocabulary * share))), labels)
    (gradient,) = torch.autograd.grad(loss, student)
    assert 0.0 <= loss.item() < 1e-6
    assert gradient.abs().max().item() < 1e-6


@given(
    seed=SEEDS, vocabulary=st.integers(2, 40), share=st.floats(0.01, 1.0), kd_temperature=st.sampled_from([1.0, 2.5]),
    spread=st.sampled_from([0.5, 8.0]), is_sampled=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_the_closed_form_equals_plain_autograd(
    seed: int, vocabulary: int, share: float, kd_temperature: float, spread: float, is_sampled: bool
) -> None:
    student, teacher, _ = pair(seed, vocabulary, spread=spread)
    logits = student[0].requires_grad_(True)
    k = max(1, int(vocabulary * share))
    ids, values, tail = (part[0] for part in stored(teacher, k, kd_temperature))
    if is_sampled:
        counts = torch.arange(1, k + 1).expand(4, k).clone()
        counts[:, -1] = 0 if k > 1 else 1
        ids[:, -1] = ids[:, 0]
        targets = sampled_targets(ids, counts, torch.ones(4), kd_temperature=kd_temperature)
    else:
        targets = topk_targets(ids, values, tail, kd_temperature=kd_temperature)
    twin = sparse_divergence(logits, targets)
    (twin_gradient,) = torch.autograd.grad(twin.sum(), logits)
    log_q = losses.log_probs(logits.detach(), kd_temperature)
    ours, gradient = sparse_divergence_with_gradient(log_q, targets)
    torch.testing.assert_close(ours, twin.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, twin_gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kd_temperature", [1.0, 2.0])
def test_draws_have_the_full_value_and_gradient_as_their_mean(kd_temperature: float) -> None:
    student, teacher, _ = pair(3, 12, positions=1)
    log_p = (teacher[0] / kd_temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    trials, draws = 20_000, 10
    drawn = torch.multinomial(log_p.exp(), trials * draws, replacement=True, generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(drawn.view(trials, draws), 12).sum(1)
    targets = sampled_targets(
        torch.arange(12).expand(trials, 12), counts, entropy.expand(trials), kd_temperature=kd_temperature
    )
    values, gradients = sparse_divergence_with_gradient(losses.log_probs(student[0], kd_temperature).repeat(trials, 1), targets)
    logits = student.clone().requires_grad_(True)
    full = losses.forward_kl(logits, teacher, torch.zeros(1, 1, dtype=torch.int64), kd_temperature=kd_temperature)
    (gradient,) = torch.autograd.grad(full, logits)
    bound = 5 / trials**0.5
    torch.testing.assert_close(values.mean(), full.detach(), atol=float(values.std()) * bound, rtol=0.0)
    spread = gradients.std(0).max().item()
    torch.testing.assert_close(gradients.mean(0), gradient[0, 0], atol=spread * bound, rtol=0.0)


def test_all_draws_on_one_token_are_cross_entropy() -> None:
    student, _, labels = pair(0, 9)
    labels[:] = 4
    ids, counts = torch.full((1, 4, 1), 4), torch.full((1, 4, 1), 50)
    ours = sampled_forward_kl(student, ids, counts, torch.zeros(1, 4), labels)
    torch.testing.assert_close(ours, losses.cross_entropy(student, labels))


@given(seed=SEEDS, noise=st.sampled_from([0.0, 0.01, 1.0]), k=st.sampled_from([1, 8, 200]))
@settings(deadline=None, max_examples=25)
def test_bfloat16_logits_and_float16_storage_give_no_negative_loss(seed: int, noise: float, k: int) -> None:
    _, teacher, labels = pair(seed, 200, spread=4.0)
    student = teacher + torch.randn(teacher.shape, generator=torch.Generator().manual_seed(seed)) * noise
    ids, values, tail = stored(teacher, k)
    value = topk_forward_kl(student.bfloat16(), ids, values.half(), tail.half(), labels)
    assert 0.0 <= value.item() < 10.0


def test_tail_of_a_student_that_is_sure_gives_finite_loss_and_gradient() -> None:
    student = torch.tensor([[[200.0, 0.0, 0.0]]], requires_grad=True)
    ids, values, tail = stored(torch.zeros(1, 1, 3), 1)
    loss = topk_forward_kl(student, ids, values, tail, torch.zeros(1, 1, dtype=torch.int64))
    loss.backward()
    assert math.isfinite(loss.item())
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


def test_ignored_positions_change_nothing_and_all_ignored_is_zero() -> None:
    student, teacher, labels = pair(1, 9)
    marked = labels.clone()
    marked[0, 2:] = losses.IGNORED_LABEL
    kept = topk_forward_kl(student[:, :2], *stored(teacher[:, :2], 3), labels[:, :2])
    torch.testing.assert_close(topk_forward_kl(student, *stored(teacher, 3), marked), kept)
    assert topk_forward_kl(student, *stored(teacher, 3), torch.full_like(labels, losses.IGNORED_LABEL)).item() == 0.0


def test_more_tokens_than_the_vocabulary_has_are_refused() -> None:
    student, teacher, labels = pair(1, 9)
    with pytest.raises(ValueError, match="9 tokens are stored a position and the vocabulary has 5"):
        topk_forward_kl(student[..., :5], *stored(teacher, 9), labels)
    with pytest.raises(ValueError, match=r"token id \d is outside the student's vocabulary of 5"):
        topk_forward_kl(student[..., :5], *stored(teacher, 5), labels)
    with pytest.raises(ValueError, match="batch and tokens must be the same"):
        topk_forward_kl(student[:, :2], *stored(teacher, 5), labels)
