"""The formulas, one function each. Times are integer nanoseconds unless a name says otherwise.

Symbols: ``t0`` arrival, ``t1`` time of the first chunk of output, ``tn`` time of the last one, ``N`` output
tokens. A *chunk* is what one step emits for one request: one token, or several with speculation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from operator import sub

NS_PER_S = 1_000_000_000
NS_PER_MS = 1_000_000


def ratio(amount: float, per: float) -> float | None:
    """``amount / per``; None over nothing."""
    return amount / per if per else None


def ttft_ns(t0: int, t1: int) -> int:
    """Time to first token, ``t1 - t0``."""
    return t1 - t0


def e2el_ns(t0: int, tn: int) -> int:
    """End-to-end latency, ``tn - t0``."""
    return tn - t0


def tpot_ns(t1: int, tn: int, n: int) -> float:
    """Time per output token after the first, ``(tn - t1) / (N - 1)``; 0 for ``N <= 1``.

    The 0 counts for goodput; statistics of TPOT leave requests with ``N <= 1`` out.
    """
    return (tn - t1) / (n - 1) if n > 1 else 0.0


def itl_chunk_ns(times: Sequence[int]) -> Iterator[int]:
    """Gaps between the chunks of one request, one per chunk after the first: what vLLM's client sees."""
    return map(sub, islice(times, 1, None), times)


def itl_spread_ns(times: Sequence[int], sizes: Sequence[int]) -> Iterator[float]:
    """The same gaps shared out over the tokens of the chunk that ends them, as SGLang does.

    A gap ``g`` before a chunk of ``k`` tokens gives ``k`` samples of ``g / k``.
    """
    for gap, size in zip(itl_chunk_ns(times), islice(sizes, 1, None), strict=True):
        share = gap / size
        for _ in range(size):
            yield share


def linear_position(q: float, n: int) -> tuple[int, float]:
    """Where the ``q``-th percentile of ``n`` sorted values lies: (index below it, fraction towards the next).

    Raises:
        ValueError: ``q`` outside 0..100, or no values.
    """
    if not 0 <= q <= 100:
        raise ValueError(f"percentile {q} is outside 0..100")
    if n < 1:
        raise ValueError("a percentile needs at least one value")
    position = q / 100 * (n - 1)
    below = min(math.floor(position), n - 1)
    return below, position - below


def interpolate(a: float, b: float, fraction: float) -> float:
    """Linear interpolation in numpy's form, which never leaves ``a..b`` and is exact at both ends."""
    gap = b - a
    return b - gap * (1 - fraction) if fraction >= 0.5 else a + gap * fraction


def peak_concurrency(intervals: Iterable[tuple[int, int]]) -> int:
    """Largest number of ``[start, end)`` intervals that overlap; at one instant departures come first."""
    changes: list[tuple[int, int]] = []
    for start, end in intervals:
        changes.append((start, 1))
        changes.append((end, -1))
    changes.sort()
    level = peak = 0
    for _, change in changes:
        level += change
        peak = max(peak, level)
    return peak


def percentile_name(q: float) -> str:
    """``p99`` for a whole percentile, ``p99.9`` otherwise."""
    return f"p{int(q)}" if q == int(q) else f"p{q}"
