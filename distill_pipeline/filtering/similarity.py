"""How much two completions of one prompt are alike: the exact Jaccard similarity of their word 5-grams.

The reasoning and the answer are read as one text, so that two ways to one answer are two texts. A text of fewer than five words
is one shingle, and is alike only where all its words are.
"""

import numpy as np
from numpy.typing import NDArray

from distill_pipeline.ngrams import WordBlock, grouped, ngram_hashes, tokens
from distill_pipeline.prompts.near_dedup import SHINGLE_WORDS

Shingles = frozenset[int]
"""64-bit hashes of the different 5-grams of a text."""

_ROUNDING = 1e-9


def completion_shingles(reasoning: str | None, answer: str) -> Shingles:
    """The shingles of a completion; of one without words a single zero."""
    _, hashes = tokens(answer)
    if reasoning:
        hashes = np.concatenate([tokens(reasoning)[1], hashes])
    grams = ngram_hashes(hashes, max(1, min(SHINGLE_WORDS, len(hashes))))
    return frozenset(grams.tolist() or (0,))


def is_alike(one: Shingles, other: Shingles, similarity: float) -> bool:
    """Whether two texts have at least this Jaccard similarity, in (0, 1]."""
    shared = len(one & other)
    return shared >= similarity * (len(one) + len(other) - shared) - _ROUNDING


def is_more_alike(one: Shingles, other: Shingles, similarity: float) -> bool:
    """Whether two texts have more than this Jaccard similarity, in [0, 1)."""
    shared = len(one & other)
    return shared > similarity * (len(one) + len(other) - shared) + _ROUNDING


def most_alike(block: WordBlock, starts: NDArray[np.int64], prompt_starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """The most that each of many completions can be alike to another of its prompt, asked of all at once.

    The share of a completion's shingles that any other of the prompt has too: no Jaccard similarity to one of them is higher.

    Args:
        block: the words of all completions; each one's reasoning stands right before its answer.
        starts: int64 (completions + 1,); the first word of each.
        prompt_starts: int64 (prompts + 1,); the first completion of each.
    Returns:
        float64 (completions,) in [0, 1]; 1 for one of fewer than five words.
    """
    num_words = np.diff(starts)
    owner = np.repeat(np.arange(len(num_words)), num_words)
    prompt = np.repeat(np.arange(len(prompt_starts) - 1), np.diff(prompt_starts))
    places = np.arange(len(block.hashes))
    places = places[places + SHINGLE_WORDS <= starts[owner + 1]]
    places, is_again = grouped(block.hashes, places, SHINGLE_WORDS, prompt[owner[places]])
    of = owner[places]
    is_own = is_again & np.r_[False, of[1:] == of[:-1]][: len(of)]
    own, is_other = of[~is_own], is_again[~is_own]
    is_shared = is_other | np.r_[is_other[1:], False][: len(own)]
    distinct = np.maximum(num_words - SHINGLE_WORDS + 1, 0) - np.bincount(of[is_own], minlength=len(num_words))
    shared = np.bincount(own[is_shared], minlength=len(num_words))
    return np.where(distinct > 0, shared / np.maximum(distinct, 1), 1.0)
