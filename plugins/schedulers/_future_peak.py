"""The future peak M*: the most KV tokens a batch will ever hold, if its output lengths are known."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
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

    __slots__ = ("_demands", "most")

    def __init__(self, demands: Iterable[tuple[int, int]] = ()) -> None:
        self._demands = list(demands)
        self.most = sum(chain.from_iterable(self._demands))
        """Tokens of all requests at their ends. M* is never above it, and it is known at once."""

    def add(self, a: int, b: int) -> None:
        """One more request. O(1)."""
        self._demands.append((a, b))
        self.most += a + b

    def peak(self) -> int:
        """M*, 0 without requests. O(n log n), O(n) soon after the last time."""
        self._demands.sort(key=_b, reverse=True)
        held = top = 0
        for alive, (a, b) in enumerate(self._demands, 1):
            held += a
            demand = held + alive * b
            if demand > top:
                top = demand
        return top
