"""What a server's reply means: choices with texts and tokens, or a fault with what it costs and what to do about it."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from distill_pipeline.generation.protocol import TokenLogprobs
from distill_pipeline.reasoning import CLOSE_TAG, OPEN_TAG

_FINISH = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", "stop_sequence"), "stop"),
    **dict.fromkeys(("length", "max_tokens", "model_length"), "length"),
}
_TOO_LONG = re.compile(
    r"context[ _-]?(length|size|window)|maximum model length|max_model_len|prompt is too long|input is too long|max_new_tokens",
    re.IGNORECASE,
)
_NO_MONEY = re.compile(r"insufficient_quota|insufficient balance|payment required", re.IGNORECASE)
_TOKEN_ID = "token_id:"
MAX_ERROR_CHARS = 300


@dataclass(frozen=True)
class Choice:
    """One sample of a reply. ``problem`` is the error of one that is no answer; ``tokens`` is None unless it is known."""

    text: str
    is_cut: bool
    logprob: float | None = None
    tokens: int | None = None
    problem: str | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    """What the server says of each token, where it was asked for log-probabilities."""


@dataclass(frozen=True)
class Reply:
    """The samples of one request; token numbers are the whole request's, None where the server does not report them."""

    choices: tuple[Choice, ...]
    prompt_tokens: int | None
    completion_tokens: int | None
    fingerprint: str | None = None


@dataclass(frozen=True)
class Fault:
    """Why there is no reply.

    ``kind``: ``limited`` (ask later, costs nothing), ``failed`` (ask again, a bounded number of times), ``refused`` (this
    prompt never gets an answer) or ``fatal`` (no prompt does). ``error`` begins with its class and a colon.
    """

    kind: Literal["limited", "failed", "refused", "fatal"]
    error: str
    is_overload: bool = False
    wait_seconds: float | None = None
    status: int | None = None


