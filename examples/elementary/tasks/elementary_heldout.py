"""The Python half of the lm-eval task ``elementary_heldout``: where its questions are, and when an answer is right.

The questions are found beside this file, so that the task runs from any working directory and without a network.
"""

import json
from pathlib import Path
from typing import Any

import datasets

from distill_pipeline.scoring.text import contains_phrase

HELDOUT_PATH = Path(__file__).resolve().parents[1] / "heldout.jsonl"


def load_heldout(**_metadata: Any) -> datasets.DatasetDict:
    """The held-out questions as the split ``test``. lm-eval passes the task's metadata, which changes nothing here."""
    rows = [json.loads(line) for line in HELDOUT_PATH.read_text(encoding="utf-8").splitlines()]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


def score_answer(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """``acc`` 1.0 when one of the reference's alternatives occurs in the answer as whole words, else 0.0."""
    return {"acc": float(contains_phrase(results[0], doc["reference"]))}
