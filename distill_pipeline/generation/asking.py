"""Greedy answers of one model to any conversations, through the generation store: none is ever paid for twice."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from distill_pipeline.generation.answering import stored_answers, stored_form
from distill_pipeline.generation.budget import Spending
from distill_pipeline.generation.opening import TeacherModel, greedy_engine
from distill_pipeline.generation.protocol import Asked
from distill_pipeline.generation.requests import family_of, request_key
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.records import prompt_id
from distill_pipeline.storage.places import Place

Answer = Mapping[str, Any]
"""``raw_text``, ``finish_reason`` and, where that is ``error``, ``error`` as :class:`Completion` gives it."""


class GreedyAnswers:
    """One model and where its answers are kept. The model is loaded when the first answer is missing."""

    def __init__(
        self, model: TeacherModel, *, generations_dir: Place, device: str, max_tokens: int,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            device: a torch device or ``auto``.
            extra_body: more fields of each request to a server; null takes one out.
        """
        self._engine = greedy_engine(model, max_tokens=max_tokens, device=device, extra_body=extra_body)
        self.family = family_of(self._engine.settings)
        self._store = GenerationStore(generations_dir, self.family, self._engine.settings, max_tokens=max_tokens)

    def answer(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[Answer]:
        """One answer a conversation, in order. Failed ones are not kept: the next call asks again."""
        keys = [request_key(self.family, prompt_id(messages), 0) for messages in conversations]
        there = self._store.has(keys)
        missing = {key: messages for key, messages, found in zip(keys, conversations, there, strict=True) if not found}
        failed = self._ask([Asked(messages, (key,)) for key, messages in missing.items()]) if missing else {}
        stored = self._store.read(keys)
        return [stored[key] if key in stored else failed[key] for key in keys]

    def _ask(self, missing: Sequence[Asked]) -> dict[str, Answer]:
        """Have answers made and stored as they come; what failed, by key."""
        failed: dict[str, Answer] = {}
        with closing(stored_answers(self._engine, [missing], Spending(), self._store)) as lists:
            for completions in lists:
                failed |= {done.key: stored_form(done) for done in completions if done.finish_reason == "error"}
        return failed
