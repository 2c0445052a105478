"""Two ways to step a transformers model through a batch of rows: with shared prefixes, and the plain one for other models.

``PlainDecoder`` expands a transformers cache to all rows and works with every model that has one; ``SharedPrefixDecoder`` is
several times cheaper. Both give the same logits up to rounding: ``decoder_for`` tries the fast one on a probe against the
model's own forward pass and takes it only when they agree.

Axes: P prompts, R rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from distill_pipeline.generation.shared_prefix import SharedPrefixDecoder


class Decoder(Protocol):
    """What the engine needs: prefill once, then one token a row and step, dropping rows as they finish."""

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_row: torch.Tensor, max_tokens: int) -> torch.Tensor:
        """Start a batch; logits (P, V) after each prompt. ``prompt_of_row`` is int64 (R,)."""

    def step(self, tokens_R: torch.Tensor) -> torch.Tensor:
        """Append one token to each row; logits (R, V) after it."""

    def drop(self, holes: torch.Tensor, movers: torch.Tensor, num_rows: int) -> None:
        """Copy the rows at ``movers`` to ``holes``, then keep the first ``num_rows``."""


def decoder_for(model: Any) -> Decoder:
    """The fastest decoder that provably computes what ``model`` computes."""
    decoder = SharedPrefixDecoder(model)
    return decoder if _agrees(decoder, model) else PlainDecoder(model)


class PlainDecoder:
    """Left-padded prompts and a transformers cache that holds every row in full."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_row: torch.Tensor, max_tokens: int) -> torch.Tensor:
        device = self.model.device
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        self._cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))
        self._cache.batch_select_indices(prompt_of_row)
        self._mask = mask[prompt_of_row]
        return logits

    def step(self, tokens_R: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens_R), 1)], dim=1)
        return self._forward(tokens_R[:, None], self._mask, self._mask.sum(-1, keepdim=True) - 1)

    def drop(self, holes: torch.Tensor, movers: torch.Tensor, num_rows: int) -> None:
        order = torch.arange(num_rows, device=holes.device)
        order[holes] = movers
        self._cache.batch_select_indices(order)
        self._mask = self._mask[order]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self._cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        logits: torch.Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def _agrees(decoder: SharedPrefixDecoder, model: Any) -> bool:
    """Whether the decoder's logits on a small probe equal those of the model's own forward pass on the whole text."""
    config = model.config
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        return False
    high = min(config.vocab_size, 97)
    texts = [[(7 * i + 3) % high for i in range(length)] for length in (6, 6, 9)]
    texts[1][4], texts[2][5], tokens = 5 % high, 11 % high, [[1, 2, 4, 1, 3], [3, 1, 2, 2, 1]]
    rows = torch.tensor([0, 2, 1, 0, 2], device=model.device)
    try:
        decoder.prefill(texts, rows, len(tokens))
        for step in tokens:
            ours = decoder.step(torch.tensor(step, device=model.device))
    except (NotImplementedError, TypeError, KeyError, AttributeError, RuntimeError):
        return False
    for row, prompt in enumerate(rows.tolist()):
        whole = torch.tensor([texts[prompt] + [step[row] for step in tokens]], device=model.device)
        theirs = model(input_ids=whole, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
        if not torch.allclose(ours[row].float(), theirs, rtol=0.0, atol=tolerance * float(theirs.abs().max())):
            return False
    return True
