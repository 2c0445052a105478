"""The output head and the losses on it, a chunk of tokens at a time: the logits of a batch never exist at once.

A vocabulary of 50,000 makes logits two hundred times as large as the hidden states they come from, and a divergence needs
several arrays of their size. Here a chunk of hidden states goes through the head, its losses and the gradient by its
logits are written in closed form, and that gradient goes straight back into the hidden states and the head's weights, all
in the forward pass. Work between the two matrix products runs over a few rows at a time, which stay in the cache.

Decided: gradients are made in the forward pass and only scaled in the backward pass; the sums are divided by the token
count of the whole optimizer step, so that micro-batches add up to exactly the loss of the global batch. A head's bias, scale
and soft-cap (see ``models.output_head``) are applied to those few rows, in float32, student's and teacher's each their own.

Axes: P positions with a loss, N (position, target) pairs, H hidden width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.losses import (
    cross_entropy_with_gradient,
    divergence_with_gradient,
    log_probs,
    policy_gradient_with_gradient,
)
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.sparse_losses import SparseTargets, sparse_divergence_with_gradient

POLICY_GRADIENT = "policy_gradient"
"""In the place of a divergence: reverse_kl estimated from the targets, which the student drew itself."""

CHUNK_TOKENS = 96
"""Tokens whose logits exist at once: fewer starve the matrix product, more cost memory and gain nothing."""

BLOCK_ELEMENTS = 1 << 18
"""Logits that the losses work on at once on a CPU: 1 MiB an array, so that a handful stay in the cache."""


@dataclass(frozen=True)
class Targets:
    """What the positions of a batch must predict.

    Position i has the pairs ``pair_bounds[i] : pair_bounds[i + 1]``: token ids and how many completions go on with each.
    ``weight_P`` is the sum of a position's pair weights: the completion tokens it stands for. ``sparse`` is what was stored of
    the teacher's distribution, where that takes the place of a teacher.
    """

    pair_bounds: list[int]
    pair_position_N: Tensor
    pair_target_N: Tensor
    pair_weight_N: Tensor
    weight_P: Tensor
    sparse: SparseTargets | None = None

    def cut(self, start: int, stop: int) -> "Targets":
        """The targets of positions ``start : stop``, renumbered from 0."""
        first, last = self.pair_bounds[start], self.pair_bounds[stop]
        pairs = slice(first, last)
        bounds = [bound - first for bound in self.pair_bounds[start : stop + 1]]
        position_N = self.pair_position_N[pairs] - start
        sparse = None if self.sparse is None else self.sparse.cut(start, stop)
        return Targets(
            bounds, position_N, self.pair_target_N[pairs], self.pair_weight_N[pairs], self.weight_P[start:stop], sparse
        )

    def to(self, device: torch.device) -> "Targets":
        """The same targets on a device."""
        moved: dict[str, Any] = {key: x.to(device) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved, sparse=None if self.sparse is None else self.sparse.to(device))


@dataclass(frozen=True)
class HeadLoss:
    """``loss`` carries the gradient; ``divergence`` (0 without a teacher) and ``cross_entropy`` are its parts, unweighted.

    All three are float32 sums over this call's tokens divided by ``num_tokens``.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor


