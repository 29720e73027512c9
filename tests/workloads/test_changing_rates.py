"""Weibull gaps, busy and quiet times, windows: closed forms at 1e5 requests."""

from __future__ import annotations

import math
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from servelab.plugins.workloads._describe import cv
from servelab.plugins.workloads._traffic import Traffic

N = 100_000
NS = 1_000_000_000


def times(n: int = N, **settings: Any) -> list[int]:
    return Traffic.model_validate({"num_requests": n, "normalize_arrivals": False, **settings}).times_ns(
        Random(3)
    )


def gap_cv(found: list[int]) -> float:
    value = cv([b - a for a, b in pairwise(found)])
    assert value is not None
    return value


@pytest.mark.parametrize("shape", [0.6, 1.5, 4])
def test_weibull_gaps(shape: float) -> None:
    found = times(process="weibull", burstiness=shape, request_rate=20)
    spread = math.sqrt(math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1)
    assert found[-1] / NS == pytest.approx(N / 20, abs=3 * spread * math.sqrt(N) / 20)
    assert gap_cv(found) == pytest.approx(spread, rel=0.03)


def test_weibull_times_are_rescaled_as_others() -> None:
    assert times(process="weibull", burstiness=2, request_rate=4, normalize_arrivals=True)[-1] == N * NS // 4


def test_interrupted_poisson() -> None:
    """CV^2 = 1 + 2 r a / (a + b)^2, a and b the rates at which busy and quiet times end."""
    on_s, off_s, mean = 1.0, 3.0, 10.0
    found = times(request_rate=mean, on_off={"on_s": on_s, "off_s": off_s})
    busy, a, b = mean * (on_s + off_s) / on_s, 1 / on_s, 1 / off_s
    assert gap_cv(found) == pytest.approx(math.sqrt(1 + 2 * busy * a / (a + b) ** 2), rel=0.03)
    assert N * NS / found[-1] == pytest.approx(mean, rel=0.05)
    within = sum(b - a < 5 * NS / busy for a, b in pairwise(found)) / N
    assert within > 0.97, "gaps within busy times are those of the busy rate"


def test_a_quiet_rate_is_a_share_of_the_busy_one() -> None:
    """Mean 11 = (r + 0.1 r) / 2 over equal halves: r = 20; the mean stays."""
    found = times(request_rate=11, on_off={"on_s": 5, "off_s": 5, "quiet": 0.1})
    assert N * NS / found[-1] == pytest.approx(11, rel=0.03)
    seconds = [0] * (found[-1] // NS + 1)
    for t in found:
        seconds[t // NS] += 1
    ordered = sorted(seconds)
    assert ordered[len(ordered) // 4] == pytest.approx(2, abs=1)
    assert ordered[3 * len(ordered) // 4] == pytest.approx(20, abs=4)


def test_equal_gaps_in_windows_by_hand() -> None:
    """2 a second for 2 s, none for 1 s, 10 a second for 0.5 s, and again: the fifth gap, from 2 s on, ends
    0.1 s into the fast window."""
    windows = [{"duration_s": 2, "rate": 2}, {"duration_s": 1, "rate": 0}, {"duration_s": 0.5, "rate": 10}]
    found = times(12, process="constant", request_rate="inf", windows={"windows": windows})
    assert [round(t / NS, 6) for t in found] == [
        0.5, 1, 1.5, 2, 3.1, 3.2, 3.3, 3.4, 3.5, 4, 4.5, 5
    ]  # fmt: skip


def test_windows_have_their_own_rate_and_burstiness() -> None:
    windows = [
        {"duration_s": 1000, "rate": 5, "burstiness": 4},
        {"duration_s": 1000, "rate": 20, "burstiness": 0.25},
    ]
    found = times(process="gamma", request_rate="inf", windows={"windows": windows})
    early = [t for t in found if t < 1000 * NS]
    late = [t for t in found if 1000 * NS <= t < 2000 * NS]
    assert (len(early), len(late)) == (pytest.approx(5000, rel=0.03), pytest.approx(20_000, rel=0.05))
    assert gap_cv(early) == pytest.approx(0.5, rel=0.05)
    assert gap_cv(late) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"process": "weibull", "burstiness": 0.01}, "Weibull gaps of no use"),
        ({"on_off": {"on_s": 1, "off_s": 1}, "request_rate": "inf"}, "on_off needs a mean rate"),
        ({"windows": {"windows": [{"duration_s": 1, "rate": 1}]}}, "both windows and request_rate=8"),
        ({"windows": {"windows": [{"duration_s": 1, "rate": 0}]}}, "no request would ever"),
        (
            {
                "windows": {"windows": [{"duration_s": 1, "rate": 1}]},
                "request_rate": "inf",
                "process": "gamma",
                "burstiness": 2,
            },
            "windows state their own burstiness",
        ),
        (
            {"windows": {"windows": [{"duration_s": 1, "rate": 1}]}, "on_off": {"on_s": 1, "off_s": 1}},
            "windows and on_off all say",
        ),
        ({"burstiness": 2}, "has no effect on process 'poisson'"),
    ],
)  # fmt: skip
def test_refused_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Traffic.model_validate(settings)
