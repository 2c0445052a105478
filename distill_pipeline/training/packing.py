"""Which sequences stand in one row: rows of a limited length, as full as can be, so that nothing has to be padded.

Decided: best fit by falling length: each sequence goes into the fullest row that still has room for it, found by bisection.
It needs at most 11/9 of the fewest rows and four more, as first fit does, and n log n steps, where first fit looks at every
row that is open. Source: Johnson et al. 1974, Worst-case performance bounds for simple one-dimensional packing algorithms.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence


def fill_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Numbers of the sequences in each row; a row has at most ``max_tokens`` tokens, or one sequence that is longer alone."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []
    """(room, number) of all rows, by room."""
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        place = bisect_left(open_rows, (lengths[index], 0))
        room, number = open_rows.pop(place) if place < len(open_rows) else (max_tokens, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(index)
        insort(open_rows, (room - lengths[index], number))
    return rows
