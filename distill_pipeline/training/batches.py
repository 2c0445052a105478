"""From training rows to the tensors of an optimizer step.

One sequence holds several prompts with all their completions: they form a tree, merged as far as they begin with the same
tokens: the template's system turn, a question's first words, a prompt's completions. A token sees its ancestors only and its
position is its depth, so every completion is read exactly as if it stood alone behind its prompt, and what texts share is
computed once. The loss of a node has the weight of all completions that run through it. The order is depth-first, so the
ancestors of token i are the tokens j <= i whose subtree ends after i: one number a token describes the whole mask.

Masking: the last prompt token predicts each completion's first token, a completion token the next one, and the last of
them the end token (only where the teacher finished). Prompt and padding are never predicted, whatever their token ids:
what is predicted is a list of (position, token) pairs, not a comparison of ids. Earlier assistant turns are prompt.

Decided: layout ``shared`` as above, and others for models that cannot take it. ``packed`` puts completions, each behind its
prompt, one after the other into one row without padding; positions restart at each, and from these alone transformers makes
the mask. ``varlen`` is the same for attention kernels that compute no pair across the borders, so that a row may be long.
``plain`` puts each completion in a padded row of its own with an ordinary causal mask. All have the same loss and gradient.
Gave up: token ids of all rows stay in memory, at four bytes a token.

Axes: S sequences, T tokens of the longest one, N pairs, P positions with a pair.
"""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise, repeat
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.head import Targets
from distill_pipeline.training.packing import fill_rows

Layout = Literal["shared", "packed", "varlen", "plain"]

NO_SIGNAL = -1

ATTENTION_TOKENS = 2048
"""In a tree of so many tokens attention, which looks at all pairs of them, costs as much as the rest (measured on a CPU with a
model of width 576; wider ones have a larger rest, and what is chosen by it then costs a little more than it had to). The
longest tree of several texts."""

ROW_TOKENS = 512
"""Longest packed row of several texts: a mask leaves out pairs of their tokens, but not what looking at them costs."""


@dataclass(frozen=True)
class Example:
    """A prompt with its completions as token ids; a completion ends with the end token if the teacher finished it.

    ``signal_rows``, one a completion or none at all, say where the completions' tokens start in a table of teacher signals.
    """

    prompt_id: str
    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]
    signal_rows: tuple[int, ...] = ()
    weight: float = 1.0
    """Of each of its tokens in the loss."""

    @property
    def num_tokens(self) -> int:
        """Completion tokens: what the loss is averaged over."""
        return sum(len(completion) for completion in self.completions)


