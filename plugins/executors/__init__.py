"""Executors, one line per technique: where a batch runs."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="scripted",
        factory="servelab.plugins.executors.scripted:ScriptedExecutor",
        config="servelab.plugins.executors.scripted:ScriptedExecutorConfig",
        summary="placeholder tokens until the workload's hidden lengths end, no model",
        runs=("sim",),
        provides=frozenset({"executor.sim", "executor.simulated"}),
        requires=frozenset({"workload.truth"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_executors() -> Iterable[PluginSpec]:
    return TABLE
