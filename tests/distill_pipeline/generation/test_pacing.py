"""Laws of pacing: limits hold in every minute, concurrency falls fast and grows slowly, waits are what was asked for."""

import random
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_pipeline.generation.server.pacing import FAILING, Endpoint, RateLimit, full_jitter, retry_after
from distill_pipeline.generation.server.replies import Choice, shared_tokens


def endpoint(max_concurrency: int = 64) -> Endpoint:
    return Endpoint("http://a/v1", max_concurrency, 0.5, 60.0, random.Random(0), last_success=0.0)


def answer(one: Endpoint, now: float) -> None:
    one.in_flight = int(one.limit) - 1
    one.succeeded(now)


@given(per_minute=st.integers(3, 300), idle=st.floats(0.0, 200.0))
def test_in_no_minute_more_is_sent_than_the_limit(per_minute: int, idle: float) -> None:
    limit, now, sent = RateLimit(per_minute, 0.0), idle, list[float]()
    for _ in range(2 * per_minute):
        now += limit.wait(now, 1) + 1e-9
        limit.take(now, 1)
        sent.append(now)
    for start in sent:
        assert sum(start <= time < start + 60 for time in sent) <= per_minute


def test_tokens_that_were_not_used_are_given_back() -> None:
    limit = RateLimit(6000, 0.0)
    limit.take(0.0, 100)
    assert limit.wait(0.0, 50) > 0.4
    limit.take(0.0, -80)
    assert limit.wait(0.0, 50) == 0.0


def test_concurrency_doubles_until_the_first_429_then_grows_by_one_a_round() -> None:
    one = endpoint()
    for _ in range(16):
        answer(one, 1.0)
    assert one.limit == 32
    one.was_limited(2.0, 1.5, 0.0)
    assert one.limit == 24
    one.was_limited(2.1, 1.9, 0.0)
    assert one.limit == 24, "a request sent before the cut says nothing of it"
    for _ in range(24):
        answer(one, 3.0)
    assert 24.9 < one.limit < 25.1


def test_concurrency_that_is_not_used_does_not_grow() -> None:
    one = endpoint()
    one.in_flight = 3
    one.succeeded(1.0)
    assert one.limit == 16


def test_a_429_pauses_for_as_long_as_it_says_and_is_no_failure() -> None:
    one = endpoint()
    one.was_limited(10.0, 9.0, 7.0)
    assert not one.has_room(16.9)
    assert one.has_room(17.0)
    assert one.failures == 0
    assert not one.is_dead(1e9, after_failures=1, after_seconds=0.0)


def test_an_address_that_fails_gets_one_request_at_a_time_and_is_dead_after_both_limits() -> None:
    one = endpoint()
    for _ in range(FAILING):
        one.failed(100.0, 99.0, "down", is_overload=False, wait_seconds=0.0)
    assert one.has_room(100.0)
    one.in_flight = 1
    assert not one.has_room(1000.0)
    assert one.is_dead(100.0, after_failures=FAILING, after_seconds=100.0)
    assert not one.is_dead(99.9, after_failures=FAILING, after_seconds=100.0)
    assert not one.is_dead(1000.0, after_failures=FAILING + 1, after_seconds=100.0)
    one.succeeded(101.0)
    assert not one.is_failing


@given(attempt=st.integers(1, 500), seed=st.integers())
def test_waits_lie_between_zero_and_a_bound_that_doubles(attempt: int, seed: int) -> None:
    assert 0.0 <= full_jitter(attempt, 0.5, 60.0, random.Random(seed)) <= min(60.0, 0.5 * 2.0 ** (attempt - 1))


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0), ("0.5", 0.5), ("-3", 0.0), (None, None), ("soon", None), (formatdate(1000.0 + 42, usegmt=True), 42.0),
        (formatdate(900.0, usegmt=True), 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_read_as_seconds_and_as_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, 1000.0) == seconds


@given(texts=st.lists(st.tuples(st.text(max_size=30), st.booleans()), min_size=1, max_size=8), total=st.integers(0, 500))
def test_shared_tokens_add_up_to_what_the_server_reports(texts: list[tuple[str, bool]], total: int) -> None:
    assert sum(shared_tokens([Choice(text, is_cut) for text, is_cut in texts], total, 32)) == total


def test_a_choice_that_was_cut_has_max_tokens_and_the_others_share_the_rest() -> None:
    choices = [Choice("x" * 90, True), Choice("yes", False), Choice("yes", False)]
    assert shared_tokens(choices, 40, 32) == [32, 4, 4]
