"""The future peak M*: the most KV tokens a batch will ever hold, if its output lengths are known."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from operator import itemgetter

_b = itemgetter(1)


class FuturePeak:
    """Requests of one possible future, and the peak of their KV demand.

    Request i holds ``a`` tokens and grows by one a step until its ``b`` remaining output tokens are made.
    Demand peaks just before a completion. With the requests sorted by b, largest first, 1..i are alive when i
    completes, and each has grown by b_i: ``M* = max_i(a_1 + ... + a_i + i * b_i)``.

    Args:
        demands: ``(a, b)`` of each request.
    """

    __slots__ = ("_sorted",)

    def __init__(self, demands: Iterable[tuple[int, int]] = ()) -> None:
        self._sorted = sorted(demands, key=_b)
        """By b, smallest first."""

    def add(self, a: int, b: int) -> None:
        """One more request. O(n)."""
        insort(self._sorted, (a, b), key=_b)

    def peak(self) -> int:
        """M*, 0 without requests. O(n)."""
        held = top = 0
        for alive, (a, b) in enumerate(reversed(self._sorted), 1):
            held += a
            demand = held + alive * b
            if demand > top:
                top = demand
        return top
