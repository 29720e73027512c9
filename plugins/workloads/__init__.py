"""Workloads, one line per technique: the traffic."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="chat",
        factory="servelab.plugins.workloads.chat:Chat",
        config="servelab.plugins.workloads.chat:ChatConfig",
        summary="open loop: instructions about real text, through the model's chat template",
        provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        requires=frozenset({"executor.tokenizer"}),
        tier="stable",
    ),
    PluginSpec(
        name="closed_loop",
        factory="servelab.plugins.workloads.closed_loop:ClosedLoop",
        config="servelab.plugins.workloads.closed_loop:ClosedLoopConfig",
        summary="closed loop: clients that ask again when they are answered, lengths from laws",
        provides=frozenset({"workload.prompt_ids", "workload.truth", "workload.closed_loop"}),
        tier="stable",
    ),
    PluginSpec(
        name="synthetic",
        factory="servelab.plugins.workloads.synthetic:Synthetic",
        config="servelab.plugins.workloads.synthetic:SyntheticConfig",
        summary="open loop: lengths from laws, arrivals from a renewal process",
        deviations=(
            "Times are whole nanoseconds, and the last one is exact, not exact up to rounding.",
            "A ramp may also go down, which vLLM refuses; it must start above 0, which vLLM only asserts.",
            "Prompt ids are uniform over the whole vocabulary, special tokens included; lengths are exact.",
        ),
        provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_workloads() -> Iterable[PluginSpec]:
    return TABLE
