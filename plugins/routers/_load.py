"""How loaded an instance is, and what to do when there is none."""

from __future__ import annotations

from typing import Literal

from servelab.core.families.router import ClusterView, Hold, InstanceRow

Measure = Literal["requests", "tokens", "kv"]
MEASURES = (
    "requests: waiting and running; tokens: prompt tokens still to compute and the contexts of running "
    "requests; kv: pages in use and wanted by waiting requests, of all its pages"
)
RETRY_NS = 1_000_000_000
"""Without an active instance the core is asked again after this time, or at the next report."""


def load(row: InstanceRow, measure: Measure) -> float:
    """What an instance has to serve, as it reported it."""
    if measure == "requests":
        return row.waiting + row.running
    if measure == "tokens":
        return row.prefill_tokens + row.context_tokens
    wanted = row.total_pages - row.free_pages + sum(row.waiting_pages)
    return wanted / max(row.total_pages, 1)


def nobody(view: ClusterView) -> Hold:
    """No instance is active: wait for one."""
    return Hold(view.now_ns + RETRY_NS)
