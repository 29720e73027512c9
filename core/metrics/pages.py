"""KV memory per pool: pages in use, and what they were used for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servelab.core.metrics.definitions import ratio
from servelab.core.metrics.timeline import EngineFacts, Timeline


def kv_pages(timeline: Timeline) -> list[dict[str, Any]]:
    """Pages in use per pool: the run's info knows how many there are, the steps how many are free."""
    engines = [engine for engine in timeline.engines.values() if engine.min_free]
    kv = timeline.info.get("kv") or {}
    stated = kv.get("pools") or []
    ranges = kv.get("addressing") == "contiguous_slot"
    width = max([len(stated), *(len(engine.min_free) for engine in engines)])
    return [_pool(i, stated[i] if i < len(stated) else {}, engines, ranges) for i in range(width)]


def _pool(index: int, stated: dict[str, Any], engines: Sequence[EngineFacts], ranges: bool) -> dict[str, Any]:
    pages: int | None = stated.get("pages")
    engines = [engine for engine in engines if index < len(engine.min_free)]
    peak = mean = None
    if pages is not None and engines:
        peak = pages - min(engine.min_free[index] for engine in engines)
        observed = sum(engine.observed_ns for engine in engines)
        free = ratio(sum(engine.free_integral[index] for engine in engines), observed)
        mean = None if free is None else pages - free
    return {
        "pool": stated.get("id", str(index)),
        "pages": pages,
        "peak_pages": peak,
        "mean_pages": mean,
        "peak_use": None if peak is None or not pages else peak / pages,
        "mean_use": None if mean is None or not pages else mean / pages,
        **_tokens(index, stated, engines, mean, ranges),
    }


def _tokens(
    index: int, stated: dict[str, Any], engines: Sequence[EngineFacts], mean: float | None, ranges: bool
) -> dict[str, Any]:
    """What the memory in use was used for, and what could not be used. Pools with a window: not counted."""
    page, observed = stated.get("page_tokens"), sum(engine.observed_ns for engine in engines)
    if mean is None or not page or not observed or stated.get("window_tokens"):
        return dict.fromkeys(
            ("mean_stored_tokens", "mean_awaited_tokens", "mean_idle_tokens", "mean_unusable_tokens")
        )
    stored = sum(engine.memory.stored_ns for engine in engines) / observed
    awaited = sum(engine.memory.awaited_ns for engine in engines) / observed if ranges else 0.0
    unusable = sum(sum(engine.memory.unusable_ns[index : index + 1]) for engine in engines)
    once = not any(engine.memory.shared for engine in engines)
    return {
        "mean_stored_tokens": stored,
        "mean_awaited_tokens": awaited,
        "mean_idle_tokens": mean * page - stored - awaited if once else None,
        "mean_unusable_tokens": unusable * page / observed,
    }
