"""GuideLLM's report, version 2 (``benchmarks.json``): distributions split by how requests ended.

Its rules: ``time_per_output_token_ms`` includes the time to the first token, ``inter_token_latency_ms`` is
vLLM's TPOT; both weigh a request by its tokens. ``request_latency`` is in seconds. A percentile is the
smallest value whose cumulative weight reaches it. Rates and concurrency are distributions over time. An empty
distribution is all zeros. Times are seconds of the run's clock from its start.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any

from servelab.core.metrics import RequestFacts, Timeline
from servelab.core.metrics.definitions import NS_PER_MS, NS_PER_S

REPORT_VERSION = 2
PERCENTILES = {
    "p001": "0.001",
    "p01": "0.01",
    "p05": "0.05",
    "p10": "0.1",
    "p25": "0.25",
    "p50": "0.5",
    "p75": "0.75",
    "p90": "0.9",
    "p95": "0.95",
    "p99": "0.99",
    "p999": "0.999",
}
STATUSES = {
    "successful": ("completed",),
    "incomplete": ("cancelled", "unfinished"),
    "errored": ("failed", "aborted", "rejected"),
}
MERGE_S = 1e-4
"""Events closer than this are one for rates and concurrency."""
LEAST_S = 1e-6
"""Shortest time that the last event of a rate stands for."""
TARGET = "servelab"
Sample = tuple[float, float]
"""(value, weight), or (seconds, events)."""
DOMAINS = {
    "text": ("tokens", "words", "characters"),
    "image": ("tokens", "images", "pixels", "bytes"),
    "video": ("tokens", "frames", "seconds", "bytes"),
    "audio": ("tokens", "samples", "seconds", "bytes"),
    "tool_call": ("tokens", "mixed_tokens", "count"),
}
"""What is counted per kind of content: nothing here is."""
DELAYS = (
    "resolve_start_delay_avg",
    "resolve_targeted_start_delay_avg",
    "request_start_delay_avg",
    "request_targeted_start_delay_avg",
    "resolve_end_delay_avg",
    "resolve_time_avg",
    "finalized_delay_avg",
    "processed_delay_avg",
)
"""Of GuideLLM's own workers: -1, its word for unknown."""


class Finished:
    """A request as GuideLLM's client would have seen it; times in seconds."""

    def __init__(self, facts: RequestFacts, end_ns: int) -> None:
        self.prompt, self.output, self.chunks = facts.prompt_tokens, facts.output_tokens, len(facts.times)
        self.bounds, self.queueing_ns = facts.bounds, None
        self.arrival_ns, self.times = facts.arrival_ns, facts.times
        if facts.admitted_ns is not None:
            self.queueing_ns = facts.admitted_ns - facts.arrival_ns
        ended = facts.last_ns if facts.state == "completed" else facts.ended_ns
        self.end_ns = end_ns if ended is None else ended

    @property
    def span(self) -> tuple[float, float]:
        return self.arrival_ns / NS_PER_S, self.end_ns / NS_PER_S

    @property
    def latency_s(self) -> float:
        return (self.end_ns - self.arrival_ns) / NS_PER_S

    @property
    def ttft_ms(self) -> float | None:
        return (self.times[0] - self.arrival_ns) / NS_PER_MS if self.times else None

    @property
    def tpot_ms(self) -> float:
        """With the first token."""
        last = self.times[-1] if self.times else self.end_ns
        return (last - self.arrival_ns) / self.output / NS_PER_MS if self.output else 0.0

    @property
    def itl_ms(self) -> float | None:
        """Without it."""
        if self.output < 2:
            return None
        return (self.times[-1] - self.times[0]) / (self.output - 1) / NS_PER_MS

    @property
    def later_chunks(self) -> list[Sample]:
        """Every chunk but the first, evenly spread in time and tokens as GuideLLM assumes."""
        if self.chunks < 2 or self.output < 2:
            return []
        first, last, n = self.times[0] / NS_PER_S, self.times[-1] / NS_PER_S, self.chunks - 1
        return [(first + (last - first) * i / n, (self.output - 1) / n) for i in range(1, n + 1)]

    @property
    def output_events(self) -> list[Sample]:
        if self.chunks < 2:
            last = self.times[-1] / NS_PER_S if self.times else self.span[1]
            return [(last, float(self.output))]
        return [(self.times[0] / NS_PER_S, 1.0), *self.later_chunks]

    @property
    def prompt_event(self) -> Sample:
        return (self.times[0] / NS_PER_S if self.times else self.span[1], float(self.prompt))


def guidellm(timeline: Timeline) -> dict[str, Any]:
    """A run as GuideLLM would have reported it."""
    info = timeline.info
    return {
        "metadata": {
            "version": REPORT_VERSION,
            "guidellm_version": f"servelab {info.get('servelab', 'unknown')}",
            "python_version": info.get("python", "unknown"),
            "platform": info.get("platform", "unknown"),
        },
        "config": {
            "spec": {
                "backend": {"kind": "openai_http", "target": TARGET, "model": info.get("model")},
                "profile": {"kind": "throughput", "max_concurrency": max(1, len(timeline.requests))},
                "data": [{"kind": "synthetic_text", "prompt_tokens": 1, "output_tokens": 1}],
            }
        },
        "benchmarks": [_benchmark(timeline)],
    }


