"""Forward KL towards a teacher's distribution of which only a few tokens were stored, exact about what was left out.

``topk_forward_kl``: the teacher's k likeliest tokens K and one bucket for all others,

    KL_k = sum_K p log(p / q) + P log(P / Q),    P = 1 - sum_K p,  Q = 1 - sum_K q.

It is the KL of the two distributions seen through that bucket, so 0 <= KL_k <= KL, it never falls as k grows, and it is KL
at k = V. (Without the bucket it is no divergence: it can be negative, above KL, or zero for a wrong student.)

``sampled_forward_kl``: n tokens drawn from p with replacement; the share t of the draws stands for p. Value and gradient,

    sum t log(1 / q) - H(p)    and    q - t,

have the full KL and its gradient as their means over draws. Source: Anshumann et al. 2025, arXiv:2503.16870.

Both are averaged over the tokens whose label is not -100 and multiplied by kd_temperature ** 2, as in ``losses``; what is
stored belongs to that temperature. The functions named here go through autograd; ``sparse_divergence_with_gradient`` is the
closed form of both for a loss that works in pieces, and never builds a distribution of the teacher.

Axes: B batch, T tokens, V vocabulary, K stored tokens of a position (their order is free), N positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill_pipeline.losses import IGNORED_LABEL, LOWEST, log_probs

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SparseTargets:
    """What is known of the teacher at N positions, float32, at one kd_temperature.

    ``log_p_NK`` are log-probabilities of ``ids_NK`` (int64); a slot that holds none has LOWEST and repeats an id of its row.
    ``log_tail_N`` is the log of all other tokens' probability (LOWEST where there is none), or None where the stored tokens are
    draws. ``offset_N`` is added to a position's value and has no gradient.
    """

    ids_NK: Tensor
    log_p_NK: Tensor
    log_tail_N: Tensor | None
    offset_N: Tensor
    kd_temperature: float = 1.0

    def cut(self, start: int, stop: int) -> "SparseTargets":
        """Positions ``start : stop``."""
        tail_N = None if self.log_tail_N is None else self.log_tail_N[start:stop]
        part = slice(start, stop)
        return SparseTargets(self.ids_NK[part], self.log_p_NK[part], tail_N, self.offset_N[part], self.kd_temperature)

    def to(self, device: torch.device) -> "SparseTargets":
        """The same targets on a device."""
        tail_N = None if self.log_tail_N is None else self.log_tail_N.to(device)
        moved = (self.ids_NK.to(device), self.log_p_NK.to(device), tail_N, self.offset_N.to(device))
        return SparseTargets(*moved, self.kd_temperature)


def topk_targets(ids_NK: Tensor, log_p_NK: Tensor, log_tail_N: Tensor, *, kd_temperature: float = 1.0) -> SparseTargets:
    """Targets from k tokens and the rest; made to sum to 1 again, which rounding in storage may have undone."""
    all_N1K = torch.cat([log_p_NK.float(), log_tail_N.float()[:, None]], dim=1)
    all_N1K = torch.log_softmax(all_N1K, dim=1).clamp_min(LOWEST)
    zero_N = torch.zeros_like(all_N1K[:, -1])
    return SparseTargets(ids_NK.long(), all_N1K[:, :-1], all_N1K[:, -1], zero_N, kd_temperature)


def sampled_targets(ids_NK: Tensor, counts_NK: Tensor, entropy_N: Tensor, *, kd_temperature: float = 1.0) -> SparseTargets:
    """Targets from draws: how often each token came (0 for an empty slot), and the entropy of the teacher's distribution."""
    share_NK = counts_NK.float() / counts_NK.float().sum(1, keepdim=True)
    log_share_NK = share_NK.log().clamp_min(LOWEST)
    offset_N = -(share_NK * log_share_NK).sum(1) - entropy_N.float()
    return SparseTargets(ids_NK.long(), log_share_NK, None, offset_N, kd_temperature)


