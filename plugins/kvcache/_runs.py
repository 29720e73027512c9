"""Free memory as runs of adjacent pages, handed out run by run."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal, Self

Placement = Literal["first_fit", "best_fit", "buddy"]


class Runs:
    """Free pages ``0..pages-1`` as maximal runs ``(start, length)``, ascending. O(runs) per operation."""

    def __init__(self, pages: int, placement: Placement) -> None:
        self._runs = [(0, pages)] if pages else []
        self._placement = placement

    def copy(self) -> Self:
        """A scratch copy."""
        other = type(self)(0, self._placement)
        other._runs = list(self._runs)
        return other

    def take(self, n: int) -> range | None:
        """``n`` adjacent pages; None if no run has room for them."""
        found = [(length, start, i) for i, (start, length) in enumerate(self._runs) if self._fits(i, n)]
        if not found:
            return None
        _, _, i = min(found) if self._placement == "best_fit" else found[0]
        start, length = self._runs[i]
        at = self._at(start, n)
        left = [(start, at - start), (at + n, start + length - at - n)]
        self._runs[i : i + 1] = [run for run in left if run[1]]
        return range(at, at + n)

    def take_any(self, n: int) -> list[int]:
        """``n`` pages from wherever, the last first."""
        pages: list[int] = []
        while len(pages) < n:
            start, length = self._runs.pop()
            some = min(length, n - len(pages))
            pages += range(start + length - some, start + length)
            if some < length:
                self._runs.append((start, length - some))
        return pages

    def give_back(self, pages: Iterable[int]) -> None:
        """Free again; joined with the free pages beside them."""
        for start, end in _adjacent(pages):
            i = bisect_left(self._runs, (start, 0))
            first, last = i, i
            if i and sum(self._runs[i - 1]) == start:
                first, start = i - 1, self._runs[i - 1][0]
            if i < len(self._runs) and self._runs[i][0] == end:
                last, end = i + 1, sum(self._runs[i])
            self._runs[first:last] = [(start, end - start)]

    def unusable(self, n: int) -> int:
        """Free pages that are left over when as many ranges of ``n`` as fit are placed."""
        return sum(
            length - max(0, start + length - self._at(start, n)) // n * n for start, length in self._runs
        )

    def _at(self, start: int, n: int) -> int:
        """Where in a run ``n`` pages go: a buddy at a multiple of its size, which is a power of two."""
        return -(-start // n) * n if self._placement == "buddy" else start

    def _fits(self, i: int, n: int) -> bool:
        start, length = self._runs[i]
        return self._at(start, n) + n <= start + length


def _adjacent(pages: Iterable[int]) -> Iterable[tuple[int, int]]:
    """Ranges ``(start, end)`` of adjacent pages."""
    start = end = -1
    for page in sorted(pages):
        if page != end:
            if end >= 0:
                yield start, end
            start = page
        end = page + 1
    if end >= 0:
        yield start, end
