"""Golden verdicts of the built-in scorers, and that no text makes one of them raise."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.scoring import score_answers
from distill_pipeline.scoring.scorers import contains_answer, exact, multiple_choice, numeric, regex

CONTAINS = [
    ("Paris", "The capital of France is **Paris**.", 1.0),
    ("Paris", "PARIS", 1.0),
    ("Paris", "It is Paris's old name.", 1.0),
    ("Paris", "A comparison.", 0.0),
    ("Paris", "", 0.0),
    ("colour|color", "Its color is red.", 1.0),
    ("New York", "in new-york city", 1.0),
    ("New York", "York is not new.", 0.0),
    ("mice", "The plural of mouse is mouses.", 0.0),
    ("1,000", "about 1000 metres", 1.0),
    ("São Paulo", "sa\u0303o paulo", 1.0),
    ("10", "100", 0.0),
    (None, "Paris", None),
    ("+", "plus", None),
]
NUMERIC = [
    ("72", "The answer is 72.", 1.0),
    ("72", "She had 72 and then 73.", 0.0),
    ("1,000", "1000", 1.0),
    ("1000", "It costs $1,000.00.", 1.0),
    ("50%", "0.5", 1.0),
    ("50%", "50 percent", 1.0),
    ("50%", "0.5 %", 0.0),
    ("3/4", "0.75", 1.0),
    ("1 1/2", "1½", 1.0),
    ("0.25", "\\frac{1}{4}", 1.0),
    ("-5", "\u22125", 1.0),
    ("-4", "4", 0.0),
    ("4", "-4", 0.0),
    ("5 km", "5000 m", 1.0),
    ("5 km", "5 kg", None),
    ("5 in", "5 in total", 1.0),
    ("3 million", "3,000,000", 1.0),
    ("18", "9 * 2 = <<9*2=18>>18 every day.\n#### 18", 1.0),
    ("7", "first 9, so \\boxed{\\frac{14}{2}} and not 9", 1.0),
    ("100000", "10^5", 1.0),
    ("120000", "1.2 \u00d7 10^5", 1.0),
    ("5", "five", 1.0),
    ("2", "H2O", None),
    ("7", "no idea", None),
    ("between 3 and 5", "4", None),
    ("x", "4", None),
    ("3", "3/4/2020", 0.0),
    ("1/3", "0.3333333", 1.0),
    ("1/3", "0.33", 0.0),
    (None, "4", None),
    ("4", "1/0", None),
]
CHOICES = [
    ("B", "The answer is (B).", 1.0),
    ("B", "b", 1.0),
    ("(B) Paris", "**B**", 1.0),
    ("A", "A cat is an animal.", None),
    ("C", "(A) is wrong, (B) too, so the answer: C", 1.0),
    ("D", "B) Paris", 0.0),
    ("D", "It is not (B).", None),
    ("D", "(A) or (B)", None),
    ("C", "\\boxed{C}", 1.0),
    (None, "B", None),
    ("yes", "B", None),
]
EXACT = [
    ("Paris", ' "Paris." ', 1.0),
    ("Paris", "It is Paris", 0.0),
    ("colour|color", "**Color**", 1.0),
    ("-4", "4", 0.0),
    ("don't", "don\u2019t", 1.0),
    ("Paris", "", 0.0),
    (None, "x", None),
]
SCORERS = {"contains_answer": contains_answer, "numeric": numeric, "multiple_choice": multiple_choice, "exact": exact}


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "score"),
    [
        (kind, *case)
        for kind, cases in (("contains_answer", CONTAINS), ("numeric", NUMERIC), ("multiple_choice", CHOICES), ("exact", EXACT))
        for case in cases
    ],
)
def test_golden_verdicts(kind: str, reference: str | None, answer: str, score: float | None) -> None:
    (value,) = score_answers(kind, [{"reference": reference, "answer": answer}])
    assert value.score == score, value.detail
    assert value.detail


def test_regex_matches_or_compares_a_group() -> None:
    assert regex(None, "x = 42", pattern=r"\d+").score == 1.0
    assert regex(None, "x", pattern=r"\d+").score == 0.0
    assert regex("Paris", "Answer: Rome\nAnswer: paris", pattern=r"^Answer: (.*)$", group=1, ignore_case=True).score == 1.0
    assert regex("Paris", "none", pattern=r"^Answer: (.*)$", group=1).score is None


def test_numeric_picks_the_number_it_is_told() -> None:
    assert [numeric("3", "3, then 4", pick=pick).score for pick in ("first", "last", "any")] == [1.0, 0.0, 1.0]
    assert numeric("100", "101", relative_tolerance=0.02).score == 1.0


TEXT = st.text(max_size=80) | st.text(alphabet="0123456789.,/%^-+eE$ \\{}frac#½", max_size=80)


@pytest.mark.parametrize("kind", SCORERS)
@given(reference=st.none() | TEXT, answer=TEXT)
def test_scorers_are_total_and_stay_in_range(kind: str, reference: str | None, answer: str) -> None:
    value = SCORERS[kind](reference, answer)
    assert value.score is None or 0.0 <= value.score <= 1.0
    assert reference is not None or value.score is None


@pytest.mark.parametrize("kind", SCORERS)
@pytest.mark.parametrize("unit", ["1", "1,", "1/", "(A", "\\boxed{", "$ ", "answer is ", "1 ", "10^"])
def test_no_text_takes_long(kind: str, unit: str) -> None:
    started = time.process_time()
    SCORERS[kind]("1", unit * 20_000)
    assert time.process_time() - started < 10
