"""Tasks, one line per technique: what is done with a run."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="bench",
        factory="servelab.plugins.tasks.bench:Bench",
        summary="serve the workload from start to end and measure it",
        tier="stable",
    ),
)


@hookimpl
def servelab_tasks() -> Iterable[PluginSpec]:
    return TABLE