def read_reply(body: bytes) -> Reply | Fault:
    """The reply in the body of a 200."""
    try:
        document = json.loads(body)
        choices = tuple(_choice(choice) for choice in document["choices"])
        usage = document.get("usage") or {}
        if not choices:
            raise KeyError("no choices")
        return Reply(
            choices, usage.get("prompt_tokens"), usage.get("completion_tokens"), document.get("system_fingerprint")
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        shown = brief(body.decode("utf-8", "replace"))
        return Fault("failed", f"invalid_response: no chat completion ({type(err).__name__}) in {shown!r}")


def read_fault(status: int, body: bytes, wait_seconds: float | None) -> Fault:
    """What a reply with another status means."""
    said = brief(error_text(body))
    if status == 402 or (status == 429 and _NO_MONEY.search(body.decode("utf-8", "replace"))):
        return Fault("fatal", f"no_money: {status}: {said}", status=status)
    if status == 429:
        return Fault("limited", f"rate_limited: {status}: {said}", wait_seconds=wait_seconds, status=status)
    if status >= 500 or status in {408, 409, 425}:
        overload = status in {408, 503, 529}
        return Fault("failed", f"server_error: {status}: {said}", overload, wait_seconds, status)
    if status in {400, 413, 422} and _TOO_LONG.search(body.decode("utf-8", "replace")):
        return Fault("refused", f"prompt_too_long: {status}: {said}", status=status)
    if status in {401, 403, 404} or status < 400:
        return Fault("fatal", f"refused: {status}: {said}", status=status)
    return Fault("refused", f"rejected: {status}: {said}", status=status)


def error_text(body: bytes) -> str:
    """The sentence in an error's body, whichever of the usual places it stands in."""
    text = body.decode("utf-8", "replace")
    try:
        document = json.loads(text)
    except ValueError:
        return text
    for name in ("error", "message", "detail"):
        if isinstance(document, Mapping) and name in document:
            document = document[name]
    return document if isinstance(document, str) else json.dumps(document)


def brief(text: str) -> str:
    """A text on one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= MAX_ERROR_CHARS else f"{text[:MAX_ERROR_CHARS]}..."


def _choice(choice: Mapping[str, Any]) -> Choice:
    message, reason = choice["message"], choice.get("finish_reason")
    finish = _FINISH.get(reason or "")
    if finish is None:
        name = "content_filter" if reason == "content_filter" else "unknown_finish"
        return Choice("", False, problem=f"{name}: the server ended the answer with finish_reason {reason!r}")
    text = with_reasoning(*_parts(message))
    steps = (choice.get("logprobs") or {}).get("content")
    logprob = math.fsum(step["logprob"] for step in steps) if steps else None
    return Choice(text, finish == "length", logprob, len(steps) if steps else None, steps=steps or ())


def token_logprobs(steps: Sequence[Mapping[str, Any]]) -> TokenLogprobs | None:
    """Tokens by their ids with the likeliest ones; None where the server names tokens by their texts, which have no one id."""
    named = [token for step in steps for token in (step, *step.get("top_logprobs", ()))]
    if not steps or not all(str(token["token"]).startswith(_TOKEN_ID) for token in named):
        return None
    tops = [token for step in steps for token in step["top_logprobs"]]
    ids, top_ids = ([int(token["token"].removeprefix(_TOKEN_ID)) for token in part] for part in (steps, tops))
    own, top = ([token["logprob"] for token in part] for part in (steps, tops))
    return TokenLogprobs(
        np.array(ids, np.int32), np.array(own, np.float32), np.array(top_ids, np.int32), np.array(top, np.float32)
    )


def _parts(message: Mapping[str, Any]) -> tuple[str, str]:
    """Reasoning and answer of a message: fields of their own, or both as parts of ``content``, as some servers give them."""
    reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    content = message.get("content")
    if not isinstance(content, list):
        return reasoning, _text(content)
    thought = [part for part in content if part.get("type") in {"thinking", "reasoning"}]
    return reasoning or _text(thought), _text([part for part in content if part not in thought])


def _text(value: Any) -> str:
    """A text, or that of a list of parts one after the other. Raises TypeError for what is neither: no part goes unseen."""
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    if isinstance(value, Mapping):
        named = [value[name] for name in ("text", "thinking", "reasoning") if name in value]
        value = _text(named[0]) if named else value
    if value is not None and not isinstance(value, str):
        raise TypeError(f"neither text nor parts of one: {value!r}")
    return value or ""


def with_reasoning(reasoning: str, content: str) -> str:
    """One text of what a server gives apart: reasoning between think tags, then the answer.

    An answer that is not there yet leaves the tag open: the completion was cut while it reasoned. Tags inside the reasoning
    would end it, so they go.
    """
    if not reasoning:
        return content
    inner = reasoning.strip()
    while OPEN_TAG in inner or CLOSE_TAG in inner:
        inner = inner.replace(OPEN_TAG, "").replace(CLOSE_TAG, "").strip()
    return f"{OPEN_TAG}\n{inner}\n{CLOSE_TAG}\n\n{content}" if content else f"{OPEN_TAG}\n{inner}"


def shared_tokens(choices: Sequence[Choice], total: int, max_tokens: int) -> list[int]:
    """Tokens of each choice where a server reports only their sum; they add up to it.

    Those that were cut have ``max_tokens``, the others share the rest by their length in bytes. Where that does not add up
    (the context cut them) all share by length.
    """
    lengths = [len(choice.text.encode()) + 1 for choice in choices]
    rest = total - max_tokens * sum(choice.is_cut for choice in choices)
    num_ended = sum(not choice.is_cut for choice in choices)
    if rest < num_ended or num_ended == 0:
        return _shares(total, lengths)
    shares = iter(_shares(rest, [length for length, choice in zip(lengths, choices, strict=True) if not choice.is_cut]))
    return [max_tokens if choice.is_cut else next(shares) for choice in choices]


def _shares(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to the weights, whose sum is ``total``."""
    whole, shares, weight_before, before = sum(weights), [], 0, 0
    for weight in weights:
        weight_before += weight
        upto = total * weight_before // whole
        shares.append(upto - before)
        before = upto
    return shares
