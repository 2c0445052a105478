"""Hidden states of a micro-batch, and which layout of completions a pair of models can read.

Decided: nothing is believed from a model's name. Settings that are known to look past an attention mask (sliding windows,
recurrent layers, attention kernels without masks) rule the shared layout out, and for the rest an example is run in both
layouts, longer than every window of the model that a tree can be longer than. Where the hidden states differ, packed rows are
tried in the same way, with sequences that are longer than every window of the model that the data are longer than; and last
each completion gets a padded row of its own.

Packed rows rest on what transformers makes of position ids that restart, in a batch without attention mask and cache:
``masking_utils`` masks across the borders (sdpa, eager, flex_attention, windows and chunks too), flash attention calls its
kernel for sequences of several lengths (a batch of one, ``_is_packed_sequence``). A model that does not hand its position ids
on to both fails the trial, and so does a recurrent layer or convolution.
Given up: ``cu_seq_lens_q`` and ``seq_idx``, by which the own kernels of some hybrids (Qwen3-Next, OLMo-Hybrid, Granite 4) keep
sequences apart; windows longer than the data, or that a configuration does not name so, which the trial does not reach; and
flash attention for weights in float32, which its kernels refuse, in the trial too.
"""

import contextlib
import random
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.learning import Precision
from distill_pipeline.models.forward import column_logits, evaluating, in_float32
from distill_pipeline.training.batches import MicroBatch, micro_batches
from distill_pipeline.training.examples import Example
from distill_pipeline.training.trees import ATTENTION_TOKENS, ROW_TOKENS, Layout

MASKING_ATTENTION = {"sdpa", "eager"}
"""Attention implementations of transformers that take a mask of any shape."""

PROBE_TOLERANCE = 1e-3
"""How far, relative to their largest entry, hidden states of the two layouts may lie apart (float32 rounding: 1e-6)."""

LEAK_TOLERANCE = 1e-5
"""The same of a packed sequence when those before it change: what is masked has no weight at all (seen: 0)."""

PAST_WINDOW = 8
"""Tokens by which the sequences of a trial are longer than a window; and their length where there is none."""

WINDOW_WORDS = ("window", "chunk")
"""What is in the names of a configuration's numbers that make a model look at a part of a sequence only."""

TRIAL_ERRORS = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)
"""What models raise that cannot take a layout."""


