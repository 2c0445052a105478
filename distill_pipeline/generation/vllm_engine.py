"""A model folder on this machine behind vLLM's own engine: requests go in as room is there, completions come as they end.

Decided: the engine is stepped from here, not run to the end of a list, so several windows are open at once and what is
finished is stored while the rest goes on. Prompts are handed over as the token ids that every other stage sees, and texts
are decoded here: vLLM never opens the tokenizer. Each completion is a request of its own, with a seed that follows from its
key; a prompt's samples share its prefix in vLLM's cache. Gave up: equal answers whatever runs beside them, which vLLM's
kernels do not promise.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from distill_pipeline.errors import ConfigError, GenerationError, MissingExtraError, ModelNotFoundError
from distill_pipeline.generation.budget import Spending, Usage
from distill_pipeline.generation.engine import seed_of, stop_tokens_of
from distill_pipeline.generation.local import rendered
from distill_pipeline.generation.protocol import (
    Asked,
    Completion,
    TokenLogprobs,
    failed_completion,
    not_finite_completion,
    unfit_completion,
)
from distill_pipeline.generation.requests import VLLM_ENGINE, family_settings
from distill_pipeline.generation.spec import SamplingSpec, VllmSpec
from distill_pipeline.models.load import load_generation_config, load_tokenizer, resolve_device, resolve_dtype
from distill_pipeline.models.resolve import ModelFolder
from distill_pipeline.rendering import ChatRenderer

FAILED_AT_ONCE = 1024
"""Prompts that cannot be rendered, told of before any more are taken."""


@dataclass(frozen=True)
class _Request:
    """One completion to be made; ``is_first`` of its prompt's, which pays for reading it."""

    key: str
    prompt_ids: tuple[int, ...]
    is_first: bool


