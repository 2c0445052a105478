"""Rows are as full as can be, and every sequence is in one of them."""

import random
from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.training.packing import fill_rows

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 60))
def test_each_sequence_is_in_one_row_and_no_row_of_several_is_too_long(lengths: list[int], max_tokens: int) -> None:
    rows = fill_rows(lengths, max_tokens)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= max_tokens for row in rows if len(row) > 1)


@given(lengths=LENGTHS, max_tokens=st.integers(1, 60))
def test_no_two_rows_would_fit_into_one(lengths: list[int], max_tokens: int) -> None:
    used = [sum(lengths[index] for index in row) for row in fill_rows(lengths, max_tokens)]
    assert all(one + other > max_tokens for one, other in combinations(used, 2))


def test_rows_of_ragged_lengths_are_nearly_full() -> None:
    draw = random.Random(0)
    lengths = [draw.randint(10, 60) + round(draw.lognormvariate(3.5, 0.8)) for _ in range(1000)]
    assert max(lengths) > 10 * min(lengths)
    assert len(fill_rows(lengths, 512)) <= 1.01 * sum(lengths) / 512 + 1
    # A step of few prompts, where the last row counts.
    assert len(fill_rows(lengths[:40], 512)) == -(-sum(lengths[:40]) // 512)


def test_a_sequence_goes_where_the_least_room_is_left() -> None:
    assert fill_rows([2, 3, 4, 5, 6], 10) == [[4, 2], [3, 1, 0]]
