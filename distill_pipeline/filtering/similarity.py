"""How much two completions of one prompt are alike: the exact Jaccard similarity of their word 5-grams.

The reasoning and the answer are read as one text, so that two ways to one answer are two texts. A text of fewer than five words
is one shingle, and is alike only where all its words are.
"""

import numpy as np

from distill_pipeline.ngrams import Hashes, tokens
from distill_pipeline.prompts.near_dedup import shingles_of

_ROUNDING = 1e-9


def completion_shingles(reasoning: str | None, answer: str) -> Hashes:
    """The distinct shingles of a completion, sorted."""
    _, hashes = tokens(answer)
    if reasoning:
        hashes = np.concatenate([tokens(reasoning)[1], hashes])
    return shingles_of(hashes)


def is_alike(one: Hashes, other: Hashes, similarity: float) -> bool:
    """Whether two sets of shingles have at least this Jaccard similarity, in (0, 1]."""
    small, large = sorted((len(one), len(other)))
    if small < similarity * large - _ROUNDING:
        return False  # even if one holds all of the other
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= similarity * (small + large - shared) - _ROUNDING


def is_more_alike(one: Hashes, other: Hashes, similarity: float) -> bool:
    """Whether two sets of shingles have more than this Jaccard similarity, in [0, 1)."""
    small, large = sorted((len(one), len(other)))
    if small <= similarity * large + _ROUNDING:
        return False
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared > similarity * (small + large - shared) + _ROUNDING
