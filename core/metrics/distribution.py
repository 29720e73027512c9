"""Statistics over many samples of which few are distinct."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import accumulate

from servelab.core.metrics.definitions import interpolate, linear_position


class Distribution:
    """Samples as sorted distinct values and how often each occurs.

    Requests of one batch share their step times, so millions of gaps between tokens have few distinct
    values: counting them is far cheaper than sorting them, and the statistics are the same.

    Args:
        counts: value -> how often it occurred, at least once each.
    """

    __slots__ = ("_upto", "count", "counts", "values")

    def __init__(self, counts: Mapping[float, int]) -> None:
        self.values: list[float] = sorted(counts)
        self.counts: list[int] = [counts[value] for value in self.values]
        self._upto: list[int] = list(accumulate(self.counts))
        self.count: int = self._upto[-1] if self._upto else 0

    @classmethod
    def of(cls, samples: Iterable[float]) -> Distribution:
        """Count plain samples."""
        return cls(Counter(samples))

    def _at(self, index: int) -> float:
        """The sample at ``index`` of all samples in sorted order."""
        return self.values[bisect_right(self._upto, index)]

    def mean(self) -> float | None:
        """Arithmetic mean; None without samples."""
        if not self.count:
            return None
        return math.fsum(v * c for v, c in zip(self.values, self.counts, strict=True)) / self.count

    def std(self) -> float | None:
        """Population standard deviation (``numpy.std``); None without samples."""
        mean = self.mean()
        if mean is None:
            return None
        total = math.fsum((v - mean) ** 2 * c for v, c in zip(self.values, self.counts, strict=True))
        return math.sqrt(total / self.count)

    def percentile(self, q: float) -> float | None:
        """``numpy.percentile`` with linear interpolation; None without samples."""
        if not self.count:
            return None
        below, fraction = linear_position(q, self.count)
        return interpolate(self._at(below), self._at(min(below + 1, self.count - 1)), fraction)

    def share_at_most(self, bound: float) -> float | None:
        """Share of samples that are ``<= bound``; None without samples."""
        if not self.count:
            return None
        distinct = bisect_right(self.values, bound)
        return (self._upto[distinct - 1] if distinct else 0) / self.count
