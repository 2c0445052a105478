"""What a stage gives back beside the files it wrote."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Progress = Callable[[str], None]
"""Takes one line of news about long work. A stage calls it at most every few seconds."""


def silent(line: str) -> None:
    """A progress that nobody hears of."""


@dataclass(frozen=True)
class Outcome:
    """Counts that must add up, and facts for the manifest; both hold plain JSON values.

    ``failed_gate`` is a reason for which later stages must not use the artifact; its rows are stored all the same.
    """

    counts: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    failed_gate: str | None = None
