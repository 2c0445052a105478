"""Intervals for what an evaluation measured: how far a number could move if other documents had been drawn.

All of them are 95 % intervals over documents. A share of right answers gets a Wilson interval; any other mean, and every
comparison of models, a percentile bootstrap over documents. Models are compared **paired**: a resample draws the same
documents for all of them, because a hard document is hard for all. The bootstrap is seeded, so equal answers give equal
intervals. Several tasks are resampled each within itself, and their means are averaged with equal weight.

Decided: gap recovered is unknown (null, with the reason) unless the teacher is above the untrained student with more than
noise: a ratio whose denominator may be zero says nothing. Given up: the spread between training seeds is not in here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL_Z = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""

RESAMPLES = 4000
"""Bootstrap resamples: the ends of a 95 % interval then move by about a twentieth of its width between seeds."""

CHUNK_CELLS = 2_000_000
"""Most (resample, document) cells at once: 16 MB."""

Interval = dict[str, Any]
"""``{"value", "low", "high", "n"}``; ``low`` and ``high`` are None where no interval can be given."""


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, inside [0, 1].

    Source: Wilson 1927, JASA 22:209-212, equation 4.

    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]

    Raises:
        ValueError: n is below 1, or the successes are outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a share needs n >= 1 and 0 <= successes <= n (given: {successes} of {n})")
    share, z2 = successes / n, LEVEL_Z**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = LEVEL_Z / (1 + z2 / n) * float(np.sqrt(share * (1 - share) / n + z2 / (4 * n * n)))
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def mean_interval(scores: Sequence[float], *, seed: int = 0) -> Interval:
    """The mean of documents' scores with its interval: Wilson where all are 0 or 1, bootstrap otherwise.

    One document that is not simply right or wrong has no interval; no document has no value.
    """
    values = np.asarray(scores, dtype=np.float64)
    n = len(values)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    mean = float(values.mean())
    if bool(np.isin(values, (0.0, 1.0)).all()):
        low, high = wilson_interval(float(values.sum()), n)
    elif n == 1:
        return {"value": mean, "low": None, "high": None, "n": 1}
    else:
        low, high = _percentiles(_bootstrap_means([values[:, None]], seed)[:, 0])
    return {"value": mean, "low": low, "high": high, "n": n}


def difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]], *, seed: int = 0) -> Interval:
    """Mean of ``left`` minus mean of ``right`` with a paired bootstrap interval.

    Args:
        left, right: for each task, the scores of the same documents in the same order.
    Raises:
        ValueError: the two sides do not have the same documents.
    """
    tables = _tables(left, right)
    n = sum(len(table) for table in tables)
    if n == 0:
        return {"value": None, "low": None, "high": None, "n": 0}
    value = _point(tables)
    low, high = _ends(_bootstrap_difference(tables, seed), n)
    return {"value": float(value[0] - value[1]), "low": low, "high": high, "n": n}


def gap_recovered(
    student: Sequence[Sequence[float]],
    teacher: Sequence[Sequence[float]],
    untrained: Sequence[Sequence[float]],
    *,
    seed: int = 0,
) -> Interval:
    """(student - untrained) / (teacher - untrained): 0 is no better than before training, 1 is as good as the teacher.

    In the few resamples (under 2.5 %) in which the teacher is not above the untrained student, the denominator counts as
    one document, which widens the interval.

    Args:
        student, teacher, untrained: for each task, the scores of the same documents in the same order; higher is better.
    Returns:
        ``{"value", "low", "high", "n", "reason"}``; all three numbers are None, and ``reason`` says why, where the 95 %
        interval of teacher - untrained is not above zero.
    Raises:
        ValueError: the three do not have the same documents.
    """
    tables = _tables(student, teacher, untrained)
    n = sum(len(table) for table in tables)
    unknown = {"value": None, "low": None, "high": None, "n": n}
    if n < 2:
        return {**unknown, "reason": f"{n} document{'s' * (n != 1)} cannot tell the teacher from the untrained student"}
    means = _bootstrap_means(tables, seed)
    gaps = means[:, 1] - means[:, 2]
    gap_low, gap_high = _percentiles(gaps)
    if gap_low <= 0:
        said = "is below" if gap_high < 0 else "is not above"
        return {**unknown, "reason": f"the teacher {said} the untrained student (difference {gap_low:+.3f} to {gap_high:+.3f})"}
    point = _point(tables)
    low, high = _percentiles((means[:, 0] - means[:, 2]) / np.maximum(gaps, 1.0 / n))
    return {"value": float((point[0] - point[2]) / (point[1] - point[2])), "low": low, "high": high, "n": n, "reason": None}


def above_teacher(student_minus_teacher: Mapping[str, Any]) -> dict[str, bool]:
    """Whether the student scored above its teacher, and whether that is more than noise: both deserve suspicion."""
    value, low = student_minus_teacher["value"], student_minus_teacher["low"]
    return {"flag": value is not None and value > 0, "beyond_noise": low is not None and low > 0}


def _tables(*models: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    """One array (documents, models) a task; tasks without documents are left out."""
    shapes = {tuple(len(task) for task in model) for model in models}
    if len(shapes) != 1:
        raise ValueError(f"models are compared on the same documents; documents a task: {sorted(shapes)}")
    columns = [np.stack([np.asarray(task, dtype=np.float64) for task in tasks], axis=1) for tasks in zip(*models, strict=True)]
    return [table for table in columns if len(table)]


def _point(tables: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    means: NDArray[np.float64] = np.stack([table.mean(axis=0) for table in tables])
    return np.asarray(means.mean(axis=0), dtype=np.float64)


def _bootstrap_means(tables: Sequence[NDArray[np.float64]], seed: int) -> NDArray[np.float64]:
    """Means of each model in each resample, (RESAMPLES, models): documents drawn within their task, for all models alike."""
    total = np.zeros((RESAMPLES, tables[0].shape[1]))
    for index, table in enumerate(tables):
        n = len(table)
        rng = np.random.default_rng([seed, index])
        step = max(1, CHUNK_CELLS // n)
        for start in range(0, RESAMPLES, step):
            size = min(step, RESAMPLES - start)
            counts = rng.multinomial(n, np.full(n, 1.0 / n), size=size)
            total[start : start + size] += counts @ table / n
    return total / len(tables)


def _bootstrap_difference(tables: Sequence[NDArray[np.float64]], seed: int) -> NDArray[np.float64]:
    means = _bootstrap_means(tables, seed)
    return means[:, 0] - means[:, 1]


def _ends(values: NDArray[np.float64], n: int) -> tuple[float | None, float | None]:
    return _percentiles(values) if n > 1 else (None, None)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
