"""What is kept of a teacher's distributions while a part is captured, as arrays, until it becomes the columns of a file.

Axes: R completion tokens of a part, C positions of a chunk, M (position, row) pairs, V vocabulary, K stored tokens, N draws,
T temperatures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_pipeline.losses import LOWEST, log_probs
from distill_pipeline.signals.files import SignalHeader, list_type
from distill_pipeline.signals.spec import SignalKind

Array = np.ndarray[Any, np.dtype[Any]]

LITTLE_MASS = 0.9
"""A position whose k tokens hold less than this counts as one that k serves badly."""


def _list_column(starts: Array, numbers: Array) -> pa.Array:
    flat = pa.array(numbers.reshape(-1))
    return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), flat, type=list_type(flat.type))


class TopkStore:
    """The likeliest tokens of a part's positions, and the mass outside them at each temperature."""

    def __init__(self, header: SignalHeader, num_tokens: int) -> None:
        assert header.k is not None
        self._temperatures, self._k = header.temperatures, header.k
        numbers, width = np.dtype(header.dtype), len(header.temperatures)
        self._ids = np.zeros((num_tokens, header.k), np.int32)
        self._log_probs = np.zeros((num_tokens, header.k), numbers)
        self._log_tail = np.zeros((num_tokens, width), numbers)
        self._log_z = np.zeros((num_tokens, width), np.float32)

    def take(self, log_p_CV: Tensor, position_M: Array, row_M: Array, generator: torch.Generator) -> None:
        """Keep what rows need of their positions' distributions."""
        values_CK, ids_CK = log_p_CV.topk(self._k, dim=1)
        self._ids[row_M] = ids_CK.cpu().numpy()[position_M]
        self._log_probs[row_M] = values_CK.cpu().numpy()[position_M]
        for number, temperature in enumerate(self._temperatures):
            scaled_CV = log_p_CV if temperature == 1.0 else log_p_CV / temperature
            log_z_C = torch.zeros_like(log_p_CV[:, 0]) if temperature == 1.0 else torch.logsumexp(scaled_CV, dim=1)
            rest_CV = (scaled_CV - log_z_C[:, None]).exp_().scatter_(1, ids_CK, 0.0)
            self._log_tail[row_M, number] = rest_CV.sum(1).log().cpu().numpy()[position_M]
            self._log_z[row_M, number] = log_z_C.cpu().numpy()[position_M]

    def columns(self, starts: Array) -> list[pa.Array]:
        """The columns of the part's file behind those of the text."""
        width = len(self._temperatures)
        return [
            _list_column(starts * self._k, self._ids), _list_column(starts * self._k, self._log_probs),
            _list_column(starts * width, self._log_tail), _list_column(starts * width, self._log_z),
        ]  # fmt: skip

    def sums(self) -> dict[str, Any]:
        """Mass that the k tokens hold, summed over tokens, and how many tokens hold little; by temperature."""
        kept_RT = 1.0 - np.exp(self._log_tail.astype(np.float64))
        return {"kept_mass": kept_RT.sum(0).tolist(), "little_mass": (kept_RT < LITTLE_MASS).sum(0).tolist()}


class SampledStore:
    """Draws at a part's positions, at one temperature."""

    def __init__(self, header: SignalHeader, num_tokens: int) -> None:
        assert header.draws is not None
        (self._temperature,), self._draws = header.temperatures, header.draws
        self._ids = np.zeros((num_tokens, header.draws), np.int32)
        self._entropy = np.zeros(num_tokens, np.dtype(header.dtype))

    def take(self, log_p_CV: Tensor, position_M: Array, row_M: Array, generator: torch.Generator) -> None:
        """Draw once a position, by inverting its distribution function in float64, and note the entropy."""
        if self._temperature != 1.0:
            log_p_CV = log_probs(log_p_CV, self._temperature)
        p_CV = log_p_CV.exp()
        entropy_C = -(p_CV * log_p_CV.clamp_min(LOWEST)).sum(1)
        below_CV = p_CV.double().cumsum(1)
        uniform_CN = torch.rand((len(p_CV), self._draws), dtype=torch.float64, generator=generator).to(p_CV.device)
        ids_CN = torch.searchsorted(below_CV, uniform_CN * below_CV[:, -1:], right=True).clamp_max(p_CV.shape[1] - 1)
        self._ids[row_M] = ids_CN.sort(1).values.cpu().numpy()[position_M]
        self._entropy[row_M] = entropy_C.cpu().numpy()[position_M]

    def columns(self, starts: Array) -> list[pa.Array]:
        """Equal draws of a position become one token with a count."""
        is_first = np.ones(self._ids.shape, np.bool_)
        is_first[:, 1:] = self._ids[:, 1:] != self._ids[:, :-1]
        num_ids = is_first.sum(1)
        place = np.flatnonzero(is_first)
        counts = np.diff(np.r_[place, is_first.size])  # a position's first draw ends the run before it
        own = np.r_[0, np.cumsum(num_ids)][starts]
        return [
            _list_column(starts, num_ids.astype(np.uint8)), _list_column(own, self._ids[is_first]),
            _list_column(own, counts.astype(np.uint8)), _list_column(starts, self._entropy),
        ]  # fmt: skip

    def sums(self) -> dict[str, Any]:
        """Distinct tokens, summed over tokens."""
        distinct = (np.diff(self._ids, axis=1) != 0).sum() + len(self._ids)
        return {f"distinct_t{self._temperature!r}": int(distinct)}


STORES: Mapping[SignalKind, type[TopkStore] | type[SampledStore]] = {"topk": TopkStore, "sampled": SampledStore}
