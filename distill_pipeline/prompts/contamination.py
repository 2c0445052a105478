"""Which texts give away an evaluation item: an index of the items, and the rules that compare a text with it.

A text matches an item when one of these holds (words as in :mod:`distill_pipeline.ngrams`):

``equal_text``        text and item, or the item's first lines, have the same letters, digits and operators in a row;
``shared_13_gram``    they share 13 words in a row;
``whole_question``    every word of the item's first lines lies in a shared 8-gram;
``half_covered``      at least half of an item of 13 words or more lies in shared 8-grams.

Any other shared 8-gram only flags the text. N-grams that three or more items contain are the evaluation's own template and
prove nothing; equal items of several tasks count once. Items of fewer than 13 words are matched as a whole only, because one
replaced word among so few is another question, and items of fewer than 8 words by ``equal_text`` only.

Why first lines: an item's text is its question and then its choices and target, a line or more each.
Sources: GPT-3 (arXiv:2005.14165, appendix C) for 13-grams, Tülu 3 (arXiv:2411.15124) for coverage by 8-grams.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distill_pipeline.ngrams import Hashes, WordBlock, compact, ngram_hashes, text_hash, tokens, word_hashes, words

LONG_NGRAM, SHORT_NGRAM = 13, 8
HALF = 0.5
TEMPLATE_ITEMS = 3
"""An n-gram of this many items is no evidence."""

_MAX_FIRST_LINES = 8
_MAX_SPAN_WORDS = 60
_LABEL_BEFORE = re.compile(r"\s*(?:question|problem|q)\s*:\s*", re.IGNORECASE)
_LABEL_BEHIND = re.compile(r"\s(?:answer|solution|a)\s*:\s*$", re.IGNORECASE)
_LABEL_CHARS = 32

Places = NDArray[np.int32]


@dataclass(frozen=True)
class Match:
    """What a text shares with an evaluation item. ``span`` is the longest shared run of words; a flag rejects nothing."""

    document_id: str
    rule: str
    span: str
    is_flag: bool

    def __str__(self) -> str:
        return f"{self.rule} with {self.document_id}: {self.span}"


@dataclass(frozen=True)
class _Item:
    """An evaluation item: its id, number of words, and the numbers of words of its first lines."""

    document_id: str
    num_words: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class _Grams:
    """All n-grams of all items, sorted by hash, with the item and the position each stands at."""

    hashes: Hashes
    items: Places
    positions: Places
    is_template: NDArray[np.bool_]
    sieve: NDArray[np.bool_]
    """Whether any n-gram has these low bits: answers most questions with one look."""

    @classmethod
    def of(cls, texts: list[Hashes], n: int) -> "_Grams":
        parts = [ngram_hashes(text, n) for text in texts]
        sizes = [len(part) for part in parts]
        hashes = np.concatenate([*parts, np.empty(0, dtype=np.uint64)])
        items = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
        positions = np.concatenate([*(np.arange(size, dtype=np.int32) for size in sizes), np.empty(0, dtype=np.int32)])
        order = np.lexsort((positions, items, hashes))
        hashes, items, positions = hashes[order], items[order], positions[order]
        if not len(hashes):
            return cls(hashes, items, positions, np.zeros(0, dtype=bool), np.zeros(1, dtype=bool))
        is_new = np.r_[True, hashes[1:] != hashes[:-1]]
        is_new_item = is_new | np.r_[True, items[1:] != items[:-1]]
        starts = np.flatnonzero(is_new)
        num_items = np.add.reduceat(is_new_item.astype(np.int64), starts)
        is_template = np.repeat(num_items >= TEMPLATE_ITEMS, np.diff(np.r_[starts, len(hashes)]))
        sieve = np.zeros(1 << min(26, max(10, (16 * len(hashes)).bit_length())), dtype=bool)
        sieve[hashes & np.uint64(len(sieve) - 1)] = True
        return cls(hashes, items, positions, is_template, sieve)

    def shared(self, hashes: Hashes) -> tuple[Places, Places]:
        """Places of a text whose n-gram is in the index, and where in the index its entries begin."""
        maybe = np.flatnonzero(self.sieve[hashes & np.uint64(len(self.sieve) - 1)])
        if not len(maybe):
            return np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int32)
        at = np.minimum(np.searchsorted(self.hashes, hashes[maybe]), len(self.hashes) - 1)
        is_shared = self.hashes[at] == hashes[maybe]
        return maybe[is_shared].astype(np.int32), at[is_shared].astype(np.int32)

    def entries(self, begin: int) -> slice:
        """The index entries of the n-gram whose first entry is ``begin``."""
        return slice(begin, int(np.searchsorted(self.hashes, self.hashes[begin], side="right")))


class ContaminationIndex:
    """Evaluation items to keep out of training data. Make it with :meth:`build`; matching changes nothing in it."""

    def __init__(
        self, items: list[_Item], equal: Mapping[int, str], equal_words: frozenset[int], long: _Grams, short: _Grams
    ) -> None:
        self._items, self._equal, self._equal_words, self._long, self._short = items, equal, equal_words, long, short

    @property
    def num_items(self) -> int:
        """Different items in the index."""
        return len(self._items)

    @classmethod
    def build(cls, documents: Iterable[tuple[str, str]]) -> "ContaminationIndex":
        """An index of (id, text) pairs; of items with the same text the first id stands for all."""
        items: list[_Item] = []
        texts: list[Hashes] = []
        seen: set[int] = set()
        heads_of: dict[int, str] = {}
        head_items: Counter[int] = Counter()
        equal_words: set[int] = set()
        for document_id, text in documents:
            bare = _unlabelled(text)
            listed = words(bare)
            whole = text_hash(compact(bare, listed))
            if whole in seen or not listed:
                continue
            seen.add(whole)
            heads = _first_lines(bare)
            keys = {text_hash(compact(head)) for head in heads}
            equal_words.update(text_hash("".join(words(part))) for part in (bare, *heads))
            head_items.update(keys)
            for key in (whole, *keys):
                heads_of.setdefault(key, document_id)
            hashed = word_hashes(listed)
            items.append(_Item(document_id, len(hashed), tuple(len(words(head)) for head in heads)))
            texts.append(hashed)
        equal = {key: name for key, name in heads_of.items() if key in seen or head_items[key] < TEMPLATE_ITEMS}
        return cls(items, equal, frozenset(equal_words), _Grams.of(texts, LONG_NGRAM), _Grams.of(texts, SHORT_NGRAM))

    def match(self, text: str) -> Match | None:
        """The strongest match of a text, rules in the order above; None if it shares nothing worth a report."""
        bare = _unlabelled(text)
        listed, hashes = tokens(bare)
        if not listed:
            return None
        # Guards are only looked for where the words alone are an item's.
        may_equal = text_hash("".join(listed)) in self._equal_words
        name = self._equal.get(text_hash(compact(bare, listed))) if may_equal else None
        if name is not None:
            return Match(name, "equal_text", _span(listed, 0, len(listed)), False)
        return self._long_match(listed, hashes) or self._short_match(listed, hashes)

    def may_match(self, texts: Sequence[str], block: WordBlock) -> NDArray[np.bool_]:
        """Whether :meth:`match` could find anything in each of many texts, asked of all at once: where False it cannot.

        Every rule but ``equal_text`` needs an 8-gram in common, and equal texts have equal words.

        Args:
            block: the words of the texts.
        Returns:
            bool (texts,).
        """
        found = np.fromiter(
            (
                _unlabelled(text) is not text or text_hash("".join(listed)) in self._equal_words
                for text, listed in zip(texts, block.listed, strict=True)
            ),
            dtype=bool, count=len(texts),
        )  # fmt: skip
        places, _ = self._short.shared(ngram_hashes(block.hashes, SHORT_NGRAM))
        found[block.text_of(places.astype(np.int64))] = True  # a run over the end of a text is only one more look
        return found

    def match_any(self, texts: Iterable[str]) -> Match | None:
        """The strongest match among several texts, judged one by one: a rejection before a flag, then the first."""
        flag = None
        for text in texts:
            found = self.match(text)
            if found is not None and not found.is_flag:
                return found
            flag = flag or found
        return flag

    def _long_match(self, listed: list[str], hashes: Hashes) -> Match | None:
        places, begins = self._long.shared(ngram_hashes(hashes, LONG_NGRAM))
        telling = ~self._long.is_template[begins]
        if not telling.any():
            return None
        start, length = _longest_run(places[telling])
        item = int(self._long.items[begins[telling][list(places[telling]).index(start)]])
        return Match(self._items[item].document_id, "shared_13_gram", _span(listed, start, length + LONG_NGRAM - 1), False)

    def _short_match(self, listed: list[str], hashes: Hashes) -> Match | None:
        places, begins = self._short.shared(ngram_hashes(hashes, SHORT_NGRAM))
        telling = ~self._short.is_template[begins]
        if not telling.any():
            return None
        start, length = _longest_run(places[telling])
        span = _span(listed, start, length + SHORT_NGRAM - 1)
        candidates = sorted({int(i) for begin in begins[telling] for i in self._short.items[self._short.entries(int(begin))]})
        for item in candidates:
            rule = self._coverage_rule(item, begins)
            if rule is not None:
                return Match(self._items[item].document_id, rule, span, False)
        return Match(self._items[candidates[0]].document_id, "shared_8_gram", span, True)

    def _coverage_rule(self, item: int, begins: Places) -> str | None:
        """Which coverage rule holds for an item, given the index entries a text shares."""
        size = self._items[item].num_words
        is_shared, is_telling = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
        for begin in np.unique(begins):
            entries = self._short.entries(int(begin))
            inside = self._short.items[entries]
            low, high = np.searchsorted(inside, [item, item + 1])
            for position in self._short.positions[entries][low:high]:
                is_shared[position : position + SHORT_NGRAM] = True
                if not self._short.is_template[begin]:
                    is_telling[position : position + SHORT_NGRAM] = True
        for head in self._items[item].heads:
            if head >= SHORT_NGRAM and is_shared[:head].all() and is_telling[:head].any():
                return "whole_question"
        return "half_covered" if size >= LONG_NGRAM and is_telling.mean() >= HALF else None


def _unlabelled(text: str) -> str:
    """The text without ``Question:`` before and ``Answer:`` behind it."""
    before = _LABEL_BEFORE.match(text)
    bare = text[before.end() :] if before else text
    behind = _LABEL_BEHIND.search(bare, max(0, len(bare) - _LABEL_CHARS))
    return bare[: behind.start()] if behind else bare


def _first_lines(text: str) -> list[str]:
    """The beginnings of a text that end with a line, without labels; those of fewer than two words are left out."""
    lines = [line for line in text.splitlines() if line.strip()]
    heads = ["\n".join(lines[:count]) for count in range(1, min(len(lines), _MAX_FIRST_LINES) + 1)]
    bare = (_unlabelled(head) for head in heads)
    return list(dict.fromkeys(head for head in bare if len(words(head)) > 1))


def _longest_run(places: Places) -> tuple[int, int]:
    """First place and number of the longest run of consecutive places."""
    breaks = np.flatnonzero(np.diff(places) != 1) + 1
    starts = np.r_[0, breaks]
    sizes = np.diff(np.r_[starts, len(places)])
    best = int(np.argmax(sizes))
    return int(places[starts[best]]), int(sizes[best])


def _span(listed: list[str], start: int, length: int) -> str:
    shown = " ".join(listed[start : start + min(length, _MAX_SPAN_WORDS)])
    return shown if length <= _MAX_SPAN_WORDS else f"{shown} ..."
