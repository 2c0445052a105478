"""Near-duplicate prompts, found without comparing every pair, and told apart from siblings of one template.

Two prompts are near duplicates when all of this holds:

* their final messages share at least ``threshold`` of their word 5-grams (Jaccard; a shorter message is one shingle);
* everything before the final message has the same words, so a long shared system prompt or history proves nothing;
* their references have the same words, and their numbers, operators and negations are the same, counted;
* they are no template siblings. Siblings differ only by replaced words (nothing is only added or only left out), and the
  replaced places are a slot: at least three prompts have the same words around it and different ones in it, or the same two
  fillers also tell other pairs of prompts apart.

Candidates come from MinHash signatures (128 permutations) cut into bands, 16 at the default threshold; the Jaccard similarity
that decides is exact. The first prompt stays. Signatures and words lie in files, so memory holds a few numbers a prompt.

Decided: a doubt keeps the prompt. A family with more than 2,000 look-alikes is compared with its latest 2,000 kept members
only (copies that differ in layout alone are always found). Gave up: a single pair that differs in one replaced word is a
duplicate, although two might be the first prompts of a template.
"""

from array import array
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distill_pipeline.ngrams import Hashes, bytes_hash, guards, mix, ngram_hashes, text_hash, tokens, word_hashes, words

SHINGLE_WORDS = 5
NUM_PERMUTATIONS = 128
MIN_SLOT_FILLERS = 3
"""Different fillers that make replaced words a template's slot."""

_MAX_COMPARED = 2_000
_MAX_CONFIRMED = 16
_MAX_TEMPLATE_MEMBERS = 512
_ESTIMATE_SLACK = 0.12
"""Three standard errors of a 128-permutation estimate near 0.8."""

_BATCH_ROWS = 1_024
_WORD_BYTES = 8
_SWAP_CONTEXT_BYTES = 2 * _WORD_BYTES

Indices = NDArray[np.int64]
Signatures = NDArray[np.uint32]


class Sketcher(Protocol):
    """Makes MinHash signatures: rows of 32-bit numbers that agree in a share of places near the Jaccard similarity."""

    def sketch(self, shingles: Sequence[Hashes]) -> Signatures:
        """One signature of ``NUM_PERMUTATIONS`` numbers for each non-empty set of shingle hashes."""
        ...


class RensaSketcher:
    """MinHash by the rensa package."""

    def sketch(self, shingles: Sequence[Hashes]) -> Signatures:
        from rensa import RMinHash

        matrix = RMinHash.digest_matrix_from_token_hash_sets([s.tolist() for s in shingles], NUM_PERMUTATIONS, 42)
        return np.asarray(matrix.to_rows(), dtype=np.uint32).reshape(len(shingles), NUM_PERMUTATIONS)


def shingles_of(hashes: Hashes) -> Hashes:
    """The distinct word 5-grams of a message; a shorter message is one shingle, and so is one without words."""
    n = max(1, min(SHINGLE_WORDS, len(hashes)))
    return np.unique(ngram_hashes(hashes, n)) if len(hashes) else np.zeros(1, dtype=np.uint64)


def rows_per_band(threshold: float) -> int:
    """The most rows a band may have for 99 % of pairs at the threshold to become candidates."""
    found = (rows for rows in (8, 4, 2) if 1 - (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) >= 0.99)
    return next(found, 1)


def first_occurrences(*keys: NDArray[np.uint64]) -> Indices:
    """For each row, the index of the first row with the same keys (its own, if it is that)."""
    count = len(keys[0])
    order = np.lexsort(keys)
    is_new = np.zeros(count, dtype=bool)
    is_new[:1] = True
    for key in keys:
        is_new[1:] |= key[order][1:] != key[order][:-1]
    starts = np.maximum.accumulate(np.where(is_new, np.arange(count), 0))
    first = np.empty(count, dtype=np.int64)
    first[order] = order[starts]
    return first


