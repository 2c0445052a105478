"""The accepted set depends neither on who judges nor on the chunks, and a first look decides nothing."""

import pickle
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill_pipeline.alignment import AlignedChunk, aligned_chunks
from distill_pipeline.compute.spec import ComputeSpec
from distill_pipeline.filtering import stage
from distill_pipeline.filtering.chunks import ChunkFilter
from distill_pipeline.filtering.repetition import may_repeat, repetition_fault
from distill_pipeline.filtering.screening import screen
from distill_pipeline.filtering.similarity import completion_shingles, most_alike
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import judge_prompt
from distill_pipeline.ngrams import WordBlock
from distill_pipeline.outcome import Outcome
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA

ITEM = "which planet of our solar system is the largest one and has a great red spot on it that never ends"
INDEX = ContaminationIndex.build([("t:0", ITEM), ("t:1", "name four seas"), ("t:2", "Question: how many legs has a spider?")])
RULE = FilterSpec(
    drop=("empty", "truncated", "refusal", "self_reference", "repetition", "contaminated", "duplicate", "near_duplicate"),
    diversity={"max_similarity": 0.5},
)  # type: ignore[arg-type]

WORDS = ["the", "red", "spot", "planet", "a", "b", "sea", "four", "Paris", "straße", "İ", "中文", "n't", "\n", "."]
PIECES = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=30).map(" ".join),
    st.tuples(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9), st.integers(1, 30)).map(
        lambda x: " ".join(x[0] * x[1])
    ),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).map(lambda x: " ".join(ITEM.split()[min(x) : max(x)])),
    st.sampled_from(["Question: four seas", "Name four seas", "how many legs has a spider?", "name four se as", "so " * 40]),
    st.tuples(st.text(max_size=3), st.integers(1, 60)).map(lambda x: x[0] * x[1]),
    st.text(max_size=40),
    st.integers(0, 400).map(lambda n: " ".join(f"w{i * i % 97}" for i in range(n))),
)
TEXTS = st.lists(PIECES, max_size=4).map(" ".join)
TRACES = st.one_of(st.none(), TEXTS)


def completions(groups: list[list[tuple[str | None, str]]]) -> list[dict[str, Any]]:
    return [
        {
            "completion_id": f"{prompt}-{index}", "prompt_id": f"p{prompt}", "teacher": "t", "sample_index": index,
            "reasoning": reasoning, "answer": answer, "raw_text": answer, "finish_reason": "stop", "error": None,
            "prompt_tokens": 1, "completion_tokens": len(answer), "logprob": None, "request_key": "k",
        }
        for prompt, group in enumerate(groups)
        for index, (reasoning, answer) in enumerate(group)
    ]  # fmt: skip


def batches(rows: Iterable[dict[str, Any]], schema: pa.Schema, size: int = 1000) -> list[pa.RecordBatch]:
    found: list[pa.RecordBatch] = pa.Table.from_pylist(list(rows), schema=schema).to_batches(max_chunksize=size)
    return found


def inputs(rows: list[dict[str, Any]], size: int) -> tuple[list[pa.RecordBatch], ...]:
    prompts = [
        {"prompt_id": name, "messages": [{"role": "user", "content": name}], "reference": None, "domain": "d", "source": "s",
         "license": "l", "split": "train", "metadata": "{}"}
        for name in dict.fromkeys(row["prompt_id"] for row in rows)
    ]  # fmt: skip
    scores = [
        {"completion_id": row["completion_id"], "scorer": name, "scorer_version": "1", "score": 1.0, "detail": ""}
        for number, row in enumerate(rows)
        for name in ("s", "t")[: number % 3]
    ]
    return batches(prompts, PROMPT_SCHEMA, size), batches(rows, COMPLETION_SCHEMA, size), batches(scores, SCORE_SCHEMA, size)


def filtered(
    rows: list[dict[str, Any]], folder: Path, compute: ComputeSpec, size: int = 1000
) -> tuple[Outcome, dict[str, bytes]]:
    folder.mkdir()
    outcome = stage.filter_outputs(
        *inputs(rows, size), folder, rule=RULE, filter_name="f", protected=INDEX, progress=lambda line: None, compute=compute
    )
    return outcome, {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=150, deadline=None)
@given(groups=st.lists(st.lists(st.tuples(TRACES, TEXTS), min_size=1, max_size=4), min_size=1, max_size=4))
@example(groups=[[(None, "a " + " " * 70 + "b"), (None, "A b"), (None, "stra\u00dfe " * 20), (None, "STRASSE " * 20)]])
def test_verdicts_are_the_same_with_and_without_a_first_look(groups: list[list[tuple[str | None, str]]]) -> None:
    rows = completions(groups)
    starts = np.r_[0, np.cumsum([len(group) for group in groups])]
    looks = screen([row["reasoning"] for row in rows], [row["answer"] for row in rows], starts, rule=RULE, protected=INDEX)
    judge = partial(judge_prompt, is_heldout=False, rule=RULE.of("d"), protected=INDEX, counters={})
    for begin, end in pairwise(starts):
        given = [[] for _ in rows[begin:end]]
        one, other = judge(rows[begin:end], given), judge(rows[begin:end], given, screened=looks[begin:end])
        assert [(v.reasons, v.rank, v.detail) for v in one] == [(v.reasons, v.rank, v.detail) for v in other]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=6))
