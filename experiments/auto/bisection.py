"""Bisection over sizes for the smallest student that keeps a share of the teacher's score."""

from collections.abc import Sequence
from math import sqrt
from typing import NamedTuple

FIRST, GROWTH = 4.0, 2.0
"""Ratio of the first student, and the factor to the next one as long as all keep the quality."""
NEAR = 1.2
"""The search ends when the smallest student that keeps the quality is within this factor of one that does not."""


class Tried(NamedTuple):
    """A student of the search.

    Attributes:
        ratio: how many times fewer parameters than the teacher it has.
        params: its parameters.
        score: its exact match on the held-out records.
        seconds: duration of its run.
        kept: whether it keeps the quality.
    """

    ratio: float
    params: int
    score: float
    seconds: float
    kept: bool


def smallest_kept(tries: Sequence[Tried]) -> int:
    """Returns the number of the smallest student that keeps the quality, from 1; 0 if none does."""
    kept = [number for number, one in enumerate(tries, 1) if one.kept]
    return max(kept, key=lambda number: tries[number - 1].ratio, default=0)


def between(tries: Sequence[Tried]) -> tuple[float, float]:
    """Returns the ratio of the smallest student that keeps the quality, or 1, and the next that does not, or 0."""
    kept = max((one.ratio for one in tries if one.kept), default=1.0)
    return kept, min((one.ratio for one in tries if not one.kept and one.ratio > kept), default=0.0)


def next_ratio(tries: Sequence[Tried], largest: float) -> float:
    """Returns the ratio of the next student; 0 if the search is over.

    Ratios double until a student does not keep the quality, and are then geometric means of the nearest two.

    Args:
        tries: students so far.
        largest: ratio of the smallest legal model.
    """
    kept, lost = between(tries)
    if not tries:
        return min(FIRST, sqrt(largest))
    ratio = sqrt(kept * lost) if lost else min(GROWTH * kept, largest)
    return ratio if (lost or ratio) > NEAR * kept else 0.0