def head_loss(
    hidden_PH: Tensor,
    head: OutputHead,
    targets: Targets,
    *,
    num_tokens: float,
    teacher_hidden_PH: Tensor | None = None,
    teacher_head: OutputHead | None = None,
    divergence: str = "forward_kl",
    options: Mapping[str, float] | None = None,
    kd_temperature: float = 1.0,
    ce_weight: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    grad_scale: float = 1.0,
) -> HeadLoss:
    """(1 - ce_weight) kd_temperature^2 divergence + ce_weight cross-entropy, summed and divided by ``num_tokens``.

    With ``targets.sparse`` the divergence is forward KL to these, at their temperature; else it is taken from the teacher.

    Args:
        hidden_PH: student's hidden states at positions with a loss; teacher's may have another width, on the same positions.
        head: the student's; gradients reach its matrix and its bias.
        num_tokens: completion tokens of the whole optimizer step, over all its micro-batches.
        teacher_hidden_PH, teacher_head: both or none; without them and without sparse targets the loss is cross-entropy
            alone (ce_weight 1).
        divergence, options: a name of :mod:`distill_pipeline.losses` with its own number, or ``policy_gradient``.
        grad_scale: gradients come out so many times as large (the loss does not), for dtypes that would lose small ones.
    Raises:
        ValueError: a teacher is missing although ce_weight is below 1, there are two sources of the divergence, or the
            vocabularies' widths differ (other than for ``uld``).
    """
    if targets.sparse is not None:
        if teacher_hidden_PH is not None:
            raise ValueError("sparse targets and a teacher were given: the divergence has one source")
        kd_temperature = targets.sparse.kd_temperature
    elif teacher_hidden_PH is None or teacher_head is None:
        if ce_weight != 1.0:
            raise ValueError(f"ce_weight is {ce_weight}, but there is no teacher to take the other share from")
    elif len(teacher_head) != len(head) and divergence != "uld":
        raise ValueError(f"the heads have {len(head)} and {len(teacher_head)} rows: cut both to one width")
    settings = (num_tokens, divergence, dict(options or {}), kd_temperature, ce_weight, chunk_tokens, grad_scale)
    loss, kl, ce = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden_PH, head.weight_VH, head.bias_V, head, teacher_hidden_PH, teacher_head, targets, settings
    )
    return HeadLoss(loss, kl, ce)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_PH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: OutputHead,
        teacher_hidden_PH: Tensor | None,
        teacher_head: OutputHead | None,
        targets: Targets,
        settings: tuple[float, str, dict[str, float], float, float, int, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, divergence, options, kd_temperature, ce_weight, chunk_tokens, grad_scale = settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        matrix_VH = weight_VH.to(hidden_PH.dtype)
        teacher_VH = None if teacher_head is None else teacher_head.weight_VH.to(teacher_hidden_PH.dtype)  # type: ignore[union-attr]
        grad_hidden_PH = torch.empty_like(hidden_PH) if need_hidden else None
        grad_weight_VH: Tensor | None = None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if bias_V is not None and need_bias else None
        sums = hidden_PH.new_zeros(2, dtype=torch.float32)
        for start in range(0, len(hidden_PH), chunk_tokens):
            stop = min(start + chunk_tokens, len(hidden_PH))
            chunk_CH = hidden_PH[start:stop]
            logits_CV = chunk_CH @ matrix_VH.T
            teacher_CV = None if teacher_VH is None else teacher_hidden_PH[start:stop] @ teacher_VH.T  # type: ignore[index]
            sums += _losses_in_place(
                logits_CV, head, teacher_CV, teacher_head, targets.cut(start, stop), divergence, options, kd_temperature,
                ce_weight, grad_scale / num_tokens,
            )  # fmt: skip
            if grad_hidden_PH is not None:
                torch.mm(logits_CV, matrix_VH, out=grad_hidden_PH[start:stop])
            if need_weight and grad_weight_VH is None:
                grad_weight_VH = (logits_CV.T @ chunk_CH).to(torch.float32)
            elif grad_weight_VH is not None and logits_CV.dtype == torch.float32:
                grad_weight_VH.addmm_(logits_CV.T, chunk_CH)
            elif grad_weight_VH is not None:
                grad_weight_VH += logits_CV.T @ chunk_CH
            if grad_bias_V is not None:
                grad_bias_V += logits_CV.sum(0, dtype=torch.float32)
            del logits_CV, teacher_CV  # before the next chunk takes its memory, not after
        if need_weight and grad_weight_VH is None:
            grad_weight_VH = torch.zeros_like(weight_VH)
        grad_weight_VH = None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype)
        ctx.gradients = (grad_hidden_PH, grad_weight_VH, None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype))  # type: ignore[union-attr]
        divergence_mean, cross_entropy_mean = sums[0] / num_tokens, sums[1] / num_tokens
        ctx.mark_non_differentiable(divergence_mean, cross_entropy_mean)
        loss = (1.0 - ce_weight) * divergence_mean + ce_weight * cross_entropy_mean
        return loss, divergence_mean, cross_entropy_mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        scale = float(grad)
        if scale != 1.0:
            gradients = tuple(None if gradient is None else gradient.mul_(scale) for gradient in gradients)
        return (*gradients, None, None, None, None, None)


