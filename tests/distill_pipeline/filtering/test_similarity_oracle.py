"""datasketch agrees with the near-duplicate rule on the answers of one prompt."""

import random
from functools import partial

import numpy as np
import pytest

from distill_pipeline.filtering.screening import screen
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import judge_prompt

NUM_PAIRS = 800
NUM_PERMUTATIONS = 256
UNCLEAR = 0.05
"""Two standard errors of the oracle near the threshold, where it is not exact itself."""
WORDS, MOST_EDITS = 150, 10
RULE = FilterSpec(drop=("near_duplicate",))


def test_datasketch_agrees_on_98_percent_of_clear_near_duplicate_answers() -> None:
    datasketch = pytest.importorskip("datasketch", reason="datasketch is not installed: no oracle")
    rng = random.Random(0)
    clear = agreed = near = found = 0
    for number in range(NUM_PAIRS):
        one = [f"w{rng.randrange(5_000)}" for _ in range(WORDS)]
        other = list(one)
        for at in rng.sample(range(WORDS), rng.randrange(MOST_EDITS)):
            other[at] = f"w{rng.randrange(5_000)}"
        sketches = datasketch.MinHash.bulk(
            [[" ".join(text[i : i + 5]).encode() for i in range(len(text) - 4)] for text in (one, other)],
            num_perm=NUM_PERMUTATIONS,
        )
        estimate = sketches[0].jaccard(sketches[1])
        if abs(estimate - 0.8) < UNCLEAR:
            continue
        is_near, is_found = estimate >= 0.8, is_rejected(number, " ".join(one), " ".join(other))
        clear += 1
        agreed += is_near == is_found
        near += is_near
        found += is_near and is_found
    assert min(near, clear - near) > 150
    assert found >= 0.98 * near
    assert agreed >= 0.98 * clear


def is_rejected(number: int, one: str, other: str) -> bool:
    rows = [
        {"completion_id": f"{number}-{i}", "sample_index": i, "reasoning": None, "answer": text, "raw_text": text,
         "finish_reason": "stop", "completion_tokens": WORDS}
        for i, text in enumerate((one, other))
    ]  # fmt: skip
    looks = screen([None, None], [one, other], np.array([0, 2]), rule=RULE, protected=None)
    judge = partial(judge_prompt, is_heldout=False, rule=RULE.of("d"), protected=None, counters={})
    return judge(rows, [[], []], screened=looks)[1].reasons == ["near_duplicate"]
