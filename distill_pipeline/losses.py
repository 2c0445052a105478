"""Divergences between a teacher's and a student's next-token distributions, and cross-entropy.

p is the teacher's distribution and q the student's, softmax(logits / kd_temperature) in float32 whatever the logits' dtype.
Every divergence is zero exactly when p = q (no entropy is left out), is averaged over the tokens whose label is not -100,
and is multiplied by kd_temperature ** 2, value and gradient alike, so that its gradient keeps its size at any temperature
(Hinton et al. 2015, arXiv:1503.02531, section 2). Several projects leave the square out: the same learning rate and
weight then mean something else. The teacher is a constant: no gradient reaches its logits.

Labels stand beside the logits they judge: ``labels[b, t]`` is the token that ``logits[b, t]`` predict. Nothing is shifted here.

Decided: one function for each token-wise divergence, shared with the chunked head of training. forward_kl and cross-entropy
have closed-form gradients, written over their own log-probabilities; the others go through autograd.
Given up: second derivatives of forward_kl and cross_entropy; -inf logits of the student where the teacher has mass.

Axes: B batch, T tokens, V vocabulary, N unmasked tokens or (position, target) pairs, P positions.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import VocabularyMismatchError

IGNORED_LABEL = -100
"""The label of a position that no loss looks at."""

LOWEST = torch.finfo(torch.float32).min


def forward_kl(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0
) -> Tensor:
    """Mean KL(teacher || student) = sum_v p log(p / q), in nats per token, times kd_temperature ** 2.

    Args:
        student_logits_BTV: float (batch, tokens, vocabulary), any dtype.
        teacher_logits_BTV: the same shape; a constant.
        labels_BT: int64 (batch, tokens); positions equal to -100 are ignored.
        kd_temperature: divides both models' logits; above 0.
    Returns:
        float32 scalar; 0.0 when every position is ignored.
    Raises:
        VocabularyMismatchError: the last axes differ.
        ValueError: the other axes differ, or kd_temperature is not above 0.
    """
    return _masked_mean("forward_kl", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature)


def reverse_kl(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0
) -> Tensor:
    """Mean KL(student || teacher) = sum_v q log(q / p), times kd_temperature ** 2. Arguments as in ``forward_kl``."""
    return _masked_mean("reverse_kl", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature)


def jsd(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """Mean generalised Jensen-Shannon divergence, times kd_temperature ** 2. Arguments as in ``forward_kl``.

    With m = beta p + (1 - beta) q it is beta KL(p || m) + (1 - beta) KL(q || m); beta = 0 is defined as forward_kl and
    beta = 1 as reverse_kl. Towards both ends it falls to zero (JSD / beta goes to forward_kl), so a beta of 0.9 has about a
    fifteenth of the gradient of beta = 1.
    Source: Agarwal et al. 2024, arXiv:2306.13649, equation 1.
    """
    options = {"beta": _unit(beta, "beta")}
    return _masked_mean("jsd", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature, **options)


def skew_forward_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    kd_temperature: float = 1.0,
    alpha: float = 0.1,
) -> Tensor:
    """Mean KL(p || alpha p + (1 - alpha) q), times kd_temperature ** 2. Arguments as in ``forward_kl``.

    Source: Ko et al. 2024, arXiv:2402.03898 (whose code leaves out the teacher's entropy; this does not).
    """
    options = {"alpha": _unit(alpha, "alpha")}
    return _masked_mean("skew_forward_kl", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature, **options)


def skew_reverse_kl(
    student_logits_BTV: Tensor,
    teacher_logits_BTV: Tensor,
    labels_BT: Tensor,
    *,
    kd_temperature: float = 1.0,
    alpha: float = 0.1,
) -> Tensor:
    """Mean KL(q || alpha q + (1 - alpha) p), times kd_temperature ** 2. Arguments as in ``forward_kl``."""
    options = {"alpha": _unit(alpha, "alpha")}
    return _masked_mean("skew_reverse_kl", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature, **options)


def tvd(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0) -> Tensor:
    """Mean total variation distance, half the sum_v |p - q|, times kd_temperature ** 2. Arguments as in ``forward_kl``."""
    return _masked_mean("tvd", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature)


def akl(
    student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0, mu: float = 0.5
) -> Tensor:
    """Mean adaptive KL, times kd_temperature ** 2. Arguments as in ``forward_kl``.

    g_h / (g_h + g_t) forward_kl + g_t / (g_h + g_t) reverse_kl, where the head is the shortest run of the teacher's likeliest
    tokens with mass of at least mu, and g_h and g_t are the sums of |p - q| over head and tail. The two weights are constants
    for the gradient. Source: Wu et al. 2024, arXiv:2404.02657.
    """
    return _masked_mean("akl", student_logits_BTV, teacher_logits_BTV, labels_BT, kd_temperature, mu=_unit(mu, "mu"))


def uld(student_logits_BTV: Tensor, teacher_logits_BTU: Tensor, labels_BT: Tensor, *, kd_temperature: float = 1.0) -> Tensor:
    """Mean universal logit distillation, sum_i |p_(i) - q_(i)|, times kd_temperature ** 2, for two different vocabularies.

    p_(1) >= p_(2) >= ... are the teacher's probabilities in falling order and q_(i) the student's; the shorter list goes on
    with zeros. It is the Wasserstein distance of the two where moving mass costs the same between any two tokens. It compares
    how sure the models are, not of what: it is also zero where they are equally sure of different tokens, so cross-entropy
    must say what is right. Sorting the vocabulary takes most of its time.

    Args:
        teacher_logits_BTU: float (batch, tokens, the teacher's vocabulary): what the teacher says before the token of its own
            that is paired with the student's at the same place. Others, Returns and Raises as in ``forward_kl``, but that the
            last axes may differ.
    Source: Boizard et al. 2024, arXiv:2402.12030, equation 4.
    """
    return _masked_mean("uld", student_logits_BTV, teacher_logits_BTU, labels_BT, kd_temperature)


def cross_entropy(student_logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean -log q(label) in nats over the labels that are not -100; float32, and 0.0 when all of them are -100."""
    _check_labels(student_logits_BTV, labels_BT)
    kept = labels_BT != IGNORED_LABEL
    loss_N: Tensor = _CrossEntropy.apply(student_logits_BTV[kept], labels_BT[kept])  # type: ignore[no-untyped-call]
    return loss_N.sum() / max(loss_N.numel(), 1)


def log_probs(logits_NV: Tensor, kd_temperature: float = 1.0) -> Tensor:
    """log softmax(logits / kd_temperature) in float32."""
    scaled_NV = logits_NV.float() if kd_temperature == 1.0 else logits_NV.float() / kd_temperature
    return torch.log_softmax(scaled_NV, dim=-1)


def divergence_with_gradient(
    name: str, log_q_NV: Tensor, log_p_NV: Tensor, *, kd_temperature: float = 1.0, **options: float
) -> tuple[Tensor, Tensor]:
    """One divergence of every token, (N,) float32, and its gradient by the student's logits, (N, V) float32.

    Both carry kd_temperature ** 2; the arguments are ``log_probs`` at that temperature, and their memory is used up.
    Not differentiable itself: this is what a loss calls that works in pieces.
    """
    if name != "forward_kl":
        with torch.inference_mode(False), torch.enable_grad():
            # log q is as good as the logits it came from: a constant a token apart, to which every divergence is blind.
            # Both are normalised again: tvd and uld have a kink where they are equal, and equal to the last bit they stay.
            free_NV = log_q_NV.detach().clone().requires_grad_(True)
            log_p_NV = torch.log_softmax(log_p_NV.detach().clone(), dim=-1)
            loss_N = TOKEN_DIVERGENCES[name](torch.log_softmax(free_NV, dim=-1), log_p_NV, **options)
            (gradient_NV,) = torch.autograd.grad(loss_N.sum(), free_NV)
        return loss_N.detach().clamp_min(0.0) * kd_temperature**2, gradient_NV * kd_temperature
    p_NV = log_p_NV.exp()
    gap_NV = log_p_NV.sub_(log_q_NV)
    # KL is never negative, so the clamp takes away nothing but rounding; the gradient does not pass through it.
    loss_N = torch.linalg.vecdot(p_NV, gap_NV).clamp_min_(0.0).mul_(kd_temperature**2)
    gradient_NV = log_q_NV.exp_().sub_(p_NV)
    return loss_N, gradient_NV if kd_temperature == 1.0 else gradient_NV.mul_(kd_temperature)


def cross_entropy_with_gradient(
    log_q_PV: Tensor, pair_position_N: Tensor, pair_target_N: Tensor, pair_weight_N: Tensor, *, want_gradient: bool = True
) -> tuple[Tensor, Tensor | None]:
    """-log q(target) of (position, target) pairs, (N,) float32, and the gradient of their weighted sum, (P, V) float32.

    Several pairs may share a position: what one prefix predicts in several completions. The gradient of a position's
    logits is the sum over its pairs of weight (q - onehot(target)).
    """
    pairs = (pair_position_N, pair_target_N)
    loss_N = -log_q_PV[pairs]
    if not want_gradient:
        return loss_N, None
    weight_P = log_q_PV.new_zeros(len(log_q_PV)).index_add_(0, pair_position_N, pair_weight_N)
    gradient_PV = log_q_PV.exp().mul_(weight_P[:, None])
    return loss_N, gradient_PV.index_put_(pairs, -pair_weight_N, accumulate=True)


def policy_gradient_with_gradient(
    log_q_PV: Tensor,
    log_p_PV: Tensor,
    pair_position_N: Tensor,
    pair_target_N: Tensor,
    pair_weight_N: Tensor,
    *,
    kd_temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The estimate of KL(q || p) from drawn tokens, (N,) float32, and the policy gradient of their weighted sum, (P, V).

    The tokens y, (position, target) pairs, were drawn from q as it is now. c = log q(y) - log p(y) is an estimate of KL(q || p)
    without bias, and -c is the advantage of y. The gradient is that of the sum of weight c log q(y) with c held constant, so by
    the logits of a position it is the sum of weight c (onehot(y) - q). Its mean over y ~ q is q (log q - log p - KL(q || p)),
    the gradient of reverse_kl: the mean of c's own gradient is zero, so c must not be differentiated. No importance ratio
    is needed, because the policy that drew is the one that learns. Both results carry kd_temperature ** 2, and the
    arguments are ``log_probs`` at that temperature; the memory of ``log_q_PV`` is used up.

    Source: Gu et al. 2024, arXiv:2306.08543, equation 3, with the sum over later tokens left out.
    """
    pairs = (pair_position_N, pair_target_N)
    cost_N = log_q_PV[pairs] - log_p_PV[pairs]
    weighted_N = cost_N * pair_weight_N
    weighted_P = log_q_PV.new_zeros(len(log_q_PV)).index_add_(0, pair_position_N, weighted_N)
    gradient_PV = log_q_PV.exp_().mul_(-weighted_P[:, None]).index_put_(pairs, weighted_N, accumulate=True)
    return cost_N * kd_temperature**2, gradient_PV.mul_(kd_temperature)


class _ForwardKL(torch.autograd.Function):
    """Token-wise forward KL that keeps one (N, V) array for its backward pass instead of five."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, teacher_NV: Tensor, kd_temperature: float) -> Tensor:
        log_q_NV, log_p_NV = _finite(log_probs(student_NV, kd_temperature)), _finite(log_probs(teacher_NV, kd_temperature))
        loss_N, gradient_NV = divergence_with_gradient("forward_kl", log_q_NV, log_p_NV, kd_temperature=kd_temperature)
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = student_NV.dtype
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad_N[:, None]).to(ctx.dtype), None, None


class _CrossEntropy(torch.autograd.Function):
    """Token-wise cross-entropy on the closed form above."""

    @staticmethod
    def forward(ctx: Any, student_NV: Tensor, labels_N: Tensor) -> Tensor:
        each_N = torch.arange(len(labels_N), device=labels_N.device)
        ones_N = torch.ones(len(labels_N), device=labels_N.device)
        loss_N, gradient_NV = cross_entropy_with_gradient(log_probs(student_NV), each_N, labels_N, ones_N)
        ctx.save_for_backward(gradient_NV)
        ctx.dtype = student_NV.dtype
        return loss_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        (gradient_NV,) = ctx.saved_tensors
        return (gradient_NV * grad_N[:, None]).to(ctx.dtype), None


def _finite(log_NV: Tensor) -> Tensor:
    """-inf becomes the lowest finite number, so that 0 * log 0 is 0."""
    return log_NV.clamp_min(LOWEST)


def _kl_tokens(log_a_NV: Tensor, log_b_NV: Tensor) -> Tensor:
    """KL(a || b) of every token."""
    return (log_a_NV.exp() * (log_a_NV - log_b_NV)).sum(-1)


def _mixture(log_a_NV: Tensor, log_b_NV: Tensor, share: float) -> Tensor:
    """log(share a + (1 - share) b), mixed as probabilities; either end is that distribution itself.

    Written from the larger of the two, so that where a equals b the mixture equals both to the last bit.
    """
    if share in (0.0, 1.0):
        return log_a_NV if share == 1.0 else log_b_NV
    is_a_larger_NV = log_a_NV >= log_b_NV
    high_NV = torch.where(is_a_larger_NV, log_a_NV, log_b_NV)
    low_NV = torch.where(is_a_larger_NV, log_b_NV, log_a_NV)
    low_share_NV = torch.where(is_a_larger_NV, log_a_NV.new_tensor(1.0 - share), log_a_NV.new_tensor(share))
    gap_NV = torch.where(high_NV > -math.inf, low_NV - high_NV, 0.0)
    return high_NV + torch.log1p(low_share_NV * torch.expm1(gap_NV))


def _jsd_tokens(log_q_NV: Tensor, log_p_NV: Tensor, beta: float) -> Tensor:
    if beta in (0.0, 1.0):
        return _kl_tokens(log_p_NV, log_q_NV) if beta == 0.0 else _kl_tokens(log_q_NV, log_p_NV)
    log_m_NV = _mixture(log_p_NV, log_q_NV, beta)
    return beta * _kl_tokens(log_p_NV, log_m_NV) + (1.0 - beta) * _kl_tokens(log_q_NV, log_m_NV)


def _akl_tokens(log_q_NV: Tensor, log_p_NV: Tensor, mu: float) -> Tensor:
    with torch.no_grad():
        p_NV, order_NV = log_p_NV.exp().sort(dim=-1, descending=True, stable=True)
        gap_NV = (p_NV - log_q_NV.exp().gather(-1, order_NV)).abs()
        in_head_NV = p_NV.cumsum(-1) - p_NV < mu
        head_N, total_N = (gap_NV * in_head_NV).sum(-1), gap_NV.sum(-1)
        share_N = torch.where(total_N > 0, head_N / total_N.clamp_min(torch.finfo(total_N.dtype).tiny), 0.5)
    return share_N * _kl_tokens(log_p_NV, log_q_NV) + (1.0 - share_N) * _kl_tokens(log_q_NV, log_p_NV)


def _uld_tokens(log_q_NV: Tensor, log_p_NU: Tensor) -> Tensor:
    q_NV, p_NU = (log_NV.exp().sort(dim=-1, descending=True).values for log_NV in (log_q_NV, log_p_NU))
    width = max(q_NV.shape[-1], p_NU.shape[-1])
    q_NW, p_NW = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (q_NV, p_NU))
    return (p_NW - q_NW).abs().sum(-1)


TOKEN_DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": lambda log_q_NV, log_p_NV: _kl_tokens(log_q_NV, log_p_NV),
    "jsd": _jsd_tokens,
    "skew_forward_kl": lambda log_q_NV, log_p_NV, alpha: _kl_tokens(log_p_NV, _mixture(log_p_NV, log_q_NV, alpha)),
    "skew_reverse_kl": lambda log_q_NV, log_p_NV, alpha: _kl_tokens(log_q_NV, _mixture(log_q_NV, log_p_NV, alpha)),
    "tvd": lambda log_q_NV, log_p_NV: (log_p_NV.exp() - log_q_NV.exp()).abs().sum(-1) / 2,
    "akl": _akl_tokens,
    "uld": _uld_tokens,
}
"""Each divergence of every token from (log q, log p), as plain autograd; forward_kl has its closed form instead."""