class VllmEngine:
    """Engine ``vllm``: see :class:`distill_pipeline.generation.protocol.Engine`."""

    def __init__(
        self,
        model: ModelFolder,
        *,
        name: str,
        sampling: SamplingSpec,
        seed: int,
        device: str,
        system: str | None = None,
        dtype: str | None = None,
        max_model_len: int | None = None,
        resources: VllmSpec | None = None,
        trust_remote_code: bool = False,
        top_logprobs: int | None = None,
    ) -> None:
        """
        Args:
            name: what messages call the teacher.
            device: ``auto``, ``cpu`` or ``cuda``; which of several CUDA devices, CUDA_VISIBLE_DEVICES says.
            max_model_len: most tokens of prompt and completion; None is the model's own context.
            top_logprobs: give each completion's tokens with so many likeliest ones at each place. All log-probabilities are
                then the model's own at temperature 1, since vLLM gives one kind in a run.
        Raises:
            ConfigError: the device has a number.
        """
        self._model, self._name, self._sampling, self._seed = model, name, sampling, seed
        self._max_model_len, self._resources = max_model_len, resources or VllmSpec()
        self._trust_remote_code, self._top_logprobs = trust_remote_code, top_logprobs
        self._device = resolve_device(device)
        if torch.device(self._device).index is not None:
            raise ConfigError(
                f"teacher {name}: engine vllm takes the devices that CUDA_VISIBLE_DEVICES shows, and the teacher's device is "
                f"{self._device}. Set the device to cuda, and CUDA_VISIBLE_DEVICES to the number."
            )
        self._dtype = dtype or resolve_dtype(model.path, self._device)
        self._renderer = ChatRenderer(load_tokenizer(model.path, trust_remote_code=trust_remote_code), system=system)
        self._facts: dict[str, Any] = {}
        self.settings = family_settings(
            identity=model.identity, revision=model.revision, engine=VLLM_ENGINE, dtype=self._dtype, system=system,
            rendering=self._renderer.fingerprint, sampling=sampling, seed=seed, top_logprobs=top_logprobs,
        ) | {"max_model_len": max_model_len}  # fmt: skip

    def answer(self, windows: Iterable[Sequence[Asked]], spending: Spending) -> Generator[list[Completion], None, None]:
        """As many requests in flight as vLLM takes into two steps; see the protocol."""
        waiting = self._requests(windows)
        failed: list[Completion] = []
        for item in waiting:
            if isinstance(item, _Request):
                break
            failed.append(item)
            if len(failed) == FAILED_AT_ONCE:
                yield failed
                failed = []
        else:
            yield failed
            return
        yield failed
        with closing(self._opened()) as running:
            yield from _answered(running, chain([item], waiting), spending)

    def facts(self) -> dict[str, Any]:
        """Device, dtype, and once it was loaded vLLM's version and the context."""
        return {"device": self._device, "dtype": self._dtype, **self._facts}

    def _requests(self, windows: Iterable[Sequence[Asked]]) -> Iterator[_Request | Completion]:
        """A request a key, in the windows' order; a failed completion where a prompt cannot be rendered."""
        for window in windows:
            for asked in window:
                ids = rendered(self._renderer, asked.messages)
                for index, key in enumerate(asked.keys):
                    yield failed_completion(key, ids) if isinstance(ids, str) else _Request(key, ids, index == 0)

    def _opened(self) -> "_Running":
        """The engine with its model in memory.

        Raises:
            MissingExtraError: vLLM is not installed.
            ConfigError: the installed vLLM is for another kind of device.
            ModelNotFoundError: the folder has no safetensors.
            GenerationError: vLLM cannot load the model.
        """
        vllm = _vllm()
        from vllm.platforms import current_platform

        kind = current_platform.device_type
        if kind != torch.device(self._device).type:
            raise ConfigError(
                f"teacher {self._name}: the installed vllm runs on {kind}, and the teacher's device is {self._device}. Install "
                f"a vllm for {self._device}, or set the device to {kind}."
            )
        if not any(self._model.path.glob("*.safetensors")):
            raise ModelNotFoundError(f"{self._model.path} holds no .safetensors weights. Save it with save_pretrained.")
        try:
            engine = vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**self._engine_args()))
        except Exception as err:
            raise GenerationError(
                f"teacher {self._name}: vLLM cannot run {self._model.reference} ({type(err).__name__}: {err}). Where memory is "
                "short, lower max_model_len or set vllm.gpu_memory_utilization (on a CPU vllm.kv_cache_gib)."
            ) from err
        running = _Running(engine, self._name, self._renderer, self._sampling, self._stop_token_ids(), self._top_logprobs or 0)
        self._facts = {"vllm": vllm.__version__, "context_tokens": running.context_tokens}
        return running

    def _engine_args(self) -> dict[str, Any]:
        """Arguments of vLLM's engine; what is unset is left to its own defaults."""
        resources = self._resources
        given = {
            "max_model_len": self._max_model_len, "gpu_memory_utilization": resources.gpu_memory_utilization,
            "kv_cache_memory_bytes": resources.kv_cache_gib and int(resources.kv_cache_gib * 2**30),
            "max_num_seqs": resources.max_num_seqs, "max_logprobs": self._top_logprobs,
        }  # fmt: skip
        own = self._sampling.temperature == 0.0 or self._top_logprobs is not None
        return {
            "model": str(self._model.path), "skip_tokenizer_init": True, "load_format": "safetensors", "dtype": self._dtype,
            "trust_remote_code": self._trust_remote_code, "generation_config": "vllm",
            "tensor_parallel_size": resources.tensor_parallel_size, "enforce_eager": resources.enforce_eager,
            "disable_log_stats": True,
            "logprobs_mode": "raw_logprobs" if own else "processed_logprobs",
            **{name: value for name, value in given.items() if value is not None},
        }  # fmt: skip

    def _stop_token_ids(self) -> frozenset[int]:
        config = load_generation_config(self._model.path, trust_remote_code=self._trust_remote_code)
        return self._renderer.stop_token_ids | stop_tokens_of(config)


