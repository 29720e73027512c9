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
    PluginSpec(
        name="describe",
        factory="servelab.plugins.tasks.describe:Describe",
        config="servelab.plugins.tasks.describe:DescribeConfig",
        summary="tell what a workload sends, without serving it: a table, workload.json and a picture",
        provides=frozenset({"task.offline"}),
        tier="stable",
    ),
    PluginSpec(
        name="quality",
        factory="servelab.plugins.tasks.quality:QualityTask",
        config="servelab.plugins.tasks.quality:QualityTaskConfig",
        summary="compare quantizers with the unquantized model on held-out text: a table and a plot",
        runs=("torch",),
        provides=frozenset({"task.offline"}),
        requires=frozenset({"executor.quality"}),
        imports=("matplotlib",),
        tier="stable",
    ),
)


@hookimpl
def servelab_tasks() -> Iterable[PluginSpec]:
    return TABLE
