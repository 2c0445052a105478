"""A teacher that reads completions in its own tokens, for ``divergence: uld``: what it says of each of the student's tokens.

Decided: within a completion the student's i-th token meets the teacher's i-th (Boizard et al. 2024, arXiv:2402.12030); tokens
past the end of the shorter tokenization have no partner and count in the cross-entropy alone. The loss is still divided by the
student's completion tokens. The teacher reads a whole optimizer step first, each completion in a sequence of its own, and
its hidden states wait for the student's micro-batches: they are small beside logits.
Given up: alignment by text; the shared layout, in which one of the student's places could have several partners.

Axes: M completion tokens of a step in the student's tokens, P positions of a micro-batch, H hidden width of the teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.training.batches import MicroBatch, micro_batches
from distill_pipeline.training.examples import Example
from distill_pipeline.training.layout import forward_precision, hidden_states
from distill_pipeline.training.parallel import ALONE, PLAIN, HeldModel, Processes


@dataclass(frozen=True)
class TeacherReading:
    """The teacher's hidden states by the student's completion tokens, and which of these have a partner at all."""

    hidden_MH: Tensor
    is_paired_M: Tensor

    def of(self, part: MicroBatch) -> tuple[Tensor, MicroBatch]:
        """The teacher's (P, H) hidden states of a micro-batch, and that batch with no divergence where there is no partner."""
        row_P = torch.from_numpy(part.signals.first_rows()).to(self.hidden_MH.device)
        weight_P = part.targets.weight_P * self.is_paired_M[row_P]
        return self.hidden_MH[row_P], replace(part, targets=replace(part.targets, weight_P=weight_P))


def read_apart(
    teacher: Any, batch: Sequence[Example], own: Sequence[Example], *, max_tokens: int, device: str, dtype: torch.dtype,
    held: HeldModel = PLAIN, processes: Processes = ALONE,
) -> tuple[list[Example], TeacherReading]:  # fmt: skip
    """Let the teacher read a step's completions.

    Args:
        batch, own: the same completions in the student's and in the teacher's tokens.
        max_tokens: most tokens of a forward pass.
        held, processes: how the teacher is called, and together with whom.
    Returns:
        The student's examples with the place of their tokens in the reading, for layout ``plain``; and the reading.
    """
    starts = list(accumulate((len(ids) for example in batch for ids in example.completions), initial=0))
    unused = iter(starts)
    ours, theirs = [], []
    for example, other in zip(batch, own, strict=True):
        rows = tuple(islice(unused, len(example.completions)))
        pairs = zip(example.completions, other.completions, strict=True)
        cut = tuple(other_ids[: len(ids)] for ids, other_ids in pairs)
        ours.append(replace(example, signal_rows=rows))
        theirs.append(replace(other, completions=cut, signal_rows=rows))
    width = teacher.config.get_text_config().hidden_size
    num_rows = max(1, starts[-1])  # row 0 is there for a process without work, too
    hidden_MH = torch.zeros(num_rows, width, device=device)
    is_paired_M = torch.zeros(num_rows, dtype=torch.bool, device=device)
    for part, is_own in processes.passes(micro_batches(theirs, layout="plain", max_tokens=max_tokens, pad_id=0)):
        with torch.no_grad(), forward_precision(torch.device(device).type, dtype):
            hidden_PH = held.run(hidden_states, teacher, part.to(device))
        if not is_own:
            continue
        row_P = torch.from_numpy(part.signals.first_rows()).to(device)
        hidden_MH[row_P] = hidden_PH.float()
        is_paired_M[row_P] = True
    return ours, TeacherReading(hidden_MH, is_paired_M)
