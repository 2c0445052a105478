"""What is measured of a model beside its training: an untrained student's loss, and whether a teacher's logits are numbers.

Completions stand in sequences of their own, a chunk of logits at a time; nothing is trained and no random number drawn.
"""

from collections.abc import Sequence
from typing import Any

import torch

from distill_pipeline.models.forward import evaluating
from distill_pipeline.models.output_head import OutputHead
from distill_pipeline.training.batches import micro_batches
from distill_pipeline.training.examples import Example
from distill_pipeline.training.head import CHUNK_TOKENS, head_loss
from distill_pipeline.training.layout import forward_precision, hidden_states

MEASURED_TOKENS = 1024
"""Tokens of a forward pass."""


def mean_cross_entropy(model: Any, head: OutputHead, examples: Sequence[Example], *, pad_id: int) -> float:
    """-log q of the examples' completion tokens, in nats a token, in the weights' own precision."""
    num_tokens, total = sum(example.num_tokens for example in examples), 0.0
    with torch.no_grad(), evaluating(model):
        for part in micro_batches(examples, layout="plain", max_tokens=MEASURED_TOKENS, pad_id=pad_id):
            part = part.to(str(model.device))
            hidden_PH = hidden_states(model, part)
            total += float(head_loss(hidden_PH, head.detached(), part.targets, num_tokens=num_tokens).cross_entropy)
    return total


def prompts_without_numbers(model: Any, head: OutputHead, examples: Sequence[Example], *, dtype: torch.dtype) -> list[str]:
    """The prompts among these on which a model's logits hold NaN or infinity."""
    return [example.prompt_id for example in examples if not _has_finite_logits(model, head, example, dtype)]


def _has_finite_logits(model: Any, head: OutputHead, example: Example, dtype: torch.dtype) -> bool:
    with torch.no_grad(), forward_precision(model.device.type, dtype):
        for part in micro_batches([example], layout="plain", max_tokens=MEASURED_TOKENS, pad_id=0):
            hidden_PH = hidden_states(model, part.to(str(model.device)))
            for start in range(0, len(hidden_PH), CHUNK_TOKENS):
                if not bool(head.logits(hidden_PH[start : start + CHUNK_TOKENS]).isfinite().all()):
                    return False
    return True
