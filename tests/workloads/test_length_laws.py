"""Length laws: bounds, closed forms, published numbers, refusals."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from servelab.plugins.workloads._laws import LengthLaw, LogNormal, Mixture, chooser

ADAPTER: TypeAdapter[Any] = TypeAdapter(LengthLaw)
GRID = 20_000
BELOW_ONE = math.nextafter(1.0, 0.0)


def law(value: object) -> Any:
    return ADAPTER.validate_python(value)


def on_grid(value: object) -> list[int]:
    """The law at the midpoints of a grid: a sample without chance."""
    sample = law(value).sampler()
    return [sample((i + 0.5) / GRID) for i in range(GRID)]


def clipped_mean(survival: Callable[[float], float], low: int, high: int) -> float:
    """Mean of a rounded and clipped variable from P(X >= x), by summing the tail."""
    return low + sum(survival(k + 0.5) for k in range(low, high))


def normal_tail(mean: float, std: float) -> Callable[[float], float]:
    return lambda x: 1 - NormalDist(mean, std).cdf(x)


def lognormal_tail(mu: float, sigma: float) -> Callable[[float], float]:
    return lambda x: 1 - NormalDist(mu, sigma).cdf(math.log(x))


CLOSED_FORMS = [
    pytest.param(7, 7.0, 1, id="shorthand"),
    pytest.param({"law": "constant", "value": 7}, 7.0, 1, id="constant"),
    pytest.param({"law": "uniform", "min": 3, "max": 12}, 7.5, 1, id="uniform"),
    pytest.param(
        {"law": "normal", "mean": 100, "std": 30, "min": 60, "max": 130},
        clipped_mean(normal_tail(100, 30), 60, 130),
        1,
        id="normal",
    ),
    pytest.param({"law": "normal", "mean": 100, "std": 0, "max": 130}, 100.0, 1, id="normal-std-0"),
    pytest.param(
        {"law": "lognormal", "median": 128, "sigma": 0.6, "min": 16, "max": 1024},
        clipped_mean(lognormal_tail(math.log(128), 0.6), 16, 1024),
        1,
        id="lognormal-median",
    ),
    pytest.param(
        {"law": "lognormal", "mu": 4.3, "sigma": 2.2, "max": 6142},
        clipped_mean(lognormal_tail(4.3, 2.2), 1, 6142),
        1,
        id="lognormal-mu",
    ),
    pytest.param(
        # ranks 1, 2, 3 with weights 1, 1/2, 1/3: mean rank 18/11, so lengths ceil(k * 11/9) = 2, 3, 4
        {"law": "zipf", "mean": 2, "alpha": 1, "max": 100},
        (2 * 6 + 3 * 3 + 4 * 2) / 11,
        1,
        id="zipf",
    ),
    pytest.param({"law": "empirical", "values": [5, 1, 9, 9], "max": 8}, 5.5, 4, id="empirical"),
    pytest.param(
        {
            "law": "mixture",
            "parts": [
                {"weight": 3, "length": {"law": "uniform", "min": 1, "max": 9}},
                {"weight": 1, "length": 41},
            ],
        },
        0.75 * 5 + 0.25 * 41,
        3,
        id="mixture",
    ),
]


@pytest.mark.parametrize(("value", "mean", "pieces"), CLOSED_FORMS)
def test_mean_is_the_closed_form(value: object, mean: float, pieces: int) -> None:
    """A midpoint sum over a monotone piece is off by at most its range over the number of points."""
    sample = on_grid(value)
    span = max(sample) - min(sample)
    assert sum(sample) / GRID == pytest.approx(mean, abs=pieces * span / GRID + 1e-9)


def test_uniform_includes_both_ends_and_is_even() -> None:
    sample = on_grid({"law": "uniform", "min": 3, "max": 6})
    assert [sample.count(v) for v in (3, 4, 5, 6)] == [GRID // 4] * 4


def test_lognormal_percentiles_are_those_of_the_law() -> None:
    sample = sorted(on_grid({"law": "lognormal", "median": 1000, "sigma": 1, "max": 100_000}))
    for q in (0.1, 0.5, 0.9):
        assert sample[int(q * GRID)] == pytest.approx(1000 * math.exp(NormalDist().inv_cdf(q)), abs=1)


def test_median_and_mu_say_the_same() -> None:
    median = on_grid({"law": "lognormal", "median": 128, "sigma": 0.6, "max": 1024})
    assert median == on_grid({"law": "lognormal", "mu": math.log(128), "sigma": 0.6, "max": 1024})


@pytest.mark.parametrize(
    ("mean", "alpha", "p10", "p50", "p90", "p99"),
    [
        (128, 2.0, 35, 35, 206, 1711),
        (256, 1.5, 15, 30, 503, 4642),
        (512, 1.15, 6, 54, 1703, 5317),
        (1024, 1.0005, 5, 137, 3691, 6144),
    ],
)
def test_zipf_reproduces_the_llumnix_settings(
    mean: int, alpha: float, p10: int, p50: int, p90: int, p99: int
) -> None:
    """Percentiles of 1e5 draws of the published generator, so within its sampling noise: one rank."""
    settings = {"law": "zipf", "mean": mean, "alpha": alpha}
    sample = sorted(on_grid({**settings, "max": 6144}))
    assert sample[int(0.1 * GRID)] == p10
    assert sample[int(0.5 * GRID)] == pytest.approx(p50, rel=0.03)
    assert sample[int(0.9 * GRID)] == pytest.approx(p90, rel=0.02)
    assert sample[int(0.99 * GRID)] == pytest.approx(p99, rel=0.04)
    uncapped = on_grid({**settings, "max": 10_000_000})
    assert sum(uncapped) / GRID == pytest.approx(mean, rel=0.02)


def test_zipf_cap_lowers_the_mean_of_the_heaviest_setting() -> None:
    sample = on_grid({"law": "zipf", "mean": 1024, "alpha": 1.0005, "max": 6144})
    assert max(sample) == 6144
    assert sum(sample) / GRID == pytest.approx(982, rel=0.01)


def test_mixture_takes_each_part_in_its_share() -> None:
    sample = on_grid({"law": "mixture", "parts": [{"weight": 84, "length": 1}, {"weight": 16, "length": 2}]})
    assert sample.count(2) == 0.16 * GRID


def test_mixtures_nest() -> None:
    inner = {"law": "mixture", "parts": [{"weight": 1, "length": 2}, {"weight": 1, "length": 4}]}
    outer = {"law": "mixture", "parts": [{"weight": 1, "length": 1}, {"weight": 1, "length": inner}]}
    sample = on_grid(outer)
    assert {v: sample.count(v) / GRID for v in set(sample)} == {1: 0.5, 2: 0.25, 4: 0.25}
    assert isinstance(law(outer), Mixture)


def test_chooser_draws_in_proportion() -> None:
    choose = chooser([1, 2, 1])
    assert [choose(u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, BELOW_ONE)] == [0, 0, 1, 1, 2, 2]


lengths = st.integers(1, 5_000)


@st.composite
def bounded(draw: st.DrawFn, /, **fields: st.SearchStrategy[Any]) -> dict[str, Any]:
    low, high = sorted((draw(lengths), draw(lengths)))
    return {"min": low, "max": high, **{name: draw(strategy) for name, strategy in fields.items()}}


simple_laws: st.SearchStrategy[Any] = st.one_of(
    lengths,
    st.builds(dict, law=st.just("constant"), value=lengths),
    bounded(law=st.just("uniform")),
    bounded(law=st.just("normal"), mean=st.floats(0.5, 1e4), std=st.floats(0, 1e4)),
    bounded(law=st.just("lognormal"), mu=st.floats(-20, 20), sigma=st.floats(0, 10)),
    bounded(law=st.just("lognormal"), median=st.floats(1e-3, 1e6), sigma=st.floats(0, 10)),
    bounded(law=st.just("zipf"), mean=st.integers(1, 300), alpha=st.floats(0.05, 20)),
    bounded(law=st.just("empirical"), values=st.lists(lengths, min_size=1, max_size=9)),
)
any_law: st.SearchStrategy[Any] = st.recursive(
    simple_laws,
    lambda inner: st.builds(
        dict,
        law=st.just("mixture"),
        parts=st.lists(st.builds(dict, weight=st.floats(1e-3, 1e3), length=inner), min_size=1, max_size=4),
    ),
    max_leaves=6,
)
uniforms = st.floats(0.0, 1.0, exclude_max=True)


@given(any_law, st.lists(uniforms, max_size=20))
def test_every_law_stays_in_its_range(value: object, us: list[float]) -> None:
    made = law(value)
    sample = made.sampler()
    for u in (0.0, BELOW_ONE, *us):
        length = sample(u)
        assert type(length) is int
        assert 1 <= made.lowest <= length <= made.highest
        assert sample(u) == length


@given(simple_laws, st.lists(uniforms, min_size=2, max_size=20))
def test_every_quantile_function_rises(value: Any, us: list[float]) -> None:
    if isinstance(value, dict) and value["law"] == "empirical":
        value = {**value, "values": sorted(value["values"])}
    sample = law(value).sampler()
    assert all(sample(a) <= sample(b) for a, b in pairwise(sorted(us)))


@given(any_law)
def test_every_law_survives_its_json_form(value: object) -> None:
    made = law(value)
    assert law(made.model_dump(mode="json")) == made
    assert ADAPTER.validate_json(ADAPTER.dump_json(made)) == made


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "greater than or equal to 1"),
        (True, "should be a valid dictionary"),
        ({"law": "pareto"}, "does not match any of the expected tags: 'constant', 'uniform'"),
        ({"law": "uniform", "min": 9, "max": 3}, "min 9 is above max 3"),
        ({"law": "lognormal", "mu": 1, "median": 3, "sigma": 1, "max": 9}, "exactly one of mu and median"),
        ({"law": "lognormal", "sigma": 1, "max": 9}, "exactly one of mu and median"),
        ({"law": "lognormal", "mu": 1, "sigma": 1}, "Field required"),
        ({"law": "normal", "mean": 5, "std": math.nan, "max": 9}, "std"),
        ({"law": "empirical", "values": []}, "at least 1 item"),
        ({"law": "empirical", "values": [4, 0]}, "greater than or equal to 1"),
        ({"law": "mixture", "parts": []}, "at least 1 item"),
        ({"law": "mixture", "parts": [{"weight": 0, "length": 1}]}, "greater than 0"),
        ({"law": "constant", "value": 1, "max": 5}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_laws_are_refused_with_the_reason(value: object, message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        law(value)
    assert message in str(caught.value)


def test_a_law_prints_as_one_short_line() -> None:
    made = LogNormal(median=128, sigma=0.6, max=1024)
    assert str(made) == "lognormal(min=1, max=1024, median=128.0, sigma=0.6)"
    long = str(law({"law": "empirical", "values": list(range(1, 500))}))
    assert long.startswith("empirical(values=[1, 2") and len(long) < 100 and "\n" not in long


def test_the_grid_hits_every_share_edge() -> None:
    """Guards the tests above: shares that are multiples of 1/GRID are counted exactly."""
    assert bisect_right([(i + 0.5) / GRID for i in range(GRID)], 0.16) == 0.16 * GRID
