"""Teacher forcing: a causal model's logits at the tokens of given completions, for log-likelihoods and divergences.

Rows are padded on the right, which a causal model cannot see from the left, and logits are asked for at completion
positions only: over a vocabulary of 49,152 a batch of whole sequences would cost 200 KB a prompt token.

Axes: B rows, T positions that predict a completion token, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.models.forward import LOGIT_CELLS, column_logits

IGNORED = -100
"""Label of positions that are no completion token."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt (at least one) and of its completion."""


def batches_of(rows: Sequence[Row], *, vocab_size: int, max_rows: int) -> Iterator[list[int]]:
    """Indices of rows that go through the model together, of similar length, within the limit on logits."""
    order = sorted(range(len(rows)), key=lambda index: (len(rows[index][0]), len(rows[index][1]), index))
    batch: list[int] = []
    for index in order:
        grown = [*batch, index]
        cells = len(grown) * _span([rows[i] for i in grown]) * vocab_size
        if batch and (len(grown) > max_rows or cells > LOGIT_CELLS):
            yield batch
            grown = [index]
        batch = grown
    if batch:
        yield batch


@torch.inference_mode()
def completion_logits(model: Any, rows: Sequence[Row], *, device: str) -> tuple[Tensor, Tensor]:
    """Logits that predict each completion token, and those tokens.

    Args:
        model: a causal language model in evaluation mode, on ``device``.
        rows: prompt and completion ids; every prompt has at least one token.
    Returns:
        Float logits (B, T, V) in the model's dtype, and int64 labels (B, T) with ``IGNORED`` where a row has no token.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in rows) - 1
    first = min(len(prompt) for prompt, _ in rows) - 1
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    seen = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, (prompt, completion) in enumerate(rows):
        tokens = torch.tensor([*prompt, *completion], dtype=torch.int64)
        ids[index, : len(tokens) - 1] = tokens[:-1]
        seen[index, : len(tokens) - 1] = 1
        labels[index, len(prompt) - 1 : len(tokens) - 1] = tokens[len(prompt) :]
    inputs = {"input_ids": ids.to(device), "attention_mask": seen.to(device), "use_cache": False}
    logits = column_logits(model, inputs, torch.arange(first, width, device=device))
    return logits, labels[:, first:].to(device)


def _span(rows: Sequence[Row]) -> int:
    """Positions between the earliest and the last prediction of a batch."""
    return max(len(p) + len(c) for p, c in rows) - min(len(p) for p, _ in rows)
