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
        name="orca_static",
        factory="servelab.plugins.tasks.orca_static:OrcaStatic",
        config="servelab.plugins.tasks.orca_static:OrcaStaticConfig",
        summary="experiment: request-level against iteration-level batching over the variance of outputs",
        paper=Paper(
            title="Orca: A Distributed Serving System for Transformer-Based Generative Models",
            year=2022,
            id="OSDI 2022",
        ),
        deviations=(
            "The paper's 36.9 times the throughput at equal latency is of GPT-3 175B on several A100s "
            "against FasterTransformer; here the gain of iteration-level batching alone is measured, on one "
            "device.",
            "Orca's last requests drain with places empty: a finite backlog keeps the ratio below its "
            "limit, by about E[max] / E[mean] over the number of batches, which the tolerance allows.",
            "Members that have finished leave the batch (the port's rule); on the device the iterations that "
            "are left are then cheaper than FasterTransformer's, whose places stay occupied.",
        ),
        runs=("sim",),
        requires=frozenset({"executor.sim"}),
        tier="stable",
    ),
    PluginSpec(
        name="pastfuture_goodput",
        factory="servelab.plugins.tasks.pastfuture_goodput:GoodputStudy",
        config="servelab.plugins.tasks.pastfuture_goodput:GoodputStudyConfig",
        summary="experiment: goodput of admission rules against closed-loop clients, and drifting lengths",
        paper=PASTFUTURE,
        deviations=(
            "The paper's goodput figures are in its plots: its words are judged here (flat, collapsing, "
            'saturating early, up to 2 to 3 times), by bounds of ours; "up to" by the law under which the '
            "gain is largest.",
            "Step times are the roofline's for this device, not LightLLM's; KV memory is 7500 pages of 16 "
            "tokens, whatever the device has room for. Llama-2's 4096 positions are exceeded, as in the "
            "paper.",
            "ShareGPT-o1 is drawn from its file's percentiles, prompts and outputs apart.",
            "The artifact's client states each true output length as the cap, and its Past-Future server "
            "then uses that instead of its draws. Here caps are a law's longest output, and nobody but the "
            "oracle knows lengths.",
            "Goodput is that of a span in mid-run; the artifact divides a fixed number of requests, all of "
            "them repeated until they have met the SLA, by the time until the last. A request that ended, "
            "but too late, is not repeated: its client goes on.",
            "The paper's figure calls aggressive's watermark 99 %; its server's code is 95 % before a prompt "
            "and 100 % with it, which is judged. The other reading is told.",
            "The drift run divides lengths and capacity by scale and counts decode steps, as the toy study.",
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
            "The preset quick divides lengths, capacity, tokens of a pass and the interval by scale and "
            "takes fewer requests, W with them: filling and draining weigh more, and use is lower.",
        ),
        runs=("sim",),
        requires=frozenset({"executor.sim"}),
        tier="stable",
    ),
    PluginSpec(
        name="sarathi_capacity",
        factory="servelab.plugins.tasks.sarathi_capacity:SarathiCapacity",
        config="servelab.plugins.tasks.sarathi_capacity:SarathiCapacityConfig",
        summary="experiment: capacity of Sarathi-Serve, vLLM v0 and Orca under bounds on gaps between tokens",
        paper=SARATHI,
        deviations=(
            "Lengths are log-normal through the median and the 90th percentile that the paper states for its "
            "data, drawn anew; prompts and outputs are independent. The data itself is not used.",
            "Step times are the roofline's for this device, with CUDA graphs as in vLLM 0.19; the paper's "
            "engines took longer on the host.",
            "Capacities differ from the paper's, which are in its plots; their ratios are judged, by bounds "
            "of ours.",
            "A search takes num_requests requests: an overload is seen only as far as it builds up in them.",
            "The paper's bounds of 0.1 and 0.5 s are used as they are, not 5 and 25 times what is measured "
            "here.",
        ),
        runs=("sim",),
        requires=frozenset({"executor.sim"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_tasks() -> Iterable[PluginSpec]:
    return TABLE
