"""Files of texts that training data must not resemble: one item a line, as plain text or as JSON objects.

An item of a ``.jsonl`` or ``.ndjson`` file is the texts of its object, a line each, the question first and then the others in
order, so that a question is compared as a question and not with the names of its fields around it.
"""

import json
from collections.abc import Iterator
from typing import Any

import fsspec

from distill_pipeline.errors import ConfigError

_JSON_LINES = (".jsonl", ".ndjson")
_QUESTIONS = ("prompt", "messages", "question", "problem", "instruction", "query", "input", "text")
"""Names under which a question is looked for first."""


def protected_items(path: str, label: str) -> Iterator[tuple[str, str]]:
    """(id, text) of each item of a file; blank lines are none.

    Args:
        path: a path or an fsspec URL.
        label: what the experiment file calls it, for ids and messages.
    Raises:
        ConfigError: the file cannot be read, or a line of it is no JSON object.
    """
    is_json = path.removesuffix(".gz").endswith(_JSON_LINES)
    try:
        with fsspec.open(path, "rt", encoding="utf-8", compression="infer") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{label}:{number}", _item(line, label, number) if is_json else line
    except (OSError, UnicodeDecodeError, ImportError) as err:
        raise ConfigError(f"decontaminate.files: {label} cannot be read: {err}. Give a text or JSONL file in UTF-8.") from err


def _item(line: str, label: str, number: int) -> str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"decontaminate.files: {label}, line {number} is no JSON: {err}. Mend the line.") from err
    if not isinstance(found, dict):
        raise ConfigError(f"decontaminate.files: {label}, line {number} must be a JSON object, it is a {type(found).__name__}.")
    first = {name: found[name] for name in _QUESTIONS if name in found}
    return "\n".join(_texts(first | found))


def _texts(value: Any) -> Iterator[str]:
    """The texts and numbers inside a value, in order; of chat messages the contents only."""
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        yield str(value)
    elif isinstance(value, dict):
        names = ["content"] if {"role", "content"} <= value.keys() else list(value)
        for name in names:
            yield from _texts(value[name])
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
