"""From a source's row to a prompt: which shapes are understood, and why the others are not.

A prompt is ``prompt`` (text, or a list of messages) or else ``messages``. Messages have a role and a text; a system message
may only come first and the last message is the user's, for that is what a teacher answers. Columns that are not renamed to
one of the known ones become metadata.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_pipeline.hashing import canonical_json

ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]


class MalformedRow(ValueError):
    """A row that is no prompt; the text says why. It never leaves this package: it becomes a bad row."""


@dataclass(frozen=True, slots=True)
class PromptFields:
    """What a good row says. ``metadata`` is canonical JSON of everything else, the row's own id included."""

    messages: Messages
    reference: str | None
    domain: str
    source_id: str | None
    metadata: str


def parse_row(row: Mapping[str, Any], columns: Mapping[str, str], default_domain: str) -> PromptFields:
    """Check one row.

    Args:
        columns: what the source calls ``prompt``, ``messages``, ``reference``, ``domain`` and ``id``.
    Raises:
        MalformedRow: it has no prompt, an empty one, one of another shape, or text that no file or model can hold.
    """
    messages, used = _messages(row, columns)
    reference = _reference(row.get(columns["reference"]))
    domain = _scalar(row.get(columns["domain"]), columns["domain"]) or default_domain
    source_id = _scalar(row.get(columns["id"]), columns["id"])
    known = {used, columns["reference"], columns["domain"], columns["id"]}
    rest = {str(key): _plain(value) for key, value in row.items() if key not in known and value is not None}
    if source_id is not None:
        rest["id"] = source_id
    metadata = canonical_json(rest)
    for text in (*(message["content"] for message in messages), reference or "", domain, metadata):
        _check_text(text)
    return PromptFields(messages, reference, domain, source_id, metadata)


def _messages(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[Messages, str]:
    """The prompt as messages, and the column it came from."""
    for column in (columns["prompt"], columns["messages"]):
        value = row.get(column)
        if value is None:
            continue
        if column == columns["messages"] and isinstance(value, str):
            value = _parsed(value, column)
        if isinstance(value, str):
            if not value.strip():
                raise MalformedRow("the prompt is empty")
            return [{"role": "user", "content": value}], column
        return _chat(value, column), column
    names = f"{columns['prompt']!r} or {columns['messages']!r}"
    present = [name for name in (columns["prompt"], columns["messages"]) if name in row]
    if present:
        raise MalformedRow(f"the prompt is empty: {present[0]!r} is null")
    shown = ", ".join(str(key) for key in list(row)[:12]) or "none"
    raise MalformedRow(f"no column {names}; columns here: {shown}")


def _parsed(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as err:
        raise MalformedRow(f"{column!r} must be a list of messages, or one as JSON text") from err


def _chat(value: Any, column: str) -> Messages:
    if not isinstance(value, list):
        raise MalformedRow(f"{column!r} must be a list of messages, it is a {type(value).__name__}")
    if not value:
        raise MalformedRow("the prompt is empty: no messages")
    messages = []
    for index, item in enumerate(value):
        role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise MalformedRow(f"message {index} must have a role and a content that are text")
        if role not in ROLES:
            raise MalformedRow(f"message {index} has the role {role[:40]!r}; known: {', '.join(ROLES)}")
        if role == "system" and index:
            raise MalformedRow(f"message {index} is a system message; it may only come first")
        messages.append({"role": role, "content": content})
    if messages[-1]["role"] != "user":
        raise MalformedRow(f"the last message must be the user's, it is the {messages[-1]['role']}'s")
    if not messages[-1]["content"].strip():
        raise MalformedRow("the prompt is empty: the last message has no text")
    return messages


def _reference(value: Any) -> str | None:
    """The gold answer as text; a list of texts is a choice of right answers, joined by ``|``."""
    if isinstance(value, list):
        if not all(isinstance(item, str) and item.strip() and "|" not in item for item in value):
            raise MalformedRow("the reference must be text, a number, or a list of texts without |")
        return "|".join(value) or None
    return _scalar(value, "reference")


def _scalar(value: Any, column: str) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, int | float):
        return str(value)
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    raise MalformedRow(f"{column!r} must be text or a number, it is a {type(value).__name__}")


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are none become null, dates and the like their text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return f"{len(value)} bytes" if isinstance(value, bytes) else str(value)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise MalformedRow("a text holds a NUL character")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as err:
        raise MalformedRow(f"a text holds half a character (U+{ord(text[err.start]):04X}), which UTF-8 cannot hold") from err
