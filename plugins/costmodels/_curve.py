"""A monotone curve through measured points."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping


class Curve:
    """Straight lines between points; flat before the first; the last slope goes on after the last.

    Measured points that fall are pooled with the ones before them to their mean (isotonic regression), so
    that the curve never falls. Where no point falls it goes through every one.

    Args:
        points: y by x; x at least 1, and at least one point.
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        self.x = sorted(points)
        self.y = _isotonic([points[x] for x in self.x])
        self.pooled = self.y != [points[x] for x in self.x]
        """Some points fell."""

    def __call__(self, x: int) -> float:
        i = bisect_right(self.x, x) - 1
        if i < 0:
            return self.y[0]
        if self.x[i] == x or len(self.x) == 1:
            return self.y[i]
        i = min(i, len(self.x) - 2)
        slope = (self.y[i + 1] - self.y[i]) / (self.x[i + 1] - self.x[i])
        return self.y[i] + slope * (x - self.x[i])


def _isotonic(values: list[float]) -> list[float]:
    """The nearest values that never fall, in the sense of least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # sum and count
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            before = pools.pop()
            total, count = total + before[0], count + before[1]
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]
