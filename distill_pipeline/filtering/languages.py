"""Is a text in a language that nobody asked for? Asked of prose only, and a doubt keeps the text.

Model: py3langid (a naive Bayes model of byte n-grams, 140 languages, in the package itself; BSD). A text is in another
language when all allowed languages together have less than ``MAX_ALLOWED_PROB`` of the probability and one other language has
at least ``MIN_OTHER_PROB``.

Decided: code, formulas, links and lines that look like code are taken out first, and a text of which fewer than ``MIN_LETTERS``
letters are left is never judged; the first ``JUDGED_CHARS`` characters of prose are looked at. Gave up: a text that changes
its language later, and lists of names.
"""

import re
from functools import lru_cache
from typing import Any

from distill_pipeline.errors import MissingExtraError

MIN_LETTERS = 20
JUDGED_CHARS = 600
MAX_ALLOWED_PROB = 0.05
MIN_OTHER_PROB = 0.4
NO_LANGUAGE = "zxx"
"""The model's class of texts in no language at all."""

CODE_LINE_FRAC = 1 / 3
"""Share of lines that look like code from which on a text is code as a whole."""

_SCANNED_CHARS = 4_000
_FENCED = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(
    r"\$\$.*?(?:\$\$|\Z)|\$[^$\n]+\$|\\\[.*?(?:\\\]|\Z)|\\\(.*?(?:\\\)|\Z)|\\begin\{(\w+\*?)\}.*?(?:\\end\{\1\}|\Z)"
    r"|\\[A-Za-z]+(?:\{[^{}\n]*\})*",
    re.DOTALL,
)
_LINK = re.compile(r"\S+://\S+|\bwww\.\S+|\S+@\S+")
_CODE_SIGNS = re.compile(r"[{}()\[\];=<>_\\^|&#+*/~@$%]")
_CODE_START = re.compile(r"\s*(?:import |from \w+ import |def \w|class \w+[(:]|return\b|#include|#!|//|SELECT |\$ |>>> )")
_CODE_SIGN_FRAC = 0.1


def other_language(text: str, allowed: tuple[str, ...]) -> str | None:
    """The language of a text that is in none of the allowed ones, or None.

    Args:
        allowed: codes out of ``filtering.spec.LANGUAGE_CODES``.
    Raises:
        MissingExtraError: py3langid is not installed.
    """
    prose = prose_of(text)[:JUDGED_CHARS]
    if sum(map(str.isalpha, prose)) < MIN_LETTERS:
        return None
    ranked: dict[str, float] = dict(_identifier().rank(prose))
    if sum(ranked.get(code, 0.0) for code in allowed) >= MAX_ALLOWED_PROB:
        return None
    code, prob = next((code, prob) for code, prob in ranked.items() if code != NO_LANGUAGE)
    return code if prob >= MIN_OTHER_PROB else None


def prose_of(text: str) -> str:
    """What of a text's beginning is neither code, nor formula, nor link; nothing where most of it looks like code."""
    head = text[:_SCANNED_CHARS]
    if "`" in head or "~~~" in head:
        head = _FENCED.sub(" ", head)
    if "$" in head or "\\" in head:
        head = _FORMULA.sub(" ", head)
    if "@" in head or "://" in head or "www." in head:
        head = _LINK.sub(" ", head)
    lines = [line for line in head.splitlines() if line.strip()]
    prose = [line for line in lines if not _is_code(line)]
    return "\n".join(prose) if len(lines) - len(prose) <= CODE_LINE_FRAC * len(lines) else ""


def _is_code(line: str) -> bool:
    dense = len("".join(line.split()))
    return _CODE_START.match(line) is not None or len(_CODE_SIGNS.findall(line)) >= _CODE_SIGN_FRAC * dense


@lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as err:
        raise MissingExtraError.of("the filter rule language", "py3langid", "scorers") from err
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
