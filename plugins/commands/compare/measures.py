"""Units of the figures of a run, and which way is better. One table; unknown figures have neither."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Better = Literal["less", "more", ""]


@dataclass(frozen=True, slots=True)
class Measure:
    """What a figure is in."""

    unit: str
    better: Better
    """Which way is better; empty: neither."""
    main: bool = False
    """Whether it is shown without ``--all``."""
    samples: str = ""
    """Key in ``servelab.samples`` of what is behind it."""


LATENCY = re.compile(
    r"(?:servelab\.)?(?P<stat>mean|median|std|p[\d.]+)_(?P<metric>ttft|tpot|itl|e2el|queueing)_ms"
)
MAIN_STATS = ("mean", "median", "p90", "p99")

TABLE: tuple[tuple[str, Measure], ...] = (
    (r"duration", Measure("s", "less", True)),
    (r"completed", Measure("req", "more", True)),
    (r"failed", Measure("req", "less", True)),
    (r"request_throughput", Measure("req/s", "more", True)),
    (r"(output|total_token)_throughput", Measure("tok/s", "more", True)),
    (r"request_goodput", Measure("req/s", "more", True)),
    (r"max_output_tokens_per_s", Measure("tok/s", "more")),
    (r"max_concurrent_requests", Measure("req", "")),
    (r"total_(input|output)_tokens", Measure("tok", "")),
    (r"servelab\.slo_attainment", Measure("share", "more", True)),
    (r"servelab\.slo_attainment_by_metric\..*", Measure("share", "more")),
    (r"servelab\.slo_by_class\..*\.request_goodput", Measure("req/s", "more")),
    (r"servelab\.slo_by_class\..*\.token_goodput", Measure("tok/s", "more")),
    (r"servelab\.slo_by_class\..*\.good", Measure("req", "more")),
    (r"servelab\.slo_by_class\..*\.judged", Measure("req", "")),
    (r"servelab\.slo_by_class\..*\.attainment.*", Measure("share", "more")),
    (r"servelab\.tbt_attainment", Measure("share", "more", True)),
    (r"servelab\.slo_good", Measure("req", "more")),
    (r"servelab\.(slo_judged|length_capped_requests)", Measure("req", "")),
    (r"servelab\.token_goodput", Measure("tok/s", "more", True)),
    (r"servelab\.requests\.(rejected|aborted|failed|cancelled|unfinished)", Measure("req", "less")),
    (r"servelab\.requests\..*", Measure("req", "")),
    (r"servelab\.preemptions", Measure("", "less", True)),
    (r"servelab\.recomputed_tokens", Measure("tok", "less", True)),
    (r"servelab\.prefix_hit_tokens", Measure("tok", "more", True)),
    (r"servelab\.prefix_hit_rate", Measure("share", "more")),
    (r"servelab\.evicted_pages", Measure("pages", "")),
    (r"servelab\.batch\.mean_requests", Measure("req/step", "", True)),
    (r"servelab\.batch\..*_requests", Measure("req", "")),
    (r"servelab\.batch\..*_tokens", Measure("tok", "")),
    (r"servelab\.instance_hours", Measure("h", "less")),
    (r"servelab\.instances\..*\.lasted", Measure("s", "")),
    (r"servelab\.router\.held_requests", Measure("req", "")),
    (r"servelab\.router\.moves", Measure("moves", "")),
    (r"servelab\.router\.dropped_actions", Measure("actions", "")),
    (r"servelab\.instances\..*\.(requests|dispatched|moved_in|moved_out)", Measure("req", "")),
    (r"servelab\.instances\..*\.steps", Measure("steps", "")),
    (r"servelab\.instances\..*_tokens", Measure("tok", "")),
    (r"servelab\.instances\..*\.mean_requests", Measure("req/step", "")),
    (r"servelab\.instances\..*_use", Measure("share", "")),
    (r"servelab\.kv_pages\..*\.peak_use", Measure("share", "", True)),
    (r"servelab\.kv_pages\..*_use", Measure("share", "")),
    (r"servelab\.kv_pages\..*(pages)", Measure("pages", "")),
    (r"servelab\.kv_pages\..*mean_(idle|unusable)_tokens", Measure("tok", "less")),
    (r"servelab\.kv_pages\..*_tokens", Measure("tok", "")),
    (r"servelab\.quality\..*\.kl_mean", Measure("nats", "less", True)),
    (r"servelab\.quality\..*\.kl_.*", Measure("nats", "less")),
    (r"servelab\.quality\..*\.top1_agreement", Measure("share", "more", True)),
    (r"servelab\.quality\..*\.perplexity", Measure("", "less", True)),
    (r"servelab\.quality\..*\.linear_bytes", Measure("bytes", "less")),
    (r"servelab\.wall_s", Measure("s", "less", True)),
    (r"servelab\.peak_rss_bytes", Measure("bytes", "less", True)),
    (r".*_bytes", Measure("bytes", "")),
    (r".*_ms", Measure("ms", "")),
)
"""Patterns of whole keys, the first that fits counts."""


def measure(key: str) -> Measure:
    """Unit and direction of a figure by its key in ``results.json``, parts joined by dots."""
    if match := LATENCY.fullmatch(key):
        return Measure("ms", "less", match["stat"] in MAIN_STATS, match["metric"])
    for pattern, found in TABLE:
        if re.fullmatch(pattern, key):
            return found
    return Measure("", "")