class _Running:
    """vLLM's engine with the requests that are in it."""

    def __init__(
        self, engine: Any, name: str, renderer: ChatRenderer, sampling: SamplingSpec, stop_token_ids: frozenset[int],
        top_logprobs: int,
    ) -> None:  # fmt: skip
        self._engine, self._name, self._renderer, self._sampling = engine, name, renderer, sampling
        self._stop_token_ids, self._top_logprobs = stop_token_ids, top_logprobs
        self._in_flight: dict[str, tuple[_Request, Usage]] = {}
        self.context_tokens: int = engine.vllm_config.model_config.max_model_len
        self.room: int = 2 * engine.vllm_config.scheduler_config.max_num_seqs

    def __len__(self) -> int:
        return len(self._in_flight)

    def limit(self, request: _Request) -> int:
        """Most tokens of its completion; not above zero where there is no room for one."""
        return min(self._sampling.max_tokens, self.context_tokens - len(request.prompt_ids)) if request.prompt_ids else 0

    def add(self, request: _Request, most: Usage) -> None:
        """Hand a request over. Raises GenerationError."""
        vllm, sampling = _vllm(), self._sampling
        from vllm.sampling_params import RequestOutputKind

        params = vllm.SamplingParams(
            temperature=sampling.temperature, top_k=sampling.top_k or 0, top_p=sampling.top_p,
            seed=seed_of(request.key) if sampling.temperature > 0.0 else None,
            max_tokens=self.limit(request), logprobs=self._top_logprobs, stop_token_ids=sorted(self._stop_token_ids),
            detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        try:
            self._engine.add_request(request.key, {"type": "token", "prompt_token_ids": list(request.prompt_ids)}, params)
        except Exception as err:
            raise self._broken(err) from err
        self._in_flight[request.key] = request, most

    def step(self) -> list[tuple[Completion, Usage]]:
        """What one step of the engine finished, each with what was set aside for it. Raises GenerationError."""
        try:
            outputs = self._engine.step()
        except Exception as err:
            raise self._broken(err) from err
        done = []
        for output in outputs:
            if output.finished:
                request, most = self._in_flight.pop(output.request_id)
                done.append((self._completion(request, output.outputs[0]), most))
        return done

    def close(self) -> None:
        """Stop the engine's processes: their memory is free for what comes next."""
        self._engine.engine_core.shutdown()

    def _completion(self, request: _Request, output: Any) -> Completion:
        """A completion of vLLM's output, whose ids end with the end token where one was drawn."""
        drawn, length = list(output.token_ids), len(request.prompt_ids)
        if output.finish_reason not in {"stop", "length"}:
            error = f"engine_error: vLLM ended the request with finish_reason {output.finish_reason!r}"
            return failed_completion(request.key, error, prompt_tokens=length)
        if not math.isfinite(output.cumulative_logprob):
            return not_finite_completion(request.key, length)
        end = drawn[-1] if output.finish_reason == "stop" else None
        ids = tuple(drawn if end is None else drawn[:-1])
        return Completion(
            request.key, self._renderer.decode(ids), ids, output.finish_reason, length, len(drawn), output.cumulative_logprob,
            end_token_id=end, tokens=_tokens(drawn, output.logprobs, self._top_logprobs) if self._top_logprobs else None,
        )  # fmt: skip

    def _broken(self, err: Exception) -> GenerationError:
        return GenerationError(
            f"teacher {self._name}: vLLM stopped working ({type(err).__name__}: {err}). Everything answered is stored: run "
            "again."
        )


def _tokens(drawn: Sequence[int], places: Sequence[Mapping[int, Any]], k: int) -> TokenLogprobs:
    """vLLM gives each place's ``k`` likeliest tokens and the drawn one, with their ranks from 1."""
    tops = [sorted(place.items(), key=lambda item: item[1].rank)[:k] for place in places]
    own = [place[token].logprob for token, place in zip(drawn, places, strict=True)]
    return TokenLogprobs(
        np.array(drawn, np.int32), np.array(own, np.float32),
        np.array([token for top in tops for token, _ in top], np.int32),
        np.array([found.logprob for top in tops for _, found in top], np.float32),
    )  # fmt: skip


def _answered(
    running: _Running, waiting: Iterator[_Request | Completion], spending: Spending
) -> Generator[list[Completion], None, None]:
    """Keep the engine full until nothing waits. Raises BudgetError once the next request does not fit and none is running."""
    held: _Request | Completion | None = None
    while True:
        done: list[Completion] = []
        while len(running) < running.room and len(done) < FAILED_AT_ONCE:
            item = held or next(waiting, None)
            held = None
            if not isinstance(item, _Request):
                if item is None:
                    break
                done.append(item)
            elif (limit := running.limit(item)) <= 0:
                done.append(unfit_completion(item.key, len(item.prompt_ids), running.context_tokens))
            elif spending.reserve(most := Usage(len(item.prompt_ids) * item.is_first, limit, 1)):
                running.add(item, most)
            else:
                held = item
                break
        if done:
            yield done
        elif not running:
            if held is not None:
                raise spending.used_up()
            return
        if running:
            finished = running.step()
            for completion, most in finished:
                spending.release(most)
                spending.pay(Usage(most.prompt_tokens, completion.completion_tokens, 1))
            yield [completion for completion, _ in finished]


def _vllm() -> Any:
    """The package. Raises MissingExtraError."""
    try:
        import vllm
    except ImportError as err:
        raise MissingExtraError.of("engine vllm", "vllm", "vllm") from err
    return vllm
