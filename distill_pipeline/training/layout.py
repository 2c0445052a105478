"""Hidden states of a micro-batch, and which layout of completions a pair of models can read.

Decided: nothing is believed from a model's name. Settings that are known to look past an attention mask (sliding windows,
recurrent layers, attention kernels without masks) rule the shared layout out, and for the rest a small example is run in
both layouts: if the hidden states differ, each completion gets a sequence of its own.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.learning import Precision
from distill_pipeline.models.forward import column_logits, evaluating
from distill_pipeline.training.batches import Example, Layout, MicroBatch, micro_batches

MASKING_ATTENTION = {"sdpa", "eager"}
"""Attention implementations of transformers that take a mask of any shape."""

PROBE_TOLERANCE = 1e-3
"""How far, relative to their largest entry, hidden states of the two layouts may lie apart (float32 rounding: 1e-6)."""


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
    if batch.layout == "shared":
        inputs["position_ids"] = batch.position_ids_ST
    return inputs


def choose_layout(models: list[Any], longest: int) -> tuple[Layout, str]:
    """The layout that all ``models`` can read, and why.

    Args:
        longest: the largest position of a token in the data; a sliding window that is longer than that changes nothing.
    """
    for model in models:
        reason = _obstacle(model, longest)
        if reason is not None:
            return "plain", f"{type(model).__name__}: {reason}"
    return "shared", "all models read several completions behind one prompt as they read them alone"


def _obstacle(model: Any, longest: int) -> str | None:
    config = model.config.get_text_config()
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in MASKING_ATTENTION:
        return f"attention implementation {implementation} takes no mask of this shape"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of the kinds {', '.join(sorted(other))}"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and longest >= window:
        return f"its sliding window of {window} tokens is shorter than the data ({longest})"
    if not _reads_trees(model):
        return "a trial gave other hidden states in the two layouts"
    return None


def _reads_trees(model: Any) -> bool:
    """Whether a small example has the same hidden states in both layouts."""
    ids = [3 + i % 7 for i in range(9)]
    example = Example("probe", tuple(ids[:4]), (tuple(ids[3:7]), tuple(ids[2:8]), (*ids[3:5], ids[0], ids[1])))
    try:
        with evaluating(model), torch.no_grad():
            shared, plain = (_by_completion(model, example, layout) for layout in ("shared", "plain"))
    except (TypeError, ValueError, RuntimeError, IndexError):
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
