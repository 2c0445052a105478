"""Laws of the vote: classes by verifier equality, no winner in a tie, no vote for what cannot be read."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill_pipeline.scoring.opening import open_scorer
from distill_pipeline.scoring.registry import ScoreValue
from distill_pipeline.scoring.rows import AnswerRow, OpenedScorer, ScoringContext
from distill_pipeline.scoring.spec import ScorerSpec

Samples = Callable[..., list[AnswerRow]]


def vote(rows: Sequence[AnswerRow], **options: Any) -> list[ScoreValue]:
    with open_scorer(ScorerSpec(kind="majority_vote", options=options), ScoringContext()) as scorer:
        return scorer.score(rows)


def scores(rows: Sequence[AnswerRow], **options: Any) -> list[float | None]:
    return [value.score for value in vote(rows, **options)]


def test_the_larger_class_wins_whatever_the_spelling(samples: Samples) -> None:
    values = vote(samples(["Paris.", "**paris**", "Rome", "PARIS"]))
    assert [value.score for value in values] == [1.0, 1.0, 0.0, 1.0]
    assert [value.detail for value in values[1:3]] == ["3 of 4 votes", "1 of 4 votes; the winner has 3"]


@pytest.mark.parametrize(
    ("by", "answers"),
    [
        ("numeric", ["There are 3 boxes of 14, so 42.", "#### 42.0", r"\boxed{84/2}", "In all: 40 + 1 = 41"]),
        ("numeric", ["1/2", "0.5", "50%", "0.4"]),
        ("numeric", ["5 km", "5000 m", "it is 5000 meters", "4 km"]),
        ("multiple_choice", ["The answer is B.", "(B) because A is wrong", r"\boxed{B}", "C"]),
        ("exact", [r"So \boxed{x+1}", "#### x+1", "x+1", "x+2"]),
        ("exact", ["P(A|B)", "p(a|b)", r"\boxed{P(A|B)}", "P(A"]),
    ],
)
def test_answers_are_told_equal_by_a_verifier(by: str, answers: list[str], samples: Samples) -> None:
    assert scores(samples(answers), by=by) == [1.0, 1.0, 1.0, 0.0]


def test_a_tie_has_no_winner(samples: Samples) -> None:
    values = vote(samples(["a", "b", "a", "b"]))
    assert [value.score for value in values] == [None] * 4
    assert values[0].detail == "no winner: 2 answers have 2 of 4 votes each"


def test_a_cut_or_unreadable_answer_does_not_vote_but_counts_in_the_total(samples: Samples) -> None:
    assert scores(samples(["a", "a", ("b", "length"), ("b", "length")])) == [1.0, 1.0, None, None]
    assert scores(samples(["a", "a", ("b", "length"), ("b", "length"), ""])) == [None] * 5
    assert scores(samples(["7", "7", "no number", "8"]), by="numeric") == [1.0, 1.0, None, 0.0]


def test_a_winner_needs_votes_and_a_share_of_all(samples: Samples) -> None:
    assert scores(samples(["a"])) == [None]
    assert scores(samples(["a"]), min_votes=1) == [1.0]
    rows = samples(["a", "a", "b", "c", "d"])
    assert scores(rows) == [None] * 5
    assert scores(rows, min_share=0.4) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert scores(rows, min_share=0.4, min_votes=3) == [None] * 5


def test_each_prompt_votes_for_itself(samples: Samples) -> None:
    rows = [*samples(["a", "a", "b"], "first"), *samples(["b", "b", "a"], "second")]
    assert scores(rows) == [1.0, 1.0, 0.0, 1.0, 1.0, 0.0]


def test_the_verifiers_options_count(samples: Samples) -> None:
    rows = samples(["10", "10.1", "12"])
    assert scores(rows, by="numeric") == [None] * 3
    assert scores(rows, by="numeric", by_options={"relative_tolerance": 0.02}) == [1.0, 1.0, 0.0]


def test_a_users_function_tells_equal_and_one_that_hangs_makes_all_unknown(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "equality_of_tests.py").write_text(
        "import time\ndef same(reference, answer):\n    if 'hang' in answer: time.sleep(60)\n"
        "    return reference[0] == answer[0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = ScorerSpec(kind="majority_vote", options={"by": "equality_of_tests:same"}, timeout_seconds=0.5)
    with open_scorer(spec, ScoringContext()) as scorer:
        assert [value.score for value in scorer.score(samples(["xa", "xb", "y"]))] == [1.0, 1.0, 0.0]
        lost = scorer.score(samples(["xa", "hang", "y"]))
    assert [(value.score, value.lost) for value in lost] == [(None, "timeout")] * 3


ANSWERS = st.lists(
    st.tuples(st.sampled_from(["1", "1.0", "2", "2/2", "three", "", "4 km", "4000 m"]), st.sampled_from(["stop", "length"])),
    min_size=1,
    max_size=8,
)


def ballots(scorer: OpenedScorer, rows: Sequence[AnswerRow]) -> dict[str, tuple[str, ScoreValue]]:
    """Key and score by completion."""
    keyed = zip(scorer.keys(rows), scorer.score(rows), strict=True)
    return dict(zip((row.completion_id for row in rows), keyed, strict=True))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ANSWERS, st.randoms(use_true_random=False))
def test_a_vote_does_not_depend_on_the_order_and_scores_add_up(
    samples: Samples, answers: list[tuple[str, str]], random: Any
) -> None:
    rows = samples(answers)
    with open_scorer(ScorerSpec(kind="majority_vote", options={"by": "numeric"}), ScoringContext()) as scorer:
        by_id = ballots(scorer, rows)
        mixed = list(rows)
        random.shuffle(mixed)
        assert by_id == ballots(scorer, mixed)
    by_key: dict[str, set[ScoreValue]] = {}
    for key, value in by_id.values():
        by_key.setdefault(key, set()).add(value)
    assert all(len(values) == 1 for values in by_key.values())
    winners = sum(value.score == 1.0 for _, value in by_id.values())
    losers = sum(value.score == 0.0 for _, value in by_id.values())
    assert winners == 0 == losers or (winners >= 2 and 2 * winners >= len(rows) and winners > 0)


def test_teacher_logprob_is_the_geometric_mean_probability(samples: Samples) -> None:
    from math import log

    rows = [
        *samples(["a"], completion_tokens=4, logprob=4 * log(0.25)),
        *samples(["a"], completion_tokens=3, logprob=0.0),
        *samples(["a"], completion_tokens=3, logprob=None),
        *samples(["a"], completion_tokens=0, logprob=-1.0),
        *samples(["a"], completion_tokens=1, logprob=float("nan")),
        *samples(["a"], completion_tokens=1, logprob=-1e9),
    ]
    with open_scorer(ScorerSpec(kind="teacher_logprob"), ScoringContext()) as scorer:
        found = [value.score for value in scorer.score(rows)]
    assert found[0] == pytest.approx(0.25)
    assert found[1:] == [1.0, None, None, None, 0.0]
