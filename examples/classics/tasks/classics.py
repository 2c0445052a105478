"""The Python half of the lm-eval task ``classics``: where its passages are."""

import json
from pathlib import Path
from typing import Any

import datasets

PASSAGES_PATH = Path(__file__).resolve().parents[1] / "passages.jsonl"


def load_passages(**_metadata: Any) -> datasets.DatasetDict:
    """The passages as the split ``test``. lm-eval passes the task's metadata, which changes nothing here."""
    rows = [json.loads(line) for line in PASSAGES_PATH.read_text(encoding="utf-8").splitlines()]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