def _benchmark(timeline: Timeline) -> dict[str, Any]:
    groups = {
        status: [Finished(f, timeline.last_ns) for f in timeline.requests.values() if f.state in states]
        for status, states in STATUSES.items()
    }
    everyone = [one for group in groups.values() for one in group]
    start = min((one.span[0] for one in everyone), default=0.0)
    end = max((one.span[1] for one in everyone), default=0.0)
    totals: dict[str, Any] = {
        **{status: len(group) for status, group in groups.items()},
        "total": len(everyone),
    }
    waits = [one.queueing_ns / NS_PER_S for one in everyone if one.queueing_ns is not None]
    settings = timeline.info.get("settings") or {}
    return {
        "type_": "generative_benchmark",
        "config": {
            "id_": "servelab",
            "run_id": "servelab",
            "run_index": 0,
            "strategy": {"type_": "throughput"},
            "constraints": {},
            "profile": {},
            "requests": settings.get("workload") or {},
            "backend": {"target": TARGET, "model": timeline.info.get("model")},
            "environment": {},
        },
        "scheduler_state": {"start_time": start, "end_time": end},
        "scheduler_metrics": {
            "start_time": start,
            "request_start_time": start,
            "measure_start_time": start,
            "measure_end_time": end,
            "request_end_time": end,
            "end_time": end,
            "requests_made": totals,
            "queued_time_avg": math.fsum(waits) / len(waits) if waits else -1.0,
            "request_time_avg": _mean([one.latency_s for one in everyone]),
            **dict.fromkeys(DELAYS, -1.0),
        },
        "metrics": {"request_totals": totals, **_metrics(groups, start, end)},
        "requests": {"successful": [], "incomplete": [], "errored": [], "total": None},
        "start_time": start,
        "end_time": end,
        "duration": end - start,
        "warmup_duration": 0.0,
        "cooldown_duration": 0.0,
    }


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else -1.0


def _metrics(groups: Mapping[str, Sequence[Finished]], start: float, end: float) -> dict[str, Any]:
    def values(of: Callable[[Finished], Iterable[Sample]]) -> dict[str, Any]:
        return _split(groups, of, distribution)

    def each(of: Callable[[Finished], float | None]) -> dict[str, Any]:
        return values(lambda one: [] if (value := of(one)) is None else [(value, 1)])

    def rates(of: Callable[[Finished], Iterable[Sample]]) -> dict[str, Any]:
        return _split(groups, of, lambda events: rate_distribution(events, start, end))

    none = _split(groups, lambda one: [], distribution)
    return {
        "requests_per_second": rates(lambda one: [(one.span[1], 1.0)]),
        "request_concurrency": _split(
            groups, lambda one: [one.span], lambda spans: concurrency_distribution(spans, start, end)
        ),
        "request_latency": each(lambda one: one.latency_s),
        "request_streaming_iterations_count": each(lambda one: one.chunks),
        "prompt_token_count": each(lambda one: one.prompt),
        "output_token_count": each(lambda one: one.output),
        "total_token_count": each(lambda one: one.prompt + one.output),
        "time_to_first_token_ms": each(lambda one: one.ttft_ms),
        "time_to_first_output_token_ms": each(lambda one: one.ttft_ms),
        "time_per_output_token_ms": values(lambda one: [(one.tpot_ms, one.output)]),
        "inter_token_latency_ms": values(
            lambda one: [] if one.itl_ms is None else [(one.itl_ms, one.output - 1)]
        ),
        "time_to_last_round_trip_ms": none,
        "avg_round_trip_time_ms": none,
        "prompt_tokens_per_second": rates(lambda one: [one.prompt_event]),
        "output_tokens_per_second": rates(lambda one: one.output_events),
        "tokens_per_second": rates(lambda one: [one.prompt_event, *one.output_events]),
        "output_tokens_per_iteration": values(lambda one: [(n, 1) for _, n in one.output_events]),
        "iter_tokens_per_iteration": values(lambda one: [(n, 1) for _, n in one.later_chunks]),
        **{domain: dict.fromkeys(kinds) for domain, kinds in DOMAINS.items()},
        **_goodput(groups, start, end),
    }


