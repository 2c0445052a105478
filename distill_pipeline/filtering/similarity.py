"""How much two completions of one prompt are alike: the exact Jaccard similarity of their word 5-grams.

The reasoning and the answer are read as one text, so that two ways to one answer are two texts. A text of fewer than five words
is one shingle, and is alike only where all its words are.
"""

import numpy as np

from distill_pipeline.ngrams import ngram_hashes, tokens
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
