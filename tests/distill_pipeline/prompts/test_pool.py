"""Laws 1 and 6 for the prompt pool: every row is accounted for, and training prompts share nothing with the evaluation."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from distill_pipeline.outcome import Outcome
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.prompts.pool import REJECTED_SCHEMA, build_pool
from distill_pipeline.prompts.spec import DedupSpec, SourceSpec
from distill_pipeline.prompts.split import split_of
from distill_pipeline.records import PROMPT_SCHEMA, prompt_id

ITEM = "What is the simple past tense of the irregular verb to run?"


def pool_of(
    folder: Path, lines: list[Any], *, holdout_frac: float = 0.2, protected: ContaminationIndex | None = None, out: str = "out"
) -> tuple[Outcome, list[dict[str, Any]], list[dict[str, Any]]]:
    (folder / "p.jsonl").write_bytes(
        b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    )
    out_dir = folder / out
    out_dir.mkdir()
    outcome = build_pool(
        [SourceSpec(path="p.jsonl", license="cc0-1.0", domain="d")], out_dir, resolve_path=lambda path: str(folder / path),
        holdout_frac=holdout_frac, dedup=DedupSpec(), protected=protected, progress=lambda line: None,
    )  # fmt: skip
    kept = pq.ParquetFile(out_dir / "part-00000.parquet").read()
    rejected = pq.ParquetFile(out_dir / "rejected-00000.parquet").read()
    assert kept.schema == PROMPT_SCHEMA
    assert rejected.schema == REJECTED_SCHEMA
    assert sorted(path.name for path in out_dir.iterdir()) == ["part-00000.parquet", "rejected-00000.parquet"]
    return outcome, kept.to_pylist(), rejected.to_pylist()


def test_every_row_is_kept_or_rejected_with_a_reason(tmp_path: Path) -> None:
    lines = [
        {"prompt": "What is the capital of France?", "reference": "Paris", "id": "a"},
        {"prompt": "What is the capital of France?", "reference": "Paris"},
        {"prompt": "what is the capital of france", "reference": "paris"},
        {"prompt": "Name a colour.", "id": "a"},
        b'{"torn',
        {"prompt": ITEM},
        {"prompt": "Why do cats purr?"},
    ]
    outcome, kept, rejected = pool_of(tmp_path, lines, holdout_frac=0.0, protected=ContaminationIndex.build([("t:0", ITEM)]))
    assert [row["messages"][0]["content"] for row in kept] == ["What is the capital of France?", "Why do cats purr?"]
    assert {(row["line"], row["reason"]) for row in rejected} == {
        (2, "duplicate"), (3, "near_duplicate"), (4, "malformed"), (5, "malformed"), (6, "contaminated"),
    }  # fmt: skip
    assert outcome.counts == {
        "seen": 7, "kept": 2, "train": 2, "heldout": 0, "malformed": 2, "duplicate": 1, "near_duplicate": 1,
        "contaminated": 1, "flagged": 0,
    }  # fmt: skip
    details = {row["line"]: row["detail"] for row in rejected}
    assert details[2] == "same prompt as p.jsonl:1"
    assert details[3] == "nearly the same prompt as p.jsonl:1"
    assert details[4] == "its id is already that of p.jsonl:1"
    assert details[6].startswith("equal_text with t:0: what is the simple past tense")
    assert {row["line"] for row in outcome.facts["bad_rows"]} == {4, 5}
    assert outcome.facts["contaminated"][0]["item"] == "t:0"
    assert outcome.facts["licenses"] == {"p.jsonl": "cc0-1.0"}


def test_the_split_is_a_property_of_the_prompt_and_order_is_kept(tmp_path: Path) -> None:
    lines = [{"prompt": f"What is the plural of the noun {chr(97 + n % 26)}{chr(97 + n // 26)}o?"} for n in range(300)]
    outcome, kept, _ = pool_of(tmp_path, lines)
    assert [row["messages"][0]["content"] for row in kept] == [line["prompt"] for line in lines]
    assert all(row["prompt_id"] == prompt_id(row["messages"]) for row in kept)
    assert all(row["split"] == split_of(row["prompt_id"], 0.2) for row in kept)
    _, fewer, _ = pool_of(tmp_path, lines[::-2], out="other")
    split = {row["prompt_id"]: row["split"] for row in kept}
    assert all(row["split"] == split[row["prompt_id"]] for row in fewer)
    assert 30 <= outcome.counts["heldout"] <= 90


def test_only_training_prompts_are_decontaminated(tmp_path: Path) -> None:
    lines = [{"prompt": f"Who wrote the book number {number}?"} for number in range(60)]
    index = ContaminationIndex.build((f"t:{n}", line["prompt"]) for n, line in enumerate(lines))
    outcome, kept, rejected = pool_of(tmp_path, lines, protected=index)
    assert {row["split"] for row in kept} == {"heldout"}
    assert outcome.counts["contaminated"] == len(rejected) == 60 - len(kept)
    assert len(kept) > 0


def test_template_siblings_of_evaluation_items_are_kept(tmp_path: Path) -> None:
    names = [f"{a}{b}land" for a in "abcdefg" for b in "aeiou"]
    lines = [
        {"prompt": f"Answer in a single word: what is the capital city of the country of {n}?", "reference": n} for n in names
    ]
    index = ContaminationIndex.build((f"t:{n}", line["prompt"]) for n, line in enumerate(lines[:10]))
    outcome, kept, _ = pool_of(tmp_path, lines, holdout_frac=0.0, protected=index)
    assert outcome.counts["contaminated"] == 10
    assert outcome.counts["near_duplicate"] == 0
    assert len(kept) == 25


def test_flagged_prompts_are_kept_and_listed(tmp_path: Path) -> None:
    lines = [{"prompt": "Explain: the simple past tense of the irregular verb, please."}]
    outcome, kept, _ = pool_of(tmp_path, lines, holdout_frac=0.0, protected=ContaminationIndex.build([("t:0", ITEM)]))
    assert len(kept) == outcome.counts["flagged"] == 1
    assert outcome.facts["flagged"][0]["span"] == "the simple past tense of the irregular verb"


def test_hostile_ids_and_domains_never_become_paths(tmp_path: Path) -> None:
    before = set(tmp_path.parent.iterdir())
    _, kept, _ = pool_of(tmp_path, [{"prompt": "x", "id": "../../../evil", "domain": "../../etc"}])
    assert json.loads(kept[0]["metadata"]) == {"id": "../../../evil"}
    assert set(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_sources_give_the_same_bytes(seed: int, tmp_path: Path) -> None:
    lines = [{"prompt": f"Question {seed} about topic {n % 50}, in detail?", "id": str(n)} for n in range(120)]
    pool_of(tmp_path, lines, out="a")
    pool_of(tmp_path, lines, out="b")
    for name in ("part-00000.parquet", "rejected-00000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