def _goodput(groups: Mapping[str, Sequence[Finished]], start: float, end: float) -> dict[str, Any]:
    """Only where all requests state the same bounds and GuideLLM has such bounds; its rules, not ours."""
    stated = {tuple(sorted(one.bounds.items())) for group in groups.values() for one in group}
    bounds = dict(stated.pop()) if len(stated) == 1 else {}
    if not bounds or bounds.keys() - {"ttft", "tpot", "e2el"}:
        return {"slo_attainment": None, "slo_determined_requests": 0, "request_goodput": None}
    good, determined = [], len(groups["errored"])
    for one in groups["successful"]:
        found = {"ttft": one.ttft_ms, "tpot": one.itl_ms, "e2el": one.latency_s * 1000}
        measured = [(found[metric], bound / NS_PER_MS) for metric, bound in bounds.items()]
        if any(value is None for value, _ in measured):
            continue
        determined += 1
        if all(value is not None and value <= bound for value, bound in measured):
            good.append(one)
    only: dict[str, Sequence[Finished]] = {**dict.fromkeys(STATUSES, ()), "successful": good}
    rate = _split(
        only, lambda one: [(one.span[1], 1.0)], lambda events: rate_distribution(events, start, end)
    )
    return {
        "slo_attainment": len(good) / determined if determined else None,
        "slo_determined_requests": determined,
        "request_goodput": rate if determined else None,
    }


def _split(
    groups: Mapping[str, Sequence[Finished]],
    of: Callable[[Finished], Iterable[Sample]],
    summary: Callable[[Sequence[Sample]], dict[str, Any]],
) -> dict[str, Any]:
    """A summary per status, and one of all."""
    samples = {status: [sample for one in group for sample in of(one)] for status, group in groups.items()}
    everything = [sample for group in samples.values() for sample in group]
    return {**{status: summary(group) for status, group in samples.items()}, "total": summary(everything)}


# ---------------------------------------------------------------- distributions


def distribution(samples: Iterable[Sample], count: int | None = None) -> dict[str, Any]:
    """GuideLLM's summary of weighted values.

    Args:
        samples: (value, weight); a weight of 0 counts for nothing.
        count: observations behind it; the sum of the weights by default.
    """
    weights: defaultdict[float, float] = defaultdict(float)
    for value, weight in samples:
        weights[value] += weight
    values = sorted(value for value, weight in weights.items() if weight > 0)
    total = math.fsum(weights[value] for value in values)
    if not values:
        names = ("mean", "median", "mode", "variance", "std_dev", "min", "max", "total_sum")
        return {
            **dict.fromkeys(names, 0.0),
            "count": count or 0,
            "percentiles": dict.fromkeys(PERCENTILES, 0.0),
        }
    upto = list(accumulate(weights[value] for value in values))
    percentiles = {
        name: float(values[min(bisect_left(upto, Fraction(q) * Fraction(upto[-1])), len(values) - 1)])
        for name, q in PERCENTILES.items()
    }
    mean = math.fsum(value * weights[value] for value in values) / total
    variance = math.fsum((value - mean) ** 2 * weights[value] for value in values) / total
    count = round(total) if count is None else count
    return {
        "mean": mean,
        "median": percentiles["p50"],
        "mode": float(max(values, key=lambda value: weights[value])),
        "variance": variance,
        "std_dev": math.sqrt(variance),
        "min": float(values[0]),
        "max": float(values[-1]),
        "count": count,
        "total_sum": mean * count,
        "percentiles": percentiles,
    }


def merged(events: Iterable[Sample]) -> list[Sample]:
    """Events in order of time, those within ``MERGE_S`` of the first of a group as one at its time."""
    out: list[tuple[float, float]] = []
    for time, amount in sorted(events, key=lambda event: event[0]):
        if out and time <= out[-1][0] + MERGE_S:
            out[-1] = (out[-1][0], out[-1][1] + amount)
        else:
            out.append((time, amount))
    return out


def rate_distribution(events: Sequence[Sample], start: float, end: float) -> dict[str, Any]:
    """Events per second over time: each stands for the time half-way to its neighbours."""
    inside = [(time, amount) for time, amount in events if start <= time <= end]
    points = merged([(start, 0.0), *inside, (end, 0.0)])
    count = round(math.fsum(amount for _, amount in points))
    if len(points) < 2:
        return distribution([], len(points))
    middles = [(a + b) / 2 for (a, _), (b, _) in pairwise(points)]
    edges = [points[0][0], *middles, max(points[-1][0], middles[-1] + LEAST_S)]
    spans = [b - a for a, b in pairwise(edges)]
    return distribution(
        [(amount / span, span) for (_, amount), span in zip(points, spans, strict=True)], count
    )


def concurrency_distribution(spans: Sequence[Sample], start: float, end: float) -> dict[str, Any]:
    """Requests at one time, weighted by how long there were so many; ``spans`` are (begin, end)."""
    changes = merged([(begin, 1.0) for begin, _ in spans] + [(over, -1.0) for _, over in spans])
    if not changes:
        return distribution([], 0)
    points = merged([(start, 0.0), *changes, (end, 0.0)])
    levels = list(accumulate(amount for _, amount in points))
    lasting = [
        (max(level, 0.0), b - a) for level, ((a, _), (b, _)) in zip(levels, pairwise(points), strict=False)
    ]
    return distribution(lasting, len(spans))
