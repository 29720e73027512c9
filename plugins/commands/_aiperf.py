"""AIPerf's ``profile_export_aiperf.json``: one block of statistics per metric.

Its rules: requests that completed only; milliseconds and seconds; percentiles by linear interpolation and the
population's standard deviation. Its ``inter_token_latency`` is vLLM's TPOT; vLLM's ITL is
``inter_chunk_latency``. A metric without an observation is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from servelab.core.metrics import Distribution, RequestFacts, Timeline
from servelab.core.metrics.definitions import NS_PER_MS, NS_PER_S, itl_chunk_ns
from servelab.core.metrics.goodput import judge_all

SCHEMA_VERSION = "1.1"
"""Of AIPerf's export; the first with ``count`` and ``sum``, and nothing here needs a later one."""
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
PER_USER = "tokens/sec/user"
ERRORS = ("failed", "aborted", "rejected")
"""What its client would see as an error; it counts cancelled requests nowhere."""


def aiperf(timeline: Timeline) -> dict[str, Any]:
    """A run as AIPerf would have exported it."""
    done = [facts for facts in timeline.requests.values() if facts.state == "completed"]
    errors = Counter((f.state, f.reason) for f in timeline.requests.values() if f.state in ERRORS)
    partial = timeline.finished is None or timeline.finished.status == "interrupted"
    found = {
        **_records(done),
        **_run(done, timeline),
        "error_request_count": _value("requests", errors.total() or None),
    }
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: block for name, block in found.items() if block is not None},
        "was_cancelled": partial,
        "error_summary": [
            {"error_details": {"type": state, "message": reason}, "count": count}
            for (state, reason), count in errors.most_common()
        ],
        **_times(timeline),
        "servelab": {"version": timeline.info.get("servelab"), "model": timeline.info.get("model")},
    }


def _records(done: list[RequestFacts]) -> dict[str, dict[str, Any] | None]:
    """Metrics with a value per request."""
    out = [facts for facts in done if facts.times]
    many = [facts for facts in out if facts.output_tokens > 1]
    chunks = [facts for facts in out if len(facts.times) > 1]
    spans = [(facts, facts.times[-1] - facts.times[0]) for facts in many]
    return {
        "time_to_first_token": _block("ms", (_ms(facts.ttft_ns) for facts in out)),
        "time_to_second_token": _block("ms", (_ms(f.times[1] - f.times[0]) for f in chunks)),
        "request_latency": _block("ms", (_ms(facts.e2el_ns) for facts in out)),
        "decode_duration": _block("ms", (_ms(f.times[-1] - f.times[0]) for f in out)),
        "inter_token_latency": _block("ms", (_ms(facts.tpot_ns) for facts in many)),
        "inter_chunk_latency": _block("ms", (_ms(gap) for f in out for gap in itl_chunk_ns(f.times))),
        "output_token_throughput_per_user": _block(
            PER_USER, ((f.output_tokens - 1) * NS_PER_S / span for f, span in spans if span)
        ),
        "e2e_output_token_throughput": _block(
            PER_USER, (f.output_tokens * NS_PER_S / f.e2el_ns for f in out if f.e2el_ns)
        ),
        "prefill_throughput_per_user": _block(
            PER_USER, (f.prompt_tokens * NS_PER_S / f.ttft_ns for f in out if f.ttft_ns)
        ),
        "output_sequence_length": _block("tokens", (facts.output_tokens for facts in out)),
        "output_token_count": _block("tokens", (facts.output_tokens for facts in out)),
        "input_sequence_length": _block("tokens", (facts.prompt_tokens for facts in done)),
    }


def _run(done: list[RequestFacts], timeline: Timeline) -> dict[str, dict[str, Any] | None]:
    """Metrics with one value. AIPerf's duration: first request sent to last response, of those done."""
    ends = [facts.last_ns for facts in done if facts.last_ns is not None]
    span = max(ends) - min(facts.arrival_ns for facts in done) if ends else 0
    inputs, outputs = sum(f.prompt_tokens for f in done), sum(f.output_tokens for f in done)
    goodput = judge_all(timeline.requests.values(), timeline.last_ns)

    def rate(unit: str, amount: float) -> dict[str, Any] | None:
        return _value(unit, amount * NS_PER_S / span if span else None)

    return {
        "request_count": _value("requests", len(done)),
        "request_throughput": rate("requests/sec", len(done)),
        "output_token_throughput": rate("tokens/sec", outputs),
        "input_token_throughput": rate("tokens/sec", inputs),
        "total_token_throughput": rate("tokens/sec", inputs + outputs),
        "benchmark_duration": _value("sec", span / NS_PER_S if span else None),
        "total_isl": _value("tokens", inputs),
        "total_osl": _value("tokens", outputs),
        "total_output_tokens": _value("tokens", outputs),
        "good_request_count": _value("requests", goodput.total.good if goodput.stated else None),
        "goodput": rate("requests/sec", goodput.total.good) if goodput.stated else None,
    }


def _times(timeline: Timeline) -> dict[str, str]:
    last = timeline.finished
    if last is None or last.date is None or last.wall_s is None:
        return {}
    start = datetime.strptime(last.date, "%Y%m%d-%H%M%S")
    return {"start_time": start.isoformat(), "end_time": (start + timedelta(seconds=last.wall_s)).isoformat()}


def _ms(ns: float | None) -> float:
    assert ns is not None
    return ns / NS_PER_MS


def _value(unit: str, value: float | None) -> dict[str, Any] | None:
    return None if value is None else {"unit": unit, "avg": value}


def _block(unit: str, samples: Iterable[float]) -> dict[str, Any] | None:
    found = Distribution.of(samples)
    mean = found.mean()
    if mean is None:
        return None
    return {
        "unit": unit,
        "avg": mean,
        **{f"p{q}": found.percentile(q) for q in PERCENTILES},
        "min": found.values[0],
        "max": found.values[-1],
        "std": found.std(),
        "count": found.count,
        "sum": mean * found.count,
    }
