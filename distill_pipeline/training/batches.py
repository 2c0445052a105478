"""From a step's examples to the tensors of its forward passes: token ids, positions, masks and targets.

Axes: S sequences, T tokens of the longest one, N pairs, P positions with a pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distill_pipeline.training.examples import Example
from distill_pipeline.training.head import Targets
from distill_pipeline.training.trees import Layout, TokenTree, passes, sequences_of


@dataclass(frozen=True)
class SignalPlaces:
    """Which rows of a table of teacher signals speak of which of a batch's P positions: pairs, some positions in several."""

    position_M: np.ndarray[Any, np.dtype[np.int64]]
    row_M: np.ndarray[Any, np.dtype[np.int64]]

    def first_rows(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(P,) one row a position: the first of those that there are."""
        position_P, first = np.unique(self.position_M, return_index=True)
        assert len(position_P) == int(self.position_M.max(initial=-1)) + 1, "a position without a signal"
        return self.row_M[first]


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of one forward pass.

    ``token_ids_ST`` and ``position_ids_ST`` are int64, padded on the right with the end token; ``end_ST`` holds the end of each
    token's subtree; ``places_P`` are indices into the flattened (S * T) hidden states; ``targets`` what they must predict.
    """

    token_ids_ST: Tensor
    position_ids_ST: Tensor
    end_ST: Tensor
    lengths_S: Tensor
    places_P: Tensor
    targets: Targets
    prompt_ids: tuple[str, ...]
    layout: Layout
    signals: SignalPlaces

    def to(self, device: str) -> "MicroBatch":
        """The same batch on a device."""
        if device == "cpu":
            return self
        moved: dict[str, Any] = {key: x.to(device) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved, targets=self.targets.to(torch.device(device)))

    def attention_mask(self, *, additive: bool) -> Tensor | None:
        """What the model takes: (S, T) of ones and zeros in layout ``plain``, (S, 1, T, T), boolean or additive, in ``shared``.

        None in the packed ones: transformers looks for borders in the position ids only where it is given no mask.
        """
        if self.layout in ("packed", "varlen"):
            return None
        place_T = torch.arange(self.token_ids_ST.shape[1], device=self.token_ids_ST.device)
        if self.layout == "plain":
            return (place_T < self.lengths_S[:, None]).long()
        # Padding has end = its own place + 1: it sees itself, so that no row of the mask is empty, and nobody sees it.
        seen_STT = (place_T[:, None] >= place_T) & (place_T[:, None] < self.end_ST[:, None, :])
        mask = seen_STT[:, None]
        if not additive:
            return mask
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


def micro_batches(examples: Sequence[Example], *, layout: Layout, max_tokens: int, pad_id: int) -> Iterator[MicroBatch]:
    """Cut the examples of one optimizer step into forward passes of at most ``max_tokens`` tokens, padding included.

    Sequences of similar length go together; one that alone is longer than ``max_tokens`` goes alone, as a packed row does:
    kernels find its borders in the position ids of a batch of one.
    """
    sequences = sequences_of(examples, layout, max_tokens=max_tokens)
    sequences.sort(key=lambda sequence: -len(sequence.tokens))
    sizes = [len(sequence.tokens) for sequence in sequences]
    for part in passes(sizes, 1 if layout in ("packed", "varlen") else max_tokens):
        yield collate(sequences[part], layout=layout, pad_id=pad_id)


def collate(sequences: Sequence[TokenTree], *, layout: Layout, pad_id: int) -> MicroBatch:
    """Pad sequences to one length and gather their targets."""
    width = max(len(sequence.tokens) for sequence in sequences)
    token_ids = np.full((len(sequences), width), pad_id, dtype=np.int64)
    position_ids = np.zeros((len(sequences), width), dtype=np.int64)
    end = np.tile(np.arange(1, width + 1, dtype=np.int64), (len(sequences), 1))
    places: list[int] = []
    bounds: list[int] = [0]
    pairs: list[tuple[int, int, float]] = []
    signals: list[tuple[int, int]] = []
    for row, sequence in enumerate(sequences):
        length, first = len(sequence.tokens), len(places)
        token_ids[row, :length], position_ids[row, :length], end[row, :length] = sequence.tokens, sequence.depth, sequence.end
        for (place, target), weight in sorted(sequence.targets.items()):
            flat = row * width + place
            if not places or places[-1] != flat:
                places.append(flat)
                bounds.append(len(pairs))
            pairs.append((len(places) - 1, target, weight))
            bounds[-1] = len(pairs)
        rank = {flat - row * width: first + index for index, flat in enumerate(places[first:])}
        signals += [(rank[place], signal_row) for place, signal_row in sequence.signals]
    signals_M2 = np.array(signals, dtype=np.int64).reshape(-1, 2)
    position_N, target_N, weight_N = (torch.tensor(column) for column in zip(*pairs, strict=True))
    weight_P = torch.zeros(len(places)).index_add_(0, position_N, weight_N.float())
    lengths = [len(sequence.tokens) for sequence in sequences]
    return MicroBatch(
        torch.from_numpy(token_ids), torch.from_numpy(position_ids), torch.from_numpy(end), torch.tensor(lengths),
        torch.tensor(places), Targets(bounds, position_N, target_N, weight_N.float(), weight_P),
        tuple(dict.fromkeys(name for sequence in sequences for name in sequence.prompt_ids)), layout,
        SignalPlaces(signals_M2[:, 0], signals_M2[:, 1]),
    )  # fmt: skip
