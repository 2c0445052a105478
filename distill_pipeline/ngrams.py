"""Words, and hashes of words in a row: what near-duplicate search, decontamination and the repetition filter count.

A word is a run of letters and digits after compatibility decomposition, without accents and case folded. Scripts written
without spaces (Chinese, Japanese, Thai and their neighbours) count each character as a word, so that an n-gram means
something there too. An n-gram is a 64-bit number: 10 million of them collide with p < 3e-6, and arrays of them are compared
without a loop in Python.

Decided: signs are no words, but :func:`guards` keeps those that change what a question asks (numbers, operators, negations).
"""

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_GUARD = re.compile(
    r"\d+(?:[.,:]\d+)*"
    r"|[+=<>^%$\u00a3\u00b1\u00d7\u00f7\u20ac\u2212\u221a\u2260\u2264\u2265]|[-*/](?=\s?[\d(])|(?<=[\d)])[-*/]|(?<=[\d)]\s)[-*/]"
    r"|\b(?:not|no|nor|never|none|neither|without|except|cannot)\b|n't\b"
)
_THOUSANDS = re.compile(r",(?=\d{3}(?!\d))")
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u02bc\u2032", "'"))
_ASCII_WORDS = {code: chr(code).lower() if chr(code).isalnum() else " " for code in range(128)}
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_CACHED_WORDS = 1 << 20


class _Unmarked(dict[int, int | None]):
    """A translation table that drops combining marks, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        kept = None if unicodedata.category(chr(code)).startswith("M") else code
        self[code] = kept
        return kept


class _WordHashes(dict[str, int]):
    """Hashes of words; emptied when it holds a million, so that memory stays bounded."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        hashed = text_hash(word)
        self[word] = hashed
        return hashed


_unmarked = _Unmarked()
_word_hashes = _WordHashes()


def fold(text: str) -> str:
    """The text without case, accents and compatibility forms."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKD", text).translate(_unmarked).casefold()


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():  # the same without a regular expression, four times faster
        return text.translate(_ASCII_WORDS).split()
    return _WORD.findall(fold(text))


@lru_cache(maxsize=8)
def tokens(text: str) -> "tuple[list[str], Hashes]":
    """The words of a text and their hashes, kept for the next rules that ask about the same text. Do not change them."""
    listed = words(text)
    return listed, word_hashes(listed)


def guards(text: str) -> tuple[str, ...]:
    """The numbers, operators and negations of a text, sorted: two texts that differ here ask for different things."""
    folded = fold(text if text.isascii() else text.translate(_APOSTROPHES))
    found = _GUARD.findall(folded)
    return tuple(sorted(_THOUSANDS.sub("", guard) if "," in guard else guard for guard in found))


def compact(text: str, listed: list[str] | None = None) -> str:
    """Letters, digits and guards only, without spaces: equal for texts that differ in layout and punctuation.

    Args:
        listed: ``words(text)`` where the caller has it already.
    """
    return "".join(words(text) if listed is None else listed) + "\x1f" + "\x1f".join(guards(text))


def bytes_hash(data: bytes) -> int:
    """64 bits of the BLAKE2b hash: the same on every machine and in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


def text_hash(text: str) -> int:
    """:func:`bytes_hash` of a text; lone surrogates are taken as they are."""
    return bytes_hash(text.encode("utf-8", "surrogatepass"))


def word_hashes(listed: list[str]) -> Hashes:
    """One 64-bit hash a word."""
    return np.fromiter(map(_word_hashes.__getitem__, listed), dtype=np.uint64, count=len(listed))


def mix(values: Hashes) -> Hashes:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit (the end of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * _MIX_1
    values = (values ^ (values >> np.uint64(27))) * _MIX_2
    return values ^ (values >> np.uint64(31))


def ngram_hashes(hashes: Hashes, n: int) -> Hashes:
    """The hash of each run of ``n`` words, by its first word's position; empty for fewer than ``n`` words."""
    count = len(hashes) - n + 1
    if count <= 0:
        return np.empty(0, dtype=np.uint64)
    total = hashes[:count].copy()
    for step in range(1, n):
        total *= _MULTIPLIER
        total += hashes[step : step + count]
    return mix(total)
