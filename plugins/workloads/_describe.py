"""Statistics of a workload, for ``describe()``: lengths, arrivals, settings."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from pydantic import BaseModel

from servelab.plugins.workloads._arrivals import NS

WINDOW_S = 60
"""Length of the windows in which papers state burstiness."""

MIN_WINDOW_GAPS = 10
"""A window with fewer gaps says nothing about their variation."""

MAX_RATE_POINTS = 120
"""Longest rate series ``describe`` gives; longer runs use a multiple of the window."""


def arrival_statistics(times_ns: Sequence[int]) -> dict[str, Any]:
    """What ``describe()`` says of arrivals at these times: how many, how fast, how evenly."""
    n, last_ns = len(times_ns), times_ns[-1]
    return {
        "requests": n,
        "duration_s": last_ns / NS,
        "realised_rate": n * NS / last_ns if last_ns else None,
        "rate_series": rate_series(times_ns),
        "iat_cv": cv([after - before for before, after in pairwise(times_ns)]),
        "iat_cv_60s": windowed_iat_cv(times_ns),
    }


def json_settings(config: BaseModel) -> dict[str, Any]:
    """Every setting in JSON types; an infinity, which JSON has not, is written ``"inf"``."""
    return {
        name: "inf" if isinstance(value, float) and math.isinf(value) else value
        for name, value in config.model_dump(mode="json").items()
    }


def statistics(values: Sequence[int]) -> dict[str, Any] | None:
    """Mean, population CV and percentiles by linear interpolation (as NumPy's default); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": sum(ordered) / len(ordered),
        "cv": cv(ordered),
        "min": ordered[0],
        **{f"p{q}": percentile(ordered, q) for q in (10, 50, 90, 99)},
        "max": ordered[-1],
        "total": sum(ordered),
    }


def percentile(ordered: Sequence[float], q: float) -> float:
    """The value ``q`` percent of the way through sorted values, linearly interpolated."""
    position = (len(ordered) - 1) * q / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def cv(values: Sequence[float]) -> float | None:
    """Population standard deviation over the mean; None of nothing and of a mean of 0."""
    mean = sum(values) / len(values) if values else 0.0
    if not mean:
        return None
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values)) / mean


def rate_series(times_ns: Sequence[int]) -> dict[str, Any]:
    """Requests/s in equal windows from time 0; the last one counts only as far as the last arrival."""
    last_ns = times_ns[-1]
    windows = max(1, -(-last_ns // (WINDOW_S * NS)))
    window_s = WINDOW_S * -(-windows // MAX_RATE_POINTS)
    window_ns = window_s * NS
    rates: list[float | None] = []
    done = 0
    for start in range(0, last_ns, window_ns):
        end = min(start + window_ns, last_ns)
        upto = bisect_right(times_ns, end)
        rates.append((upto - done) * NS / (end - start))
        done = upto
    return {"window_s": window_s, "requests_per_s": rates}


def windowed_iat_cv(times_ns: Sequence[int]) -> dict[str, Any]:
    """CV of the gaps inside each 60 s window, over the windows with enough of them."""
    window_ns = WINDOW_S * NS
    per_window: dict[int, list[int]] = {}
    for before, after in pairwise(times_ns):
        if before // window_ns == after // window_ns:
            per_window.setdefault(after // window_ns, []).append(after - before)
    values = sorted(
        value
        for gaps in per_window.values()
        if len(gaps) >= MIN_WINDOW_GAPS and (value := cv(gaps)) is not None
    )
    return {
        "windows": len(values),
        "p50": percentile(values, 50) if values else None,
        "p90": percentile(values, 90) if values else None,
    }
