"""Laws of the verdicts on one prompt's completions: one reason order, decisions that do not see the row order, exact bounds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.filtering.ledger import Ledger
from distill_pipeline.filtering.similarity import completion_shingles, is_alike, is_more_alike
from distill_pipeline.filtering.spec import FilterSpec
from distill_pipeline.filtering.verdicts import REJECT_REASONS, Verdict, judge_prompt

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()  # noqa: SIM905


def row(index: int, answer: str, *, score: float | str | None = "none", **more: Any) -> dict[str, Any]:
    """A completion with what its scorer said: a number, None for unknown, ``none`` for no scorer."""
    return {
        "completion_id": f"c{index}", "sample_index": index, "reasoning": None, "answer": answer, "raw_text": answer,
        "finish_reason": "stop", "error": None, "completion_tokens": len(answer.split()), "score": score,
    } | more  # fmt: skip


def judged(rows: Sequence[dict[str, Any]], counters: Any = None, *, domain: str = "d", **rule: Any) -> list[Verdict]:
    scores = [[] if r["score"] == "none" else [{"scorer": "s", "score": r["score"], "detail": ""}] for r in rows]
    spec = FilterSpec.model_validate(rule)
    return judge_prompt(rows, scores, is_heldout=False, rule=spec.of(domain), protected=None, counters=counters or {})


def firsts(verdicts: Sequence[Verdict]) -> list[str | None]:
    return [verdict.reasons[0] if verdict.reasons else None for verdict in verdicts]


def passes(*scores: float | str | None) -> list[dict[str, Any]]:
    return [row(index, f"answer {index}", score=score) for index, score in enumerate(scores)]


# --- difficulty -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "band", "expected"),
    [
        ([1.0, 0.0], {"min": 0.5, "max": 0.5}, None),
        ([1.0, 1.0], {"max": 1.0}, None),
        ([1.0, 1.0], {"max": 0.99}, "too_easy"),
        ([0.0, 0.0], {"min": 0.0}, None),
        ([0.0, 0.0], {"min": 0.01}, "too_hard"),
        ([1.0] * 3 + [0.0] * 7, {"min": 0.3, "max": 0.3}, None),
        ([1.0] + [0.0] * 2, {"min": 0.34}, "too_hard"),
        ([1.0, None], {"max": 0.9}, "too_easy"),  # unknown scores are no samples
        ([None, "none"], {"min": 0.0, "max": 1.0}, "unknown_difficulty"),
        ([0.99, 0.5], {"min": 0.1}, "too_hard"),  # without min_score only 1.0 is correct
    ],
)
def test_the_band_of_pass_rates_holds_its_ends(
    scores: list[float | str | None], band: dict[str, float], expected: str | None
) -> None:
    assert set(firsts(judged(passes(*scores), difficulty=band))) == {expected}


def test_min_score_says_what_is_correct_and_failed_completions_are_no_samples() -> None:
    rows = [*passes(0.6, 0.4), row(2, "", finish_reason="error")]
    assert firsts(judged(rows, min_score=0.5, difficulty={"min": 0.5, "max": 0.5})) == [None, "below_min_score", "failed"]
    assert judged(rows, min_score=0.5, difficulty={"max": 0.4})[1].reasons == ["too_easy", "below_min_score"]


# --- length -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Characters:
    """Counts characters, as a tokenizer of single letters would."""

    def count(self, text: str) -> int:
        return len(text)


@pytest.mark.parametrize(("tokens", "expected"), [(1, "too_short"), (2, None), (4, None), (5, "too_long")])
def test_lengths_are_counted_by_the_teacher_or_by_the_tokenizer_that_is_named(tokens: int, expected: str | None) -> None:
    length = {"min_tokens": 2, "max_tokens": 4}
    assert firsts(judged([row(0, "x", completion_tokens=tokens)], length=length)) == [expected]
    named = row(0, "x", raw_text="x" * tokens, completion_tokens=3)
    assert firsts(judged([named], {"m": Characters()}, length=length | {"tokenizer": "m"})) == [expected]


# --- near duplicates, diversity, keep -----------------------------------------------------------------------------------


def test_near_duplicates_are_those_of_better_completions() -> None:
    text = " ".join(WORDS)
    rows = [row(0, text + " end", score=0.5), row(1, text, score=1.0), row(2, "quite another text of some words", score=0.1)]
    verdicts = judged(rows, near_duplicate={"threshold": 0.8})
    assert firsts(verdicts) == ["near_duplicate", None, None]
    assert verdicts[0].detail == "like sample 1"
    assert firsts(judged(rows, near_duplicate={"threshold": 0.95})) == [None, None, None]
    # A better one that is rejected for itself is no reason to reject another.
    assert firsts(judged(rows, near_duplicate={"threshold": 0.8}, length={"min_tokens": 17})) == [
        None,
        "too_short",
        "too_short",
    ]


def test_two_ways_to_one_answer_are_no_near_duplicates() -> None:
    rows = [row(i, "The answer is 4.", reasoning=" ".join(WORDS[i:] + WORDS[:i][::-1])) for i in (0, 8)]
    assert firsts(judged(rows, near_duplicate={})) == [None, None]
    assert firsts(judged([r | {"reasoning": None} for r in rows], near_duplicate={})) == [None, "near_duplicate"]


@pytest.mark.parametrize(("shared", "total"), [(8, 10), (7, 10), (9, 11)])
def test_the_similarity_is_exact_at_its_threshold(shared: int, total: int) -> None:
    """Texts with ``shared`` 5-grams in common of ``total`` different ones."""
    one = " ".join(f"w{n}" for n in range(shared + 4))
    other = " ".join([one, *(f"x{n}" for n in range(total - shared))])
    a, b = completion_shingles(None, one), completion_shingles(None, other)
    exact = shared / total
    assert is_alike(a, b, exact)
    assert not is_alike(a, b, exact + 1e-6)
    assert not is_more_alike(a, b, exact)
    assert is_more_alike(a, b, exact - 1e-6)


@settings(max_examples=60, deadline=None)
@given(
    one=st.lists(st.sampled_from(WORDS), max_size=14), other=st.lists(st.sampled_from(WORDS), max_size=14),
    similarity=st.floats(0.01, 0.99),
)  # fmt: skip
def test_similarity_is_that_of_plain_sets(one: list[str], other: list[str], similarity: float) -> None:
    def plain(listed: list[str]) -> set[tuple[str, ...]]:
        n = min(5, len(listed))
        return {tuple(listed[i : i + n]) for i in range(len(listed) - n + 1)} if n else {()}

    a, b = plain(one), plain(other)
    jaccard = len(a & b) / len(a | b)
    first, second = (completion_shingles(None, " ".join(listed)) for listed in (one, other))
    if abs(jaccard - similarity) > 1e-6:
        assert is_alike(first, second, similarity) == is_more_alike(first, second, similarity) == (jaccard > similarity)


@pytest.mark.parametrize(("keep", "kept"), [(1, [3]), (2, [3, 1]), (9, [3, 1, 0, 2]), ("all", [3, 1, 0, 2])])
def test_keep_takes_the_best_so_many(keep: int | str, kept: list[int]) -> None:
    verdicts = judged(passes(0.5, 0.7, 0.2, 0.9), keep=keep)
    ranked = sorted((v for v in verdicts if v.rank is not None), key=lambda v: v.rank or 0)
    assert [verdict.row["sample_index"] for verdict in ranked] == kept
    assert set(firsts(verdicts)) <= {None, "not_best"}


def test_max_per_prompt_goes_before_a_larger_keep() -> None:
    assert firsts(judged(passes(0.5, 0.7, 0.2), keep=2, max_per_prompt=1)) == ["not_best", None, "not_best"]


def test_the_diversity_cap_keeps_the_best_of_what_is_alike_and_then_the_next_best() -> None:
    text = " ".join(WORDS)
    rows = [
        row(0, text, score=1.0), row(1, text + " and more", score=0.9), row(2, "something else that is said here", score=0.2),
    ]  # fmt: skip
    assert firsts(judged(rows, diversity={"max_similarity": 0.5})) == [None, "not_diverse", None]
    assert firsts(judged(rows, diversity={"max_similarity": 0.5}, keep=2)) == [None, "not_diverse", None]
    assert firsts(judged(rows, diversity={"max_similarity": 0.95})) == [None, None, None]


# --- whatever the rule ----------------------------------------------------------------------------------------------------

TEXTS = [
    "", "Paris", " ".join(WORDS), " ".join(WORDS) + " end", "so " * 30, "I cannot help with that.",
    "As an AI language model, I think it is Paris.", "La capitale de la France est Paris, une belle ville.",
]  # fmt: skip
ROWS = st.lists(
    st.tuples(
        st.sampled_from(TEXTS), st.sampled_from(["stop", "stop", "length", "error"]),
        st.sampled_from([None, 0.0, 0.5, 1.0, "none"]),
    ),
    min_size=1, max_size=6,
)  # fmt: skip
RULES = st.fixed_dictionaries(
    {},
    optional={
        "drop": st.lists(
            st.sampled_from(["truncated", "refusal", "self_reference", "repetition", "empty", "duplicate"]), unique=True
        ),
        "min_score": st.sampled_from([0.5, 1.0]), "keep": st.sampled_from(["all", "best_of_n", "shortest", 2]),
        "max_per_prompt": st.sampled_from([1, 2]), "near_duplicate": st.sampled_from([{}, {"threshold": 0.5}]),
        "difficulty": st.sampled_from([{"min": 0.3}, {"max": 0.7}]), "diversity": st.just({"max_similarity": 0.6}),
        "length": st.sampled_from([{"min_tokens": 2}, {"max_tokens": 9}]), "language": st.just("en"),
        "preset": st.sampled_from(["math", "code", "chat", "short_answer"]),
    },
)  # fmt: skip


def rows_of(given_rows: list[tuple[str, str, Any]]) -> list[dict[str, Any]]:
    return [
        row(index, "" if finish == "error" else text, score=score, finish_reason=finish)
        for index, (text, finish, score) in enumerate(given_rows)
    ]


@settings(max_examples=150, deadline=None)
@given(given_rows=ROWS, rule=RULES, order=st.randoms(use_true_random=False))
def test_every_row_has_one_verdict_with_reasons_in_order_whatever_the_row_order(
    given_rows: list[tuple[str, str, Any]], rule: dict[str, Any], order: Any
) -> None:
    rows = rows_of(given_rows)
    verdicts = judged(rows, **rule)
    assert [verdict.row["completion_id"] for verdict in verdicts] == [r["completion_id"] for r in rows]
    for verdict in verdicts:
        assert verdict.reasons == sorted(set(verdict.reasons), key=REJECT_REASONS.index)
        assert (verdict.rank is None) == bool(verdict.reasons)
    ranks = sorted(verdict.rank for verdict in verdicts if verdict.rank is not None)
    assert ranks == list(range(len(ranks)))
    shuffled = list(rows)
    order.shuffle(shuffled)
    found = {verdict.row["completion_id"]: (verdict.reasons, verdict.rank) for verdict in judged(shuffled, **rule)}
    assert found == {verdict.row["completion_id"]: (verdict.reasons, verdict.rank) for verdict in verdicts}


@settings(max_examples=80, deadline=None)
@given(given_rows=ROWS, drop=st.lists(st.sampled_from(["truncated", "empty", "duplicate"]), unique=True))
def test_a_lower_min_score_never_accepts_fewer(given_rows: list[tuple[str, str, Any]], drop: list[str]) -> None:
    rows = rows_of(given_rows)
    accepted = [
        {v.row["completion_id"] for v in judged(rows, drop=drop, min_score=least) if not v.reasons} for least in (1.0, 0.5, 0.0)
    ]
    assert accepted[0] <= accepted[1] <= accepted[2]


@settings(max_examples=60, deadline=None)
@given(given_rows=ROWS, most=st.floats(0.0, 0.9))
def test_what_the_diversity_cap_keeps_is_different(given_rows: list[tuple[str, str, Any]], most: float) -> None:
    kept = [v for v in judged(rows_of(given_rows), diversity={"max_similarity": most}) if not v.reasons]
    for one, other in combinations(kept, 2):
        shingles = [completion_shingles(None, verdict.row["answer"]) for verdict in (one, other)]
        assert not is_more_alike(*shingles, most)


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(ROWS, max_size=4), rule=RULES)
def test_the_ledger_adds_up_by_reason_and_by_domain(groups: list[list[tuple[str, str, Any]]], rule: dict[str, Any]) -> None:
    ledger = Ledger("f", FilterSpec.model_validate(rule))
    for number, group in enumerate(groups):
        ledger.add("q", f"d{number % 2}", judged(rows_of(group), **rule))
    outcome = ledger.outcome()
    counts, facts = outcome.counts, outcome.facts
    assert counts["completions"] == sum(map(len, groups)) == counts["accepted"] + counts["rejected"] + counts["failed"]
    assert counts["rejected"] == sum(number for name, number in counts.items() if name.startswith("rejected_"))
    funnel = facts["funnel"].values()
    assert sum(found["completions"] for found in funnel) == counts["completions"]
    assert sum(found["prompts"] for found in funnel) == counts["prompts"]
    assert all(found["completions"] >= found["finished"] >= found["scored"] for found in funnel)
    for domain, found in facts["funnel"].items():
        assert found["completions"] - found["accepted"] == sum(facts["domain_reasons"][domain].values())
    assert all(facts["samples"][reason] for reason in facts["reasons"])
