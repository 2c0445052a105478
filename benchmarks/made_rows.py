"""Rows for the data benchmarks: prompts, completions and scores as Parquet, with faults planted on purpose and written down.

Texts are words drawn by Zipf's law from a made vocabulary, so that short phrases recur as they do in prose and nothing longer
does. Each prompt has at most one planted fault; a completion's ``request_key`` names it, which no filter reads.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA
from distill_pipeline.shards import ShardWriter

SAMPLES = 4
WORDS_OF_ANSWER = 282
"""1.7 KB of this vocabulary."""
NUM_ITEMS = 2_000
FAULTS = ("duplicate", "near_duplicate", "contaminated", "refusal", "repetition", "truncated")
FAULT_FRAC = 0.24
"""Share of prompts with a fault: 1 % of completions for each kind."""

_REFUSALS = (
    "I'm sorry, but I can't help with that request.",
    "I cannot provide that information. Please ask about something else.",
    "As an AI language model, I am unable to assist with this.",
    "Unfortunately, I'm not able to answer that question.",
    "I must decline to write this.",
)
_VOCABULARY = 20_000
_TABLE = 1 << 16


@dataclass
class Made:
    """Where the rows are, and how many faults of each kind were planted."""

    folder: Path
    num_completions: int
    planted: Counter[str] = field(default_factory=Counter)


class Texts:
    """Draws texts; equal seeds draw equal texts."""

    def __init__(self, seed: int) -> None:
        vocabulary = _vocabulary(random.Random(0))
        weights = 1.0 / np.arange(10, len(vocabulary) + 10)
        self._rng = np.random.default_rng(seed)
        places = self._rng.choice(len(vocabulary), size=_TABLE, p=weights / weights.sum())
        ends = self._rng.choice(np.array(["", ",", ".", ".\n"]), size=_TABLE, p=[0.86, 0.06, 0.07, 0.01])
        self._table = np.array([vocabulary[place] + end for place, end in zip(places, ends, strict=True)], dtype=object)

    def words(self, count: int, length: int) -> list[list[str]]:
        """So many lists of so many words."""
        found: list[list[str]] = self._table[self._rng.integers(0, _TABLE, (count, length), dtype=np.uint16)].tolist()
        return found


def _vocabulary(rng: random.Random) -> list[str]:
    consonants, vowels = "bcdfghklmnprstvw", "aeiou"
    found: dict[str, None] = {}
    while len(found) < _VOCABULARY:
        syllables = 1 + (len(found) > 80) + (len(found) > 2_000 and rng.random() < 0.5)
        found["".join(rng.choice(consonants) + rng.choice(vowels) for _ in range(syllables)) + rng.choice("nrsltd")] = None
    return list(found)


def evaluation_items(seed: int = 0) -> list[tuple[str, str]]:
    """(id, text) of what completions must not contain."""
    return [(f"benchmark:{number}", " ".join(words)) for number, words in enumerate(Texts(seed + 2).words(NUM_ITEMS, 40))]


def make_rows(folder: Path, num_prompts: int, seed: int = 0) -> Made:
    """Write so many prompts and four times as many completions, each with a score of 1.0."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, rng = Texts(seed), random.Random(seed + 1)
    items = evaluation_items(seed)
    made = Made(folder, num_prompts * SAMPLES)
    with (
        ShardWriter(folder, "prompts", PROMPT_SCHEMA) as prompts,
        ShardWriter(folder, "completions", COMPLETION_SCHEMA) as completions,
        ShardWriter(folder, "scores", SCORE_SCHEMA) as scores,
    ):
        for start in range(0, num_prompts, 256):
            numbers = range(start, min(start + 256, num_prompts))
            answers = texts.words(SAMPLES * len(numbers), WORDS_OF_ANSWER)
            rows = []
            for at, number in enumerate(numbers):
                rows += _completions(number, answers[at * SAMPLES : (at + 1) * SAMPLES], items, rng, made.planted)
            completions.add_batch(_batch(rows, COMPLETION_SCHEMA))
            prompts.add_batch(_batch([_prompt(number) for number in numbers], PROMPT_SCHEMA))
            scores.add_batch(_batch([_score(row) for row in rows], SCORE_SCHEMA))
    return made


def _batch(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=schema)


def _prompt(number: int) -> dict[str, Any]:
    return {
        "prompt_id": f"p{number:012d}", "messages": [{"role": "user", "content": f"question {number}"}], "reference": None,
        "domain": "made", "source": "made", "license": "cc0-1.0", "split": "train", "metadata": "{}",
    }  # fmt: skip


def _score(row: dict[str, Any]) -> dict[str, Any]:
    return {"completion_id": row["completion_id"], "scorer": "made", "scorer_version": "1", "score": 1.0, "detail": ""}


def _completions(
    number: int, drawn: list[list[str]], items: list[tuple[str, str]], rng: random.Random, planted: Counter[str]
) -> Iterator[dict[str, Any]]:
    """The completions of one prompt; the faulty one is never the first, whose copy it may be."""
    fault = rng.choice(FAULTS) if rng.random() < FAULT_FRAC else None
    faulty = rng.randrange(1, SAMPLES)
    for index, words in enumerate(drawn):
        is_faulty = fault is not None and index == faulty
        text = _faulty(str(fault), drawn[0], words, items, rng) if is_faulty else " ".join(words)
        planted[str(fault)] += is_faulty
        yield {
            "completion_id": f"c{number:012d}-{index}", "prompt_id": f"p{number:012d}", "teacher": "made",
            "sample_index": index, "reasoning": None, "answer": text, "raw_text": text,
            "finish_reason": "length" if is_faulty and fault == "truncated" else "stop", "error": None, "prompt_tokens": 3,
            "completion_tokens": WORDS_OF_ANSWER, "logprob": None, "request_key": f"planted:{fault}" if is_faulty else "",
        }  # fmt: skip


def _faulty(fault: str, first: list[str], words: list[str], items: list[tuple[str, str]], rng: random.Random) -> str:
    """The text of a planted fault."""
    if fault == "duplicate":
        return "  ".join(first).upper() + "\n"
    if fault == "near_duplicate":
        copy = list(first)
        for at in rng.sample(range(len(copy)), 3):
            copy[at] = rng.choice(words)
        return " ".join(copy)
    if fault == "contaminated":
        at, item = rng.randrange(len(words) - 60), rng.choice(items)[1].split()
        begin = rng.randrange(len(item) - 20)
        span = item[begin : begin + rng.randrange(20, 41)]
        return " ".join([*words[:at], *span, *words[at + len(span) :]])
    if fault == "refusal":
        return rng.choice(_REFUSALS)
    if fault == "repetition":
        period = words[100 : 100 + rng.randrange(5, 40)]
        return " ".join(words[:120] + period * (1 + 162 // len(period)))
    return " ".join(words)
