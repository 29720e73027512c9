"""Tasks, one line per technique: what is done with a run."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PASTFUTURE = Paper(
    title="Past-Future Scheduler for LLM Serving under SLA Guarantees", year=2025, id="arXiv:2507.10150"
)

SARATHI = Paper(
    title="Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
    year=2024,
    id="arXiv:2403.02310",
)

TABLE = (
    PluginSpec(
        name="bench",
        factory="servelab.plugins.tasks.bench:Bench",
        summary="serve the workload from start to end and measure it",
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
    PluginSpec(
        name="capacity",
        factory="servelab.plugins.tasks.capacity:Capacity",
        config="servelab.plugins.tasks.capacity:CapacityConfig",
        summary="find the highest request rate at which an SLO holds, per seed by bisection",
        paper=SARATHI,
        deviations=(
            "The released search looks for the rate on a fixed grid of one trace; here each seed is a trace "
            "of its own.",
            "Scheduling delay is the time until a request's first launch begins (queueing_ms).",
        ),
        runs=("sim",),
        requires=frozenset({"executor.sim"}),
        tier="stable",
    ),
    PluginSpec(
        name="pastfuture_toy",
        factory="servelab.plugins.tasks.pastfuture_toy:ToyStudy",
        config="servelab.plugins.tasks.pastfuture_toy:ToyStudyConfig",
        summary="experiment: KV use of ten admission rules over a backlog, beside the authors' figures",
        paper=PASTFUTURE,
        deviations=(
            "In the authors' scripts memory may overflow for a step; here a prompt waits until its pages "
            "are free, and running requests are evicted before a step that they would not fit.",
            "An evicted request comes back with what it has produced; their scripts count only its prompt, "
            "or nothing, and so admit it again too early: they evict more.",
            "Outputs end at the request's cap. Their script for D2 states a cap of 4096 to the conservative "
            "rule and lets outputs run to 5000; here both are 5000, so that conservative admits less there "
            "than the authors report.",
            "The preset quick divides lengths, capacity, tokens of a pass and the interval by scale and "
            "takes fewer requests: filling and draining weigh more, and use is lower.",
        ),
        runs=("sim",),
        requires=frozenset({"executor.sim"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_tasks() -> Iterable[PluginSpec]:
    return TABLE