def _losses_in_place(
    logits_CV: Tensor, head: OutputHead, teacher_CV: Tensor | None, teacher_head: OutputHead | None, targets: Targets,
    divergence: str, options: dict[str, float], kd_temperature: float, ce_weight: float, scale: float,
) -> Tensor:  # fmt: skip
    """(summed divergence, summed cross-entropy), float32, from the heads' matrix products.

    ``logits_CV``, the student's, becomes the gradient of ``scale`` times the loss by that product.
    """
    rows = len(logits_CV) if logits_CV.is_cuda else max(1, BLOCK_ELEMENTS // logits_CV.shape[1])
    sums = logits_CV.new_zeros(2, dtype=torch.float32)
    for start in range(0, len(logits_CV), rows):
        product_RV = logits_CV[start : start + rows]
        teacher_RV = None if teacher_CV is None else teacher_CV[start : start + rows]
        if teacher_RV is not None and teacher_head is not None:
            teacher_RV = teacher_head.finish_(teacher_RV)
        part = targets.cut(start, start + len(product_RV))
        block_RV = head.finish_(product_RV)
        slope = head.slope(block_RV)
        sums += _block_in_place(block_RV, teacher_RV, part, divergence, options, kd_temperature, ce_weight, scale)
        if not head.is_plain:
            product_RV.copy_(block_RV.mul_(slope))
    return sums


def _block_in_place(
    block_RV: Tensor, teacher_RV: Tensor | None, targets: Targets, divergence: str, options: dict[str, float],
    kd_temperature: float, ce_weight: float, scale: float,
) -> Tensor:  # fmt: skip
    """The same for a few rows; a function of its own, so that its arrays are gone before the next rows take theirs."""
    pairs = (targets.pair_position_N, targets.pair_target_N, targets.pair_weight_N)
    log_q_RV = log_probs(block_RV)
    ce_N, ce_grad_RV = cross_entropy_with_gradient(log_q_RV, *pairs, want_gradient=ce_weight > 0.0)
    ce_sum = ce_N @ targets.pair_weight_N
    if teacher_RV is None and targets.sparse is None:
        assert ce_grad_RV is not None
        block_RV.copy_(ce_grad_RV.mul_(ce_weight * scale))
        return torch.stack([torch.zeros_like(ce_sum), ce_sum])
    if kd_temperature != 1.0:
        log_q_RV = log_probs(block_RV, kd_temperature)
    kl_sum, kl_grad_RV = _weighted_divergence(log_q_RV, teacher_RV, targets, divergence, options, kd_temperature)
    block_RV.copy_(kl_grad_RV.mul_((1.0 - ce_weight) * scale))
    if ce_grad_RV is not None:
        block_RV.add_(ce_grad_RV, alpha=ce_weight * scale)
    return torch.stack([kl_sum, ce_sum])


def _weighted_divergence(
    log_q_RV: Tensor, teacher_RV: Tensor | None, targets: Targets, divergence: str, options: dict[str, float],
    kd_temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the divergence summed over completion tokens, its gradient by the logits), from whatever there is of the teacher."""
    if targets.sparse is not None:
        kl_R, kl_grad_RV = sparse_divergence_with_gradient(log_q_RV, targets.sparse)
        return kl_R @ targets.weight_P, kl_grad_RV.mul_(targets.weight_P[:, None])
    assert teacher_RV is not None
    log_p_RV = log_probs(teacher_RV, kd_temperature)
    if divergence == POLICY_GRADIENT:
        pairs = (targets.pair_position_N, targets.pair_target_N, targets.pair_weight_N)
        kl_N, kl_grad_RV = policy_gradient_with_gradient(log_q_RV, log_p_RV, *pairs, kd_temperature=kd_temperature)
        return kl_N @ targets.pair_weight_N, kl_grad_RV
    kl_R, kl_grad_RV = divergence_with_gradient(divergence, log_q_RV, log_p_RV, kd_temperature=kd_temperature, **options)
    return kl_R @ targets.weight_P, kl_grad_RV.mul_(targets.weight_P[:, None])
