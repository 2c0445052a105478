"""The model under evaluation as lm-eval sees it: prompts from the one renderer, answers from our own engine.

lm-eval hands prompts around as strings. A rendered prompt is a string that carries its messages, so its token ids are
those of :class:`~distill_pipeline.rendering.ChatRenderer` and no text is ever tokenized twice or by another template. A
prompt that a task built as plain text becomes one user message. Choices of a multiple-choice task are tokenized as
completions, apart from the prompt, exactly as training does it.

Gave up: ``until`` strings that the model writes are cut away afterwards; generation goes in rounds so that an answer that
contains one costs no more than a round.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from distill_pipeline.errors import ConfigError
from distill_pipeline.evaluation.forcing import IGNORED, Row, batches_of, completion_logits
from distill_pipeline.generation.engine import Request, TransformersEngine
from distill_pipeline.outcome import Progress
from distill_pipeline.reasoning import opening_of, split_reasoning
from distill_pipeline.rendering import ChatRenderer

DEFAULT_ANSWER_TOKENS = 256
"""Longest answer of a task that does not say: lm-eval's own default."""

ROUND_TOKENS = 64
"""Tokens generated before looking for ``until`` strings: a round's second prefill costs less than 64 wasted steps."""

DEFAULT_CONTEXT = 2048
"""Context length of a model whose config names none: lm-eval's own default."""

PARAMETERS = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}
"""Generation settings of a task that are honoured; others are an error, never ignored."""

INERT = {"num_beams": 1, "repetition_penalty": 1.0, "num_return_sequences": 1}
"""Settings of the usual task files that change nothing at these values."""


class RenderedPrompt(str):
    """What a prompt looks like with the model's template, for logs; the messages are what counts."""

    messages: tuple[dict[str, str], ...]
    prefix: str
    """How the answer begins, when the task dictates its first words."""


class GeneratedText(str):
    """An answer, without reasoning, cut before the first ``until`` string, and why it ended: ``stop``, ``until``, ``length``
    or ``error``. One that was cut inside its reasoning is empty."""

    finish_reason: str
    raw_text: str
    """With the reasoning."""