@example(texts=["Question: how many legs has a spider?", "four seas\nname"])
@example(texts=[" ".join(f"w{n}" for n in range(3000)) + " round and round in circles now" * 3])
def test_a_text_that_a_first_look_clears_breaks_no_rule(texts: list[str]) -> None:
    block = WordBlock.of(texts)
    for text, repeats, matches in zip(texts, may_repeat(texts, block), INDEX.may_match(texts, block), strict=True):
        assert repeats or repetition_fault(text) is None
        assert matches or INDEX.match(text) is None
    alike = most_alike(block, block.starts, np.array([0, len(texts)]))
    shingles = [completion_shingles(None, text) for text in texts]
    for at, one in enumerate(shingles):
        for other in shingles[:at] + shingles[at + 1 :]:
            assert len(one & other) / len(one | other) <= alike[at] + 1e-9


def test_a_first_look_clears_ordinary_prose() -> None:
    prose = [" ".join(f"w{(i * 7919 + n * 104729) % 5003}" for i in range(300)) for n in range(8)]
    block = WordBlock.of(prose)
    assert not may_repeat(prose, block).any()
    assert not INDEX.may_match(prose, block).any()
    assert most_alike(block, block.starts, np.array([0, 8])).max() < 0.1


def rows_of_all_kinds(num_prompts: int) -> list[dict[str, Any]]:
    kinds = [
        "",
        "so " * 30,
        ITEM,
        "I cannot help with that.",
        "as an AI, I think",
        "Paris",
        "paris ",
        " ".join(map(str, range(90))),
    ]
    return completions(
        [
            [(None, kinds[(n * 3 + i) % len(kinds)] + (f" {n}" if i % 2 else "")) for i in range(1 + n % 4)]
            for n in range(num_prompts)
        ]
    )


@pytest.mark.parametrize("max_rows", [1, 3, 50])
def test_files_and_counts_are_the_same_with_processes_and_any_chunks(
    max_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of_all_kinds(60)
    alone = filtered(rows, tmp_path / "alone", ComputeSpec(workers=1))
    monkeypatch.setattr(stage, "aligned_chunks", partial(aligned_chunks, max_rows=max_rows))
    assert filtered(rows, tmp_path / "two", ComputeSpec(workers=2), size=7) == alone
    assert alone[0].counts["rejected"] > 0


def test_files_and_counts_are_the_same_on_a_ray_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None
) -> None:
    rows = rows_of_all_kinds(60)
    alone = filtered(rows, tmp_path / "alone", ComputeSpec(workers=1))
    monkeypatch.setattr(stage, "aligned_chunks", partial(aligned_chunks, max_rows=20))
    assert filtered(rows, tmp_path / "ray", ComputeSpec(engine="ray", workers=2)) == alone


def test_a_chunk_travels_with_its_own_rows_only() -> None:
    rows = completions([[(None, "x" * 1000)] * 2] * 300)
    first, *_, last = aligned_chunks(*inputs(rows, 1000), max_rows=5)
    assert (first.completions.num_rows, last.completions.num_rows) == (4, 2)
    assert len(pickle.dumps(first)) < 20_000
    copy: AlignedChunk = pickle.loads(pickle.dumps(last))
    assert copy.completions.equals(last.completions)
    assert copy.prompts.equals(last.prompts)
    assert (copy.starts.tolist(), copy.score_starts.tolist()) == (last.starts.tolist(), last.score_starts.tolist())


def test_chunks_end_at_the_limit_of_bytes_and_never_part_a_prompt() -> None:
    rows = completions([[(None, "x" * 1000)] * 3] * 40)
    chunks = list(aligned_chunks(*inputs(rows, 1000), max_bytes=20_000))
    assert all(chunk.completions.num_rows % 3 == 0 for chunk in chunks)
    assert max(chunk.completions.num_rows for chunk in chunks) <= 9
    assert sum(chunk.completions.num_rows for chunk in chunks) == 120


def test_a_filter_can_travel_to_another_process() -> None:
    ready = pickle.loads(pickle.dumps(ChunkFilter(RULE, "f", INDEX)))
    (chunk,) = aligned_chunks(*inputs(completions([[(None, ITEM)]]), 10))
    assert ready(chunk).decisions.column("reject_reason").to_pylist() == ["contaminated"]