class NearDuplicates:
    """Collects prompts with :meth:`add`, then says with :meth:`find` which repeat an earlier one.

    Args:
        folder: an empty folder for working files, for as long as the object is used.
        threshold: least Jaccard similarity of near duplicates.
    """

    def __init__(self, folder: Path, threshold: float, sketcher: Sketcher | None = None) -> None:
        self._threshold, self._sketcher = threshold, sketcher or RensaSketcher()
        self._rows_per_band = rows_per_band(threshold)
        self._num_bands = NUM_PERMUTATIONS // self._rows_per_band
        self._words = (folder / "words.bin").open("w+b")
        self._signatures = (folder / "signatures.bin").open("w+b")
        self._bands = [(folder / f"band-{band:03d}.bin").open("w+b") for band in range(self._num_bands)]
        self._ends, self._guards, self._sequences = array("Q"), array("Q"), array("Q")
        self._waiting: list[Hashes] = []
        self._num_words = 0

    def add(self, messages: Sequence[Mapping[str, Any]], reference: str | None) -> None:
        """Append a prompt; its index is the number of prompts added before."""
        text = str(messages[-1]["content"])
        before = [[message["role"], *words(message["content"])] for message in messages[:-1]]
        answer = None if reference is None else [words(reference), guards(reference)]
        self._guards.append(text_hash(repr((before, answer, guards(text)))))
        listed, hashes = tokens(text)
        hashes = hashes if listed else word_hashes([text])
        self._sequences.append(bytes_hash(hashes.tobytes()))
        self._num_words += len(hashes)
        self._ends.append(self._num_words)
        self._words.write(hashes.tobytes())
        self._waiting.append(shingles_of(hashes))
        if len(self._waiting) >= _BATCH_ROWS:
            self._flush()

    def find(self, is_candidate: NDArray[np.bool_] | None = None) -> Indices:
        """For each prompt, the index of the earlier kept prompt it nearly repeats, or -1.

        Args:
            is_candidate: bool (prompts,); prompts for which it is false neither are nor have duplicates.
        """
        self._flush()
        for file in (self._words, self._signatures, *self._bands):
            file.flush()
        count = len(self._ends)
        repeats = np.full(count, -1, dtype=np.int64)
        alive = np.ones(count, dtype=bool) if is_candidate is None else is_candidate.copy()
        rows = np.flatnonzero(alive)
        if not len(rows):
            return repeats
        first = rows[first_occurrences(_u64(self._guards)[rows], _u64(self._sequences)[rows])]
        is_copy = first != rows
        repeats[rows[is_copy]] = first[is_copy]
        rows = rows[~is_copy]
        families = _Families(self, np.memmap(self._words, dtype=np.uint64, mode="r"))
        for members in self._components(rows):
            families.resolve(members, repeats)
        return repeats

    def close(self) -> None:
        """Let go of the working files."""
        for file in (self._words, self._signatures, *self._bands):
            file.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        signatures = self._sketcher.sketch(self._waiting)
        self._signatures.write(signatures.tobytes())
        guard = _u64(self._guards)[-len(self._waiting) :]
        for band, file in enumerate(self._bands):
            part = signatures[:, band * self._rows_per_band : (band + 1) * self._rows_per_band].astype(np.uint64)
            key = guard.copy()
            for column in part.T:
                key = mix(key ^ column)
            file.write(key.tobytes())
        self._waiting = []

    def _components(self, rows: Indices) -> list[Indices]:
        """Groups of two and more prompts linked by equal bands, each in order; only these need a closer look."""
        label = np.arange(len(rows))
        changed = True
        while changed:
            changed = False
            for file in self._bands:
                keys = np.memmap(file, dtype=np.uint64, mode="r")[rows]
                order = np.argsort(keys, kind="stable")
                starts = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1]])
                sizes = np.diff(np.r_[starts, len(rows)])
                lowest = np.repeat(np.minimum.reduceat(label[order], starts), sizes)
                changed |= bool((lowest < label[order]).any())
                label[order] = lowest
        order = np.argsort(label, kind="stable")
        starts = np.flatnonzero(np.r_[True, label[order][1:] != label[order][:-1]])
        sizes = np.diff(np.r_[starts, len(rows)])
        return [rows[order[start : start + size]] for start, size in zip(starts, sizes, strict=True) if size > 1]


