"""Training rows as token ids: a prompt with its completions, and all of a student's examples packed.

Decided: token ids of all rows stay in memory, at four bytes a token. Earlier assistant turns are prompt.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.errors import TrainingError
from distill_pipeline.rendering import ChatRenderer


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
