"""Rollouts that a vLLM server draws with a student's weights: handed over, drawn as token ids, and compared before they count.

Each time the server got weights, its log-probabilities of some drawn tokens are compared with the student's own. A transfer
that did not happen, a cache of older weights or another model would otherwise train on answers that the student never gave,
and nothing would show it.

Decided: prompts go as ids and completions come as ids, so no text is tokenized again. Every setting that decides a draw is
sent, whatever the served model's generation settings say; end tokens are those of the project's own engine, and ids that the
tokenizer lacks, the padding of a head, are biased away. Log-probabilities are raw ones, at temperature 1 and of the whole
head. Given up: equal draws in equal runs. Prompts have seeds, but a server's kernels round by what else is in the batch.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill_pipeline.errors import TrainingError
from distill_pipeline.generation.engine import Request, seed_of, stop_tokens_of
from distill_pipeline.generation.protocol import Completion
from distill_pipeline.models.forward import column_logits, evaluating
from distill_pipeline.outcome import Progress
from distill_pipeline.rendering import ChatRenderer
from distill_pipeline.training.handed_weights import WeightsFolder
from distill_pipeline.training.layout import forward_precision
from distill_pipeline.training.parallel import Processes
from distill_pipeline.training.rollout_server import RolloutServer
from distill_pipeline.training.spec import RolloutServerSpec, RolloutSpec, TrainStageSpec

CHECKED_COMPLETIONS, CHECKED_TOKENS = 8, 64
"""How many completions are compared after a transfer, and the first tokens of each: their logits fit beside a training."""

NO_TOKEN_BIAS = -100.0
"""What takes a token out: e ** -100 of its mass is left, and servers take no less."""

GAP_FLOAT32, GAP_HALF = 0.02, 0.1
"""Most nats a token between server and student: rounding alone makes 1e-6 in float32, and some hundredths in half precision."""


@dataclass(frozen=True)
class _Drawn:
    """One completion with its prompt, the end token included where one was drawn."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_cut: bool


