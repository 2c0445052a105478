"""One way from messages to token ids: generation, training and evaluation all render here, so they see the same tokens.

Decided: a prompt and a completion are tokenized apart and joined as ids, so that the border between them never moves and
the loss mask is exact. The token that ends an assistant's turn is found by rendering one, because a tokenizer's
``eos_token`` is often another one. Templates that print today's date see a fixed date, so that a prompt means the same
tomorrow. Gave up: a completion's own tokenization; its ids are those of its text, which can differ from the ids that were
sampled where a text has several tokenizations.

A tokenizer without a chat template renders plain text: the contents of the messages, in order, with an empty line between
two of them, and the completion right after the last.
"""

import datetime as dt
import json
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError

from distill_pipeline.errors import ConfigError
from distill_pipeline.hashing import sha256_of
from distill_pipeline.system_prompts import Message, with_system

RENDERING_DATE = dt.datetime(2024, 7, 26)
"""What a template gets when it asks for the date: the date that Llama 3's template itself falls back to."""

_PROBE = "probe"

_DATE_CALL = re.compile(r"strftime_now\(\s*[\"']([^\"']*)[\"']\s*\)")
_FIXED_DATE = "{% macro strftime_now(format) %}{{ rendering_dates[format] }}{% endmacro +%}"


class ChatRenderer:
    """Turns messages into prompt ids and texts into completion ids, for one tokenizer and one system prompt."""

    def __init__(self, tokenizer: Any, *, system: str | None = None) -> None:
        """Reads the template once: finds the end token and checks that it takes a system message when one is given.

        Args:
            tokenizer: a transformers tokenizer.
            system: put first in every conversation that does not begin with a system message of its own; None leaves the
                template's default.
        Raises:
            ConfigError: the template refuses a system message, or neither template nor tokenizer names an end token.
        """
        self.tokenizer = tokenizer
        self.system = system
        self.vocab_size: int = max(tokenizer.get_vocab().values()) + 1
        self._special_ids = frozenset(tokenizer.added_tokens_decoder)
        self._plain_prefix = _automatic_bos(tokenizer)
        self._date_options = _fixed_date(tokenizer.chat_template)
        self.end_token_id: int = self._find_end_token()
        eos = tokenizer.eos_token_id
        self.stop_token_ids: frozenset[int] = frozenset({self.end_token_id} | ({eos} if eos is not None else set()))
        self.prompt_ids([{"role": "user", "content": _PROBE}])
        document = _tokenizer_document(tokenizer)
        self.tokenizer_sha256: str = sha256_of(document)
        self.template_sha256: str = self.template_under(system)
        self.fingerprint: str = sha256_of(["chat-renderer/1", document, tokenizer.chat_template, system, self.end_token_id])

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the conversation up to where the assistant speaks; a beginning-of-text token at most once.

        Raises:
            ConfigError: the template refuses these messages; the message quotes it.
        """
        messages = with_system(messages, self.system)
        if self.tokenizer.chat_template is None:
            return self._plain_prefix + self._encode("\n\n".join(message["content"] for message in messages))
        return self._encode(self._render(messages, generate=True))

    def template_under(self, system: str | None) -> str:
        """SHA-256 of chat template, end token and a system prompt: ``template_sha256`` of a renderer that has that one."""
        return sha256_of([self.tokenizer.chat_template, system, self.end_token_id])

    def completion_ids(self, raw_text: str, *, finished: bool) -> list[int]:
        """Ids of a completion's text, and the end token after them if and only if it ``finished``.

        Text that looks like a special token is encoded as plain text: a model cannot write a turn's end by spelling it.
        """
        ids = self._encode(raw_text, split_special_tokens=True)
        return [*ids, self.end_token_id] if finished else ids

    def conversation_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a whole conversation that ends with an assistant's turn: what a classifier of conversations reads.

        Raises:
            ConfigError: the template refuses these messages; the message quotes it.
        """
        if self.tokenizer.chat_template is None:
            return self._plain_prefix + self._encode("\n\n".join(message["content"] for message in messages))
        return self._encode(self._render(messages, generate=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens, white space as it was."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _encode(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, **options)["input_ids"]
        return list(ids)

    def _render(self, messages: Sequence[Message], *, generate: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **self._date_options
            )
        except (TemplateError, TypeError, KeyError) as err:
            roles = ", ".join(message["role"] for message in messages)
            hint = " Remove the system prompt." if self.system is not None else ""
            raise ConfigError(f"the model's chat template refuses messages with the roles {roles}: {err}.{hint}") from err
        return text

    def _find_end_token(self) -> int:
        """The first special token after an assistant's words in the rendered template, else the tokenizer's own."""
        if self.tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _PROBE}]
            closing = self._render(turns, generate=False).rpartition(_PROBE)[2]
            for token_id in self._encode(closing):
                if token_id in self._special_ids:
                    return token_id
        if self.tokenizer.eos_token_id is None:
            raise ConfigError(
                "neither the chat template nor the tokenizer names a token that ends an answer. "
                "Set eos_token in tokenizer_config.json."
            )
        return int(self.tokenizer.eos_token_id)


def _fixed_date(template: Any) -> dict[str, Any]:
    """What to render a template with so that the date it prints is always RENDERING_DATE; nothing if it prints none."""
    if not isinstance(template, str) or "strftime_now" not in template:
        return {}
    dates = {form: RENDERING_DATE.strftime(form) for form in _DATE_CALL.findall(template)}
    return {"chat_template": _FIXED_DATE + template, "rendering_dates": dates}


def _automatic_bos(tokenizer: Any) -> list[int]:
    """The beginning-of-text token as a list, when the tokenizer itself puts one before plain text; else empty."""
    ids = tokenizer(_PROBE)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids and ids[0] == bos else []


def _tokenizer_document(tokenizer: Any) -> Any:
    """What decides a tokenizer's ids, as JSON: without the padding and truncation that callers switch on and off."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.added_tokens_decoder), type(tokenizer).__name__]
    document = json.loads(backend.to_str())
    return {key: value for key, value in document.items() if key not in {"padding", "truncation"}}
