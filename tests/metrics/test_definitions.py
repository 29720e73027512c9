"""The formulas against numbers worked out by hand, and against properties."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servelab.core.metrics import Distribution
from servelab.core.metrics import definitions as d

numbers = st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=60)
percents = st.floats(0, 100)


def test_latencies() -> None:
    assert d.ttft_ns(5, 12) == 7
    assert d.e2el_ns(5, 30) == 25
    assert d.tpot_ns(10, 40, 4) == 10
    assert d.tpot_ns(10, 10, 1) == 0
    assert list(d.itl_chunk_ns([3, 5, 9])) == [2, 4]
    assert list(d.itl_chunk_ns([3])) == []


def test_itl_spread_shares_a_gap_over_the_chunk_that_ends_it() -> None:
    # chunks at 0, 12, 20 of 2, 3 and 1 tokens: 12 / 3 three times, then 8 / 1; the first chunk ends no gap
    assert list(d.itl_spread_ns([0, 12, 20], [2, 3, 1])) == [4, 4, 4, 8]


def test_percentiles_known_to_numpy() -> None:
    # numpy.percentile([15, 20, 35, 40, 50], 40) == 29.0; ([1, 1, 1, 5], 99.9) == 4.988
    assert Distribution.of([15, 20, 35, 40, 50]).percentile(40) == pytest.approx(29.0)
    assert Distribution.of([1, 1, 1, 5]).percentile(99.9) == pytest.approx(4.988)
    assert Distribution.of([7]).percentile(99) == 7


@pytest.mark.parametrize("q", [-1, 100.1])
def test_percentile_outside_its_range(q: float) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.100"):
        Distribution.of([1]).percentile(q)


def test_percentile_of_nothing() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        d.linear_position(50, 0)
    nothing = Distribution.of([])
    assert nothing.mean() is nothing.std() is nothing.percentile(50) is nothing.share_at_most(1) is None


def test_population_standard_deviation() -> None:
    # mean 5, squares 9+1+1+1+0+0+4+16 = 32, / 8 = 4
    assert Distribution.of([2, 4, 4, 4, 5, 5, 7, 9]).std() == 2


def test_share_at_most_is_inclusive() -> None:
    gaps = Distribution.of([1, 2, 2, 3])
    assert [gaps.share_at_most(x) for x in (0, 1, 2, 2.5, 3)] == [0, 0.25, 0.75, 0.75, 1]


def test_departures_come_before_arrivals() -> None:
    assert d.peak_concurrency([(0, 10), (10, 20)]) == 1
    assert d.peak_concurrency([(0, 10), (9, 20), (10, 11)]) == 2
    assert d.peak_concurrency([]) == 0


def test_percentile_names() -> None:
    assert [d.percentile_name(q) for q in (50, 99.0, 99.9)] == ["p50", "p99", "p99.9"]


@given(numbers, percents, percents)
def test_percentiles_are_monotone_and_within_the_values(values: list[int], p: float, q: float) -> None:
    low, high = sorted((p, q))
    samples = Distribution.of(values)
    a, b = samples.percentile(low), samples.percentile(high)
    assert a is not None and b is not None
    assert min(values) <= a <= b <= max(values)


@given(numbers, percents)
def test_a_distribution_equals_its_plain_samples(values: list[int], q: float) -> None:
    samples = Distribution.of(values)
    assert samples.count == len(values)
    assert samples.percentile(q) == numpy.percentile(values, q)
    mean = samples.mean()
    assert mean is not None and math.isclose(mean, sum(values) / len(values), rel_tol=1e-12, abs_tol=1e-6)
