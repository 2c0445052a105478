"""Words, and hashes of words in a row: what near-duplicate search, decontamination and the repetition filter count.

A word is a run of letters and digits after compatibility decomposition, without accents and case folded. Scripts written
without spaces (Chinese, Japanese, Thai and their neighbours) count each character as a word, so that an n-gram means
something there too. An n-gram is a 64-bit number: 10 million of them collide with p < 3e-6, and arrays of them are compared
without a loop in Python.

Decided: signs are no words, but :func:`guards` keeps those that change what a question asks (numbers, operators, negations).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

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
_CACHED_WORDS = 1 << 18


class _Unmarked(dict[int, int | None]):
    """A translation table that drops combining marks, filled as characters are met."""

    def __missing__(self, code: int) -> int | None:
        kept = None if unicodedata.category(chr(code)).startswith("M") else code
        self[code] = kept
        return kept


class _WordHashes(dict[str, int]):
    """Hashes of words; emptied when it holds a quarter of a million (40 MB), so that memory stays bounded."""

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


def grouped(
    hashes: Hashes, places: NDArray[np.int64], n: int, owners: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Those places whose run of ``n`` words also stands at another place of the same owner, equal runs side by side.

    Meant for a first look: two different runs are taken as equal with a chance of 2**-40 or so.

    Args:
        places: int64 (places,); at each, ``n`` words follow.
        owners: int64 (places,); the text, or the group of texts, that each place belongs to.
    Returns:
        The repeated places, group by group and in order inside each; and which of them have an equal one before.
    """
    if not len(places):
        return places, np.zeros(0, dtype=bool)
    grams = hashes[places]
    for step in range(1, n):
        grams = grams * _MULTIPLIER + hashes[places + step]
    bits = np.uint64(len(hashes).bit_length())
    keys = mix(grams ^ mix(owners.astype(np.uint64) + _MULTIPLIER)) >> bits << bits
    keys = np.sort(keys | places.astype(np.uint64))  # sorting whole numbers is three times faster than sorting indices
    is_same = np.r_[False, keys[1:] >> bits == keys[:-1] >> bits, False]
    is_repeated = is_same[1:] | is_same[:-1]
    found = keys[is_repeated] & ((np.uint64(1) << bits) - np.uint64(1))
    return found.astype(np.int64), is_same[:-1][is_repeated]


@dataclass(frozen=True)
class WordBlock:
    """The words of many texts, one text after the other, so that all of them are looked at in one step.

    ``hashes`` and ``num_chars`` are of each word; text ``i`` has words ``starts[i]`` to ``starts[i + 1]``; ``listed`` holds the
    words themselves, text by text.
    """

    listed: Sequence[list[str]]
    hashes: Hashes
    num_chars: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[str]) -> "WordBlock":
        """The block of these texts."""
        listed = [words(text) for text in texts]
        starts = np.r_[0, np.cumsum(np.fromiter(map(len, listed), dtype=np.int64, count=len(listed)))]
        total = int(starts[-1])
        hashes = np.fromiter(map(_word_hashes.__getitem__, chain.from_iterable(listed)), dtype=np.uint64, count=total)
        num_chars = np.fromiter(map(len, chain.from_iterable(listed)), dtype=np.int64, count=total)
        return cls(listed, hashes, num_chars, starts)

    def text_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The text in which the word at each place stands."""
        return np.searchsorted(self.starts, places, side="right") - 1
