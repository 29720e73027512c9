"""Arrival times of an open-loop client, as ``vllm bench serve`` makes them.

The gap before request ``i`` is Gamma(shape ``g``, scale ``1/(r_i g)``): mean ``1/r_i`` and coefficient of
variation ``1/sqrt(g)``. ``g = 1`` is a Poisson process, ``g = inf`` is evenly spaced. The first request waits
its gap too. Each gap is a unit gap over its rate, so one seed at two rates gives the same picture at two
speeds.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import accumulate
from random import Random
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

NS = 1_000_000_000
"""Nanoseconds in a second."""

MIN_RATE = 1e-3
"""Slowest rate in requests per second; slower ones are almost certainly a slip of units."""


class RampUp(BaseModel):
    """The rate changes from request to request: ``p`` runs from 0 at the first to 1 at the last."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    strategy: Literal["linear", "exponential"] = Field(
        description="linear: start + (end - start) p; exponential: start (end/start)^p."
    )
    start_rate: float = Field(
        ge=MIN_RATE, allow_inf_nan=False, description="Rate at the first request, requests/s."
    )
    end_rate: float = Field(
        ge=MIN_RATE, allow_inf_nan=False, description="Rate at the last request, requests/s."
    )

    def rates(self, n: int) -> list[float]:
        """Rate in force before each of ``n`` requests, requests/s."""
        a, b, last = self.start_rate, self.end_rate, max(n - 1, 1)
        if self.strategy == "linear":
            return [a + (b - a) * (i / last) for i in range(n)]
        return [a * (b / a) ** (i / last) for i in range(n)]


def arrival_times_ns(
    n: int, rng: Random, *, rate: float | RampUp, burstiness: float, normalize: bool
) -> list[int]:
    """Times of ``n`` arrivals, never decreasing.

    Args:
        n: how many, at least 1.
        rng: where the gaps come from.
        rate: requests/s, infinity: all at 0; or a ramp-up.
        burstiness: shape ``g`` of the gaps; infinity: no chance at all.
        normalize: rescale so that the last arrival is at exactly ``n / rate``. Without effect on a ramp-up,
            on even spacing (already exact), and in the freak case that every gap is 0.
    """
    if isinstance(rate, RampUp):
        gaps = [gap / r for gap, r in zip(_unit_gaps(n, burstiness, rng), rate.rates(n), strict=True)]
        return [round(t * NS) for t in accumulate(gaps)]
    if math.isinf(rate):
        return [0] * n
    exact_rate = Fraction(rate)
    if math.isinf(burstiness):
        return [round(i * NS / exact_rate) for i in range(1, n + 1)]
    times = list(accumulate(_unit_gaps(n, burstiness, rng)))
    if not normalize or not times[-1]:
        return [round(t / rate * NS) for t in times]
    end_ns = round(n * NS / exact_rate)
    total = times[-1]
    return [round(t / total * end_ns) for t in times[:-1]] + [end_ns]


def _unit_gaps(n: int, burstiness: float, rng: Random) -> list[float]:
    """Gaps of mean 1."""
    if math.isinf(burstiness):
        return [1.0] * n
    gamma, scale = rng.gammavariate, 1.0 / burstiness
    return [gamma(burstiness, scale) for _ in range(n)]
