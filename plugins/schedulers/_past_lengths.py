"""The past: a sliding window of finished output lengths, and draws from it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Iterable
from random import Random


class PastLengths:
    """The last ``window`` output lengths; at first some copies of ``initial``.

    Args:
        window: lengths remembered.
        initial: the length to begin with.
        rng: the only source of chance.
        copies: of it; None: half of the window, at least one.

    Each draw takes one number of ``rng.random()``. Draws are cut at the request's own output cap.
    """

    def __init__(self, window: int, initial: int, rng: Random, copies: int | None = None) -> None:
        copies = max(1, window // 2) if copies is None else copies
        self._recent = deque([initial] * copies, maxlen=window)
        self._sorted = [initial] * copies
        self._random = rng.random
        self.window = window
        self.seen = 0
        """Lengths recorded so far."""

    def record(self, length: int) -> None:
        """A request has finished with this output length; the oldest entry of a full window goes."""
        if len(self._recent) == self.window:
            del self._sorted[bisect_left(self._sorted, self._recent[0])]
        self._recent.append(length)
        insort(self._sorted, length)
        self.seen += 1

    def draw(self, cap: int) -> int:
        """The output length of a request that has produced nothing: one entry, uniformly."""
        lengths = self._sorted
        return min(lengths[int(self._random() * len(lengths))], cap)

    def draw_longer(self, requests: Iterable[tuple[int, int]], n: int) -> list[list[int]]:
        """``n`` draws each of the output length of requests that have produced some of it.

        Interpolates between neighbours of [produced] + {h > produced} + [cap, if larger than the last].

        Args:
            requests: output tokens produced, and the cap, of each.
            n: draws of each.
        """
        lengths, random, drawn = self._sorted, self._random, []
        size, last, times = len(lengths), lengths[-1], range(n)
        for produced, cap in requests:
            first = bisect_right(lengths, produced)
            longer = size - first
            gaps = longer + (cap > (last if longer else produced))
            own = []
            for _ in times:
                u = random() * gaps
                k = int(u)
                left = lengths[first + k - 1] if k else produced
                right = lengths[first + k] if k < longer else cap
                length = round(left + (right - left) * (u - k))
                own.append(length if length < cap else cap)
            drawn.append(own)
        return drawn

    def describe(self) -> str:
        """How much of the window is history, for the plan log."""
        return f"{min(self.seen, self.window)} of {self.window} lengths known"
