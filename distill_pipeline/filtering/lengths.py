"""Counting a completion's tokens with a model's tokenizer: a student may cut texts otherwise than the teacher did."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol


class TokenCounter(Protocol):
    """Counts tokens of a text."""

    def count(self, text: str) -> int:
        """The number of tokens, without any that begin or end a text."""
        ...


TokenCounters = Mapping[str, TokenCounter]
"""Counters by the model reference that an experiment names."""


@dataclass(frozen=True)
class ModelTokenCounter:
    """The tokenizer of a model folder, loaded when first asked; it can travel to another process."""

    folder: Path

    def count(self, text: str) -> int:
        """See :class:`TokenCounter`."""
        return len(_tokenizer(self.folder)(text, add_special_tokens=False, verbose=False)["input_ids"])


@lru_cache(maxsize=4)
def _tokenizer(folder: Path) -> Any:
    from distill_pipeline.models.load import load_tokenizer

    return load_tokenizer(folder)
