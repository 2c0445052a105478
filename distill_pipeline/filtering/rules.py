"""The rules a completion can break, each a function of one completion; what needs its siblings is in the stage.

Decided: a refusal is looked for where refusals stand, at the start of a sentence in the first 200 characters of a short
answer, and must say that help is refused: apologies, warnings and "as an AI" alone are no refusal. A self-reference, in which
the teacher speaks of itself as a model, is a rule of its own: such a text may answer well, and would teach the student to say
that it is somebody else. Text inside the reasoning is neither.
"""

import re

from distill_pipeline.filtering.repetition import repetition_fault
from distill_pipeline.filtering.spec import RepetitionSpec
from distill_pipeline.reasoning import THINK_TAGS

REFUSAL_HEAD_CHARS = 200
REFUSAL_MAX_CHARS = 600
"""A longer answer says more than no."""

_THINK_OPENINGS = tuple(THINK_TAGS)

_QUOTES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4`", "'"))
_VISIBLE = re.compile(r"[^\s\u200b-\u200f\u2060\ufeff]")

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

_MAKER = r"(?:open ?ai|anthropic|google(?: deepmind)?|deepmind|meta|microsoft|alibaba(?: cloud)?|deepseek|mistral(?: ai)?|xai)"
_MODEL_NAME = r"(?:chat ?gpt|gpt-?[345]\S*|claude|gemini|bard|llama|qwen|deepseek(?:-\w+)?|mistral|copilot|smollm\d?)"
_MODEL = (
    r"(?:ai|artificial intelligence|(?:large |ai |ai-based )?language model|llm"
    r"|ai(?:-powered)?(?: language)? (?:model|assistant|chatbot))"
)
_MADE = r"(?:developed|created|trained|made|built)"
_SELF_REFERENCE = re.compile(
    rf"\bas (?:an? {_MODEL}(?: (?:model|assistant|system))?|{_MODEL_NAME})(?: (?:{_MADE} )?by {_MAKER})?(?:,|\s+i\b)"
    rf"|\bi(?:'m| am)(?: just| only| actually)? (?:{_MODEL_NAME}\b|an? {_MODEL}\b(?! (?:researcher|engineer|developer|expert)))"
    rf"|\bi was {_MADE} by {_MAKER}\b"
    r"|\bmy (?:training data|knowledge cut-?off)\b",
    re.IGNORECASE,
)
_SELF_SIGNS = (
    " ai", "artificial intelligence", "language model", "llm", "gpt", "claude", "gemini", "bard", "llama", "qwen", "deepseek",
    "mistral", "copilot", "smollm", "openai", "anthropic", "google", "deepmind", "meta", "microsoft", "alibaba", "xai",
    "training data", "knowledge cut",
)  # fmt: skip
"""One of these stands in every self-reference: looking for them is ten times faster than the expression."""
_FULL_TESTS = RepetitionSpec()

_ENDS_READ, _END_SIGNS = 64, 16


def is_empty(answer: str) -> bool:
    """Nothing a reader could see."""
    return _VISIBLE.search(answer) is None


def is_truncated(finish_reason: str, raw_text: str) -> bool:
    """Cut at the token limit, or still thinking when it ended: an opening think tag without its closing one."""
    if finish_reason == "length":
        return True
    start = raw_text.lstrip()
    return start.startswith(_THINK_OPENINGS) and any(
        start.startswith(opening) and closing not in start for opening, closing in THINK_TAGS.items()
    )


def is_refusal(answer: str) -> bool:
    """Whether a short answer declines to answer."""
    if len(answer) >= REFUSAL_MAX_CHARS:
        return False
    head = answer.lstrip()[:REFUSAL_HEAD_CHARS].translate(_QUOTES)
    return _REFUSAL.search(head) is not None


def is_self_reference(answer: str) -> bool:
    """Whether the text speaks of itself as a model, or of who made it."""
    lower = answer.lower()
    if not any(map(lower.__contains__, _SELF_SIGNS)):
        return False
    return _SELF_REFERENCE.search(answer if answer.isascii() else answer.translate(_QUOTES)) is not None


def is_repetitive(reasoning: str | None, answer: str, tests: RepetitionSpec = _FULL_TESTS) -> bool:
    """Whether the trace or the answer, each by itself and by its own test, goes round in circles."""
    return any(
        repetition_fault(text, loops_only=test == "loops") is not None
        for text, test in ((reasoning, tests.reasoning), (answer, tests.answer))
        if text and test != "off"
    )


def content_key(reasoning: str | None, answer: str) -> tuple[str, str]:
    """Equal for completions that say the same but for case and white space. Two ways to one answer are not the same."""
    return " ".join((reasoning or "").split()).casefold(), " ".join(answer.split()).casefold()


def ends(text: str) -> tuple[str, str]:
    """The first and the last signs of what :func:`content_key` compares: where these differ, so do the texts."""
    first = "".join(text[:_ENDS_READ].split())
    last = "".join(text[-_ENDS_READ:].split())
    if min(len(first), len(last)) < _END_SIGNS:
        first = last = "".join(text.split())
    # Folding may lengthen a sign, never shorten it, so cutting again gives as many of both.
    return first[:_END_SIGNS].casefold()[:_END_SIGNS], last[-_END_SIGNS:].casefold()[-_END_SIGNS:]
