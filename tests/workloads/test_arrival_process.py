"""Arrival times: exact where the definition is exact, statistical where it is chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from servelab.plugins.workloads._arrivals import NS, RampUp, arrival_times_ns
from servelab.plugins.workloads._describe import cv

MANY = 100_000


def times(
    n: int,
    *,
    rate: float | RampUp = 8.0,
    burstiness: float = 1.0,
    normalize: bool = True,
    seed: int = 1,
) -> list[int]:
    return arrival_times_ns(n, Random(seed), rate=rate, burstiness=burstiness, normalize=normalize)


def gaps(t: Sequence[int]) -> list[int]:
    """With the first, which is waited for too."""
    return [after - before for before, after in pairwise([0, *t])]


@pytest.mark.parametrize("rate", [0.1, 1 / 3, 2.57, 8.0, 1000.0])
@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0, math.inf])
@pytest.mark.parametrize("n", [1, 2, 64, 1001])
def test_normalised_arrivals_end_at_exactly_n_over_rate(n: int, rate: float, burstiness: float) -> None:
    assert times(n, rate=rate, burstiness=burstiness)[-1] == round(n * NS / Fraction(rate))


def test_normalising_is_one_common_factor() -> None:
    raw, scaled = times(1000, normalize=False), times(1000)
    factor = scaled[-1] / raw[-1]
    assert factor != 1
    assert scaled == pytest.approx([t * factor for t in raw], abs=2)


@pytest.mark.parametrize("normalize", [True, False])
def test_infinite_burstiness_is_even_spacing_from_the_first_gap_on(normalize: bool) -> None:
    assert times(5, rate=4.0, burstiness=math.inf, normalize=normalize) == [NS // 4 * i for i in range(1, 6)]
    thirds = times(30_000, rate=3.0, burstiness=math.inf, normalize=normalize)
    assert set(gaps(thirds)) == {NS // 3, NS // 3 + 1}
    assert thirds[2::3] == [NS * i for i in range(1, 10_001)]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, math.inf])
def test_infinite_rate_is_everything_at_once(burstiness: float) -> None:
    assert times(10, rate=math.inf, burstiness=burstiness) == [0] * 10


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_rate_and_variation_of_many_gaps(burstiness: float) -> None:
    t = times(MANY, rate=50.0, burstiness=burstiness, normalize=False)
    expected_cv = 1 / math.sqrt(burstiness)
    sigma = expected_cv / math.sqrt(MANY)
    assert t[-1] / NS * 50.0 / MANY == pytest.approx(1, abs=3 * sigma)
    assert cv(gaps(t)) == pytest.approx(expected_cv, rel=0.03)


def exponential_cdf(x: float) -> float:
    return 1 - math.exp(-x)


def erlang4_cdf(x: float) -> float:
    """Gamma of shape 4 and mean 1."""
    return 1 - math.exp(-4 * x) * sum((4 * x) ** k / math.factorial(k) for k in range(4))


@pytest.mark.parametrize(("burstiness", "cdf"), [(1.0, exponential_cdf), (4.0, erlang4_cdf)])
def test_gaps_follow_the_gamma_law(burstiness: float, cdf: Callable[[float], float]) -> None:
    """Kolmogorov-Smirnov distance below its 1 % critical value."""
    values = sorted(g / NS for g in gaps(times(MANY, rate=1.0, burstiness=burstiness, normalize=False)))
    distance = max(max(abs(cdf(x) - i / MANY), abs(cdf(x) - (i + 1) / MANY)) for i, x in enumerate(values))
    assert distance < 1.63 / math.sqrt(MANY)


def test_gaps_are_uncorrelated() -> None:
    g = gaps(times(MANY, rate=1.0, normalize=False))
    mean = sum(g) / MANY
    variance = sum((x - mean) ** 2 for x in g)
    covariance = sum((a - mean) * (b - mean) for a, b in pairwise(g))
    assert abs(covariance / variance) < 3 / math.sqrt(MANY)


def test_a_rate_is_a_time_scale() -> None:
    slow, fast = times(100, rate=2.0, normalize=False), times(100, rate=8.0, normalize=False)
    assert [4 * t for t in fast] == pytest.approx(slow, abs=4)


@pytest.mark.parametrize(
    ("strategy", "rates"), [("linear", [2.0, 4.0, 6.0, 8.0]), ("exponential", [2.0, 3.1748, 5.0397, 8.0])]
)
def test_ramp_up_rates(strategy: str, rates: list[float]) -> None:
    ramp = RampUp.model_validate({"strategy": strategy, "start_rate": 2, "end_rate": 8})
    assert ramp.rates(4) == pytest.approx(rates, abs=1e-4)
    assert ramp.rates(1) == [2.0]


@pytest.mark.parametrize("normalize", [True, False])
def test_ramp_up_divides_unit_gaps_by_the_rate_and_is_never_rescaled(normalize: bool) -> None:
    ramp = RampUp(strategy="linear", start_rate=2, end_rate=8)
    even = times(4, rate=ramp, burstiness=math.inf, normalize=normalize)
    assert gaps(even) == pytest.approx([NS / 2, NS / 4, NS / 6, NS / 8], abs=1)
    unit = gaps(times(4, rate=1.0, normalize=False))
    chance = gaps(times(4, rate=ramp, normalize=normalize))
    assert chance == pytest.approx([g / r for g, r in zip(unit, (2, 4, 6, 8), strict=True)], abs=2)


def test_a_flat_ramp_is_the_unscaled_process() -> None:
    ramp = RampUp(strategy="exponential", start_rate=8, end_rate=8)
    assert times(50, rate=ramp) == pytest.approx(times(50, rate=8.0, normalize=False), abs=1)


@pytest.mark.parametrize("rate", [0, -1, math.inf, math.nan])
def test_ramp_rates_must_be_positive_and_finite(rate: float) -> None:
    with pytest.raises(ValidationError):
        RampUp(strategy="linear", start_rate=rate, end_rate=8)


@given(
    n=st.integers(1, 200),
    rate=st.one_of(st.floats(1e-3, 1e5), st.just(math.inf)),
    burstiness=st.one_of(st.floats(1e-3, 1e6), st.just(math.inf)),
    normalize=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_times_never_decrease(n: int, rate: float, burstiness: float, normalize: bool, seed: int) -> None:
    t = times(n, rate=rate, burstiness=burstiness, normalize=normalize, seed=seed)
    assert len(t) == n
    assert all(type(x) is int for x in t)
    assert t == sorted(t) and t[0] >= 0
