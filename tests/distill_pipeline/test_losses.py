"""Laws 9 and 16: reference values, agreement, masks, precision and vocabulary of every divergence."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distill_pipeline import losses
from distill_pipeline.errors import VocabularyMismatchError

TEACHER = (4.0, 3.0, 1.0, 0.0, -1.0)
STUDENT = (3.0, 3.5, 0.0, 0.5, -1.0)
ALL = {
    "forward_kl": losses.forward_kl, "reverse_kl": losses.reverse_kl, "jsd": losses.jsd, "tvd": losses.tvd, "akl": losses.akl,
    "skew_forward_kl": losses.skew_forward_kl, "skew_reverse_kl": losses.skew_reverse_kl, "uld": losses.uld,
}  # fmt: skip
DEFAULTS = {"jsd": {"beta": 0.5}, "akl": {"mu": 0.5}, "skew_forward_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1}}
Loss = Callable[..., Tensor]


def one_token(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 1, -1)


def labels(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.long)


# Values in float64 from plain NumPy: research table of the two distributions above.
REFERENCE = [
    ("forward_kl", {}, 0.256501), ("reverse_kl", {}, 0.271424), ("tvd", {}, 0.352574), ("akl", {"mu": 0.5}, 0.264316),
    ("jsd", {"beta": 0.1}, 0.0230261), ("jsd", {"beta": 0.5}, 0.0644312), ("jsd", {"beta": 0.9}, 0.0240672),
    ("jsd", {"beta": 0.01}, 0.0025385), ("jsd", {"beta": 0.99}, 0.0026828),
    ("jsd", {"beta": 0.0}, 0.256501), ("jsd", {"beta": 1.0}, 0.271424),
    ("skew_forward_kl", {"alpha": 0.1}, 0.206892), ("skew_forward_kl", {"alpha": 0.5}, 0.066146),
    ("skew_reverse_kl", {"alpha": 0.1}, 0.213664), ("skew_reverse_kl", {"alpha": 0.5}, 0.062716),
    ("forward_kl", {"kd_temperature": 2.0}, 0.265576), ("forward_kl", {"kd_temperature": 4.0}, 0.255424),
    ("uld", {}, 0.218517),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "expected"), REFERENCE)
def test_divergence_has_its_reference_value(name: str, options: dict[str, float], expected: float) -> None:
    value = ALL[name](one_token(STUDENT), one_token(TEACHER), labels(1, 1), **options)
    assert value.dtype == torch.float32
    assert abs(value.item() - expected) < 1e-6


@pytest.mark.parametrize(("kd_temperature", "norm"), [(1.0, 0.474298), (2.0, 0.419260), (4.0, 0.357968)])
def test_gradient_carries_the_square_of_the_temperature(kd_temperature: float, norm: float) -> None:
    student = one_token(STUDENT).requires_grad_(True)
    losses.forward_kl(student, one_token(TEACHER), labels(1, 1), kd_temperature=kd_temperature).backward()
    assert student.grad is not None
    assert abs(student.grad.norm().item() - norm) < 1e-6


def test_temperature_without_end_has_the_limit_of_the_reference_table() -> None:
    student, teacher = one_token(STUDENT), one_token(TEACHER)
    limit = in_float64("forward_kl", student, teacher, 1e5).item()
    assert abs(limit - 0.230000) < 1e-5
    oracle = in_float64("forward_kl", student, teacher, 32.0).item()
    assert abs(losses.forward_kl(student, teacher, labels(1, 1), kd_temperature=32.0).item() - oracle) < 2e-4
    assert abs(oracle - limit) < 5e-3


def test_forward_kl_leaves_no_entropy_out() -> None:
    student, teacher = one_token(STUDENT), one_token(TEACHER)
    p = teacher[0, 0].softmax(-1)
    each = [losses.cross_entropy(student, torch.full((1, 1), token)).item() for token in range(5)]
    crossed = sum(chance * ce for chance, ce in zip(p.tolist(), each, strict=True))
    entropy = -(p * p.log()).sum().item()
    assert crossed == pytest.approx(1.055681, abs=1e-6)
    assert entropy == pytest.approx(0.799180, abs=1e-6)
    assert losses.forward_kl(student, teacher, labels(1, 1)).item() == pytest.approx(crossed - entropy, abs=1e-6)


def test_cross_entropy_equals_torch_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 5, 11, requires_grad=True), torch.randint(11, (2, 5))
    targets[0, 1] = targets[1, 4] = losses.IGNORED_LABEL
    ours = torch.autograd.grad(losses.cross_entropy(logits, targets), logits)[0]
    theirs = torch.autograd.grad(F.cross_entropy(logits.view(-1, 11), targets.view(-1)), logits)[0]
    torch.testing.assert_close(losses.cross_entropy(logits, targets), F.cross_entropy(logits.view(-1, 11), targets.view(-1)))
    torch.testing.assert_close(ours, theirs)


def in_float64(name: str, student: Tensor, teacher: Tensor, kd_temperature: float) -> Tensor:
    """The formulas once more, by probabilities, in float64 and by plain autograd: an oracle that shares no code."""
    q, p = (x.double().div(kd_temperature).softmax(-1) for x in (student, teacher))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if name == "akl":
        order = p.argsort(-1, descending=True)
        sorted_p, gap = p.gather(-1, order), (p - q).abs().detach().gather(-1, order)
        head = sorted_p.cumsum(-1) - sorted_p < 0.5
        share = (gap * head).sum(-1) / gap.sum(-1)
        value = share * kl(p, q) + (1 - share) * kl(q, p)
    else:
        value = {
            "forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "tvd": lambda: (p - q).abs().sum(-1) / 2,
            "jsd": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
            "skew_forward_kl": lambda: kl(p, 0.1 * p + 0.9 * q), "skew_reverse_kl": lambda: kl(q, 0.1 * q + 0.9 * p),
            "uld": lambda: (q.sort(-1).values - p.sort(-1).values).abs().sum(-1),
        }[name]()  # fmt: skip
    return value.mean() * kd_temperature**2


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10_000), kd_temperature=st.sampled_from([0.5, 1.0, 3.0]), vocabulary=st.integers(2, 60))
@settings(deadline=None, max_examples=25)
def test_value_and_gradient_agree_with_a_float64_oracle(name: str, seed: int, kd_temperature: float, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(1, 4, vocabulary, generator=generator) * 2).requires_grad_(True)
    teacher = torch.randn(1, 4, vocabulary, generator=generator) * 2
    ours = ALL[name](student, teacher, labels(1, 4), kd_temperature=kd_temperature)
    oracle = in_float64(name, student, teacher, kd_temperature)
    assert abs(ours.item() - oracle.item()) < 1e-5 * max(1.0, oracle.item())
    ours_grad, oracle_grad = (torch.autograd.grad(value, student)[0] for value in (ours, oracle))
    torch.testing.assert_close(ours_grad, oracle_grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@example(seed=259, kd_temperature=8.0, spread=0.1)
@given(
    seed=st.integers(0, 10_000), kd_temperature=st.sampled_from([0.5, 1.0, 2.0, 8.0]), spread=st.sampled_from([0.1, 3.0, 20.0])
)
@settings(deadline=None, max_examples=25)
def test_divergence_and_gradient_vanish_when_student_equals_teacher(
    name: str, seed: int, kd_temperature: float, spread: float
) -> None:
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(seed)) * spread
    student = logits.clone().requires_grad_(True)
    value = ALL[name](student, logits, labels(2, 3), kd_temperature=kd_temperature)
    value.backward()
    assert student.grad is not None
    assert 0.0 <= value.item() < 1e-6
    assert student.grad.abs().max().item() < 1e-6


@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 10_000), noise=st.sampled_from([0.0, 0.01, 0.1, 2.0]))
@settings(deadline=None, max_examples=25)
def test_bfloat16_logits_give_no_negative_loss(name: str, seed: int, noise: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(1, 4, 500, generator=generator) * 4
    student = teacher + torch.randn(1, 4, 500, generator=generator) * noise
    value = ALL[name](student.bfloat16(), teacher.bfloat16(), labels(1, 4))
    assert value.item() >= 0.0
    assert value.dtype == torch.float32


@pytest.mark.parametrize("name", ALL)
def test_loss_is_zero_with_finite_gradient_when_every_position_is_ignored(name: str) -> None:
    student = torch.randn(2, 3, 7, requires_grad=True)
    value = ALL[name](student, torch.randn(2, 3, 7), torch.full((2, 3), losses.IGNORED_LABEL))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert torch.equal(student.grad, torch.zeros_like(student))


def test_cross_entropy_is_zero_when_every_position_is_ignored() -> None:
    student = torch.randn(2, 3, 7, requires_grad=True)
    value = losses.cross_entropy(student, torch.full((2, 3), losses.IGNORED_LABEL))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()


@pytest.mark.parametrize("name", ALL)
def test_ignored_positions_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 6, 9), torch.randn(1, 6, 9)
    marked = labels(1, 6)
    marked[0, 3:] = losses.IGNORED_LABEL
    student[0, 3:] = math.nan
    value = ALL[name](student, teacher, marked)
    torch.testing.assert_close(value, ALL[name](student[:, :3], teacher[:, :3], labels(1, 3)))


@pytest.mark.parametrize("name", ALL)
@given(
    seed=st.integers(0, 10_000), mask=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4),
    vocabulary=st.integers(1, 9), kd_temperature=st.sampled_from([0.7, 1.0, 2.0]),
)  # fmt: skip
@settings(deadline=None, max_examples=25)
def test_the_loss_is_the_mean_over_unmasked_tokens_wherever_these_stand(
    name: str, seed: int, mask: list[list[bool]], vocabulary: int, kd_temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(len(mask), 5, vocabulary, generator=generator) for _ in range(2))
    student.requires_grad_(True)
    kept = torch.tensor(mask)
    marked = torch.where(kept, 0, losses.IGNORED_LABEL)
    value = ALL[name](student, teacher, marked, kd_temperature=kd_temperature)
    alone = [
        ALL[name](student[i, j].view(1, 1, -1), teacher[i, j].view(1, 1, -1), labels(1, 1), kd_temperature=kd_temperature)
        for i, j in kept.nonzero().tolist()
    ]
    expected = torch.stack(alone).mean() if alone else student.sum() * 0.0
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    found, other = (torch.autograd.grad(loss, student)[0] for loss in (value, expected))
    torch.testing.assert_close(found, other, atol=1e-6, rtol=1e-5)
    assert not found[~kept].any()


@pytest.mark.parametrize("name", ALL)
@given(shift=st.floats(-30, 30), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=20)
def test_a_constant_added_to_all_logits_changes_nothing(name: str, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 2, 12, generator=generator) for _ in range(2))
    torch.testing.assert_close(
        ALL[name](student + shift, teacher, labels(1, 2)), ALL[name](student, teacher, labels(1, 2)), atol=2e-6, rtol=1e-5
    )


@pytest.mark.parametrize("name", ALL)
def test_tokens_that_both_models_rule_out_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 3, 9), torch.randn(1, 3, 9)
    padding = torch.full((1, 3, 4), -math.inf)
    wide = [torch.cat([x, padding], dim=-1) for x in (student, teacher)]
    torch.testing.assert_close(ALL[name](*wide, labels(1, 3)), ALL[name](student, teacher, labels(1, 3)))


@pytest.mark.parametrize("name", ALL)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = torch.randn(1, 3, 9, requires_grad=True), torch.randn(1, 3, 9, requires_grad=True)
    ALL[name](student, teacher, labels(1, 3)).backward()
    assert teacher.grad is None


@given(seed=st.integers(0, 1000), ours=st.integers(1, 9), theirs=st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_uld_of_two_vocabularies_is_that_of_the_smaller_filled_up_with_impossible_tokens(
    seed: int, ours: int, theirs: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(1, 3, size, generator=generator) for size in (ours, theirs))
    student.requires_grad_(True)
    wide = [F.pad(x, (0, 9 - x.shape[-1]), value=-math.inf) for x in (student, teacher)]
    value, filled = losses.uld(student, teacher, labels(1, 3)), losses.uld(*wide, labels(1, 3))
    torch.testing.assert_close(value, filled)
    found, expected = (torch.autograd.grad(x, student)[0] for x in (value, filled))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_uld_sees_how_sure_a_model_is_and_not_of_what() -> None:
    teacher = torch.randn(1, 4, 7)
    assert losses.uld(teacher.flip(-1), teacher, labels(1, 4)).item() == pytest.approx(0.0, abs=1e-6)
    assert losses.uld(torch.zeros(1, 4, 7), teacher, labels(1, 4)).item() > 0.1


@pytest.mark.parametrize("name", ALL)
def test_the_divergence_of_the_fused_head_vanishes_too_when_student_equals_teacher(name: str) -> None:
    log_p = losses.log_probs(torch.randn(6, 1000, generator=torch.Generator().manual_seed(0)) * 3)
    value, gradient = losses.divergence_with_gradient(name, log_p.clone(), log_p.clone(), **DEFAULTS.get(name, {}))
    assert value.abs().max().item() < 1e-6
    assert gradient.abs().max().item() < 1e-6


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"uld"}))
def test_different_vocabularies_are_refused(name: str) -> None:
    with pytest.raises(VocabularyMismatchError, match="the student has 5 logits a token and the teacher 6"):
        ALL[name](torch.zeros(1, 1, 5), torch.zeros(1, 1, 6), labels(1, 1))


@pytest.mark.parametrize(("call", "message"), [
    (lambda a: losses.forward_kl(a, a, labels(1, 1), kd_temperature=0.0), "kd_temperature is 0.0"),
    (lambda a: losses.forward_kl(a, a[:, :1], labels(1, 2)), "teacher logits"),
    (lambda a: losses.forward_kl(a, a, labels(1, 3)), "labels must be"),
    (lambda a: losses.jsd(a, a, labels(1, 2), beta=1.5), "beta is 1.5"),
    (lambda a: losses.skew_forward_kl(a, a, labels(1, 2), alpha=-0.1), "alpha is -0.1"),
    (lambda a: losses.akl(a, a, labels(1, 2), mu=2.0), "mu is 2.0"),
])  # fmt: skip
def test_arguments_out_of_range_are_named(call: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 5))
