"""Arrival times of an open-loop client, as ``vllm bench serve`` makes them.

The gap before request ``i`` is Gamma(shape ``g``, scale ``1/(r_i g)``): mean ``1/r_i`` and coefficient of
variation ``1/sqrt(g)``. ``g = 1`` is a Poisson process, ``g = inf`` is evenly spaced. The first request waits
its gap too. Each gap is a unit gap over its rate, so one seed at two rates gives the same picture at two
speeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate, cycle
from random import Random
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class OnOff(BaseModel):
    """Two rates that take turns, each for an exponential time: a Markov-modulated process. The mean over both
    is ``request_rate``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    on_s: float = Field(gt=0, allow_inf_nan=False, description="Mean length of a busy time, seconds.")
    off_s: float = Field(gt=0, allow_inf_nan=False, description="Mean length of a quiet time, seconds.")
    quiet: float = Field(
        default=0.0, ge=0, lt=1, description="Rate of the quiet times over that of the busy ones."
    )

    def busy_rate(self, mean: float) -> float:
        """Rate of the busy times, requests/s."""
        return mean * (self.on_s + self.off_s) / (self.on_s + self.quiet * self.off_s)


class Window(BaseModel):
    """A stretch of time with a rate and a burstiness of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    duration_s: float = Field(gt=0, allow_inf_nan=False, description="Its length, seconds.")
    rate: float = Field(ge=0, allow_inf_nan=False, description="Requests per second; 0: none.")
    burstiness: float = Field(
        default=1.0, ge=1e-3, description="Shape of gaps that begin in it, as of the workload."
    )


class Windows(BaseModel):
    """Windows one after the other, again and again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    windows: tuple[Window, ...] = Field(min_length=1, description="In order.")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not any(one.rate for one in self.windows):
            raise ValueError("no request would ever come: let a window have a rate above 0")
        return self


Gap = Callable[[], float]
"""Draws a gap of mean 1."""
Process = Literal["poisson", "gamma", "weibull", "constant"]


def unit_gap(process: Process, shape: float, rng: Random) -> Gap:
    """Gaps of mean 1: Gamma or Weibull with a shape, exponential, or all equal."""
    if process == "constant" or math.isinf(shape):
        return lambda: 1.0
    if process == "weibull":
        draw, scale = rng.weibullvariate, 1.0 / math.gamma(1.0 + 1.0 / shape)
        return lambda: draw(scale, shape)
    gamma, scale = rng.gammavariate, 1.0 / shape
    return lambda: gamma(shape, scale)


def arrival_times_ns(
    n: int,
    rng: Random,
    *,
    rate: float | RampUp | Windows,
    burstiness: float,
    normalize: bool,
    process: Process = "gamma",
    on_off: OnOff | None = None,
) -> list[int]:
    """Times of ``n`` arrivals, never decreasing.

    Args:
        n: how many, at least 1.
        rng: where the gaps come from.
        rate: requests/s, infinity: all at 0; or how it changes.
        burstiness: shape of the gaps; infinity: no chance at all.
        normalize: rescale so that the last arrival is at exactly ``n / rate``. Without effect where the rate
            changes as stated, on even spacing (already exact), and in the freak case that every gap is 0.
        process: law of the gaps; a shape of 1 is exponential under both.
        on_off: the rate is a mean over busy and quiet times.
    """
    gap = unit_gap(process, burstiness, rng)
    if isinstance(rate, Windows):
        pieces = (
            (one.duration_s, one.rate, unit_gap(process, one.burstiness, rng)) for one in cycle(rate.windows)
        )
        return [round(t * NS) for t in _through(pieces, n)]
    if isinstance(rate, RampUp):
        return [round(t * NS) for t in accumulate(gap() / r for r in rate.rates(n))]
    if math.isinf(rate):
        return [0] * n
    exact_rate = Fraction(rate)
    if on_off is not None:
        busy = on_off.busy_rate(1.0)
        times = list(_through(_turns(on_off, busy, rate, gap, Random(rng.getrandbits(64))), n))
    elif process == "constant" or math.isinf(burstiness):
        return [round(i * NS / exact_rate) for i in range(1, n + 1)]
    else:
        times = list(accumulate(gap() for _ in range(n)))
    if not normalize or not times[-1]:
        return [round(t / rate * NS) for t in times]
    end_ns = round(n * NS / exact_rate)
    total = times[-1]
    return [round(t / total * end_ns) for t in times[:-1]] + [end_ns]


Piece = tuple[float, float, Gap]
"""A length of time, the rate in it, and gaps of mean 1."""


def _turns(on_off: OnOff, busy: float, rate: float, gap: Gap, rng: Random) -> Iterator[Piece]:
    """Busy and quiet times in units of the mean gap ``1 / rate``."""
    on = rng.random() < on_off.on_s / (on_off.on_s + on_off.off_s)  # as if it had always been running
    while True:
        mean_s = on_off.on_s if on else on_off.off_s
        yield rng.expovariate(1.0 / mean_s) * rate, busy if on else busy * on_off.quiet, gap
        on = not on


def _through(pieces: Iterator[Piece], n: int) -> Iterator[float]:
    """Arrivals where the rate changes: a gap that outlasts its piece goes on at the rate of the next."""
    now, (end, rate, gap) = 0.0, next(pieces)
    for _ in range(n):
        left = gap()
        while left > (room := (end - now) * rate) or not rate:
            left -= room
            now = end
            length, rate, gap = next(pieces)
            end = now + length
        now += left / rate
        yield now
