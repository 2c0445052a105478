"""How a causal language model turns its last hidden states into logits: a matrix, and at most a bias, a scale and a soft-cap.

Decided: a configuration only suggests. ``logits_scaling`` divides in one family and multiplies in another, so every reading of
what it names is held against the model's own logits on a few tokens, and the first that fits is the head. Small logits
look alike with and without a soft-cap, so the head's input is also blown up until a cap must show.
Given up: heads with more layers than one, and functions that no configuration names; they are refused.

Axes: P positions, H hidden width, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.models.forward import evaluating

CAP_ATTRIBUTE = "final_logit_softcapping"
SCALE_ATTRIBUTES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""What configurations call a function that follows the head (``logits_scaling`` is division in Granite, not in HyperCLOVA)."""

PROBE_TOLERANCE = 1e-3
"""How far, relative to the largest logit, a model's own logits may lie from what the head says (float32 rounding: 1e-6)."""

PROBE_REACH = 120.0
"""How large the largest logit before its cap is made, at least; four times the usual caps, where tanh is flat."""


@dataclass(frozen=True)
class OutputHead:
    """logits = cap tanh(scale (h W^T + bias) / cap); without a cap, scale (h W^T + bias)."""

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def __len__(self) -> int:
        return len(self.weight_VH)

    @property
    def is_plain(self) -> bool:
        """Whether the matrix is all there is."""
        return self.bias_V is None and self.scale == 1.0 and self.cap is None

    def cut(self, width: int) -> "OutputHead":
        """The head of the first ``width`` tokens."""
        if width == len(self):
            return self
        return replace(self, weight_VH=self.weight_VH[:width], bias_V=None if self.bias_V is None else self.bias_V[:width])

    def of(self, model: Any) -> "OutputHead":
        """The same head, as long as this one, with the weights that ``model`` has now."""
        matrix = model.get_output_embeddings()
        return replace(self, weight_VH=matrix.weight, bias_V=getattr(matrix, "bias", None)).cut(len(self))

    def without_weights(self) -> "OutputHead":
        """What remains to be known of it where a model's weights are elsewhere: its length, and what follows its matrix."""
        bias_V = None if self.bias_V is None else self.bias_V.to("meta")
        return replace(self, weight_VH=self.weight_VH.detach().to("meta"), bias_V=bias_V)

    def detached(self) -> "OutputHead":
        """The same head, to which no gradient goes."""
        return replace(self, weight_VH=self.weight_VH.detach(), bias_V=None if self.bias_V is None else self.bias_V.detach())

    def logits(self, hidden_PH: Tensor) -> Tensor:
        """(P, V) logits, in the hidden states' dtype where the head is plain and in float32 elsewhere; no gradient is kept."""
        with torch.no_grad():
            return self.finish_(hidden_PH @ self.weight_VH.to(hidden_PH.dtype).T)

    def finish_(self, product_PV: Tensor) -> Tensor:
        """What follows the matrix product, in float32; the memory of a float32 product is used up."""
        if self.is_plain:
            return product_PV
        logits_PV = product_PV.float()
        if self.bias_V is not None:
            logits_PV.add_(self.bias_V)
        if self.cap is None:
            return logits_PV.mul_(self.scale)
        return logits_PV.mul_(self.scale / self.cap).tanh_().mul_(self.cap)

    def slope(self, logits_PV: Tensor) -> Tensor | float:
        """The derivative of the logits by the matrix product, from the logits: scale (1 - (logits / cap)^2)."""
        if self.cap is None:
            return self.scale
        return (logits_PV / self.cap).square_().neg_().add_(1.0).mul_(self.scale)


def output_head(model: Any) -> OutputHead:
    """The head of a causal language model, as its own logits confirm it.

    Raises:
        TrainingError: the logits are something else than hidden states times the output embedding with the bias, scale and
            soft-cap that the configuration names: a loss on that would silently be another model's loss. Or no numbers.
    """
    name, matrix = type(model).__name__, model.get_output_embeddings()
    if model.base_model is model or not isinstance(getattr(matrix, "weight", None), Tensor):
        raise TrainingError(f"{name} has no output embedding; distillation needs a causal language model with a linear head")
    readings = list(_readings(matrix, model.config.get_text_config()))
    probe = torch.arange(2, min(10, len(matrix.weight)), device=matrix.weight.device)[None]
    with evaluating(model), torch.no_grad():
        hidden_PH = model.base_model(input_ids=probe, use_cache=False).last_hidden_state[0]
        largest = float((hidden_PH @ matrix.weight.T).abs().max())
        reach = max(max(reading.cap or 0.0, PROBE_REACH / 4) * 4 / min(1.0, reading.scale) for reading in readings)
        gains = [1.0, reach / max(largest, 1e-6)]
        own = [(gain, logits_PV) for gain in gains if (logits_PV := _own_logits(model, matrix, probe, gain)) is not None]
    if bool(own[0][1].isnan().any()):
        raise TrainingError(f"the logits of {name} are not numbers on the tokens 2 to 9: its weights hold NaN or infinity")
    for reading in readings:
        if all(_fits(reading, hidden_PH, gain, logits_PV) for gain, logits_PV in own):
            return reading
    named = [f"scale {reading.scale:g}, soft-cap {reading.cap}" for reading in readings]
    bias = "" if readings[0].bias_V is None else " and bias"
    raise TrainingError(
        f"the logits of {name} are not its last hidden states times its output embedding{bias} with any of what its "
        f"configuration names ({'; '.join(named)}). Choose a model with a linear head."
    )


def _readings(matrix: Any, config: Any) -> Iterator[OutputHead]:
    """What the head may be: the configuration's cap, then none; each scale as a factor, as a divisor, then none."""
    cap = getattr(config, CAP_ATTRIBUTE, None)
    named = [value for key in SCALE_ATTRIBUTES if (value := getattr(config, key, None)) not in (None, 0, 1)]
    scales = dict.fromkeys([*(factor for value in named for factor in (float(value), 1.0 / value)), 1.0])
    for limit in dict.fromkeys([float(cap) if cap else None, None]):
        for scale in scales:
            yield OutputHead(matrix.weight, getattr(matrix, "bias", None), scale, limit)


def _own_logits(model: Any, matrix: Any, probe: Tensor, gain: float) -> Tensor | None:
    """The model's logits (P, V) where its head's input is ``gain`` times as large; None where that cannot be done to it."""
    called = gain == 1.0

    def enlarge(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal called
        if not (args and args[0].is_floating_point()):  # the embedding itself, which reads ids
            return args
        called = True
        return (args[0] * gain, *args[1:])

    handle = matrix.register_forward_pre_hook(enlarge)
    try:
        logits_PV: Tensor = model(input_ids=probe, use_cache=False).logits[0]
    finally:
        handle.remove()
    return logits_PV if called else None


def _fits(head: OutputHead, hidden_PH: Tensor, gain: float, own_PV: Tensor) -> bool:
    """Whether a head gives the model's own logits; a short dtype rounds the product there, and each step after it."""
    ours_PV = head.logits(hidden_PH * gain).float()
    tolerance = max(PROBE_TOLERANCE, (1 if head.is_plain else 4) * torch.finfo(own_PV.dtype).eps)
    own_PV = own_PV.float()
    return ours_PV.shape == own_PV.shape and torch.allclose(
        own_PV, ours_PV, rtol=tolerance, atol=tolerance * float(own_PV.abs().max())
    )
