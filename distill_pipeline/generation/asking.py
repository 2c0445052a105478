"""Greedy answers of one model to any conversations, through the generation store: none is ever paid for twice."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_pipeline.generation.answering import failure, failures, rendered
from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.generation.requests import family_of, family_settings, request_key
from distill_pipeline.generation.sampling import Sampling
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.generation.store import GenerationStore
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.records import prompt_id
from distill_pipeline.rendering import ChatRenderer

Answer = Mapping[str, Any]
"""``raw_text``, ``finish_reason`` and, where that is ``error``, ``error`` as :class:`Completion` gives it."""


class GreedyAnswers:
    """One model and where its answers are kept. The model is loaded when the first answer is missing."""

    def __init__(
        self, model: ModelFolder, *, generations_dir: Path, device: str, max_tokens: int, batch_tokens: int = 16_384
    ) -> None:
        """
        Args:
            device: a torch device or ``auto``.
            batch_tokens: most tokens of a generation batch.
        """
        self._model, self._max_tokens, self._batch_tokens = model, max_tokens, batch_tokens
        self._device = resolve_device(device)
        self._dtype = resolve_dtype(model.path, self._device)
        self._renderer = ChatRenderer(load_tokenizer(model.path))
        settings = family_settings(
            identity=model.identity, revision=model.revision, dtype=self._dtype, system=None,
            rendering=self._renderer.fingerprint, sampling=SamplingSpec(n=1, temperature=0.0, max_tokens=max_tokens), seed=0,
        )  # fmt: skip
        self.family = family_of(settings)
        self._store = GenerationStore(generations_dir, self.family, settings, max_tokens=max_tokens)
        self._engine: TransformersEngine | None = None

    def answer(self, conversations: Sequence[Sequence[Mapping[str, str]]]) -> list[Answer]:
        """One answer a conversation, in order. Failed ones are not kept: the next call asks again."""
        keys = [request_key(self.family, prompt_id(messages), 0) for messages in conversations]
        there = self._store.has(keys)
        missing = {key: messages for key, messages, found in zip(keys, conversations, there, strict=True) if not found}
        failed = self._ask(missing) if missing else {}
        self._store.flush()
        stored = self._store.read(keys)
        return [stored[key] if key in stored else failed[key] for key in keys]

    def _ask(self, missing: Mapping[str, Sequence[Mapping[str, str]]]) -> dict[str, Answer]:
        """Generate and store batch after batch; what failed, by key."""
        failed: dict[str, Answer] = {}
        requests = []
        for key, messages in missing.items():
            ids = rendered(self._renderer, messages)
            if isinstance(ids, str):
                failed[key] = failure(ids)
            else:
                requests.append(Request(key, ids))
        engine = self._engine = self._engine or self._loaded()
        for batch in engine.plan_batches(requests, max_tokens=self._max_tokens):
            completions = engine.run_batch(batch, max_tokens=self._max_tokens, sampling=Sampling())
            self._store.add(completions)
            self._store.flush_if_due()
            failed.update(failures(completions))
        return failed

    def _loaded(self) -> TransformersEngine:
        model = load_model(self._model.path, device=self._device, dtype=self._dtype)
        return TransformersEngine(model, self._renderer, batch_tokens=self._batch_tokens)
