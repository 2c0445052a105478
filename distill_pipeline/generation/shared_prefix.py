"""Stepping a batch of rows whose prompts share text: its keys and values are kept and read once.

What all prompts of a batch have in common (a system prompt) is kept once, the rest of each prompt once, and per row only its
own completion. Attention over the three parts is one softmax over their joined scores, so it equals attention over the whole
text up to rounding. Prompts are read in groups of equal length, so none is padded. Rows that finish are overwritten by the
last rows, which costs a copy of as many rows as finished.

It hooks into transformers as an attention function and needs plain causal softmax attention with the usual grouped heads.

Axes: P prompts, R rows, H key-value heads, G query heads of each, D head size, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface

ATTENTION_NAME = "distill_shared_prefix"
PREFILL_TOKENS = 4096
"""Most prompt tokens of one prefill pass; bounds the memory of its activations."""

_UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "position_bias")
"""Keywords with which models ask an attention function for more than plain softmax attention."""


class SharedPrefixDecoder:
    """The fast decoder. See the module's docstring."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._phase = "common"
        self._common: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def prefill(self, prompts: Sequence[Sequence[int]], prompt_of_row: torch.Tensor, max_tokens: int) -> torch.Tensor:
        device = self.model.device
        self._num_rows, self._max_tokens, self._step = len(prompt_of_row), max_tokens, -1
        self._num_prompts, self._num_common = len(prompts), _common_length(prompts)
        self._common, self._prompts, self._own = {}, {}, {}
        lengths = [len(prompt) - self._num_common for prompt in prompts]
        self._width = max(lengths)
        if self._num_common:
            self._phase = "common"
            self._forward(torch.tensor([prompts[0][: self._num_common]], device=device), first_position=0)
        self._phase = "prompt"
        logits: torch.Tensor | None = None
        for chosen in _equal_lengths(lengths):
            self._chosen = torch.tensor(chosen, device=device)
            ids = torch.tensor([list(prompts[index][self._num_common :]) for index in chosen], device=device)
            part = self._forward(ids, first_position=self._num_common)
            logits = part.new_empty(len(prompts), part.shape[-1]) if logits is None else logits
            logits[self._chosen] = part
        assert logits is not None
        self._phase = "decode"
        self._prompt_of_row = prompt_of_row
        self._prompt_lengths = torch.tensor(lengths, device=device)
        self._next_position = self._prompt_lengths[prompt_of_row] + self._num_common
        self._group_rows()
        return logits

    def step(self, tokens_R: torch.Tensor) -> torch.Tensor:
        self._step += 1
        logits = self._forward(tokens_R[:, None], positions=self._next_position[:, None])
        self._next_position = self._next_position + 1
        return logits

    def drop(self, holes: torch.Tensor, movers: torch.Tensor, num_rows: int) -> None:
        filled = self._step + 1
        for layer, (keys, values) in self._own.items():
            keys[holes, :, :filled] = keys[movers, :, :filled]
            values[holes, :, :filled] = values[movers, :, :filled]
            self._own[layer] = keys[:num_rows], values[:num_rows]
        for name in ("_prompt_of_row", "_next_position"):
            kept = getattr(self, name).clone()
            kept[holes] = kept[movers]
            setattr(self, name, kept[:num_rows])
        self._num_rows = num_rows
        self._drop_prompts()
        self._group_rows()

    def _drop_prompts(self) -> None:
        """Forget prompts without rows once they are half of all: each prompt is then copied at most once more."""
        alive = torch.unique(self._prompt_of_row)
        if 2 * len(alive) > self._num_prompts:
            return
        renumbered = torch.zeros(self._num_prompts, dtype=torch.int64, device=alive.device)
        renumbered[alive] = torch.arange(len(alive), device=alive.device)
        self._prompt_of_row, self._prompt_lengths = renumbered[self._prompt_of_row], self._prompt_lengths[alive]
        self._prompts = {layer: (keys[alive], values[alive]) for layer, (keys, values) in self._prompts.items()}
        self._num_prompts = len(alive)

    def _group_rows(self) -> None:
        """Lay rows out as a table of prompts x places, so that a prompt's rows read its keys in one product."""
        rows, counts = self._prompt_of_row, torch.bincount(self._prompt_of_row, minlength=self._num_prompts)
        order = torch.argsort(rows, stable=True)
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows[order]]
        self._places = int(counts.max())
        self._cell_of_row = torch.empty_like(rows)
        self._cell_of_row[order] = rows[order] * self._places + place
        self._row_of_cell = torch.zeros(self._num_prompts * self._places, dtype=torch.int64, device=rows.device)
        self._row_of_cell[self._cell_of_row] = torch.arange(len(rows), device=rows.device)
        beyond = torch.arange(self._width, device=rows.device) >= self._prompt_lengths[:, None]
        self._beyond_prompt = beyond[:, None, None, :]

    def _forward(self, ids: torch.Tensor, *, first_position: int = 0, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, V) after the last token."""
        if positions is None:
            positions = torch.arange(first_position, first_position + ids.shape[1], device=ids.device)[None]
        with _attention(self.model.config, ATTENTION_NAME):
            output = self.model(
                input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=1, shared_prefix_decoder=self
            )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def attend(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
        """One layer's attention: query (batch, H * G, T, D), new keys and values (batch, H, T, D); output like query."""
        if self._phase == "decode":
            return self._attend_decode(layer, query * scale, keys, values)
        if self._phase == "common":
            self._common[layer] = keys, values
        else:
            if layer not in self._prompts:
                shape = (self._num_prompts, keys.shape[1], self._width)
                self._prompts[layer] = keys.new_zeros(*shape, keys.shape[-1]), values.new_zeros(*shape, values.shape[-1])
            for store, new in zip(self._prompts[layer], (keys, values), strict=True):
                store[self._chosen, :, : new.shape[2]] = new
            if self._num_common:
                common_keys, common_values = self._common[layer]
                keys = torch.cat([common_keys.expand(len(keys), -1, -1, -1), keys], dim=2)
                values = torch.cat([common_values.expand(len(values), -1, -1, -1), values], dim=2)
        num_new, num_keys = query.shape[2], keys.shape[2]
        mask = None
        if num_new < num_keys:
            mask = torch.ones(num_new, num_keys, dtype=torch.bool, device=query.device).tril(diagonal=num_keys - num_new)
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    def _attend_decode(self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        rows, heads, step = self._num_rows, keys.shape[1], self._step
        if layer not in self._own:
            shape = (rows, heads, self._max_tokens)
            self._own[layer] = keys.new_empty(*shape, keys.shape[-1]), values.new_empty(*shape, values.shape[-1])
        own_keys, own_values = self._own[layer]
        own_keys[:, :, step] = keys[:, :, 0]
        own_values[:, :, step] = values[:, :, 0]
        query_RHGD = query.reshape(rows, heads, -1, query.shape[-1])
        prompt_keys, prompt_values = self._prompts[layer]
        scores = [
            self._by_prompt(query_RHGD, prompt_keys.transpose(-1, -2), mask=self._beyond_prompt),
            query_RHGD @ own_keys[:, :, : step + 1].transpose(-1, -2),
        ]
        if self._num_common:
            scores.append(_by_all(query_RHGD, self._common[layer][0][0].transpose(-1, -2)))
        weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1, dtype=torch.float32).to(query.dtype)
        parts = torch.split(weights, [part.shape[-1] for part in scores], dim=-1)
        output: torch.Tensor = self._by_prompt(parts[0], prompt_values) + parts[1] @ own_values[:, :, : step + 1]
        if self._num_common:
            output = output + _by_all(parts[2], self._common[layer][1][0])
        return output.reshape(rows, -1, 1, values.shape[-1])

    def _by_prompt(self, left_RHGX: torch.Tensor, right_PHXY: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Each row's left factor times its prompt's right factor: (R, H, G, Y)."""
        _, heads, groups, inner = left_RHGX.shape
        cells = left_RHGX[self._row_of_cell].view(self._num_prompts, self._places, heads, groups, inner)
        left = cells.transpose(1, 2).reshape(self._num_prompts, heads, self._places * groups, inner)
        product = left @ right_PHXY
        if mask is not None:
            product = product.masked_fill(mask, float("-inf"))
        product = product.view(self._num_prompts, heads, self._places, groups, -1).transpose(1, 2)
        return product.reshape(self._num_prompts * self._places, heads, groups, -1)[self._cell_of_row]


def _by_all(left_RHGX: torch.Tensor, right_HXY: torch.Tensor) -> torch.Tensor:
    """Each row's left factor times one right factor for all: (R, H, G, Y)."""
    rows, heads, groups, inner = left_RHGX.shape
    product = left_RHGX.transpose(0, 1).reshape(heads, rows * groups, inner) @ right_HXY
    return product.view(heads, rows, groups, -1).transpose(0, 1)


def _attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    shared_prefix_decoder: SharedPrefixDecoder,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """The hook that transformers calls in every layer."""
    if asked := [name for name in _UNSUPPORTED if options.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(asked)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = shared_prefix_decoder.attend(module.layer_idx, query, key, value, scale)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION_NAME, _attention_function)


@contextmanager
def _attention(config: Any, name: str) -> Iterator[None]:
    """Use another attention function inside; the model is as before afterwards."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def _common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens all prompts share, leaving each at least one of its own; 0 for a single prompt."""
    if len(prompts) < 2:
        return 0
    # Between the least and the greatest in dictionary order lie all others, and so does what they share.
    first, last = min(map(list, prompts)), max(map(list, prompts))
    limit = min(map(len, prompts)) - 1
    return next((i for i in range(limit) if first[i] != last[i]), limit)


def _equal_lengths(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices grouped by length, at most PREFILL_TOKENS tokens a group: no prompt is padded in prefill."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(length, []).append(index)
    for length, members in sorted(groups.items()):
        size = max(1, PREFILL_TOKENS // length)
        for start in range(0, len(members), size):
            yield members[start : start + size]
