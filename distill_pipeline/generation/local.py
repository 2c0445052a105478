"""A model folder on this machine as an engine: rendered here, batched within each window, loaded when first asked."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from distill_pipeline.errors import ConfigError
from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.generation.engine import Request, TransformersEngine, planned_batches
from distill_pipeline.generation.protocol import Asked, Completion, Piece, failed_completion
from distill_pipeline.generation.requests import LOCAL_ENGINE, family_settings
from distill_pipeline.generation.sampling import Sampling
from distill_pipeline.generation.spec import SamplingSpec
from distill_pipeline.models.load import load_model, load_tokenizer, resolve_device, resolve_dtype
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer


class LocalEngine:
    """Engine ``transformers``: see :class:`distill_pipeline.generation.protocol.Engine`."""

    def __init__(
        self,
        model: ModelFolder,
        *,
        sampling: SamplingSpec,
        seed: int,
        device: str,
        system: str | None = None,
        dtype: str | None = None,
        batch_tokens: int = 16_384,
        trust_remote_code: bool = False,
        top_logprobs: int | None = None,
        is_elsewhere: bool = False,
    ) -> None:
        """
        Args:
            device: a torch device or ``auto``.
            batch_tokens: most tokens of a generation batch.
            top_logprobs: give each completion's tokens with so many likeliest ones at each place.
            is_elsewhere: the device is another machine's: this engine divides work, and is not loaded.
        """
        self._model, self._sampling = model, sampling
        self._batch_tokens, self._trust_remote_code, self._top_logprobs = batch_tokens, trust_remote_code, top_logprobs
        self._device = device if is_elsewhere else resolve_device(device)
        self._dtype = dtype or resolve_dtype(model.path, self._device)
        self._renderer = ChatRenderer(load_tokenizer(model.path, trust_remote_code=trust_remote_code), system=system)
        self._engine: TransformersEngine | None = None
        self.settings = family_settings(
            identity=model.identity, revision=model.revision, engine=LOCAL_ENGINE, dtype=self._dtype, system=system,
            rendering=self._renderer.fingerprint, sampling=sampling, seed=seed, top_logprobs=top_logprobs,
        )  # fmt: skip

    def answer(self, windows: Iterable[Sequence[Asked]], spending: Spending) -> Generator[list[Completion], None, None]:
        """A window's batches depend on its requests alone: a run that was cut goes on with those it would have had next."""
        sampling, max_tokens = self._sampling, self._sampling.max_tokens
        assert sampling.top_k is not None, "the experiment file checks that"
        draw = Sampling(sampling.temperature, sampling.top_k, sampling.top_p)
        for window in windows:
            requests, failed = self._rendered(window)
            yield failed
            self._engine = self._engine or self._loaded()
            for batch in self._engine.plan_batches(requests, max_tokens=max_tokens):
                most = self._most(batch)
                if not spending.reserve(most):
                    raise spending.used_up()
                completions = self._engine.run_batch(
                    batch, max_tokens=max_tokens, sampling=draw, top_logprobs=self._top_logprobs or 0
                )
                spending.release(most)
                spending.pay(Usage(most.prompt_tokens, sum(done.completion_tokens for done in completions), len(batch)))
                yield completions

    def pieces(self, window: Sequence[Asked]) -> tuple[list[Piece], list[Completion]]:
        """The batches of a window, each as prompts again: an engine that is asked for one of them has it as its only batch."""
        requests, failed = self._rendered(window)
        of_key = {key: asked for asked in window for key in asked.keys}
        pieces = []
        for batch in planned_batches(requests, max_tokens=self._sampling.max_tokens, batch_tokens=self._batch_tokens):
            groups = groupby((request.key for request in batch), key=lambda key: id(of_key[key]))
            asked = [tuple(keys) for _, keys in groups]
            pieces.append(Piece(tuple(Asked(of_key[keys[0]].messages, keys) for keys in asked), self._most(batch)))
        return pieces, failed

    def facts(self) -> dict[str, Any]:
        """Device, dtype, and whether prompts were read once for all their samples."""
        shares = None if self._engine is None else self._engine.shares_prefixes
        return {"device": self._device, "dtype": self._dtype, "shares_prefixes": shares}

    def _most(self, batch: Sequence[Request]) -> Usage:
        """The most that a batch can cost; each prompt is read once for all its samples."""
        prompts = sum(len(prompt) for prompt in {request.prompt_ids for request in batch})
        return Usage(prompts, len(batch) * self._sampling.max_tokens, len(batch))

    def _rendered(self, window: Sequence[Asked]) -> tuple[list[Request], list[Completion]]:
        """The requests of a window, and the completions of prompts that the template refuses."""
        requests, failed = [], []
        for asked in window:
            ids = rendered(self._renderer, asked.messages)
            if isinstance(ids, str):
                failed += [failed_completion(key, ids) for key in asked.keys]
            else:
                requests += [Request(key, ids) for key in asked.keys]
        return requests, failed

    def _loaded(self) -> TransformersEngine:
        model = load_model(
            self._model.path, device=self._device, dtype=self._dtype, trust_remote_code=self._trust_remote_code
        )  # fmt: skip
        return TransformersEngine(model, self._renderer, batch_tokens=self._batch_tokens)


def rendered(renderer: ChatRenderer, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...] | str:
    """A prompt's ids, or the error of one that cannot be rendered."""
    try:
        return tuple(renderer.prompt_ids(messages))
    except ConfigError as err:
        return f"render_failed: {err}"