class ExampleSet:
    """All examples of a student, packed: indexable, four bytes a token.

    ``own`` holds the same completions in the teacher's tokens, where a stage reads these.
    """

    def __init__(self) -> None:
        self.own: ExampleSet | None = None
        self._tokens = array("i")
        self._spans: list[array[int]] = []
        self._signal_rows: list[array[int]] = []
        self.prompt_ids: list[str] = []
        self.weights: list[float] = []
        """Of each example's tokens in the loss; none where all weigh 1."""

    def append(self, example: Example) -> None:
        """Add one example."""
        ends = array("q", [len(self._tokens)])
        for ids in (example.prompt, *example.completions):
            self._tokens.extend(ids)
            ends.append(len(self._tokens))
        self._spans.append(ends)
        self._signal_rows.append(array("q", example.signal_rows))
        self.prompt_ids.append(example.prompt_id)

    def fingerprint(self) -> str:
        """SHA-256 of all token ids, their borders, the prompt ids and weights."""
        digest = hashlib.sha256(self._tokens.tobytes())
        for ends, prompt_id in zip(self._spans, self.prompt_ids, strict=True):
            digest.update(ends.tobytes() + prompt_id.encode())
        digest.update(array("d", self.weights).tobytes())
        if self.own is not None:
            digest.update(self.own.fingerprint().encode())
        return digest.hexdigest()

    def longest(self) -> int:
        """Tokens of the longest prompt with its longest completion."""
        return max(ends[1] - ends[0] + max(stop - start for start, stop in pairwise(ends[1:])) for ends in self._spans)

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(ends[1] - ends[0] for ends in self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> Example:
        ends = self._spans[index]
        parts = [tuple(self._tokens[start:stop]) for start, stop in pairwise(ends)]
        weight = self.weights[index] if self.weights else 1.0
        return Example(self.prompt_ids[index], parts[0], tuple(parts[1:]), tuple(self._signal_rows[index]), weight)


SignalRow = Callable[[str, tuple[int, ...], tuple[int, ...]], int]
"""From a completion's id, its prompt's tokens and its own to the row where its teacher signals start."""


def encode_examples(
    batches: Iterable[pa.RecordBatch], renderer: ChatRenderer, *, max_length: int, signal_row: SignalRow | None = None,
    own_renderer: ChatRenderer | None = None,
) -> tuple[ExampleSet, dict[str, int]]:  # fmt: skip
    """Render training rows (TRAINING_SCHEMA) to examples, in their order.

    Args:
        signal_row: finds the examples' ``signal_rows``, where they have any.
        own_renderer: the teacher's, for a stage that reads apart; completions must fit into ``max_length`` in both.
    Returns:
        The examples, and counts that add up: ``completions`` = ``trained_completions`` + ``too_long`` + ``no_tokens``;
        ``rows``, ``trained_rows`` (with at least one completion left) and ``data_tokens`` (completion tokens of one epoch).
    Raises:
        TrainingError: no token is left to train on.
    """
    examples = ExampleSet()
    examples.own = None if own_renderer is None else ExampleSet()
    names = ("rows", "completions", "trained_rows", "trained_completions", "too_long", "no_tokens", "data_tokens")
    counts = dict.fromkeys(names, 0)
    for batch in batches:
        for row in batch.to_pylist():
            prompt, kept, left_out = encode_row(row, renderer, max_length=max_length)
            own_prompt, own_kept = tuple[int, ...](), dict[str, tuple[int, ...]]()
            if own_renderer is not None:
                own_prompt, pairs, _ = encode_row(row, own_renderer, max_length=max_length)
                own_kept = dict(pairs)
                left_out["too_long"] += sum(name not in own_kept for name, _ in kept)
                kept = [(name, ids) for name, ids in kept if name in own_kept]
            counts["rows"] += 1
            counts["completions"] += len(row["completions"])
            counts["too_long"] += left_out["too_long"]
            counts["no_tokens"] += left_out["no_tokens"]
            if kept:
                rows = () if signal_row is None else tuple(signal_row(name, prompt, ids) for name, ids in kept)
                examples.append(Example(row["prompt_id"], prompt, tuple(ids for _, ids in kept), rows))
                if examples.own is not None:
                    examples.own.append(Example(row["prompt_id"], own_prompt, tuple(own_kept[name] for name, _ in kept)))
                counts["trained_rows"] += 1
                counts["trained_completions"] += len(kept)
                counts["data_tokens"] += sum(len(ids) for _, ids in kept)
    if not len(examples):
        raise TrainingError(
            f"no token to train on: of {counts['completions']} completions in {counts['rows']} rows, {counts['too_long']} are "
            f"longer than max_length={max_length} with their prompt and {counts['no_tokens']} are empty. "
            "Raise max_length, or loosen the filter."
        )
    return examples, counts


def encode_row(
    row: Mapping[str, Any], renderer: ChatRenderer, *, max_length: int
) -> tuple[tuple[int, ...], list[tuple[str, tuple[int, ...]]], dict[str, int]]:
    """The tokens of a training row's prompt and of its usable completions by id, and how many are left out by reason."""
    prompt = tuple(renderer.prompt_ids(row["messages"]))
    kept: list[tuple[str, tuple[int, ...]]] = []
    left_out = {"too_long": 0, "no_tokens": 0}
    for completion in row["completions"]:
        ids = renderer.completion_ids(completion["raw_text"], finished=completion["finish_reason"] == "stop")
        if not ids or not prompt:
            left_out["no_tokens"] += 1
        elif len(prompt) + len(ids) > max_length:
            left_out["too_long"] += 1
        else:
            kept.append((completion["completion_id"], tuple(ids)))
    return prompt, kept, left_out


@lru_cache(maxsize=2)
def epoch_order(num_examples: int, *, seed: int, epoch: int) -> tuple[int, ...]:
    """A permutation of the examples that depends on these three numbers alone."""
    return tuple(np.random.default_rng([seed, epoch]).permutation(num_examples).tolist())


@dataclass
class TokenTree:
    """One sequence of a batch: tokens in depth-first order, their depth, where their subtree ends, and their targets."""

    tokens: list[int]
    depth: list[int]
    end: list[int]
    targets: dict[tuple[int, int], float]
    """The weight of all completions that put a token (second) right after a place of this sequence (first)."""
    prompt_ids: tuple[str, ...]
    signals: list[tuple[int, int]]
    """(place, row of the teacher signals) of every completion token that has one; a shared place comes several times."""


def sequences_of(examples: Sequence[Example], layout: Layout, *, max_tokens: int) -> list[TokenTree]:
    """The sequences of some examples: trees or packed rows of at most ``max_tokens``, or one a completion (``plain``)."""
    if layout == "shared":
        return [_tree(group) for group in _neighbours(examples, min(max_tokens, ATTENTION_TOKENS))]
    alone = [one for example in examples for one in _alone(example)]
    if layout == "plain":
        return [_tree([one]) for one in alone]
    lengths = [len(one.prompt) + one.num_tokens - 1 for one in alone]
    rows = fill_rows(lengths, max_tokens if layout == "varlen" else min(max_tokens, ROW_TOKENS))
    return [_tree([alone[index] for index in row], merged=False) for row in rows]


def _alone(example: Example) -> Iterator[Example]:
    """Each completion of an example behind its prompt."""
    for index, ids in enumerate(example.completions):
        yield replace(example, completions=(ids,), signal_rows=example.signal_rows[index : index + 1])


def _neighbours(examples: Sequence[Example], max_tokens: int) -> Iterator[list[Example]]:
    """Examples whose prompts begin alike, in trees of at most ``max_tokens``; a longer one stands alone.

    Large trees read what prompts share once, small ones have less attention, and those of one pass are padded to the largest:
    of some numbers of trees the one that costs least is taken, and the order cut so that the largest is as small as can be.
    """
    ordered = sorted(examples, key=lambda example: (example.prompt, example.prompt_id))
    own = [len(example.prompt) + example.num_tokens for example in ordered]
    shared = [0, *(_common(before.prompt, example.prompt) for before, example in pairwise(ordered))]

    def trees(limit: int) -> list[tuple[int, int]]:
        """(number of its first example, tokens) of each tree."""
        found = list[tuple[int, int]]()
        for index, (tokens, saved) in enumerate(zip(own, shared, strict=False)):
            if found and found[-1][1] + tokens - saved <= limit:
                found[-1] = found[-1][0], found[-1][1] + tokens - saved
            else:
                found.append((index, tokens))
        return found

    def evened(limit: int) -> list[tuple[int, int]]:
        """As many trees, with the smallest largest one."""
        number = len(trees(limit))
        return trees(bisect_left(range(limit), True, key=lambda smaller: len(trees(smaller)) <= number))

    def cost(cut: list[tuple[int, int]]) -> float:
        sizes = sorted((tokens for _, tokens in cut), reverse=True)
        padded = ((len(sizes[part]), sizes[part][0]) for part in _passes(sizes, max_tokens))
        return float(sum(number * width * (1 + width / ATTENTION_TOKENS) for number, width in padded))

    halves = [max_tokens >> times for times in range(max_tokens.bit_length())]
    cuts = {len(trees(limit)): limit for half in halves for limit in (half, 3 * half // 4)}
    best = min((evened(limit) for limit in cuts.values()), key=cost, default=[(index, 0) for index in range(len(ordered))])
    for start, stop in pairwise([*(first for first, _ in best), len(ordered)]):
        yield ordered[start:stop]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common beginning."""
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _tree(examples: Sequence[Example], *, merged: bool = True) -> TokenTree:
    """Texts merged where they begin alike, or each a tree of its own."""
    tokens: list[int] = []
    depth: list[int] = []
    end: list[int] = []
    targets: dict[tuple[int, int], float] = {}
    signals: list[tuple[int, int]] = []
    # Sorted, texts that begin alike stand together, and each one leaves the path of the one before at one place.
    texts = sorted(
        (example.prompt + ids, len(example.prompt), row, example.weight)
        for example in examples
        for ids, row in zip(example.completions, example.signal_rows or repeat(NO_SIGNAL), strict=False)
    )
    path: list[int] = []
    last: tuple[int, ...] = ()
    for ids, prompt_length, row, weight in texts:
        inputs = ids[:-1]
        shared = _common(last, inputs) if merged else 0
        for place in path[shared:]:
            end[place] = len(tokens)
        del path[shared:]
        for offset in range(shared, len(inputs)):
            path.append(len(tokens))
            tokens.append(inputs[offset])
            depth.append(offset)
            end.append(0)
        last = inputs
        for place, target in zip(path[prompt_length - 1 :], ids[prompt_length:], strict=True):
            targets[place, target] = targets.get((place, target), 0.0) + weight
        if row != NO_SIGNAL:
            signals += [(place, row + offset) for offset, place in enumerate(path[prompt_length - 1 :])]
    for place in path:
        end[place] = len(tokens)
    return TokenTree(tokens, depth, end, targets, tuple(example.prompt_id for example in examples), signals)


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
    for part in _passes(sizes, 1 if layout in ("packed", "varlen") else max_tokens):
        yield collate(sequences[part], layout=layout, pad_id=pad_id)


def _passes(sizes: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Cut sequences, longest first, into forward passes of at most ``max_tokens`` tokens with padding, or of one sequence."""
    start = 0
    while start < len(sizes):
        stop = min(start + max(1, max_tokens // sizes[start]), len(sizes))
        yield slice(start, stop)
        start = stop


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
