"""Whether an answer contains a reference, judged word by word.

Decided: a reference is found as whole words in a row, whatever the case, the punctuation or the markdown around them, so
that ``Paris`` is in "It's **Paris**." and not in "comparison". Gave up: signs, decimals and spelling; "-4" reads as "4".
"""

import re
import unicodedata

ALTERNATIVES_SEPARATOR = "|"
"""Stands between the right answers of a reference that has several, as in ``color|colour``."""

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032`\u00b4", "'"))
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def normalize_words(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, letters (accents kept) and digits; other signs only separate them.

    An apostrophe stays inside a word (``don't``) but a possessive ending goes, so ``France's`` is ``france``. Digit groups
    are joined: ``1,000`` is ``1000``.
    """
    folded = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).casefold()
    # Case folding can undo the composition of accents (as in "İ"), hence the second pass.
    folded = unicodedata.normalize("NFKC", folded)
    joined = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", folded)
    return [word.removesuffix("'s") for word in _WORD.findall(joined)]


def contains_phrase(answer: str, alternatives: str) -> bool:
    """Whether any of the alternatives, separated by ``|``, occurs in the answer as whole words in a row.

    An alternative without a single word is never found.
    """
    words = normalize_words(answer)
    return any(_occurs(normalize_words(phrase), words) for phrase in alternatives.split(ALTERNATIVES_SEPARATOR))


def _occurs(phrase: list[str], words: list[str]) -> bool:
    starts = range(len(words) - len(phrase) + 1)
    return bool(phrase) and any(words[start : start + len(phrase)] == phrase for start in starts)
