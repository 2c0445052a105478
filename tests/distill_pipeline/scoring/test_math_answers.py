"""Mathematics: the answer is where the text states it, a right number elsewhere does not count, and nothing hangs."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.scoring import score_answers
from distill_pipeline.scoring.expressions import final_answer, standard_form
from distill_pipeline.scoring.math_answers import math, require_math_verify

require_math_verify()


@settings(deadline=None)
@given(
    number=st.integers(-(10**30), 10**30),
    digit=st.integers(0, 9),
    form=st.sampled_from(["\\boxed{%s}", "The answer is %s.", "#### %s", "%s"]),
)
def test_a_digit_appended_to_the_right_number_is_never_right(number: int, digit: int, form: str) -> None:
    assert math(str(number), form % number).score == 1.0
    if number:
        assert math(str(number), form % f"{number}{digit}").score == 0.0


@settings(deadline=None)
@given(
    reference=st.none() | st.text(max_size=40), answer=st.text(alphabet="0123456789.,/%^-+ \\{}()[]$frac#x=½π√", max_size=30)
)
def test_finding_the_answer_never_raises(reference: str | None, answer: str) -> None:
    final_answer(answer)
    standard_form(answer)
    standard_form(reference or "")


@pytest.mark.parametrize(
    "answer",
    [
        "Of 12 apples she keeps 7.\n\nThe answer is 7.", "\\boxed{12} at first; the answer is 7.",
        "12 is too many.\n\\boxed{7}",
        "The answer is 12. Wait, it is 7.", "12, 7", "\\boxed{}", "#### 12\nNo: 7",
    ],
)  # fmt: skip
def test_the_right_number_in_the_wrong_place_is_not_right(answer: str) -> None:
    assert math("12", answer).score != 1.0


def test_long_texts_are_read_at_their_end_and_fast() -> None:
    started = time.process_time()
    filler = "Consider 12 again, with $x = 12$. " * 6_000
    assert math("12", filler + "\\boxed{12}").score == 1.0
    assert math("12", filler + "So it is \\boxed{13}.").score == 0.0
    for unit in ("\\boxed{", "$", "(", "\\frac{", "answer is ", "1 ", "####", "12,"):
        assert math("12", unit * (200_000 // len(unit))).score != 1.0
    assert time.process_time() - started < 10


def test_an_expression_that_hangs_is_unknown_and_its_neighbours_are_judged() -> None:
    hanging = [
        "9**9**9**9",
        "\\boxed{9^{9^{9^9}}}",
        "\\boxed{((9!)!)!}",
        "\\boxed{\\sum_{n=1}^{99999999} \\sin(n)^{\\sqrt{n}}}",
    ]
    rows = [{"reference": "9", "answer": answer} for answer in [*hanging, "\\boxed{\\sqrt{81}}"]]
    started = time.monotonic()
    *lost, kept = score_answers("math", rows, timeout_seconds=3)
    assert time.monotonic() - started < 60
    assert all(value.score != 1.0 for value in lost)
    assert kept.score == 1.0


def test_what_cannot_be_read_is_unknown_and_never_wrong() -> None:
    for reference, answer in [
        ("see the figure 3", "7"),
        ("7", "no idea"),
        ("7", "\\boxed{7"),
        ("7", "\\boxed{?}"),
        ("", "7"),
        (None, "7"),
    ]:
        assert math(reference, answer).score is None


def test_numbers_are_compared_exactly() -> None:
    assert math("10000000", "10000001").score == 0.0
    assert math("0.0000001", "0").score == 0.0
    assert math("2^{100}", "\\boxed{2^{100}+1}").score == 0.0
    assert math("\\frac{1}{3}", "0.333333").score == 1.0
    assert math("\\frac{1}{3}", "0.33333313").score == 0.0
    assert math("5 cm", "5 m").score == 0.0