class ServedRollouts:
    """One server's part in a training, as one process sees it."""

    _given_at: tuple[int, int] | None
    """Stage and step that the server's weights are of."""

    def __init__(
        self, spec: RolloutServerSpec, renderer: ChatRenderer, *, limit: int, dtype: torch.dtype, progress: Progress
    ) -> None:
        """
        Args:
            limit: most tokens of a prompt with its completion.
            dtype: what the student's forward passes run in.
        """
        self._spec, self._renderer, self._limit, self._dtype = spec, renderer, limit, dtype
        self._server, self._folder = RolloutServer(spec, progress=progress), WeightsFolder(Path(spec.folder))
        self._most_gap = spec.max_logprob_gap or (GAP_FLOAT32 if dtype == torch.float32 else GAP_HALF)
        self._is_open, self._given_at = False, None
        self._transfers, self._transfer_seconds, self._gaps = 0, 0.0, list[float]()

    def prepare(self, student: Any) -> None:
        """Make the folder, so that a server can be started on it before it is needed. Only the first process does."""
        self._folder.claim(self._renderer.tokenizer)
        self._folder.write(student)

    def open(self, processes: Processes) -> None:
        """Wait for the server, once; the first process does, and the others for it. All processes come here together.

        Raises:
            TrainingError: nobody answers.
            ConfigError: it was not started for this.
        """
        if self._is_open:
            return
        if processes.is_first:
            self._server.wait(context_tokens=self._limit)
        processes.most(0)
        if not processes.is_first:
            self._server.wait(context_tokens=self._limit)
        self._is_open = True

    def answers(
        self, student: Any, requests: Sequence[Request], rollouts: RolloutSpec, *, stage: int, step: int, processes: Processes
    ) -> dict[str, Completion]:
        """By key, of an opened server; the samples of a prompt stand together in ``requests``. All processes come together.

        Raises:
            TrainingError: the server does not answer, or does not draw from the student as it is.
            ConfigError: it was not started for this.
        """
        is_due = self._is_due(stage, step, rollouts.refresh_every or 1)
        if is_due:
            self._hand_over(student, processes)
            self._given_at = stage, step
        prompts = requests[:: rollouts.samples]
        ends = self._renderer.stop_token_ids | stop_tokens_of(getattr(student, "generation_config", None))
        width = student.config.get_text_config().vocab_size
        bodies = [self._body(request, rollouts, ends, width) for request in prompts]
        drawn = [
            self._drawn(choice, request.prompt_ids, ends)
            for request, choices in zip(prompts, self._server.complete(bodies), strict=True)
            for choice in self._whole(choices, rollouts.samples)
        ]
        if is_due and drawn:
            self._compare(student, drawn, f"step {step + 1} of stage {stage + 1}")
        return {request.key: _completion(request.key, one) for request, one in zip(requests, drawn, strict=True)}

    def facts(self) -> dict[str, Any]:
        """How it went, for the manifest."""
        gaps = self._gaps
        return {
            "base_url": self._server.url, "bit_reproducible": False, "transfers": self._transfers,
            "transfer_seconds": round(self._transfer_seconds, 3),
            "mean_logprob_gap": math.fsum(gaps) / len(gaps) if gaps else None, "most_logprob_gap": max(gaps, default=None),
        }  # fmt: skip

    def _is_due(self, stage: int, step: int, every: int) -> bool:
        return self._given_at is None or self._given_at[0] != stage or step - self._given_at[1] >= every

    def _hand_over(self, student: Any, processes: Processes) -> None:
        """The first process writes and has the server read; the others wait for it."""
        if processes.is_first:
            started = time.monotonic()
            self._folder.write(student)
            self._server.load(self._folder.path)
            self._transfers, self._transfer_seconds = self._transfers + 1, self._transfer_seconds + time.monotonic() - started
        processes.most(0)

    def _body(self, request: Request, rollouts: RolloutSpec, ends: frozenset[int], width: int) -> dict[str, Any]:
        """A request for all samples of a prompt, but for the model's name."""
        body: dict[str, Any] = {
            "prompt": list(request.prompt_ids), "n": rollouts.samples, "temperature": rollouts.temperature,
            "max_tokens": min(rollouts.max_tokens, self._limit - len(request.prompt_ids)), "top_p": rollouts.top_p,
            "top_k": rollouts.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "stop_token_ids": sorted(ends), "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip
        if self._renderer.vocab_size < width:
            body["logit_bias"] = {str(token): NO_TOKEN_BIAS for token in range(self._renderer.vocab_size, width)}
        if self._spec.seeds and rollouts.temperature > 0.0:
            body["seed"] = seed_of(request.key) % 2**31
        return body

    def _whole(self, choices: Sequence[Mapping[str, Any]], samples: int) -> list[Mapping[str, Any]]:
        if len(choices) != samples:
            raise TrainingError(f"rollouts.server: {self._server.url} gave {len(choices)} completions of {samples}.")
        return sorted(choices, key=lambda choice: choice.get("index", 0))

    def _drawn(self, choice: Mapping[str, Any], prompt: tuple[int, ...], ends: frozenset[int]) -> _Drawn:
        """What one choice says was drawn. Raises TrainingError where that cannot be."""
        ids, reason = choice.get("token_ids"), choice.get("finish_reason")
        logprobs = (choice.get("logprobs") or {}).get("token_logprobs") or []
        if not ids or len(logprobs) != len(ids):
            raise TrainingError(
                f"rollouts.server: {self._server.url} gives no token ids with a log-probability each. It must be a vLLM that "
                "knows return_token_ids."
            )
        is_ended = [token in ends for token in ids]
        if reason not in {"stop", "length"} or is_ended[-1] != (reason == "stop") or any(is_ended[:-1]):
            raise TrainingError(
                f"rollouts.server: {self._server.url} ended a rollout with finish_reason {reason!r} at the token {ids[-1]}, "
                f"and the end tokens are {', '.join(map(str, sorted(ends)))}. Start it with --generation-config vllm."
            )
        if max(ids) >= self._renderer.vocab_size:
            raise TrainingError(f"rollouts.server: {self._server.url} drew {max(ids)}, which is no token of the tokenizer.")
        return _Drawn(prompt, tuple(ids), tuple(logprobs), reason == "length")

    def _compare(self, student: Any, drawn: Sequence[_Drawn], where: str) -> None:
        """The server's log-probabilities of some drawn tokens with the student's own. Raises TrainingError."""
        chosen = drawn[:: math.ceil(len(drawn) / CHECKED_COMPLETIONS)]
        served = torch.tensor([value for one in chosen for value in one.logprobs[:CHECKED_TOKENS]])
        with torch.no_grad(), evaluating(student), forward_precision(student.device.type, self._dtype):
            own = torch.cat([_logprobs(student, one.prompt, one.ids[:CHECKED_TOKENS]) for one in chosen]).cpu()
        gap = (own - served).abs().mean().item()
        if not gap <= self._most_gap:
            raise TrainingError(
                f"rollouts.server: in {where} {self._server.url} does not draw from the student. It gives {len(served)} drawn "
                f"tokens a mean log-probability of {served.mean().item():.4f}, and the student gives them "
                f"{own.mean().item():.4f}; a token differs by {gap:.4f} nats, and {self._most_gap:g} are allowed "
                f"(max_logprob_gap). Either the weights in {self._folder.path} did not reach it, or its dtype is another, or "
                "it reports log-probabilities of another kind than --logprobs-mode raw_logprobs. Nothing was learnt from "
                "these tokens."
            )
        self._gaps.append(gap)


def served_rollouts(
    stages: Sequence[TrainStageSpec], renderer: ChatRenderer, *, limit: int, dtype: torch.dtype, progress: Progress
) -> dict[RolloutServerSpec, ServedRollouts]:
    """The servers that the stages name."""
    specs = [stage.rollouts.server for stage in stages if stage.method == "on_policy" and stage.rollouts.server is not None]
    return {
        spec: ServedRollouts(spec, renderer, limit=limit, dtype=dtype, progress=progress) for spec in dict.fromkeys(specs)
    }  # fmt: skip


def _logprobs(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> Tensor:
    """float32 (T,) log-probabilities of a completion's tokens under the whole distribution at temperature 1."""
    tokens_1T = torch.tensor([[*prompt, *ids[:-1]]], device=model.device)
    columns_C = torch.arange(len(prompt) - 1, tokens_1T.shape[1], device=model.device)
    logits_CV = column_logits(model, {"input_ids": tokens_1T, "use_cache": False}, columns_C)[0].float()
    drawn_C1 = torch.tensor(ids, device=model.device)[:, None]
    return logits_CV.log_softmax(dim=-1).gather(1, drawn_C1).squeeze(1)


def _completion(key: str, one: _Drawn) -> Completion:
    end = None if one.is_cut else one.ids[-1]
    return Completion(
        key, "", one.ids if one.is_cut else one.ids[:-1], "length" if one.is_cut else "stop", len(one.prompt), len(one.ids),
        math.fsum(one.logprobs), end_token_id=end,
    )  # fmt: skip
