"""Law 1 for filtered sets: every completion gets exactly one verdict, whatever the batches, and nothing is lost."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.errors import IntegrityError
from distill_pipeline.filtering.ledger import pass_at_k
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.stage import PASS_SCHEMA, filter_outputs
from distill_pipeline.filtering.verdicts import REJECT_REASONS
from distill_pipeline.outcome import Outcome
from distill_pipeline.prompts.contamination import ContaminationIndex
from distill_pipeline.records import COMPLETION_SCHEMA, PROMPT_SCHEMA, SCORE_SCHEMA, TRAINING_SCHEMA, VERDICT_SCHEMA

ITEM = "Which planet of our solar system is the largest one and has a great red spot?"
INDEX = ContaminationIndex.build([("t:0", ITEM)])
ALL_RULES = ("truncated", "refusal", "repetition", "contaminated", "empty", "duplicate")


def completion(prompt: str, index: int, answer: str, **more: Any) -> dict[str, Any]:
    """A completion; ``score`` is what its scorer said, a list for several, absent for none."""
    row = {
        "completion_id": f"{prompt}-{index}", "prompt_id": prompt, "teacher": "t", "sample_index": index, "reasoning": None,
        "answer": answer, "raw_text": answer, "finish_reason": "stop", "error": None, "prompt_tokens": 1,
        "completion_tokens": len(answer.split()), "logprob": None, "request_key": "k",
    }  # fmt: skip
    return row | more


def chunks(rows: Sequence[dict[str, Any]], schema: pa.Schema, size: int) -> Iterator[pa.RecordBatch]:
    known = [{name: row.get(name) for name in schema.names} for row in rows]
    yield from pa.Table.from_pylist(known, schema=schema).to_batches(max_chunksize=size)


def filtered(
    folder: Path, rows: list[dict[str, Any]], rule: FilterSpec, *, size: int = 3, heldout: tuple[str, ...] = ()
) -> tuple[Outcome, list[dict[str, Any]], list[dict[str, Any]]]:
    folder.mkdir(exist_ok=True)
    names = ["never asked", *dict.fromkeys(row["prompt_id"] for row in rows)]
    prompts = [
        {
            "prompt_id": name, "messages": [{"role": "user", "content": f"q {name}"}], "reference": "r", "domain": "d",
            "source": "s", "license": "l", "split": "heldout" if name in heldout else "train", "metadata": "{}",
        }
        for name in names
    ]  # fmt: skip
    scores = [
        {"completion_id": row["completion_id"], "scorer": f"s{number}", "scorer_version": "1", "score": score, "detail": "d"}
        for row in rows
        if "score" in row and row["finish_reason"] != "error"
        for number, score in enumerate(row["score"] if isinstance(row["score"], list) else [row["score"]])
    ]
    outcome = filter_outputs(
        chunks(prompts, PROMPT_SCHEMA, size), chunks(rows, COMPLETION_SCHEMA, size), chunks(scores, SCORE_SCHEMA, size), folder,
        rule=rule, filter_name="filtered_set/t/f", protected=INDEX, progress=lambda line: None,
    )  # fmt: skip
    tables = {}
    for prefix, schema in (("part", VERDICT_SCHEMA), ("train", TRAINING_SCHEMA), ("passes", PASS_SCHEMA)):
        tables[prefix] = pq.ParquetFile(folder / f"{prefix}-00000.parquet").read()
        assert tables[prefix].schema == schema
    return outcome, tables["part"].to_pylist(), tables["train"].to_pylist()


def reasons(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["reject_reason"] for row in rows]


CASES = [
    completion("a", 0, "", finish_reason="error", error="HTTP 500", score=1.0),
    completion("a", 1, " ", score=1.0),
    completion("a", 2, "Paris", finish_reason="length", score=1.0),
    completion("a", 3, "I'm sorry, but I can't help with that.", score=1.0),
    completion("a", 4, "so " * 30, score=1.0),
    completion("a", 5, "Jupiter: " + ITEM, score=1.0),
    completion("a", 6, "Paris.", score=1.0),
    completion("a", 7, "paris. ", score=1.0),
    completion("a", 8, "It is Paris", score=None),
    completion("a", 9, "Could be Paris"),
    completion("a", 10, "Rome", score=0.5),
    completion("a", 11, "The capital is Paris", score=[1.0, 0.9]),
    completion("b", 0, "held", score=1.0),
    completion("c", 0, "", finish_reason="length", score=0.0),
]


def test_every_rule_gives_its_reason_and_all_reasons_are_kept(tmp_path: Path) -> None:
    outcome, rows, train = filtered(tmp_path, CASES, FilterSpec(min_score=0.9, drop=ALL_RULES), heldout=("b",))
    assert reasons(rows) == [
        "failed", "empty", "truncated", "refusal", "repetition", "contaminated", None, "duplicate", "unknown_score",
        "unknown_score", "below_min_score", None, "heldout", "empty",
    ]  # fmt: skip
    assert rows[-1]["reject_reasons"] == ["empty", "truncated", "below_min_score"]
    assert rows[8]["reject_reasons"] == rows[9]["reject_reasons"] == ["unknown_score"]
    assert [row["rank"] for row in rows if row["accepted"]] == [0, 1]
    assert rows[11]["scores"] == [{"scorer": "s0", "score": 1.0, "detail": "d"}, {"scorer": "s1", "score": 0.9, "detail": "d"}]
    assert [c["completion_id"] for c in train[0]["completions"]] == ["a-6", "a-11"]
    assert (len(train), train[0]["messages"]) == (1, [{"role": "user", "content": "q a"}])
    counts = outcome.counts
    assert (counts["completions"], counts["accepted"], counts["failed"], counts["rejected"]) == (14, 2, 1, 11)
    assert (counts["rejected_unknown_score"], counts["rejected_empty"], counts["rejected_not_best"]) == (2, 2, 0)
    assert (counts["prompts"], counts["prompts_with_accepted"]) == (3, 1)
    assert outcome.failed_gate is None
    assert outcome.facts["samples"]["contaminated"][0]["detail"].startswith("shared_13_gram with t:0: which planet")
    assert outcome.facts["samples"]["failed"][0]["detail"] == "HTTP 500"
    assert outcome.facts["yields"]["d"]["accepted"] == 2


def test_an_empty_rule_accepts_all_but_failed_and_heldout(tmp_path: Path) -> None:
    _, rows, _ = filtered(tmp_path, CASES, FilterSpec(), heldout=("b",))
    assert [row["reject_reason"] for row in rows if not row["accepted"]] == ["failed", "heldout"]


FOUR = [
    completion("a", 0, "long and good answer", score=1.0),
    completion("a", 1, "short good", score=1.0),
    completion("a", 2, "short bad", score=0.2),
    completion("a", 3, "b", score=0.1),
]


@pytest.mark.parametrize(
    ("rule", "kept", "reason"),
    [
        (FilterSpec(), ["a-1", "a-0", "a-2", "a-3"], None),
        (FilterSpec(max_per_prompt=2), ["a-1", "a-0"], "over_max_per_prompt"),
        (FilterSpec(keep="best_of_n"), ["a-1"], "not_best"),
        (FilterSpec(keep="best_of_n", max_per_prompt=2), ["a-1", "a-0"], "not_best"),
        (FilterSpec(keep="shortest"), ["a-3"], "not_best"),
        (FilterSpec(keep="shortest", min_score=0.2), ["a-1"], "not_best"),
    ],
)
def test_keep_and_max_per_prompt_choose_best_then_shorter(
    rule: FilterSpec, kept: list[str], reason: str | None, tmp_path: Path
) -> None:
    _, rows, train = filtered(tmp_path, FOUR, rule)
    assert [c["completion_id"] for c in train[0]["completions"]] == kept
    assert reason is None or reason in reasons(rows)
    assert sorted(row["rank"] for row in rows if row["accepted"]) == list(range(len(kept)))


def test_a_duplicate_of_a_rejected_completion_is_kept(tmp_path: Path) -> None:
    rows = [completion("a", 0, "Paris", finish_reason="length"), completion("a", 1, "Paris")]
    assert reasons(filtered(tmp_path, rows, FilterSpec(drop=("truncated", "duplicate")))[1]) == ["truncated", None]


def test_an_empty_set_says_why_and_keeps_its_rows(tmp_path: Path) -> None:
    rows = [completion("a", number, f"answer {number}", score=0.87 if number else 0.5) for number in range(4)]
    outcome, verdicts, train = filtered(tmp_path, rows, FilterSpec(min_score=0.9))
    assert outcome.failed_gate == (
        "filtered_set/t/f is empty: 0 of 4 teacher outputs passed. Largest reject reason: below_min_score "
        "(4; min_score=0.90, best score 0.87). Lower min_score below 0.87, or read the rejected rows in its part-*.parquet "
        "files."
    )
    assert len(verdicts) == 4
    assert train == []


def test_an_empty_set_names_other_reasons_and_no_outputs_at_all(tmp_path: Path) -> None:
    failed = [completion("a", 0, "", finish_reason="error", error="x")]
    assert "Largest reject reason: failed (1). Mend the teacher" in str(
        filtered(tmp_path / "a", failed, FilterSpec())[0].failed_gate
    )
    unknown = [completion("a", 0, "x")]
    message = str(filtered(tmp_path / "b", unknown, FilterSpec(min_score=1.0))[0].failed_gate)
    assert "Largest reject reason: unknown_score (1)" in message
    assert "there are no teacher outputs" in str(filtered(tmp_path / "c", [], FilterSpec())[0].failed_gate)


def test_pass_rates_count_known_scores_only(tmp_path: Path) -> None:
    outcome, _, _ = filtered(tmp_path, [*FOUR, completion("b", 0, "x", score=None)], FilterSpec())
    assert outcome.facts["correct_of_known"] == {"0 of 0": 1, "2 of 4": 1}
    assert outcome.facts["pass_at"]["1"] == {"mean": 0.5, "prompts": 1}
    assert outcome.facts["pass_at"]["2"]["mean"] == pytest.approx(1 - 1 / 6, abs=1e-6)
    assert [row["num_correct"] for row in pq.ParquetFile(tmp_path / "passes-00000.parquet").read().to_pylist()] == [2, 0]


@given(n=st.integers(1, 9), data=st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_correct_one(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    assert pass_at_k(n, n, k) == 1.0


def test_scores_of_other_outputs_are_an_error(tmp_path: Path) -> None:
    stray = {"completion_id": "other", "scorer": "s", "scorer_version": "1", "score": 1.0, "detail": ""}
    prompt = {"prompt_id": "a", "messages": [{"role": "user", "content": "q"}], "domain": "d", "source": "s", "license": "l",
              "split": "train", "metadata": "{}"}  # fmt: skip
    with pytest.raises(IntegrityError, match="Score the outputs again"):
        filter_outputs(
            chunks([prompt], PROMPT_SCHEMA, 9), chunks([completion("a", 0, "x")], COMPLETION_SCHEMA, 9),
            chunks([stray], SCORE_SCHEMA, 9), tmp_path, rule=FilterSpec(), filter_name="f", protected=None,
            progress=lambda line: None,
        )  # fmt: skip


ANSWERS = ["Paris", "paris ", "", "I cannot help with that.", "so " * 30, "Jupiter: " + ITEM, "Rome is a big city"]
ROWS = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from(ANSWERS), st.sampled_from(["stop", "length", "error"]),
            st.sampled_from([None, 0.0, 0.5, 1.0, "none"]),
        ),
        min_size=1, max_size=5,
    ),
    max_size=5,
)  # fmt: skip
RULES = st.builds(
    FilterSpec, min_score=st.sampled_from([None, 0.5, 1.0]), keep=st.sampled_from(["all", "best_of_n", "shortest", 2]),
    preset=st.sampled_from([None, "math", "chat"]), near_duplicate=st.sampled_from([None, {"threshold": 0.5}]),
    difficulty=st.sampled_from([None, {"min": 0.3, "max": 0.7}]), diversity=st.sampled_from([None, {"max_similarity": 0.5}]),
    domains=st.sampled_from([{}, {"d": {"preset": "code"}}, {"other": {"keep": 1}}]),
    max_per_prompt=st.sampled_from([None, 1, 2]), drop=st.lists(st.sampled_from(ALL_RULES), unique=True).map(tuple),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(groups=ROWS, rule=RULES, size=st.integers(1, 7), order=st.randoms(use_true_random=False))
def test_every_completion_has_one_verdict_and_batches_and_order_change_nothing(
    groups: list[list[tuple[str, str, Any]]], rule: FilterSpec, size: int, order: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    by_prompt = [
        [
            completion(f"p{number}", index, "" if finish == "error" else answer, finish_reason=finish,
                       **({} if score == "none" else {"score": score}))
            for index, (answer, finish, score) in enumerate(group)
        ]
        for number, group in enumerate(groups)
    ]  # fmt: skip
    rows = [row for group in by_prompt for row in group]
    one, other, third = (tmp_path_factory.mktemp("filter") for _ in range(3))
    outcome, verdicts, train = filtered(one, rows, rule, size=size, heldout=("p1",))
    assert [row["completion_id"] for row in verdicts] == [row["completion_id"] for row in rows]
    assert all(row["accepted"] == (row["reject_reason"] is None) == (row["rank"] is not None) for row in verdicts)
    assert all(row["reject_reasons"] == sorted(row["reject_reasons"], key=REJECT_REASONS.index) for row in verdicts)
    counts = outcome.counts
    assert counts["completions"] == len(rows) == counts["accepted"] + counts["failed"] + counts["rejected"]
    accepted = {row["completion_id"] for row in verdicts if row["accepted"]}
    assert accepted == {c["completion_id"] for row in train for c in row["completions"]}
    assert (outcome.failed_gate is None) == bool(accepted)

    filtered(other, rows, rule, size=1000, heldout=("p1",))
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()
    for group in by_prompt:
        order.shuffle(group)
    shuffled = [row for group in by_prompt for row in group]
    _, _, same = filtered(third, shuffled, rule, size=size, heldout=("p1",))
    assert same == train
