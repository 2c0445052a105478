"""Laws of the intervals."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_pipeline.evaluation.statistics import above_teacher, difference, gap_recovered, mean_interval, wilson_interval

scores = st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=60)


def _answers(right: int, n: int) -> list[float]:
    return [1.0] * right + [0.0] * (n - right)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [(8, 10, 0.490162, 0.943318), (0, 10, 0.0, 0.277533), (10, 10, 0.722467, 1.0), (81, 263, 0.255265, 0.366165)],
)
def test_wilson_interval_equals_published_values(right: int, n: int, low: float, high: float) -> None:
    """Values of Newcombe 1998, Statistics in Medicine 17:857-872, table I (81 of 263), and of R's binom::binom.confint."""
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=6e-5)


@given(n=st.integers(1, 500), share=st.floats(0, 1))
def test_wilson_interval_holds_the_share_and_stays_in_the_unit_interval(n: int, share: float) -> None:
    right = round(share * n)
    low, high = wilson_interval(right, n)
    assert 0.0 <= low <= right / n <= high <= 1.0


def test_wilson_interval_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="3 of 2"):
        wilson_interval(3, 2)


def test_mean_of_no_document_is_unknown_and_of_one_graded_document_has_no_interval() -> None:
    assert mean_interval([]) == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_interval([0.5]) == {"value": 0.5, "low": None, "high": None, "n": 1}


def test_bootstrap_interval_of_a_mean_agrees_with_the_normal_one() -> None:
    values = np.random.default_rng(7).normal(3.0, 2.0, size=2000)
    found = mean_interval(values.tolist())
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert found["low"] == pytest.approx(values.mean() - half, abs=0.01)
    assert found["high"] == pytest.approx(values.mean() + half, abs=0.01)


def test_difference_is_paired_so_that_equal_mistakes_cancel() -> None:
    """Two models that differ in 5 of 100 documents: the unpaired interval would be over +-0.13 wide."""
    left, right = _answers(55, 100), _answers(50, 100)
    found = difference([left], [right])
    assert found["value"] == pytest.approx(0.05)
    assert 0.0 < found["low"] < found["high"] < 0.11


@settings(max_examples=25, deadline=None)
@given(left=scores, data=st.data())
def test_difference_is_antisymmetric(left: list[float], data: st.DataObject) -> None:
    right = data.draw(st.lists(st.sampled_from([0.0, 1.0]), min_size=len(left), max_size=len(left)))
    forth, back = difference([left], [right]), difference([right], [left])
    assert forth["value"] == pytest.approx(-back["value"])
    assert forth["low"] == pytest.approx(-back["high"])


def test_gap_recovered_is_one_at_the_teacher_and_zero_at_the_untrained_student() -> None:
    teacher, untrained = _answers(60, 100), _answers(5, 100)
    at_teacher = gap_recovered([teacher], [teacher], [untrained])
    at_start = gap_recovered([untrained], [teacher], [untrained])
    assert (at_teacher["value"], at_teacher["low"], at_teacher["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert (at_start["value"], at_start["low"], at_start["high"]) == (0.0, 0.0, 0.0)


def test_gap_recovered_of_a_known_case_has_the_delta_method_interval() -> None:
    rng = np.random.default_rng(3)
    teacher, student, untrained = (list((rng.random(4000) < p).astype(float)) for p in (0.6, 0.5, 0.1))
    found = gap_recovered([student], [teacher], [untrained])
    s, t, u = (np.asarray(x) for x in (student, teacher, untrained))
    ratio = (s.mean() - u.mean()) / (t.mean() - u.mean())
    influence = ((s - u) - ratio * (t - u)) / (t.mean() - u.mean())
    half = 1.96 * influence.std(ddof=1) / math.sqrt(len(s))
    assert found["value"] == pytest.approx(ratio)
    assert (found["low"], found["high"]) == pytest.approx((ratio - half, ratio + half), abs=0.006)


def test_gap_recovered_is_unknown_when_the_teacher_is_not_above_the_untrained_student() -> None:
    same = _answers(30, 60)
    found = gap_recovered([same], [same], [same])
    assert (found["value"], found["low"], found["high"]) == (None, None, None)
    assert "the teacher is not above the untrained student" in found["reason"]
    assert "is below" in gap_recovered([same], [_answers(10, 60)], [_answers(50, 60)])["reason"]


def test_gap_recovered_of_one_document_is_unknown() -> None:
    assert gap_recovered([[1.0]], [[1.0]], [[0.0]])["value"] is None


@settings(max_examples=30, deadline=None)
@given(student=scores, data=st.data())
def test_gap_recovered_always_gives_ordered_finite_numbers_or_a_reason(student: list[float], data: st.DataObject) -> None:
    same_length = st.lists(st.sampled_from([0.0, 1.0]), min_size=len(student), max_size=len(student))
    teacher, untrained = data.draw(same_length), data.draw(same_length)
    found = gap_recovered([student], [teacher], [untrained])
    if found["value"] is None:
        assert found["reason"]
    else:
        assert all(math.isfinite(found[key]) for key in ("value", "low", "high"))
        assert found["low"] <= found["high"]


def test_intervals_are_the_same_in_every_run() -> None:
    left, right = _answers(30, 70), _answers(20, 70)
    assert difference([left], [right]) == difference([left], [right])


def test_tasks_are_weighted_equally_whatever_their_size() -> None:
    found = difference([_answers(10, 10), _answers(0, 1000)], [_answers(0, 10), _answers(0, 1000)])
    assert found["value"] == pytest.approx(0.5)


def test_models_with_other_documents_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="same documents"):
        difference([[1.0, 0.0]], [[1.0]])


def test_student_above_its_teacher_is_flagged() -> None:
    assert above_teacher(difference([_answers(9, 10)], [_answers(2, 10)])) == {"flag": True, "beyond_noise": True}
    assert above_teacher(difference([_answers(6, 10)], [_answers(5, 10)])) == {"flag": True, "beyond_noise": False}
    assert above_teacher(difference([_answers(5, 10)], [_answers(5, 10)])) == {"flag": False, "beyond_noise": False}