def topk_forward_kl(
    student_logits_BTV: Tensor,
    topk_ids_BTK: Tensor,
    topk_log_probs_BTK: Tensor,
    log_tail_BT: Tensor,
    labels_BT: Tensor,
    *,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Mean KL_k(teacher || student), in nats per token, times kd_temperature ** 2.

    Args:
        student_logits_BTV: float (batch, tokens, vocabulary), any dtype.
        topk_ids_BTK, topk_log_probs_BTK: the teacher's tokens and their log-probabilities at ``kd_temperature``.
        log_tail_BT: log of the probability of all other tokens at that temperature; -inf where there are none.
        labels_BT: int64; positions equal to -100 are ignored.
    Returns:
        float32 scalar; 0.0 when every position is ignored.
    Raises:
        ValueError: more tokens are stored than the vocabulary has, an id lies outside it, or shapes differ.
    """
    kept = _kept(student_logits_BTV, topk_ids_BTK, labels_BT)
    targets = topk_targets(topk_ids_BTK[kept], topk_log_probs_BTK[kept], log_tail_BT[kept], kd_temperature=kd_temperature)
    return _mean(sparse_divergence(student_logits_BTV[kept], targets))


def sampled_forward_kl(
    student_logits_BTV: Tensor,
    sampled_ids_BTK: Tensor,
    counts_BTK: Tensor,
    entropy_BT: Tensor,
    labels_BT: Tensor,
    *,
    kd_temperature: float = 1.0,
) -> Tensor:
    """Mean estimate of KL(teacher || student) from draws, times kd_temperature ** 2; one estimate may be below 0.

    Args:
        sampled_ids_BTK: tokens drawn from the teacher's distribution at ``kd_temperature``; ``counts_BTK`` how often each came.
        entropy_BT: entropy of that distribution, in nats.
        Others, Returns and Raises as in ``topk_forward_kl``.
    """
    kept = _kept(student_logits_BTV, sampled_ids_BTK, labels_BT)
    targets = sampled_targets(sampled_ids_BTK[kept], counts_BTK[kept], entropy_BT[kept], kd_temperature=kd_temperature)
    return _mean(sparse_divergence(student_logits_BTV[kept], targets))


def sparse_divergence(student_logits_NV: Tensor, targets: SparseTargets) -> Tensor:
    """The divergence of every position, (N,) float32, as plain autograd over the whole vocabulary."""
    log_q_NV = log_probs(student_logits_NV, targets.kd_temperature)
    p_NK = targets.log_p_NK.exp()
    value_N = (p_NK * (targets.log_p_NK - log_q_NV.gather(1, targets.ids_NK))).sum(1)
    if targets.log_tail_N is not None and targets.ids_NK.shape[1] < log_q_NV.shape[1]:
        rest_NV = log_q_NV.scatter(1, targets.ids_NK, LOWEST)
        log_rest_N = torch.logsumexp(rest_NV, dim=1)
        value_N = value_N + targets.log_tail_N.exp() * (targets.log_tail_N - log_rest_N)
    value_N = value_N + (value_N.clamp_min(0.0) - value_N).detach()
    return (value_N + targets.offset_N) * targets.kd_temperature**2


def sparse_divergence_with_gradient(log_q_NV: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """The same values, and their gradient by the student's logits, (N, V) float32, in closed form.

    Where sum_K p + P = 1 the gradient is q - p on the stored tokens and q (1 - P / Q) elsewhere; for draws P = 0. Q is summed
    over the tokens outside K, so that it keeps its digits where it is small.

    Args:
        log_q_NV: ``log_probs`` of the student at the targets' temperature; its memory is used up.
    """
    p_NK = targets.log_p_NK.exp()
    log_q_NK = log_q_NV.gather(1, targets.ids_NK)
    value_N = (p_NK * (targets.log_p_NK - log_q_NK)).sum(1)
    gradient_NV = log_q_NV.exp_()
    if targets.log_tail_N is None:
        gradient_NV.scatter_add_(1, targets.ids_NK, -p_NK)
    else:
        gradient_NV.scatter_(1, targets.ids_NK, 0.0)
        rest_N = gradient_NV.sum(1).clamp_min_(TINY)
        tail_N = targets.log_tail_N.exp()
        value_N += tail_N * (targets.log_tail_N - rest_N.log())
        gradient_NV.mul_((1.0 - tail_N / rest_N)[:, None]).scatter_(1, targets.ids_NK, log_q_NK.exp() - p_NK)
    value_N = value_N.clamp_min_(0.0).add_(targets.offset_N).mul_(targets.kd_temperature**2)
    return value_N, gradient_NV if targets.kd_temperature == 1.0 else gradient_NV.mul_(targets.kd_temperature)


def _kept(student_BTV: Tensor, ids_BTK: Tensor, labels_BT: Tensor) -> Tensor:
    """Where a loss is asked for, once the shapes fit."""
    if not student_BTV.shape[:-1] == ids_BTK.shape[:-1] == labels_BT.shape:
        raise ValueError(
            f"student logits are {tuple(student_BTV.shape)}, stored tokens {tuple(ids_BTK.shape)} and labels "
            f"{tuple(labels_BT.shape)}: batch and tokens must be the same"
        )
    if ids_BTK.shape[-1] > student_BTV.shape[-1]:
        raise ValueError(f"{ids_BTK.shape[-1]} tokens are stored a position and the vocabulary has {student_BTV.shape[-1]}")
    kept = labels_BT != IGNORED_LABEL
    if ids_BTK.numel() and bool((ids_BTK[kept] >= student_BTV.shape[-1]).any()):
        raise ValueError(f"token id {int(ids_BTK[kept].max())} is outside the student's vocabulary of {student_BTV.shape[-1]}")
    return kept


def _mean(value_N: Tensor) -> Tensor:
    return value_N.sum() / max(value_N.numel(), 1)
