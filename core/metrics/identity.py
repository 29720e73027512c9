"""Which run it was: from its first record, which says what it is, and its last, which says what it cost."""

from __future__ import annotations

from typing import Any

from servelab.core.metrics.definitions import NS_PER_MS
from servelab.core.metrics.timeline import Timeline

RAISED = ("plugins", "stamps", "seed", "clock")
"""Keys of the run's info that stand beside the figures, and not in ``info`` again."""
BACKEND = "servelab"


def vllm_identity(timeline: Timeline) -> dict[str, Any]:
    """What ``vllm bench serve`` writes before its figures; None where a run has no such thing."""
    info = timeline.info
    workload = (info.get("settings") or {}).get("workload") or {}
    planned = (info.get("workload") or {}).get("requests")
    if timeline.compared and not timeline.requests:
        planned = 0  # nothing was to be served, as in `task=quality`
    return {
        "date": timeline.finished.date if timeline.finished else None,
        "endpoint_type": BACKEND,
        "backend": BACKEND,
        "label": None,
        "model_id": info.get("model"),
        "tokenizer_id": info.get("tokenizer"),
        "num_prompts": len(timeline.requests) if planned is None else planned,
        "request_rate": workload.get("request_rate"),
        "burstiness": workload.get("burstiness"),
        "max_concurrency": workload.get("max_concurrency"),
    }


def identity(timeline: Timeline) -> dict[str, Any]:
    """What the run was made of and what it cost; what its info does not say is empty or None."""
    info, last = timeline.info, timeline.finished
    return {
        "plugins": {kind: _without_settings(stated) for kind, stated in (info.get("plugins") or {}).items()},
        "stamps": list(info.get("stamps") or ()),
        "seed": info.get("seed"),
        "clock": info.get("clock"),
        "wall_s": last.wall_s if last else None,
        "peak_rss_bytes": last.peak_rss_bytes if last else None,
        "energy_j": last.energy_j if last else None,
    }


def rest_of_info(timeline: Timeline) -> dict[str, Any]:
    """The run's info, less what stands elsewhere in the result."""
    return {key: value for key, value in timeline.info.items() if key not in RAISED}


def stated_tbt_ns(timeline: Timeline) -> int | None:
    """The run's general bound on gaps between tokens."""
    ms = _slo(timeline).get("tbt_ms")
    return None if ms is None else round(ms * NS_PER_MS)


def _slo(timeline: Timeline) -> dict[str, Any]:
    return (timeline.info.get("settings") or {}).get("slo") or {}


def notes(timeline: Timeline) -> list[str]:
    """What a reader of the figures should know, in sentences."""
    classes = _slo(timeline).get("classes") or {}
    arrived = {facts.request_class for facts in timeline.requests.values()}
    found = [
        f"slo.classes.{name} bounded nothing: no request of this class arrived"
        for name in classes
        if name not in arrived
    ]
    unbounded = sum(not facts.bounds for facts in timeline.requests.values())
    if 0 < unbounded < len(timeline.requests):
        found.append(
            f"{unbounded} of {len(timeline.requests)} requests state no bound and are not judged for goodput"
        )
    return found


def _without_settings(stated: Any) -> Any:
    """All settings are in ``info.settings`` already."""
    if isinstance(stated, list):
        return [_without_settings(one) for one in stated]
    return {key: value for key, value in stated.items() if key != "settings"}
