"""The sequences of a step: which texts stand in one, in which order, and what each of its places must predict.

One sequence holds several prompts with all their completions: they form a tree, merged as far as they begin with the same
tokens: the template's system turn, a question's first words, a prompt's completions. A token sees its ancestors only and its
position is its depth, so every completion is read exactly as if it stood alone behind its prompt, and what texts share is
computed once. The loss of a node has the weight of all completions that run through it. The order is depth-first, so the
ancestors of token i are the tokens j <= i whose subtree ends after i: one number a token describes the whole mask.

Masking: the last prompt token predicts each completion's first token, a completion token the next one, and the last of
them the end token (only where the teacher finished). Prompt and padding are never predicted, whatever their token ids:
what is predicted is a list of (position, token) pairs, not a comparison of ids.

Decided: layout ``shared`` as above, and others for models that cannot take it. ``packed`` puts completions, each behind its
prompt, one after the other into one row without padding; positions restart at each, and from these alone transformers makes
the mask. ``varlen`` is the same for attention kernels that compute no pair across the borders, so that a row may be long.
``plain`` puts each completion in a padded row of its own with an ordinary causal mask. All have the same loss and gradient.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, repeat
from typing import Literal

from distill_pipeline.training.examples import Example
from distill_pipeline.training.packing import fill_rows

Layout = Literal["shared", "packed", "varlen", "plain"]

NO_SIGNAL = -1

ATTENTION_TOKENS = 2048
"""In a tree of so many tokens attention, which looks at all pairs of them, costs as much as the rest (measured on a CPU with a
model of width 576; wider ones have a larger rest, and what is chosen by it then costs a little more than it had to). The
longest tree of several texts."""

ROW_TOKENS = 512
"""Longest packed row of several texts: a mask leaves out pairs of their tokens, but not what looking at them costs."""


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
        padded = ((len(sizes[part]), sizes[part][0]) for part in passes(sizes, max_tokens))
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


def passes(sizes: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Cut sequences, longest first, into forward passes of at most ``max_tokens`` tokens with padding, or of one sequence."""
    start = 0
    while start < len(sizes):
        stop = min(start + max(1, max_tokens // sizes[start]), len(sizes))
        yield slice(start, stop)
        start = stop