def compute_dtype(precision: Precision, device: str) -> torch.dtype:
    """What forward passes run in; ``auto`` is bfloat16 on CUDA and float32 elsewhere."""
    if precision == "auto":
        precision = "bf16" if torch.device(device).type == "cuda" else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def forward_precision(device_type: str, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """What a student's forward passes run in: ``dtype`` by autocast, or the weights' own float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype)


def hidden_states(model: Any, batch: MicroBatch) -> Tensor:
    """The (P, H) last hidden states of a causal language model at the places of ``batch`` that predict something."""
    hidden_STH: Tensor = model.base_model(**_inputs(model, batch)).last_hidden_state
    # index_select: its gradient is a plain sum over rows, in a fixed order.
    return hidden_STH.flatten(0, 1).index_select(0, batch.places_P)


def place_logits(model: Any, batch: MicroBatch) -> Tensor:
    """The (P, V) logits at the same places, in the model's dtype: its own head's, whatever that does."""
    width = batch.token_ids_ST.shape[1]
    columns_C, column_P = torch.unique(batch.places_P % width, return_inverse=True)
    return column_logits(model, _inputs(model, batch), columns_C)[batch.places_P // width, column_P]


def _inputs(model: Any, batch: MicroBatch) -> dict[str, Any]:
    additive = getattr(model.config, "_attn_implementation", None) == "eager"
    inputs = {"input_ids": batch.token_ids_ST, "attention_mask": batch.attention_mask(additive=additive), "use_cache": False}
    if batch.layout != "plain":
        inputs["position_ids"] = batch.position_ids_ST
    return inputs


def choose_layout(models: list[Any], longest: int) -> tuple[Layout, str]:
    """The first layout that all ``models`` can read, and why: ``shared``, then ``packed`` or ``varlen``, then ``plain``.

    Args:
        longest: the largest position of a token in the data; a sliding window that is longer than that changes nothing.
    """
    not_shared = _first_obstacle(models, longest, _tree_obstacle)
    if not_shared is None:
        return "shared", "all models read several completions behind one prompt as they read them alone"
    not_packed = _first_obstacle(models, longest, _row_obstacle)
    if not_packed is None:
        layout: Layout = "packed" if any(map(_takes_masks, models)) else "varlen"
        return layout, f"all models read sequences one after the other as they read them alone; not shared: {not_shared}"
    return "plain", f"not shared: {not_shared}; not packed: {not_packed}"


def _first_obstacle(models: list[Any], longest: int, obstacle: Callable[[Any, int], str | None]) -> str | None:
    found = ((model, obstacle(model, longest)) for model in models)
    return next((f"{type(model).__name__}: {reason}" for model, reason in found if reason is not None), None)


def _takes_masks(model: Any) -> bool:
    """Whether its attention takes a mask of any shape; then it computes all pairs of a row, and masks some."""
    return getattr(model.config, "_attn_implementation", None) in MASKING_ATTENTION


def _tree_obstacle(model: Any, longest: int) -> str | None:
    config = model.config.get_text_config()
    if not _takes_masks(model):
        return f"attention implementation {model.config._attn_implementation} takes no mask of this shape"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest >= window:
        return f"its sliding window of {window} tokens is shorter than the data ({longest})"
    if not _reads_trees(model, longest, _past_windows(config, max(ATTENTION_TOKENS, longest))):
        return "a trial gave other hidden states in the two layouts"
    return None


def _reads_trees(model: Any, longest: int, num_tokens: int) -> bool:
    """Whether an example has the same hidden states in both layouts: short texts, in a tree of more than ``num_tokens``."""
    ids, draw = [3 + i % 7 for i in range(9)], random.Random(0)
    size, vocab = max(6, min(16, longest - 4)), range(3, max(10, getattr(model.config.get_text_config(), "vocab_size", 10)))
    further = [tuple(draw.choices(vocab, k=size)) for _ in range(num_tokens // (size // 2) + 1)]
    example = Example("probe", tuple(ids[:4]), (tuple(ids[3:7]), tuple(ids[2:8]), (*ids[3:5], ids[0], ids[1]), *further))
    try:
        with evaluating(model), in_float32(model), torch.no_grad():
            shared, plain = (_by_completion(model, example, layout) for layout in ("shared", "plain"))
    except TRIAL_ERRORS:
        return False
    scale = max(float(value.abs().max()) for value in plain.values())
    return all(torch.allclose(shared[key], plain[key], atol=PROBE_TOLERANCE * scale, rtol=0.0) for key in plain)


def _by_completion(model: Any, example: Example, layout: Layout) -> dict[tuple[int, ...], Tensor]:
    """Hidden states by the prefix that they follow, which has one meaning in both layouts."""
    found = {}
    (batch,) = micro_batches([example], layout=layout, max_tokens=1 << 20, pad_id=0)
    batch = batch.to(str(model.device))
    for place, hidden_H in zip(batch.places_P.tolist(), hidden_states(model, batch).float(), strict=True):
        row, column = divmod(place, batch.token_ids_ST.shape[1])
        end_T = batch.end_ST[row].tolist()
        prefix = tuple(int(batch.token_ids_ST[row, j]) for j in range(column + 1) if end_T[j] > column)
        found[prefix] = hidden_H
    return found


def _row_obstacle(model: Any, longest: int) -> str | None:
    """Why packed rows are read otherwise than each sequence alone, by a trial; None where they are not."""
    length = max(PAST_WINDOW, min(longest, _past_windows(model.config.get_text_config(), longest)))
    row_tokens = ROW_TOKENS if _takes_masks(model) else max(ROW_TOKENS, 2 * length + PAST_WINDOW)
    lengths = (length, max(PAST_WINDOW, min(length, row_tokens - length - PAST_WINDOW)), PAST_WINDOW - 1, 1)
    draw = random.Random(0)
    # The first token keeps them in this order; of the second and the last, at least one stands behind one that changes.
    texts = [(3 + i, *draw.choices(range(3, 10), k=size)) for i, size in enumerate(lengths)]
    changed = [ids if i % 2 else (ids[0], *(3 + (token - 2) % 7 for token in ids[1:])) for i, ids in enumerate(texts)]
    is_same_M = torch.tensor([i % 2 == 1 for i, size in enumerate(lengths) for _ in range(size)])
    try:
        widened = in_float32(model) if _takes_masks(model) else contextlib.nullcontext()  # flash kernels take no float32
        with evaluating(model), widened, torch.no_grad():
            alone_MH = _by_token(model, texts, "plain", 1)
            packed_MH, again_MH = (_by_token(model, some, "varlen", row_tokens) for some in (texts, changed))
    except TRIAL_ERRORS as err:
        return f"a trial of packed sequences failed with {type(err).__name__}: {str(err).partition(chr(10))[0][:200]}"
    rounding = 0.0 if _takes_masks(model) else 4 * torch.finfo(model.dtype).eps
    scale = float(alone_MH.abs().max())
    if not torch.allclose(packed_MH[is_same_M], again_MH[is_same_M], atol=max(LEAK_TOLERANCE, rounding) * scale, rtol=0.0):
        return f"in a trial with {length} tokens a packed sequence saw another one"
    if not torch.allclose(packed_MH, alone_MH, atol=max(PROBE_TOLERANCE, rounding) * scale, rtol=0.0):
        return f"a trial with {length} tokens gave other hidden states packed than alone"
    return None


def _past_windows(config: Any, limit: int) -> int:
    """Tokens of a sequence that is longer than every window of a model that is shorter than ``limit``."""
    numbers = [value for name, value in config.to_dict().items() if any(word in name for word in WINDOW_WORDS)]
    return max((value for value in numbers if type(value) is int and 0 < value < limit), default=0) + PAST_WINDOW


def _by_token(model: Any, texts: list[tuple[int, ...]], layout: Layout, max_tokens: int) -> Tensor:
    """(M, H) hidden states at each token of some texts but the last, text by text."""
    starts = accumulate((len(ids) - 1 for ids in texts), initial=0)
    examples = [Example("trial", ids[:1], (ids[1:],), (start,)) for ids, start in zip(texts, starts, strict=False)]
    rows, found = [], []
    for batch in micro_batches(examples, layout=layout, max_tokens=max_tokens, pad_id=0):
        rows.append(torch.from_numpy(batch.signals.first_rows()))
        found.append(hidden_states(model, batch.to(str(model.device))).float().cpu())
    return torch.cat(found)[torch.cat(rows).argsort()]
