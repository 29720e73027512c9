"""The future peak M*: the most KV tokens a batch will ever hold, if its output lengths are known."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable


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
        self._sorted = sorted((-b, a) for a, b in demands)

    def add(self, a: int, b: int) -> None:
        """One more request. O(n)."""
        insort(self._sorted, (-b, a))

    def peak(self) -> int:
        """M*, 0 without requests. O(n)."""
        held = top = 0
        for alive, (minus_b, a) in enumerate(self._sorted, 1):
            held += a
            demand = held - alive * minus_b
            if demand > top:
                top = demand
        return top
