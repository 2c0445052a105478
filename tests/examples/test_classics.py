"""Laws of the general English that students may forget: the task reads every passage, and each only once."""

import json
from pathlib import Path

from distill_pipeline.evaluation.tasks import evaluation_documents

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_task_reads_every_passage_once() -> None:
    lines = (EXAMPLES / "classics" / "passages.jsonl").read_text(encoding="utf-8").splitlines()
    passages = [json.loads(line)["text"] for line in lines]
    documents = evaluation_documents(["classics"], str(EXAMPLES))
    assert len(set(passages)) == len(passages) == len(documents) == 18
    assert all(passage in text for passage, (_, text) in zip(passages, documents, strict=True))
