"""Does a text go round in circles? Gopher's repetition rules and a loop test, by hashes of words in numpy.

The rules of Rae et al. 2021 (arXiv:2112.11446, table A1) were made for web pages; they are asked of texts of 50 words and
more only, since a short answer rightly says its few words twice. The loop test (one period, at least three times, up to the
end of the text) is for models that got stuck; it needs 16 words, or 100 characters where there are no words.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distill_pipeline.ngrams import Hashes, WordBlock, grouped, ngram_hashes, tokens

MIN_WORDS = 50
TOP_NGRAM_FRAC = {2: 0.20, 3: 0.18, 4: 0.16}
"""Largest share of characters that the commonest n-gram may cover."""
REPEATED_NGRAM_FRAC = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Largest share of characters in n-grams that stood before."""
DUPLICATE_LINE_FRAC = 0.30
DUPLICATE_LINE_CHARS_FRAC = 0.20
MIN_LINES = 6

MAX_PERIOD_WORDS = 200
MIN_LOOP_WORDS = 16
MIN_LOOP_TIMES = 3
MAX_PERIOD_CHARS = 16
MIN_LOOP_CHARS = 100

_LOOP_NGRAM = 10
"""So many words at the end of any loop stand twice: max(2 * period, MIN_LOOP_WORDS - period) is more for every period."""


def repetition_fault(text: str, *, loops_only: bool = False) -> str | None:
    """Why a text counts as repetitive, in a few words, or None. ``loops_only`` asks for a loop at the end and nothing else."""
    listed, hashes = tokens(text)
    period = loop_period(hashes)
    if period is not None:
        return f"the same {period} words again and again up to the end"
    if _loops_in_chars(text):
        return "the same few characters again and again up to the end"
    if loops_only or len(listed) < MIN_WORDS:
        return None
    return _ngram_fault(hashes, np.fromiter(map(len, listed), dtype=np.int64, count=len(listed))) or _line_fault(text)


def may_repeat(texts: Sequence[str], block: WordBlock) -> NDArray[np.bool_]:
    """Whether :func:`repetition_fault` could find one in each of many texts, asked of all at once: where False it cannot.

    An n-gram stands twice only where its first n - 1 words do, so each length looks at fewer places than the one before.
    Overlaps are counted twice here, so a few texts are let through to the exact rules. A loop of 16 words and three periods
    repeats its last 10 words.

    Args:
        block: the words of the texts.
    Returns:
        bool (texts,).
    """
    doubts = np.fromiter((_loops_in_chars(text) or _line_fault(text) is not None for text in texts), bool, count=len(texts))
    ends = np.r_[0, np.cumsum(block.num_chars)]
    total = np.diff(ends[block.starts])
    text_of = np.repeat(np.arange(len(texts)), np.diff(block.starts))
    places = np.arange(len(block.hashes))
    for n in (*TOP_NGRAM_FRAC, *REPEATED_NGRAM_FRAC):
        places = places[places + n <= block.starts[text_of[places] + 1]]
        places, is_again = grouped(block.hashes, places, n, text_of[places])
        if not len(places):
            break
        chars = ends[places + n] - ends[places]
        if n in TOP_NGRAM_FRAC:
            first = np.flatnonzero(~is_again)
            sizes = np.diff(np.r_[first, len(places)])
            texts_of_first = text_of[places[first]]
            doubts[texts_of_first[sizes * chars[first] > TOP_NGRAM_FRAC[n] * total[texts_of_first]]] = True
        else:
            covered = np.bincount(text_of[places[is_again]], chars[is_again], minlength=len(texts))
            doubts |= covered > REPEATED_NGRAM_FRAC[n] * total
        if n == _LOOP_NGRAM:
            doubts[text_of[places[places + n == block.starts[text_of[places] + 1]]]] = True
    return doubts


def loop_period(hashes: Hashes) -> int | None:
    """The shortest period with which words repeat, at least three times, up to the end; None if they do not."""
    count = len(hashes)
    if count < MIN_LOOP_WORDS:
        return None
    tail = hashes[-(MAX_PERIOD_WORDS + 1) :]
    for period in (len(tail) - 1 - np.flatnonzero(tail[:-1] == tail[-1]))[::-1].tolist():
        needed = max(MIN_LOOP_TIMES * period, MIN_LOOP_WORDS)
        if needed > count:
            return None
        if np.array_equal(hashes[count - needed + period :], hashes[count - needed : count - period]):
            return int(period)
    return None


def _loops_in_chars(text: str) -> bool:
    tail = text.rstrip()[-MIN_LOOP_CHARS:]
    if len(tail) < MIN_LOOP_CHARS:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, MAX_PERIOD_CHARS + 1))


def _ngram_fault(hashes: Hashes, lengths: NDArray[np.int64]) -> str | None:
    """The first of Gopher's n-gram rules that a text breaks."""
    ends = np.r_[0, np.cumsum(lengths)]
    total = int(ends[-1])
    for n in (*TOP_NGRAM_FRAC, *REPEATED_NGRAM_FRAC):
        grams = ngram_hashes(hashes, n)
        order = np.argsort(grams, kind="stable")
        is_again = np.r_[False, grams[order][1:] == grams[order][:-1]]
        if not is_again.any():
            return None  # no n-gram stands twice, so no longer one does
        if n in TOP_NGRAM_FRAC:
            starts = np.flatnonzero(~is_again)
            sizes = np.diff(np.r_[starts, len(grams)])
            first = order[starts]
            covered = np.where(sizes > 1, sizes * (ends[first + n] - ends[first]), 0)
            if covered.max() > TOP_NGRAM_FRAC[n] * total:
                return f"one {n}-gram covers {covered.max() / total:.0%} of the text"
        else:
            covered_chars = _covered(np.sort(order[is_again]), n, ends)
            if covered_chars > REPEATED_NGRAM_FRAC[n] * total:
                return f"repeated {n}-grams cover {covered_chars / total:.0%} of the text"
    return None


def _covered(places: NDArray[np.int64], n: int, ends: NDArray[np.int64]) -> int:
    """Characters of repeated n-grams, from left to right without overlap."""
    covered, free = 0, 0
    for place in places.tolist():
        if place >= free:
            covered += int(ends[place + n] - ends[place])
            free = place + n
    return covered


def _line_fault(text: str) -> str | None:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < MIN_LINES:
        return None
    seen: set[str] = set()
    again = [line for line in lines if line in seen or seen.add(line)]  # type: ignore[func-returns-value]
    if len(again) > DUPLICATE_LINE_FRAC * len(lines):
        return f"{len(again)} of {len(lines)} lines stand twice"
    if sum(map(len, again)) > DUPLICATE_LINE_CHARS_FRAC * sum(map(len, lines)):
        return "repeated lines are a large part of the text"
    return None
