"""Requests to a server and what comes of them: bodies, the most they can cost, and completions with their token numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from distill_pipeline.generation.budget import Usage
from distill_pipeline.generation.protocol import Asked, Completion, failed_completion
from distill_pipeline.generation.served import ServedModel
from distill_pipeline.generation.server.replies import Choice, Reply, shared_tokens, token_logprobs
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.system_prompts import with_system

BYTES_A_TOKEN = 4
"""Where neither the server nor a tokenizer counts; the manifest then says ``estimated``."""
TEMPLATE_TOKENS, MESSAGE_TOKENS = 64, 16
"""Most tokens that a template adds, and adds to each message: a bound, with one token a byte of text."""


@dataclass
class Ask:
    """One request for completions of a prompt. ``window`` numbers the window it belongs to."""

    asked: Asked
    window: int
    attempts: int = 0
    failed_at: str = ""
    is_split: bool = False
    """Whether it is part of a request for several samples that the server refused."""

    def singles(self, *, is_split: bool) -> list["Ask"]:
        """A request for each sample."""
        return [Ask(Asked(self.asked.messages, (key,)), self.window, is_split=is_split) for key in self.asked.keys]


class ServedRequests:
    """What is the same in all requests of a teacher."""

    def __init__(
        self, model: ServedModel, sampling: SamplingSpec, *, system: str | None, extra_body: Mapping[str, Any], logprobs: bool,
        top_logprobs: int | None = None,
    ) -> None:  # fmt: skip
        self._model, self._system, self._extra = model, system, extra_body
        self.max_tokens = sampling.max_tokens
        self._fixed: dict[str, Any] = {
            "model": model.reference, model.server.max_tokens_field: sampling.max_tokens,
            "temperature": sampling.temperature, "top_p": sampling.top_p,
        }  # fmt: skip
        if sampling.top_k is not None:
            self._fixed["top_k"] = sampling.top_k
        if logprobs or top_logprobs:
            self._fixed["logprobs"] = True
        self._top_logprobs = top_logprobs
        if top_logprobs:
            self._fixed |= {"top_logprobs": top_logprobs, "return_tokens_as_token_ids": True}
        self.counted_by: set[str] = set()
        """Who counted tokens so far: server, tokenizer, or nobody (estimated)."""

    def body(self, ask: Ask) -> bytes:
        """The request as JSON. Its seed follows from the first key: equal requests draw alike, where the server can."""
        messages = with_system(ask.asked.messages, self._system)
        keys = ask.asked.keys
        seed = int.from_bytes(sha256(keys[0].encode()).digest()[:4], "big") >> 1
        document = self._fixed | {"messages": messages, "seed": seed} | ({"n": len(keys)} if len(keys) > 1 else {})
        document |= self._extra
        return json.dumps({name: value for name, value in document.items() if value is not None}).encode()

    def most(self, ask: Ask) -> Usage:
        """The most that a request can cost."""
        texts = [*(message["content"] for message in ask.asked.messages), self._system or ""]
        prompt = sum(len(text.encode()) + MESSAGE_TOKENS for text in texts) + TEMPLATE_TOKENS
        return Usage(prompt, len(ask.asked.keys) * self.max_tokens, 1)

    def completions(self, ask: Ask, reply: Reply) -> tuple[list[Completion], Usage]:
        """A completion for each choice, and what they cost; a server may give fewer or more choices than it was asked for."""
        keys = ask.asked.keys[: len(reply.choices)]
        choices = reply.choices[: len(keys)]
        prompt, tokens, total = self._tokens(ask.asked, choices, reply)
        done = []
        for key, choice, number in zip(keys, choices, tokens, strict=True):
            if choice.problem is not None:
                done.append(failed_completion(key, choice.problem, prompt_tokens=prompt))
            else:
                reason = "length" if choice.is_cut else "stop"
                found = token_logprobs(choice.steps) if self._top_logprobs else None
                done.append(
                    Completion(key, choice.text, (), reason, prompt, number, choice.logprob, tokens=found)  # type: ignore[arg-type]
                )
        return done, Usage(prompt, total, 1)

    def _tokens(self, asked: Asked, choices: Sequence[Choice], reply: Reply) -> tuple[int, list[int], int]:
        """Prompt tokens, tokens of each choice, and of all."""
        prompt = reply.prompt_tokens
        if prompt is None:
            prompt = self._count("\n".join(message["content"] for message in asked.messages))
        total = reply.completion_tokens
        if all(choice.tokens is not None for choice in choices):
            tokens = [choice.tokens or 0 for choice in choices]
        elif total is not None and (len(choices) == 1 or self._tokenizer is None):
            tokens = shared_tokens(choices, total, self.max_tokens)
        else:
            tokens = [
                self.max_tokens if choice.is_cut else min(self.max_tokens, self._count(choice.text) + 1) for choice in choices
            ]
        if reply.prompt_tokens is not None and total is not None:
            self.counted_by.add("server")
        return prompt, tokens, sum(tokens) if total is None else total

    def _count(self, text: str) -> int:
        if self._tokenizer is None:
            self.counted_by.add("estimated")
            return math.ceil(len(text.encode()) / BYTES_A_TOKEN)
        self.counted_by.add("tokenizer")
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _tokenizer(self) -> Any:
        if self._model.tokenizer_dir is None:
            return None
        from distill_pipeline.models.load import load_tokenizer

        return load_tokenizer(self._model.tokenizer_dir)
