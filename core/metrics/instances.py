"""What each instance did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from servelab.core.metrics.definitions import NS_PER_MS, NS_PER_S, ratio
from servelab.core.metrics.timeline import EngineFacts, Timeline


def instances(timeline: Timeline) -> list[dict[str, Any]]:
    """One entry per instance, in order of ids: those that the run states, that started or that worked."""
    stated = (timeline.info.get("cluster") or {}).get("instances") or 0
    ids = sorted({*range(stated), *timeline.started_ns, *timeline.engines})
    pools = (timeline.info.get("kv") or {}).get("pools") or []
    ended: Counter[int] = Counter()
    outputs: Counter[int] = Counter()
    moves = timeline.router
    for facts in timeline.requests.values():
        ended[facts.engine] += 1
        outputs[facts.engine] += facts.output_tokens
    return [
        {
            "instance": str(i),
            "requests": ended[i],
            "dispatched": ended[i] - moves.came[i] + moves.left[i],
            "moved_in": moves.came[i],
            "moved_out": moves.left[i],
            "output_tokens": outputs[i],
            "lasted": _lasted_ns(timeline, i) / NS_PER_S,
            **_work(timeline.engines.get(i) or EngineFacts(), pools),
        }
        for i in ids
    ]


def router(timeline: Timeline) -> dict[str, Any]:
    """What a router did besides choosing an instance at arrival."""
    facts = timeline.router
    moves = facts.came.total()
    return {
        "held_requests": facts.held,
        "mean_held_ms": ratio(facts.held_ns / NS_PER_MS, facts.held - len(facts.waiting)),
        "moves": moves,
        "moved_bytes": facts.moved_bytes,
        "mean_stop_ms": ratio(facts.stopped_ns / NS_PER_MS, moves),
        "dropped_actions": facts.dropped,
    }


def _lasted_ns(timeline: Timeline, i: int) -> int:
    """From its start, which is paid for like the rest, until it stopped or the run ended."""
    return timeline.stopped_ns.get(i, timeline.last_ns) - timeline.started_ns.get(i, 0)


def _work(engine: EngineFacts, pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    peak, mean = _use(engine, pools)
    return {
        "steps": engine.steps,
        "run_tokens": engine.batch_tokens,
        "mean_requests": ratio(engine.batch_requests, engine.steps),
        "peak_kv_use": peak,
        "mean_kv_use": mean,
    }


def _use(engine: EngineFacts, pools: Sequence[dict[str, Any]]) -> tuple[float | None, float | None]:
    """Share of the bytes of all pools in use: at most, if all were fullest at once, and mean over time."""
    sizes: list[int] = [pool.get("bytes_per_page") or 0 for pool in pools]
    pages: list[int] = [pool.get("pages") or 0 for pool in pools]
    if not engine.min_free or len(engine.min_free) != len(pools) or not all(sizes) or not all(pages):
        return None, None
    total = sum(n * size for n, size in zip(pages, sizes, strict=True))
    least = sum(n * size for n, size in zip(engine.min_free, sizes, strict=True))
    if not engine.observed_ns:
        return 1 - least / total, None
    free = sum(n * size for n, size in zip(engine.free_integral, sizes, strict=True)) / engine.observed_ns
    return 1 - least / total, 1 - free / total
