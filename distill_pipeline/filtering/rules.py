"""The rules a completion can break, each a function of one completion; what needs its siblings is in the stage.

Decided: a refusal is looked for where refusals stand, at the start of a sentence in the first 200 characters of a short
answer, and must say that help is refused: apologies, warnings and "as an AI" alone are no refusal. Text inside the reasoning
is never one.
"""

import re

from distill_pipeline.filtering.repetition import repetition_fault

REFUSAL_HEAD_CHARS = 200
REFUSAL_MAX_CHARS = 600
"""A longer answer says more than no."""

THINK_TAGS = {"<think>": "</think>", "<thinking>": "</thinking>", "<|begin_of_thought|>": "<|end_of_thought|>"}

_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4`", "'"))
_INVISIBLE = re.compile(r"[\s\u200b-\u200f\u2060\ufeff]+")

_NOT_ABLE = (
    r"(?:can ?not|can'?t|could not|couldn'?t|will not|won'?t"
    r"|(?:am|'m) (?:not able|unable|not allowed|not permitted|not going)(?: to)?"
    r"|(?:do not|don't) have the (?:ability|capability) to|must (?:decline|refuse)(?: to)?|have to (?:decline|refuse)(?: to)?"
    r"|(?:do not|don't) feel comfortable)"
)
_HELP = (
    r"(?:help|assist|provide|comply|fulfil?l|support|engage|participate|answer|respond|complete|generate|create|write|produce"
    r"|discuss|offer|give|share|do (?:that|this)|continue|proceed|process|access|browse|recommend|endorse|encourage|facilitate"
    r"|decline|refuse|providing|helping|assisting|answering|discussing|writing)"
)
_SOFTENER = r"(?:(?:just|simply|really|also|in good conscience|ethically|unfortunately|currently|at this time),? ){0,2}"
_OPENER = (
    r"(?:(?:i'?m|i am|we'?re|we are)(?: (?:really|very|so|truly|deeply))? (?:sorry|afraid)(?:,? but|,? that|[.,!:;-])?"
    r"|(?:(?:my )?(?:sincere )?apologies|sorry|i apologi[sz]e)(?:,? but|[.,!:-])?|unfortunately,?|regrettably,?|no[.,]"
    r"|as an? (?:ai|artificial intelligence|language model|large language model|assistant)[^.!?\n]{0,60},)"
)
_REFUSAL = re.compile(
    rf"(?:^|[.!?\n]\s*)[\s*_#>]*(?:{_OPENER}\s*)*(?:"
    rf"(?:i|we)(?: |(?='m)){_SOFTENER}{_NOT_ABLE} {_SOFTENER}(?:{_HELP})\b"
    r"|(?:i|we) (?:must|have to) (?:decline|refuse)\b"
    r"|(?:that|this)(?:'s| is) (?:not something i can|something i (?:cannot|can't|won't)) (?:help|assist|do|discuss|provide)"
    r"|(?:it is|it's) against (?:my|the) (?:programming|guidelines|policy|policies)"
    r")",
    re.IGNORECASE,
)


def is_empty(answer: str) -> bool:
    """Nothing a reader could see."""
    return not _INVISIBLE.sub("", answer)


def is_truncated(finish_reason: str, raw_text: str) -> bool:
    """Cut at the token limit, or still thinking when it ended: an opening think tag without its closing one."""
    if finish_reason == "length":
        return True
    start = raw_text.lstrip()
    return any(start.startswith(opening) and closing not in start for opening, closing in THINK_TAGS.items())


def is_refusal(answer: str) -> bool:
    """Whether a short answer declines to answer."""
    if len(answer) >= REFUSAL_MAX_CHARS:
        return False
    head = answer.lstrip()[:REFUSAL_HEAD_CHARS].translate(_QUOTES)
    return _REFUSAL.search(head) is not None


def is_repetitive(reasoning: str | None, answer: str) -> bool:
    """Whether the trace or the answer, each by itself, goes round in circles."""
    return any(repetition_fault(text) is not None for text in (reasoning, answer) if text)


def content_key(reasoning: str | None, answer: str) -> tuple[str, str]:
    """Equal for completions that say the same but for case and white space. Two ways to one answer are not the same."""
    return " ".join((reasoning or "").split()).casefold(), " ".join(answer.split()).casefold()
