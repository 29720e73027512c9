"""The future peak M*: the most KV tokens a batch will ever hold, if its output lengths are known."""

from __future__ import annotations

from collections.abc import Iterable


class FuturePeak:
    """Requests of one possible future, and the peak of their KV demand.

    Request i holds ``a`` tokens and grows by one a step until its ``b`` remaining output tokens are made.
    Demand peaks just before a completion. With the requests sorted by b, largest first, 1..i are alive when i
    completes, and each has grown by b_i: ``M* = max_i(a_1 + ... + a_i + i * b_i)``.

    Args:
        held: ``a`` of each request.
        remaining: ``b`` of each.
    """

    __slots__ = ("_held", "_remaining", "most")

    def __init__(self, held: Iterable[int] = (), remaining: Iterable[int] = ()) -> None:
        self._held, self._remaining = list(held), list(remaining)
        self.most = sum(self._held) + sum(self._remaining)
        """Tokens of all requests at their ends. M* is never above it, and it is known at once."""

    def add(self, a: int, b: int) -> None:
        """One more request. O(1)."""
        self._held.append(a)
        self._remaining.append(b)
        self.most += a + b

    def peak(self) -> int:
        """M*, 0 without requests. O(n log n)."""
        held = top = 0
        demands = sorted(zip(self._remaining, self._held, strict=True), reverse=True)
        for alive, (b, a) in enumerate(demands, 1):
            held += a
            demand = held + alive * b
            if demand > top:
                top = demand
        return top
