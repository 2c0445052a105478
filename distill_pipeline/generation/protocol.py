"""What the stage knows of an engine: prompts go in by windows, completions come out in any order, what they cost is told.

An engine is opened for one teacher (:mod:`distill_pipeline.generation.opening`) and starts nothing before its first prompt:
a run in which everything is stored loads no model and asks no server.
"""

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.records import FinishReason

Message = Mapping[str, str]
Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Asked:
    """A prompt and the keys of the completions that are wanted of it."""

    messages: Sequence[Message]
    keys: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Of each drawn token of a completion, the end token included, what the model thought at temperature 1, in nats.

    ``ids`` int32 (T,) and ``logprobs`` float32 (T,) are the tokens themselves; ``top_ids`` and ``top_logprobs`` (T * K,) the K
    likeliest at each place, likeliest first, place after place.
    """

    ids: Array
    logprobs: Array
    top_ids: Array
    top_logprobs: Array


@dataclass(frozen=True)
class Completion:
    """What became of a request.

    ``finish_reason`` is ``stop`` (an end token was drawn), ``length`` (cut at max_tokens or at the end of the model's
    context) or ``error``; then ``error`` begins with its class and a colon, for instance ``prompt_too_long: ...``.
    ``completion_tokens`` and ``logprob`` (nats, see :func:`sample_tokens`) count the end token; ``text`` and ``token_ids``
    are without it, and ``end_token_id`` is which one it was. A server gives no ids, and its
    log-probabilities are as it defines them. ``tokens`` are there where the teacher's ``top_logprobs`` asks for them and the
    engine knows them.
    """

    key: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    logprob: float | None
    error: str | None = None
    end_token_id: int | None = None
    tokens: TokenLogprobs | None = None


class Engine(Protocol):
    """One teacher's way of answering."""

    @property
    def settings(self) -> dict[str, Any]:
        """What its answers depend on beside the prompt, by name: the settings of their family."""

    def answer(self, windows: Iterable[Sequence[Asked]], spending: Spending) -> Generator[list[Completion], None, None]:
        """One completion a key, in any order, a list at a time; an empty list is a sign of life.

        Windows are taken when there is room for their prompts. Each request is paid with ``spending`` before it is answered.

        Raises:
            BudgetError: the next request does not fit the budget; what was in flight was yielded.
            GenerationError: the teacher as a whole does not answer.
        """

    def facts(self) -> dict[str, Any]:
        """What the manifest says of how the answers were made."""


@dataclass(frozen=True)
class Piece:
    """Prompts that are answered together, and the most they can cost: who answers them changes no answer."""

    asked: tuple[Asked, ...]
    most: Usage


class DivisibleEngine(Engine, Protocol):
    """An engine whose work can be divided among several of its kind."""

    def pieces(self, window: Sequence[Asked]) -> tuple[list[Piece], list[Completion]]:
        """A window in pieces, and the completions of prompts that cannot be asked. Loads no model."""


def unfit_completion(key: str, prompt_tokens: int, context_tokens: int) -> Completion:
    """A request whose prompt is empty, or leaves no room for an answer in the model's context."""
    error = "prompt_empty: the prompt has no token"
    if prompt_tokens:
        error = f"prompt_too_long: {prompt_tokens} tokens, the model's context holds {context_tokens}"
    return failed_completion(key, error, prompt_tokens=prompt_tokens)


def not_finite_completion(key: str, prompt_tokens: int) -> Completion:
    """A request whose logits were not numbers."""
    error = "not_a_number: the model's logits are not finite; load it in float32 or check its weights"
    return failed_completion(key, error, prompt_tokens=prompt_tokens)


def failed_completion(key: str, error: str, *, prompt_tokens: int = 0) -> Completion:
    """A request without an answer; ``error`` begins with its class and a colon."""
    return Completion(key, "", (), "error", prompt_tokens, 0, None, error)
