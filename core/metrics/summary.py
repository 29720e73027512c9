"""One flat dict with the names and rules of ``vllm bench serve``; the rest in a ``servelab`` sub-dict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from servelab.core.errors import ConfigError, LogError
from servelab.core.metrics.definitions import (
    NS_PER_MS,
    NS_PER_S,
    itl_spread_ns,
    peak_concurrency,
    percentile_name,
    ratio,
)
from servelab.core.metrics.distribution import Distribution
from servelab.core.metrics.goodput import Goodput, judge_all
from servelab.core.metrics.identity import identity, notes, rest_of_info, stated_tbt_ns, vllm_identity
from servelab.core.metrics.instances import instances, router
from servelab.core.metrics.pages import kv_pages
from servelab.core.metrics.timeline import STATES, EngineFacts, RequestFacts, Timeline
from servelab.core.metrics.tracks import Coverage
from servelab.core.records import to_dict

RESULT_SCHEMA = 2
"""Version of the result's keys; raised when one changes meaning or goes away."""

ItlMode = Literal["chunk", "spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryOptions:
    """What may be chosen. Everything else follows from the log.

    Raises:
        ConfigError: a percentile outside 0..100, or a negative bound.
    """

    percentiles: tuple[float, ...] = (99.0,)
    itl_mode: ItlMode = "chunk"
    """``chunk``: one gap per chunk (vLLM); ``spread``: gaps shared out over tokens (SGLang)."""
    rejections_are_misses: bool = True
    tbt_bound_ns: int | None = None
    """Bound for ``tbt_attainment``; None: the run's own ``slo.tbt_ms``, if it states one."""

    def __post_init__(self) -> None:
        for q in self.percentiles:
            if not 0 <= q <= 100:
                raise ConfigError(
                    f"percentile {q} is outside 0..100", do="write it in percent, e.g. 99 or 99.9"
                )
        if self.tbt_bound_ns is not None and self.tbt_bound_ns < 0:
            raise ConfigError("a time between tokens cannot be negative", why=f"bound {self.tbt_bound_ns} ns")


def summarize(timeline: Timeline, options: SummaryOptions | None = None) -> dict[str, Any]:
    """All figures of a run, as ``results.json`` holds them: every key is defined in
    ``docs/reference/metrics.md``, their types in ``docs/reference/results.schema.json``.

    A figure without a single sample is None, never 0.

    Raises:
        LogError: a completed request's terminal record and its steps disagree about its output.
    """
    options = options or SummaryOptions()
    requests = timeline.requests.values()
    completed = [facts for facts in requests if facts.outcome == "completed"]
    for facts in completed:
        _check(facts)
    states = Counter(facts.state for facts in requests)
    duration_s = _duration_ns(timeline) / NS_PER_S
    inputs = sum(facts.prompt_tokens for facts in completed if facts.parent is None)
    outputs = sum(facts.output_tokens for facts in completed)
    goodput = judge_all(requests, timeline.last_ns, rejections_are_misses=options.rejections_are_misses)
    latencies = _latencies(completed, options.itl_mode)
    queueing = _queueing(completed)
    tbt_bound_ns = stated_tbt_ns(timeline) if options.tbt_bound_ns is None else options.tbt_bound_ns
    each = instances(timeline)
    result: dict[str, Any] = {
        **vllm_identity(timeline),
        "duration": duration_s,
        "completed": len(completed),
        "failed": sum(states[state] for state in ("failed", "aborted", "cancelled", "rejected")),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": ratio(len(completed), duration_s),
        "request_goodput": ratio(goodput.total.good, duration_s) if goodput.stated else None,
        "output_throughput": ratio(outputs, duration_s),
        "total_token_throughput": ratio(inputs + outputs, duration_s),
        "max_output_tokens_per_s": float(busiest_second(completed)),
        "max_concurrent_requests": peak_concurrency(
            (facts.arrival_ns, facts.last_ns) for facts in completed if facts.last_ns is not None
        ),
    }
    for metric, distribution in latencies.items():
        result.update(statistics_ms(metric, distribution, options.percentiles))
    result["servelab"] = {
        "schema_version": RESULT_SCHEMA,
        **identity(timeline),
        "energy_per_output_token_j": _per_token(timeline, outputs),
        "notes": notes(timeline),
        "itl_mode": options.itl_mode,
        "percentile_method": "linear",
        "rejections_are_misses": options.rejections_are_misses,
        "run": _run(timeline),
        "requests": {"arrived": len(requests), **{state: states[state] for state in STATES}},
        "samples": {m: samples.count for m, samples in {**latencies, "queueing": queueing}.items()},
        "length_capped_requests": sum(facts.reason == "length" for facts in completed),
        **_attainment(goodput, duration_s),
        **_tbt(latencies["itl"], tbt_bound_ns),
        "preemptions": timeline.preemptions,
        "recomputed_tokens": timeline.recomputed_tokens,
        "prefix_hit_tokens": sum(facts.cached_tokens for facts in requests),
        "prefix_hit_rate": _hit_rate(requests),
        "evicted_pages": timeline.evicted_pages,
        **statistics_ms("queueing", queueing, options.percentiles),
        "batch": _batch(timeline.engines.values()),
        "kv_pages": kv_pages(timeline),
        "instance_hours": sum(one["lasted"] for one in each) / 3600,
        "instances": each,
        "router": router(timeline),
        "quality": _quality(timeline),
        "info": rest_of_info(timeline),
    }
    return result


def _per_token(timeline: Timeline, outputs: int) -> float | None:
    """Energy of the run over the output tokens of completed requests, in joules."""
    energy = timeline.finished.energy_j if timeline.finished else None
    return None if energy is None else ratio(energy, outputs)


def _check(facts: RequestFacts) -> None:
    if facts.output_tokens != facts.reported_tokens:
        raise LogError(
            f"the log disagrees with itself about the output of request {facts.id}",
            why=f"its steps emitted {facts.output_tokens} tokens, its end reports {facts.reported_tokens}",
            do="feed the whole log; if it is whole, report a bug of the engine",
        )


def _duration_ns(timeline: Timeline) -> int:
    """First arrival to the last terminal record; to the end of the log if a request is still open."""
    if not timeline.requests:
        return 0
    start = min(facts.arrival_ns for facts in timeline.requests.values())
    ends = [facts.ended_ns for facts in timeline.requests.values()]
    return max(timeline.last_ns if end is None else end for end in ends) - start


def statistics_ms(
    metric: str, samples: Distribution, percentiles: Sequence[float]
) -> dict[str, float | None]:
    """``mean_``, ``median_``, ``std_`` and the percentiles of nanosecond samples, in milliseconds."""
    figures = {"mean": samples.mean(), "median": samples.percentile(50), "std": samples.std()}
    figures |= {percentile_name(q): samples.percentile(q) for q in percentiles}
    return {f"{name}_{metric}_ms": None if ns is None else ns / NS_PER_MS for name, ns in figures.items()}


def _latencies(completed: Sequence[RequestFacts], itl_mode: ItlMode) -> dict[str, Distribution]:
    gaps: Counter[float] = Counter()
    inside = Coverage()
    for facts in completed:
        if itl_mode == "spread" and facts.sizes is not None:
            gaps.update(itl_spread_ns(facts.times, facts.sizes))
            continue
        before = None
        for ends, first, last in facts.spans():
            if before is not None:
                gaps[ends[first] - before] += 1
            before = ends[last - 1]
            if last - first > 1:
                inside.add(ends, first + 1, last)
    for gap, count in inside.gaps():
        gaps[gap] += count
    return {
        "ttft": Distribution.of(facts.ttft_ns for facts in completed if facts.ttft_ns is not None),
        "tpot": Distribution.of(facts.tpot_ns for facts in completed if facts.output_tokens > 1),
        "itl": Distribution(gaps),
        "e2el": Distribution.of(facts.e2el_ns for facts in completed if facts.e2el_ns is not None),
    }


def _hit_rate(requests: Iterable[RequestFacts]) -> float | None:
    """Share of the prompts that was not computed when they were first admitted."""
    admitted = [facts for facts in requests if facts.admitted_ns is not None and facts.parent is None]
    return ratio(sum(f.first_cached for f in admitted), sum(f.prompt_tokens for f in admitted))


def _queueing(completed: Iterable[RequestFacts]) -> Distribution:
    return Distribution.of(f.admitted_ns - f.arrival_ns for f in completed if f.admitted_ns is not None)


def busiest_second(completed: Sequence[RequestFacts]) -> int:
    """Most output tokens of completed requests in one second, counted from their first arrival."""
    if not completed:
        return 0
    origin = min(facts.arrival_ns for facts in completed)
    buckets: Counter[int] = Counter()
    together = Coverage()
    for facts in completed:
        if facts.sizes is not None:
            for time, size in zip(facts.times, facts.sizes, strict=True):
                buckets[(time - origin) // NS_PER_S] += size
            continue
        for ends, first, last in facts.spans():
            if last - first == 1:
                buckets[(ends[first] - origin) // NS_PER_S] += 1
            else:
                together.add(ends, first, last)
    for time, count in together.times():
        buckets[(time - origin) // NS_PER_S] += count
    return max(buckets.values(), default=0)


def _run(timeline: Timeline) -> dict[str, Any]:
    finished = timeline.finished
    status = finished.status if finished else "unknown"
    return {
        "status": status,
        "reason": finished.reason if finished else "the log has no end of run",
        "partial": status != "ok",
        "engines": len(timeline.engines),
    }


def _quality(timeline: Timeline) -> dict[str, dict[str, float]] | None:
    """Per quantizer, the figures of its last record; None where none was measured."""
    left_out = {"ev", "t_ns", "engine", "label"}
    return {
        label: {key: value for key, value in to_dict(record).items() if key not in left_out}
        for label, record in timeline.quality.items()
    } or None


def _attainment(goodput: Goodput, duration_s: float) -> dict[str, Any]:
    return {
        "slo_good": goodput.total.good if goodput.stated else None,
        "slo_judged": goodput.total.judged if goodput.stated else None,
        "slo_attainment": goodput.total.attainment,
        "slo_attainment_by_metric": goodput.attainment_by_metric(),
        "slo_by_class": {
            name: {
                "good": verdicts.total.good,
                "judged": verdicts.total.judged,
                "attainment": verdicts.total.attainment,
                "attainment_by_metric": verdicts.attainment_by_metric(),
                "request_goodput": ratio(verdicts.total.good, duration_s),
                "token_goodput": ratio(verdicts.good_tokens, duration_s),
            }
            for name, verdicts in sorted(goodput.by_class.items())
        },
        "token_goodput": ratio(goodput.good_tokens, duration_s) if goodput.stated else None,
    }


def _tbt(gaps: Distribution, bound_ns: int | None) -> dict[str, float | None]:
    if bound_ns is None:
        return {"tbt_bound_ms": None, "tbt_attainment": None}
    return {"tbt_bound_ms": bound_ns / NS_PER_MS, "tbt_attainment": gaps.share_at_most(bound_ns)}


def _batch(engines: Iterable[EngineFacts]) -> dict[str, Any]:
    engines = list(engines)
    steps = sum(engine.steps for engine in engines)
    return {
        "launches": sum(engine.launches for engine in engines),
        "steps": steps,
        "mean_requests": ratio(sum(engine.batch_requests for engine in engines), steps),
        "max_requests": max((engine.max_batch_requests for engine in engines), default=0),
        "mean_tokens": ratio(sum(engine.batch_tokens for engine in engines), steps),
        "max_tokens": max((engine.max_batch_tokens for engine in engines), default=0),
    }
