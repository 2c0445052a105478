"""What the model thought at each drawn token: its log-probability and the likeliest ones, at temperature 1, before any cut.

Axes: R rows, V vocabulary, K likeliest.
"""

from collections.abc import Sequence

import numpy as np
import torch

from distill_pipeline.generation.protocol import TokenLogprobs


class TopLogprobs:
    """Gathers them step by step for the rows of a batch; with ``k`` 0 it does nothing."""

    def __init__(self, num_rows: int, max_tokens: int, k: int, device: torch.device | str) -> None:
        self._k = k
        steps = max_tokens if k else 0
        self._own = torch.zeros(num_rows, steps, device=device)
        self._top = torch.zeros(num_rows, steps, k, device=device)
        self._ids = torch.zeros(num_rows, steps, k, dtype=torch.int32, device=device)

    def take(self, logits_RV: torch.Tensor, tokens_R: torch.Tensor, rows_R: torch.Tensor, step: int) -> None:
        """One step of some rows.

        Args:
            logits_RV: any float dtype; computed in float32.
            tokens_R: int64, what was drawn.
            rows_R: int64, which rows of the batch these are.
        """
        if not self._k:
            return
        logits_RV = logits_RV.float()
        norm_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
        top_RK, ids_RK = logits_RV.topk(self._k, dim=-1)
        self._own[rows_R, step] = (logits_RV.gather(-1, tokens_R[:, None]) - norm_R1).squeeze(-1)
        self._top[rows_R, step] = top_RK - norm_R1
        self._ids[rows_R, step] = ids_RK.int()

    def of(self, row: int, drawn: Sequence[int]) -> TokenLogprobs | None:
        """A row's tokens; None where none were gathered."""
        if not self._k:
            return None
        own, top, ids = (table[row, : len(drawn)].flatten().cpu().numpy() for table in (self._own, self._top, self._ids))
        return TokenLogprobs(np.array(drawn, np.int32), own, ids, top)
