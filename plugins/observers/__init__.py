"""Observers, one line per technique: who watches a run."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="jsonl",
        factory="servelab.plugins.observers.jsonl:JsonlObserver",
        config="servelab.plugins.observers.jsonl:JsonlConfig",
        summary="the event log and the plan log, as JSON lines",
        tier="stable",
    ),
    PluginSpec(
        name="progress",
        factory="servelab.plugins.observers.progress:progress",
        config="servelab.plugins.observers.progress:ProgressConfig",
        summary="one live line on the terminal: requests, tokens/s, KV pages in use",
        imports=("tqdm",),
        tier="stable",
    ),
    PluginSpec(
        name="report",
        factory="servelab.plugins.observers.report.observer:ReportObserver",
        config="servelab.plugins.observers.report.observer:ReportConfig",
        summary="run card, table of results, results.json",
        tier="stable",
    ),
    PluginSpec(
        name="trace",
        factory="servelab.plugins.observers.trace:TraceObserver",
        config="servelab.plugins.observers.trace:TraceConfig",
        summary="trace.json for Perfetto and chrome://tracing: launches, counters, requests, transfers",
        tier="stable",
    ),
)


@hookimpl
def servelab_observers() -> Iterable[PluginSpec]:
    return TABLE