class _Families:
    """Decides inside groups of look-alikes."""

    def __init__(self, owner: NearDuplicates, all_words: NDArray[np.uint64]) -> None:
        self._threshold = owner._threshold
        self._ends, self._words = owner._ends, all_words
        self._guards = owner._guards
        self._signatures = np.memmap(owner._signatures, dtype=np.uint32, mode="r").reshape(-1, NUM_PERMUTATIONS)

    def resolve(self, members: Indices, repeats: Indices) -> None:
        """Fill in ``repeats`` for the members of one group, in order."""
        kept = np.empty(min(len(members), _MAX_COMPARED), dtype=np.int64)
        signatures = np.empty((len(kept), NUM_PERMUTATIONS), dtype=np.uint32)
        num_kept = 0
        slots: dict[tuple[bytes, ...], bool] = {}
        for row in members.tolist():
            held = min(num_kept, len(kept))
            estimate = (signatures[:held] == self._signatures[row]).mean(axis=1)
            likely = np.flatnonzero(estimate >= self._threshold - _ESTIMATE_SLACK)
            likely = likely[np.argsort(-estimate[likely], kind="stable")][:_MAX_CONFIRMED]
            earlier = next((int(kept[at]) for at in likely if self._repeats(row, int(kept[at]), members, slots)), -1)
            repeats[row] = earlier
            if earlier < 0:
                kept[num_kept % len(kept)] = row
                signatures[num_kept % len(kept)] = self._signatures[row]
                num_kept += 1

    def _words_of(self, row: int) -> Hashes:
        start = self._ends[row - 1] if row else 0
        return np.asarray(self._words[start : self._ends[row]])

    def _repeats(self, row: int, earlier: int, members: Indices, slots: dict[tuple[bytes, ...], bool]) -> bool:
        if self._guards[row] != self._guards[earlier]:
            return False
        ours, theirs = self._words_of(row), self._words_of(earlier)
        one, other = shingles_of(ours), shingles_of(theirs)
        shared = len(np.intersect1d(one, other, assume_unique=True))
        if shared < self._threshold * (len(one) + len(other) - shared) - 1e-9:
            return False
        frame = _frame(ours, theirs)
        if frame is None:
            return True
        if frame not in slots:
            slots[frame] = self._is_slot(frame, row, members)
        return not slots[frame]

    def _is_slot(self, frame: tuple[bytes, ...], row: int, members: Indices) -> bool:
        """Whether members have these words around at least ``MIN_SLOT_FILLERS`` others, or swap two in several places."""
        at = int(np.searchsorted(members, row))
        near = members[max(0, at - _MAX_TEMPLATE_MEMBERS // 8) : at + _MAX_TEMPLATE_MEMBERS // 8]
        fillers = set()
        texts = []
        for member in dict.fromkeys([*near.tolist(), *members[:_MAX_TEMPLATE_MEMBERS].tolist()]):
            texts.append(self._words_of(member).tobytes())
            filler = _fillers(frame, texts[-1])
            if filler is not None:
                fillers.add(filler)
            if len(fillers) >= MIN_SLOT_FILLERS:
                return True
        return len(frame) == 2 and len(fillers) == 2 and _swap_recurs(frame, sorted(filler[0] for filler in fillers), texts)


def _swap_recurs(frame: tuple[bytes, ...], fillers: list[bytes], texts: list[bytes]) -> bool:
    """Whether two texts and more have a twin in which one filler stands for the other, between the same few words."""
    before, after = frame[0][-_SWAP_CONTEXT_BYTES:], frame[1][:_SWAP_CONTEXT_BYTES]
    one, other = (before + filler + after for filler in fillers)
    known = set(texts)
    return sum(one in text and text.replace(one, other, 1) in known for text in known) > 1


def _frame(ours: Hashes, theirs: Hashes) -> tuple[bytes, ...] | None:
    """The common blocks of two texts that differ only by replaced words; None if words were added, left out or none differ."""
    shorter = min(len(ours), len(theirs))
    head = _common_start(ours[:shorter], theirs[:shorter])
    tail = _common_start(ours[::-1][:shorter], theirs[::-1][:shorter])
    tail = min(tail, shorter - head)
    a, b = ours[head : len(ours) - tail], theirs[head : len(theirs) - tail]
    if not len(a) or not len(b):
        return None
    blocks = [ours[:head]]
    matcher = SequenceMatcher(None, a.tolist(), b.tolist(), autojunk=False)
    for tag, start, end, _, _ in matcher.get_opcodes():
        if tag in {"insert", "delete"}:
            return None
        if tag == "equal":
            blocks.append(a[start:end])
    blocks.append(ours[len(ours) - tail :])
    return tuple(block.tobytes() for block in blocks)


def _common_start(a: Hashes, b: Hashes) -> int:
    differs = np.flatnonzero(a != b)
    return int(differs[0]) if len(differs) else len(a)


def _fillers(frame: tuple[bytes, ...], text: bytes) -> tuple[bytes, ...] | None:
    """What stands between a frame's blocks in a text, or None where the frame does not fit. All lengths in whole words."""
    first, *middle, last = frame
    if not text.startswith(first) or not text.endswith(last) or len(first) + len(last) >= len(text):
        return None
    at, end = len(first), len(text) - len(last)
    found = []
    for block in middle:
        start = text.find(block, at + _WORD_BYTES, end)
        while start >= 0 and start % _WORD_BYTES:
            start = text.find(block, start + 1, end)
        if start < 0:
            return None
        found.append(text[at:start])
        at = start + len(block)
    found.append(text[at:end])
    return tuple(found) if at < end else None


def _u64(values: "array[int]") -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)
