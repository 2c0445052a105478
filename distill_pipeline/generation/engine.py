"""Completions of many prompts by one transformers model, for a teacher's samples and for greedy evaluation.

Decided: each prompt is read once for all its samples; rows leave the batch when they finish; logits are made for the last
position only; tokens are drawn as in :mod:`distill_pipeline.generation.sampling`. Batches are a function of the requests
alone, so a run that was cut goes on with the very batches it would have had. Gave up: filling a finished row's place with
the next prompt (continuous batching), which makes a batch depend on when its rows happened to finish.

Axes: P prompts, R rows, V vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch

from distill_pipeline.generation.decoders import Decoder, decoder_for
from distill_pipeline.generation.protocol import Completion, not_finite_completion, unfit_completion
from distill_pipeline.generation.sampling import Sampling, sample_tokens
from distill_pipeline.generation.shared_prefix import SharedPrefixDecoder
from distill_pipeline.generation.top_logprobs import TopLogprobs
from distill_pipeline.records import FinishReason
from distill_pipeline.rendering import ChatRenderer

MAX_ROWS = 512
"""Most rows of a batch, whatever the token budget: bounds the memory of the logits."""


@dataclass(frozen=True)
class Request:
    """One completion to be made. ``key`` names it and seeds its draws: equal keys draw equal tokens."""

    key: str
    prompt_ids: tuple[int, ...]


class TransformersEngine:
    """Batched generation with any transformers causal language model."""

    def __init__(
        self, model: Any, renderer: ChatRenderer, *, batch_tokens: int = 16_384, decoder: Decoder | None = None
    ) -> None:
        """
        Args:
            model: a transformers causal language model in evaluation mode, on any device.
            renderer: gives the tokens that stop a row, and decodes.
            batch_tokens: most tokens of a batch, each prompt counted once and ``max_tokens`` for each of its rows.
            decoder: how the model is stepped; by default the fastest that agrees with the model's own forward pass.
        """
        self.model = model
        self.renderer = renderer
        self.batch_tokens = batch_tokens
        self.decoder = decoder_for(model) if decoder is None else decoder
        self.context_tokens: int = getattr(model.config, "max_position_embeddings", None) or 2**31
        self.stop_token_ids = renderer.stop_token_ids | stop_tokens_of(getattr(model, "generation_config", None))

    @property
    def shares_prefixes(self) -> bool:
        """Whether the fast way of stepping is in use; results do not depend on it beyond rounding."""
        return isinstance(self.decoder, SharedPrefixDecoder)

    def generate(
        self,
        requests: Sequence[Request],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
    ) -> Iterator[Completion]:
        """Yield one completion a request, in batches sorted by prompt length: match them by ``key``.

        Requests with equal ``prompt_ids`` share one prefill. A request that does not fit the model's context yields an
        ``error`` completion.
        """
        sampling = Sampling(temperature, top_k, top_p)
        for batch in self.plan_batches(requests, max_tokens=max_tokens):
            yield from self.run_batch(batch, max_tokens=max_tokens, sampling=sampling)

    def plan_batches(self, requests: Iterable[Request], *, max_tokens: int) -> list[list[Request]]:
        """The batches in which :meth:`generate` would answer: :func:`planned_batches`."""
        return planned_batches(requests, max_tokens=max_tokens, batch_tokens=self.batch_tokens)

    def run_batch(
        self, batch: Sequence[Request], *, max_tokens: int, sampling: Sampling, top_logprobs: int = 0
    ) -> list[Completion]:
        """Answer one batch; completions come in the order of the requests.

        Args:
            top_logprobs: give each completion's ``tokens`` with so many likeliest ones at each place; 0 gives none.
        """
        limits = [min(max_tokens, self.context_tokens - len(request.prompt_ids)) for request in batch]
        fitting = [index for index, limit in enumerate(limits) if limit > 0 and batch[index].prompt_ids]
        chosen = [batch[i] for i in fitting]
        answered = self._sample(chosen, [limits[i] for i in fitting], sampling, top_logprobs) if fitting else []
        completions = dict(zip(fitting, answered, strict=True))
        return [
            completions.get(index) or unfit_completion(request.key, len(request.prompt_ids), self.context_tokens)
            for index, request in enumerate(batch)
        ]

    @torch.inference_mode()
    def _sample(
        self, requests: Sequence[Request], limits: Sequence[int], sampling: Sampling, top_logprobs: int
    ) -> list[Completion]:
        """The loop: draw a token a row, drop finished rows, step the others."""
        device = self.model.device
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))
        number = {prompt: index for index, prompt in enumerate(prompts)}
        rows = torch.tensor([number[request.prompt_ids] for request in requests], device=device)
        limits_R = torch.tensor(limits, device=device)
        seeds_R = torch.tensor([seed_of(request.key) for request in requests], device=device)
        stops = torch.tensor(sorted(self.stop_token_ids), device=device)
        num_rows, max_tokens = len(requests), max(limits)
        drawn = torch.full((num_rows, max_tokens), -1, dtype=torch.int64, device=device)
        logprobs = torch.zeros(num_rows, dtype=torch.float32, device=device)
        alive = torch.arange(num_rows, device=device)
        tops = TopLogprobs(num_rows, max_tokens, min(top_logprobs, self.renderer.vocab_size), device)
        logits_RV = self.decoder.prefill(prompts, rows, max_tokens)[rows]
        for step in range(max_tokens):
            known_RV = logits_RV[:, : self.renderer.vocab_size]
            tokens_R, logprobs_R = sample_tokens(known_RV, sampling, seeds_R[alive], step)
            tops.take(known_RV, tokens_R, alive, step)
            drawn[alive, step] = tokens_R
            logprobs[alive] += logprobs_R
            goes_on = ~torch.isin(tokens_R, stops) & (limits_R[alive] > step + 1)
            left = int(goes_on.sum())
            if left == 0:
                break
            if left < len(alive):
                holes = (~goes_on[:left]).nonzero().squeeze(1)
                movers = goes_on[left:].nonzero().squeeze(1) + left
                for state in (alive, tokens_R):
                    state[holes] = state[movers]
                alive, tokens_R = alive[:left], tokens_R[:left]
                self.decoder.drop(holes, movers, left)
            logits_RV = self.decoder.step(tokens_R)
        table, sums = drawn.tolist(), logprobs.tolist()
        return [self._completion(request, table[i], sums[i], tops, i) for i, request in enumerate(requests)]

    def _completion(self, request: Request, drawn: list[int], logprob: float, tops: TopLogprobs, row: int) -> Completion:
        count = drawn.index(-1) if -1 in drawn else len(drawn)
        finished = drawn[count - 1] in self.stop_token_ids
        ids = tuple(drawn[: count - finished])
        if not math.isfinite(logprob):
            return not_finite_completion(request.key, len(request.prompt_ids))
        reason: FinishReason = "stop" if finished else "length"
        end = drawn[count - 1] if finished else None
        return Completion(
            request.key, self.renderer.decode(ids), ids, reason, len(request.prompt_ids), count, logprob, end_token_id=end,
            tokens=tops.of(row, drawn[:count]),
        )  # fmt: skip


def planned_batches(requests: Iterable[Request], *, max_tokens: int, batch_tokens: int) -> list[list[Request]]:
    """The batches in which requests are answered.

    Sorted by prompt length, then prompt, in the given order within a prompt, and packed one after the other: without the
    requests of its first batches, a plan's other batches are the same, and a batch by itself is planned as itself.
    """
    batches: list[list[Request]] = []
    used, last = 0, None
    for request in sorted(requests, key=lambda request: (len(request.prompt_ids), request.prompt_ids)):
        cost = max_tokens + (len(request.prompt_ids) if request.prompt_ids != last else 0)
        if not batches or used + cost > batch_tokens or len(batches[-1]) == MAX_ROWS:
            batches.append([])
            used, cost = 0, max_tokens + len(request.prompt_ids)
        batches[-1].append(request)
        used, last = used + cost, request.prompt_ids
    return batches


def seed_of(key: str) -> int:
    """The int64 that seeds a request's draws."""
    return int.from_bytes(sha256(key.encode()).digest()[:8], "big", signed=True)


def stop_tokens_of(generation_config: Any) -> frozenset[int]:
    """The end tokens that a model's own generation settings name beside the template's."""
    eos = getattr(generation_config, "eos_token_id", None)
    return frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
