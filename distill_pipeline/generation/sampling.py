"""Drawing one token a row: top-k first, then temperature, top-p inside the top-k, then Gumbel-max.

Decided: softmax and sort over a whole vocabulary cost as much as the model's forward pass on a CPU, so all of it happens
among the ``top_k`` likeliest tokens. The noise of a row comes from a counter-based generator, a function of the row's seed,
the step and the token id alone: a draw depends neither on the rows beside it nor on which of them are left. Where nothing
is cut off, one such number a row inverts the distribution function: noise for every token would cost a hundred times that.

Axes: R rows, V vocabulary, K top-k.
"""

import math
from dataclasses import dataclass

import torch

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the increment of splitmix64 (Steele et al. 2014).
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 is greedy: the likeliest token, whatever top_k and top_p say.

    ``top_k`` None is the whole vocabulary.
    """

    temperature: float = 0.0
    top_k: int | None = 50
    top_p: float = 1.0


def sample_tokens(
    logits_RV: torch.Tensor, sampling: Sampling, seeds_R: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row and its log-probability.

    Args:
        logits_RV: any float dtype; computed in float32.
        seeds_R: int64, each row's own seed.
        step: how many tokens the rows have drawn before.
    Returns:
        int64 token ids (R,), and float32 log-probabilities (R,) in nats: under the distribution that was sampled from, or,
        when greedy, under the model's own at temperature 1.
    """
    if sampling.temperature == 0.0:
        best_R, tokens_R = logits_RV.max(dim=-1)
        return tokens_R, best_R.float() - torch.logsumexp(logits_RV.float(), dim=-1)
    if sampling.top_k is None and sampling.top_p == 1.0:
        return _sample_from_all(logits_RV, sampling.temperature, seeds_R, step)
    top_RK, ids_RK = torch.topk(logits_RV, min(sampling.top_k or logits_RV.shape[-1], logits_RV.shape[-1]), dim=-1)
    logprobs_RK = torch.log_softmax(top_RK.float() / sampling.temperature, dim=-1)
    if sampling.top_p < 1.0:
        probs_RK = logprobs_RK.exp()
        mass_before_RK = probs_RK.cumsum(dim=-1) - probs_RK
        # The likeliest token always stays: the mass before it is exactly zero.
        logprobs_RK = logprobs_RK.masked_fill(mass_before_RK >= sampling.top_p, -math.inf)
        logprobs_RK = logprobs_RK - torch.logsumexp(logprobs_RK, dim=-1, keepdim=True)
    choice_R1 = (logprobs_RK + gumbel_noise(seeds_R, step, ids_RK)).argmax(dim=-1, keepdim=True)
    return ids_RK.gather(-1, choice_R1).squeeze(-1), logprobs_RK.gather(-1, choice_R1).squeeze(-1)


def _sample_from_all(
    logits_RV: torch.Tensor, temperature: float, seeds_R: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first token whose mass, with that of all before it, exceeds a uniform number; one without mass never is."""
    logprobs_RV = torch.log_softmax(logits_RV.float() / temperature, dim=-1)
    mass_RV = logprobs_RV.exp().cumsum(dim=-1, dtype=torch.float64)
    uniform_R1 = _uniform(seeds_R, step, torch.zeros_like(seeds_R)[:, None])
    tokens_R1 = torch.searchsorted(mass_RV, uniform_R1 * mass_RV[:, -1:], right=True).clamp_max(logits_RV.shape[-1] - 1)
    return tokens_R1.squeeze(-1), logprobs_RV.gather(-1, tokens_R1).squeeze(-1)


def gumbel_noise(seeds_R: torch.Tensor, step: int, ids_RK: torch.Tensor) -> torch.Tensor:
    """float32 (R, K) Gumbel noise, a function of each row's seed, the step and the token id."""
    return -torch.log(-torch.log(_uniform(seeds_R, step, ids_RK))).float()


def _uniform(seeds_R: torch.Tensor, step: int, ids_RK: torch.Tensor) -> torch.Tensor:
    """float64 (R, K) in (0, 1), a function of each row's seed, the step and a number."""
    state_R1 = _mix(seeds_R.unsqueeze(-1) + _wrap(_GOLDEN * (step + 1)))
    bits_RK = _mix(state_R1 + ids_RK * _GOLDEN)
    return (_shift(bits_RK, 11).double() + 0.5) * 2.0**-53


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The output function of splitmix64 on int64 tensors; products wrap around as they should."""
    x = (x ^ _shift(x, 30)) * _MIX1
    x = (x ^ _shift(x, 27)) * _MIX2
    return x ^ _shift(x, 31)


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """An integer as int64."""
    return (value + 2**63) % 2**64 - 2**63