def _token_divergence(
    name: str, student_NV: Tensor, teacher_NV: Tensor, kd_temperature: float, options: dict[str, float]
) -> Tensor:
    log_q_NV, log_p_NV = _finite(log_probs(student_NV, kd_temperature)), _finite(log_probs(teacher_NV, kd_temperature))
    loss_N = TOKEN_DIVERGENCES[name](log_q_NV, log_p_NV, **options)
    return (loss_N + (loss_N.clamp_min(0.0) - loss_N).detach()) * kd_temperature**2


def _masked_mean(
    name: str, student_BTV: Tensor, teacher_BTV: Tensor, labels_BT: Tensor, kd_temperature: float, **options: float
) -> Tensor:
    if student_BTV.shape[-1] != teacher_BTV.shape[-1] and name != "uld":
        raise VocabularyMismatchError(
            f"the student has {student_BTV.shape[-1]} logits a token and the teacher {teacher_BTV.shape[-1]}. "
            "Choose a teacher with the student's tokenizer, cut both to the vocabulary they share, or use uld."
        )
    if student_BTV.shape[:-1] != teacher_BTV.shape[:-1]:
        raise ValueError(f"student logits are {tuple(student_BTV.shape)} and teacher logits {tuple(teacher_BTV.shape)}")
    if not kd_temperature > 0.0:
        raise ValueError(f"kd_temperature is {kd_temperature}; it must be above 0")
    _check_labels(student_BTV, labels_BT)
    kept = labels_BT != IGNORED_LABEL
    student_NV, teacher_NV = student_BTV[kept], teacher_BTV[kept].detach()
    if name == "forward_kl":
        loss_N: Tensor = _ForwardKL.apply(student_NV, teacher_NV, kd_temperature)  # type: ignore[no-untyped-call]
    else:
        loss_N = _token_divergence(name, student_NV, teacher_NV, kd_temperature, options)
    return loss_N.sum() / max(loss_N.numel(), 1)


def _check_labels(logits_BTV: Tensor, labels_BT: Tensor) -> None:
    if logits_BTV.shape[:-1] != labels_BT.shape:
        raise ValueError(f"logits are {tuple(logits_BTV.shape)}, so labels must be {tuple(logits_BTV.shape[:-1])}; "
                         f"they are {tuple(labels_BT.shape)}")  # fmt: skip


def _unit(value: float, name: str) -> float:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value}; it must lie in [0, 1]")
    return value
