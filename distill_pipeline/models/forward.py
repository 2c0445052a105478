"""What several rooms do to a causal language model to read it: leave training for a while, ask for few of its logits.

Axes: S sequences, C columns (positions of a sequence), V vocabulary.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

LOGIT_CELLS = 32_000_000
"""Most logits of one forward pass that only measures: 128 MB in float32."""


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """A model in evaluation mode inside, and as it was afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """Inside, a model computes in float32 whatever its weights are in: each module's are widened while it runs, no longer."""
    narrow: dict[Any, Tensor] = {}

    def widen(module: Any, _args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                narrow[parameter], parameter.data = parameter.data, parameter.data.float()

    def restore(module: Any, *_: Any) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in narrow:
                parameter.data = narrow.pop(parameter)

    handles = [handle for module in model.modules()
               for handle in (module.register_forward_pre_hook(widen), module.register_forward_hook(restore))]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, data in narrow.items():
            parameter.data = data


def column_logits(model: Any, inputs: Mapping[str, Any], columns_C: Tensor) -> Tensor:
    """Logits (S, C, V) at some columns, in the model's dtype; its head runs only there, where its forward pass can be told so.

    Args:
        inputs: keyword arguments of the model's forward pass.
        columns_C: int64 positions, ascending.
    """
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits_SCV: Tensor = model(**inputs, logits_to_keep=columns_C).logits
        return logits_SCV
    whole_STV: Tensor = model(**inputs).logits
    return whole_STV[:, columns_C]
