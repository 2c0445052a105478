"""How much is asked of a server at once, and when again: all of it functions of a clock that is given.

Concurrency: additive increase, multiplicative decrease, for each address alone. It doubles a round until the first sign of
too much (429, 503, 529, a deadline), then grows by one a round, and is cut to three quarters at most once a round: only by
requests that were sent after the last cut. Waits are full jitter (Brooker 2015): uniform between zero and a bound that
doubles. A server's own Retry-After goes before both.
"""

import random
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

START_CONCURRENCY = 16
CUT = 0.75
FAILING = 5
"""Failures without a success after which an address gets one request at a time, with waits between them."""


@dataclass
class Endpoint:
    """One base URL: how many requests it may have in flight, and how it is doing. Times are seconds of one clock."""

    url: str
    max_concurrency: int
    backoff_seconds: float
    max_backoff_seconds: float
    chance: random.Random
    last_success: float
    limit: float = 0.0
    in_flight: int = 0
    paused_until: float = 0.0
    failures: int = 0
    limited: int = 0
    has_answered: bool = False
    last_error: str = ""
    _cut_at: float = float("-inf")
    _is_new: bool = True

    def __post_init__(self) -> None:
        self.limit = float(min(START_CONCURRENCY, self.max_concurrency))

    @property
    def is_failing(self) -> bool:
        """Whether its last requests all failed: then it is only tried."""
        return self.failures >= FAILING

    def has_room(self, now: float) -> bool:
        """Whether a request may be sent."""
        room = 1 if self.is_failing else int(self.limit)
        return self.in_flight < room and now >= self.paused_until

    def succeeded(self, now: float) -> None:
        """An answer came."""
        self.last_success, self.has_answered = now, True
        self.failures = self.limited = 0
        step = 1.0 if self._is_new else 1.0 / self.limit
        # A limit that is not used is not tested, and does not grow.
        if self.in_flight + 1 >= int(self.limit):
            self.limit = min(float(self.max_concurrency), self.limit + step)

    def was_limited(self, now: float, sent_at: float, wait_seconds: float | None) -> None:
        """The server asks to be left alone for a while: no failure."""
        self.limited += 1
        self._cut(now, sent_at)
        wait = self._jitter(self.limited) if wait_seconds is None else wait_seconds
        self.paused_until = max(self.paused_until, now + wait)

    def failed(self, now: float, sent_at: float, error: str, *, is_overload: bool, wait_seconds: float | None) -> None:
        """No answer came, or none that can be read."""
        self.failures += 1
        self.last_error = error
        if is_overload:
            self._cut(now, sent_at)
        if wait_seconds is None and self.is_failing:
            wait_seconds = self._jitter(self.failures - FAILING + 1)
        if wait_seconds is not None:
            self.paused_until = max(self.paused_until, now + wait_seconds)

    def is_dead(self, now: float, *, after_failures: int, after_seconds: float) -> bool:
        """Whether to give it up."""
        return self.failures >= after_failures and now - self.last_success >= after_seconds

    def _cut(self, now: float, sent_at: float) -> None:
        if sent_at > self._cut_at:
            self.limit, self._cut_at, self._is_new = max(1.0, self.limit * CUT), now, False

    def _jitter(self, attempt: int) -> float:
        return full_jitter(attempt, self.backoff_seconds, self.max_backoff_seconds, self.chance)


def full_jitter(attempt: int, first: float, most: float, chance: random.Random) -> float:
    """Seconds to wait before the next attempt, after ``attempt`` of them (from 1)."""
    return chance.uniform(0.0, min(most, first * 2.0 ** min(attempt - 1, 32)))


class RateLimit:
    """At most ``per_minute`` in any minute, spent evenly: a bucket of one second's worth, at least one."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._capacity = max(1.0, per_minute / 60)
        self._per_second = max(per_minute - self._capacity, per_minute / 2) / 60
        self._level, self._at = self._capacity, now

    def wait(self, now: float, amount: float) -> float:
        """Seconds until ``amount`` may be taken; more than the bucket holds waits until it is full."""
        return max(0.0, (min(amount, self._capacity) - self._filled(now)) / self._per_second)

    def take(self, now: float, amount: float) -> None:
        """Take what was waited for, or correct what was taken for an estimate (``amount`` may be negative)."""
        self._level, self._at = min(self._capacity, self._filled(now) - amount), now

    def _filled(self, now: float) -> float:
        return min(self._capacity, self._level + (now - self._at) * self._per_second)


def retry_after(header: str | None, wall_clock: float) -> float | None:
    """Seconds that a Retry-After header asks for, given in seconds or as an HTTP date; None where it says neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    date = date.replace(tzinfo=UTC) if date.tzinfo is None else date
    return max(0.0, date.timestamp() - wall_clock)
