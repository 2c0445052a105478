"""Answers to generated tasks, judged by the verifier of the task's own data set in reasoning-gym.

The prompt's metadata names the data set (``source_dataset``) and holds the entry's metadata, at the top or under the key
``metadata``; the reference is the entry's answer. Partial credit is no credit: verifiers give 0.75 for a right answer with a
digit behind it. Some verifiers evaluate the answer as Python, so this process gives up its network, files, rights and
environment before the first row, or refuses. Not defended: such an answer can still reach into this process.
"""

import contextlib
import importlib.util
import io
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from distill_pipeline.errors import ConfigError, MissingExtraError
from distill_pipeline.scoring.numbers import final_part
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.sandbox import SandboxError, confine

_MEMORY_MB = 4096
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_SAID = re.compile(
    r"\s*(?:\*\*)?(?:the |my )?(?:final )?answer(?: is)?\s*:?(?:\*\*)?\s*:?\s*(?P<stated>\S.*?)\.?\s*", re.IGNORECASE
)


def require_reasoning_gym() -> None:
    """Confine this process, then load the verifiers.

    Raises:
        MissingExtraError: reasoning-gym is not installed.
        ConfigError: this machine allows no isolation.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MissingExtraError.of("the scorer reasoning_gym", "reasoning-gym", "reasoning-gym")
    try:
        confine(_MEMORY_MB)
    except (SandboxError, OSError) as err:
        raise ConfigError(
            f"its verifiers evaluate what a model wrote, and this machine does not let it keep that apart ({err}). Allow user "
            "namespaces, or score elsewhere."
        ) from err
    import reasoning_gym  # noqa: F401


def reasoning_gym(
    reference: str | None, answer: str, metadata: Mapping[str, Any], prompt: str | None, *, threshold: float = 1.0
) -> ScoreValue:
    """Whether the data set's verifier gives the answer at least ``threshold``.

    Unknown where the metadata names no data set, or where the verifier does not accept the reference either (entries that
    do not survive being stored as JSON).
    """
    inner = metadata.get("metadata")
    facts = inner if isinstance(inner, Mapping) else metadata
    name = facts.get("source_dataset")
    if not isinstance(name, str):
        return ScoreValue(None, "the prompt's metadata names no source_dataset")
    try:
        verify = _verifier(name)
    except ValueError:
        return ScoreValue(None, f"reasoning-gym has no data set {name!r}")
    entry = {"question": prompt or "", "answer": reference, "metadata": dict(facts)}
    score = _quiet(verify, stated_answer(answer), entry)
    if score < threshold and reference and _quiet(verify, reference, entry) < threshold:
        return ScoreValue(None, f"the verifier of {name} does not accept its own answer")
    return ScoreValue(float(score >= threshold), f"{name} gives {score:g}")


def stated_answer(text: str) -> str:
    """What an answer states: the last ``<answer>``, a box or ``####``, a last line "the answer is", else all of it."""
    if tagged := _TAGGED.findall(text):
        return str(tagged[-1]).strip()
    if (marked := final_part(text)) is not None:
        return marked
    said = _SAID.fullmatch(text.strip().rsplit("\n", 1)[-1])
    return said["stated"].strip("*` ") if said else text.strip()


@lru_cache
def _verifier(name: str) -> Any:
    from reasoning_gym import get_score_answer_fn

    return get_score_answer_fn(name)


def _quiet(verify: Any, answer: str, entry: dict[str, Any]) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        return float(verify(answer, entry))
