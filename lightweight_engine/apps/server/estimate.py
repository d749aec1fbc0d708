"""How long jobs will take, told from those that were done."""

from __future__ import annotations

from collections import deque
from itertools import combinations
from statistics import median_low

_REMEMBERED = 9  # jobs, so that a service that has become quicker or slower is known as that after five
_FIRST_GUESS = 0.5  # seconds for a megapixel-step, until jobs of several sizes were seen
_APART = 1.5  # how many times the work of one job has to be that of another, for what both say of size to be no chance


class Pace:
    """A time that every job takes, and one for each megapixel-step: small jobs say nothing of large ones otherwise.

    Both are medians over the last jobs, so that one that waited for a model to be loaded does not count. The lower of
    two is taken, as what is out of the common is slow.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)
        self._each, self._step = 0.0, _FIRST_GUESS

    def saw(self, cost: float, seconds: float) -> None:
        """A job of that many megapixel-steps is done."""
        self._seen.append((max(cost, 1e-6), seconds))
        ratios = [took / work for work, took in self._seen]
        self._step = _slope(sorted(self._seen)) or min(self._step, *ratios)
        if (each := self._rest()) < 0:  # the line says that no work takes less than no time
            self._step, each = median_low(ratios), 0.0
        self._each = each

    def seconds(self, cost: float) -> float:
        """What a job will take, roughly."""
        return self._each + cost * self._step

    def _rest(self) -> float:
        """Of most jobs, what their work does not explain."""
        return median_low([took - work * self._step for work, took in self._seen])


def _slope(seen: list[tuple[float, float]]) -> float | None:
    """Seconds for each megapixel-step: the median over pairs of jobs, of which those count most that differ most.

    Args:
        seen: (megapixel-steps, seconds) of jobs, in that order.

    Returns:
        None where no larger job took longer than a much smaller one.
    """
    pairs = [
        ((slower - took) / (more - work), more - work)
        for (work, took), (more, slower) in combinations(seen, 2)
        if more >= _APART * work and slower > took
    ]
    half = sum(weight for _, weight in pairs) / 2
    for slope, weight in sorted(pairs):
        half -= weight
        if half <= 0:
            return slope
    return None