class EvaluatedModel(LM):  # type: ignore[misc]
    """A causal language model for :func:`lm_eval.simple_evaluate`."""

    def __init__(self, model: Any, renderer: ChatRenderer, *, batch_size: int, device: str, progress: Progress) -> None:
        """
        Args:
            model: a transformers causal language model in evaluation mode, on ``device``.
            batch_size: most sequences of a forward pass over given text; generation plans its own batches.
        """
        super().__init__()
        self.model, self.renderer, self.progress = model, renderer, progress
        self.batch_size = batch_size
        self._device = device
        self.engine = TransformersEngine(model, renderer)
        self._opened = opening_of(renderer)
        config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
        self.max_length: int = getattr(config, "max_position_embeddings", None) or DEFAULT_CONTEXT

    @property
    def tokenizer_name(self) -> str:
        """Identity of tokenizer, template and system prompt, for lm-eval's request cache."""
        return self.renderer.fingerprint

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> RenderedPrompt:
        """A conversation as a prompt. Without a generation prompt, the last message is how the answer has to begin."""
        messages = [{"role": message["role"], "content": message["content"]} for message in chat_history]
        prefix = "" if add_generation_prompt else messages.pop()["content"]
        text = self.renderer.tokenizer.decode(self.renderer.prompt_ids(messages), skip_special_tokens=False)
        prompt = RenderedPrompt(text + prefix)
        prompt.messages, prompt.prefix = tuple(messages), prefix
        return prompt

    def prompt_ids(self, prompt: str) -> list[int]:
        """The token ids of a prompt, as training would render it."""
        if not isinstance(prompt, RenderedPrompt):
            return self.renderer.prompt_ids([{"role": "user", "content": prompt}])
        prefix = self.renderer.completion_ids(prompt.prefix, finished=False) if prompt.prefix else []
        return self.renderer.prompt_ids(prompt.messages) + prefix

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (prompt, continuation): the continuation's log-likelihood in nats, and whether greedy decoding writes it."""
        return self._score([self._continuation_row(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-likelihood, in nats, of each text as a whole, in windows of the model's context."""
        rows: list[Row] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.renderer.completion_ids(request.args[0], finished=False), prefix_token=self._prefix_token,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            for context, predicted in map(make_disjoint_window, windows):
                rows.append((list(context), list(predicted)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(rows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any]) -> list[GeneratedText]:
        """One answer a request, greedy unless the task asks for sampling.

        Raises:
            ConfigError: a task asks for a generation setting that is not supported.
        """
        answers: dict[int, GeneratedText] = {}
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        for indices in groups.values():
            settings = generation_settings(requests[indices[0]].args[1], requests[indices[0]].task_name)
            prompts = {
                index: (self._request_key(requests[index], index), self.prompt_ids(requests[index].args[0]))
                for index in indices
            }
            for index, answer in self._answer(prompts, **settings):
                answers[index] = answer
                if len(answers) % 100 == 0:
                    self.progress(f"answered {len(answers)} of {len(requests)} evaluation prompts")
        return [answers[index] for index in range(len(requests))]

    def _answer(
        self, prompts: Mapping[int, tuple[str, list[int]]], *, until: list[str], max_tokens: int, **sampling: Any
    ) -> Iterator[tuple[int, GeneratedText]]:
        """Answers by index, in rounds; an answer that is not at its end goes on in the next round from where it was."""
        written: dict[int, list[int]] = {index: [] for index in prompts}
        while written:
            spent = len(next(iter(written.values())))
            budget = min(ROUND_TOKENS, max_tokens - spent) if until else max_tokens
            requests = [
                Request(f"{prompts[index][0]}/{spent}", tuple(prompts[index][1] + tokens)) for index, tokens in written.items()
            ]
            by_key = {request.key: index for request, index in zip(requests, written, strict=True)}
            for completion in self.engine.generate(requests, max_tokens=budget, **sampling):
                index = by_key[completion.key]
                tokens = written.pop(index) + list(completion.token_ids)
                is_full = spent > 0 and completion.finish_reason == "error"  # the answer reached the end of the context
                reason = "length" if is_full else completion.finish_reason
                answer = cut_answer(self.renderer.decode(tokens), until, reason, self._opened)
                cut_short = len(completion.token_ids) < budget
                if answer.finish_reason == "length" and not cut_short and len(tokens) < max_tokens:
                    written[index] = tokens
                else:
                    yield index, answer

    def _request_key(self, request: Any, index: int) -> str:
        return f"{request.task_name}/{request.doc_id}/{index}"

    @property
    def _prefix_token(self) -> int:
        bos = self.renderer.tokenizer.bos_token_id
        return self.renderer.end_token_id if bos is None else int(bos)

    def _continuation_row(self, prompt: str, continuation: str) -> Row:
        if prompt == "":
            return [self._prefix_token], self.renderer.completion_ids(continuation, finished=False)
        ids = self.prompt_ids(prompt)
        prefix = getattr(prompt, "prefix", "")
        if not prefix:
            return ids, self.renderer.completion_ids(continuation, finished=False)
        split = len(self.renderer.completion_ids(prefix, finished=False))
        whole = self.renderer.completion_ids(prefix + continuation, finished=False)
        return ids[: len(ids) - split] + whole[:split], whole[split:]

    def _score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """Log-likelihood and greediness of each row's completion; a prompt that is too long loses its beginning."""
        fitted = [_fit(row, self.max_length) for row in rows]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        full = [index for index, (_, completion) in enumerate(fitted) if completion]
        waiting = [fitted[index] for index in full]
        for batch in batches_of(waiting, vocab_size=self.renderer.vocab_size, max_rows=self.batch_size):
            logits, labels = completion_logits(self.model, [waiting[i] for i in batch], device=str(self._device))
            logprobs, greedy = _token_scores(logits, labels)
            for row, i in enumerate(batch):
                scores[full[i]] = (float(logprobs[row]), bool(greedy[row]))
        return scores


def _token_scores(logits: torch.Tensor, labels: torch.Tensor) -> tuple[list[float], list[bool]]:
    """Of each row: summed log-probability of its labels, and whether each of them is the likeliest token."""
    counted = labels != IGNORED
    targets = labels.clamp_min(0)
    logits = logits.float()
    picked = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
    agrees = (logits.argmax(dim=-1) == targets) | ~counted
    return (picked.double() * counted).sum(dim=-1).tolist(), agrees.all(dim=-1).tolist()


def _fit(row: Row, max_length: int) -> Row:
    """A row within the model's context: its prompt's beginning goes first, and one token before the completion stays."""
    prompt, completion = row
    completion = completion[-max_length:]
    return prompt[-max(1, max_length + 1 - len(completion)) :], completion


def cut_answer(text: str, until: Sequence[str], finish_reason: str, opened: str = "") -> GeneratedText:
    """An answer up to the first of the strings that end it, without its reasoning.

    Args:
        opened: as :func:`split_reasoning` takes it.
    """
    ends = [position for stop in until if stop and (position := text.find(stop)) >= 0]
    text = text[: min(ends)] if ends else text
    reasoning, said = split_reasoning(text, opened=opened)
    answer = GeneratedText(text if reasoning is None else said)
    answer.finish_reason, answer.raw_text = "until" if ends else finish_reason, text
    return answer


def generation_settings(kwargs: Mapping[str, Any], task: str | None) -> dict[str, Any]:
    """A task's generation settings as arguments of the engine. Raises ConfigError for those it does not know."""
    known = normalize_gen_kwargs(dict(kwargs), DEFAULT_ANSWER_TOKENS)
    if strange := sorted(key for key in known if key not in PARAMETERS and known[key] != INERT.get(key, object())):
        raise ConfigError(
            f"evaluation task {task}: generation_kwargs {', '.join(f'{key}={known[key]!r}' for key in strange)} not supported; "
            f"supported: {', '.join(sorted(PARAMETERS))}."
        )
    until = known.get("until") or []
    settings = {"until": [until] if isinstance(until, str) else list(until), "max_tokens": known["max_gen_toks"]}
    if known["do_sample"]:
        settings |= {
            "temperature": known.get("temperature", 1.0),
            "top_k": known.get("top_k", 50),
            "top_p": known.get("top_p", 1.0),
        }
    return settings
