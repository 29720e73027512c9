"""Workloads, one line per technique: the traffic."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PASSED_ON = frozenset({"workload.prompt_ids", "workload.truth", "workload.closed_loop", "workload.programs"})
"""What workloads made of others provide as far as these do."""

TABLE = (
    PluginSpec(
        name="azure",
        factory="servelab.plugins.workloads.azure:Azure",
        config="servelab.plugins.workloads.azure:AzureConfig",
        summary="open loop: the Azure LLM inference traces, code and conversation",
        paper=Paper(
            title="Splitwise: Efficient Generative LLM Inference Using Phase Splitting",
            year=2024,
            id="arXiv 2311.18677",
        ),
        provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        tier="stable",
    ),
    PluginSpec(
        name="burstgpt",
        factory="servelab.plugins.workloads.burstgpt:BurstGPT",
        config="servelab.plugins.workloads.burstgpt:BurstGPTConfig",
        summary="open loop: the BurstGPT trace from its csv, or BurstGPT-like requests from its statistics",
        paper=Paper(
            title="BurstGPT: A Real-World Workload Dataset to Optimize LLM Serving Systems",
            year=2024,
            id="arXiv 2401.17644",
        ),
        deviations=(
            "A failed row (0 response tokens) cannot be served as such: an engine that reads a prompt "
            "answers at least one token. By default it is replayed with 1 output token, and 1 prompt token "
            "where the file says 0; with failures: drop it is left out. Generated traffic has no "
            "failures.",
            "Generated traffic has one mean rate: no days, no nights. Model and log type are drawn "
            "independently, and a log type's shape of gaps is that of all.",
            "Turns of a session come at their recorded times, whenever the turn before them ends; how much "
            "of a prompt repeats the turn before is not recorded, so context_tokens is 0.",
        ),
        provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        tier="stable",
    ),
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
        name="mooncake",
        factory="servelab.plugins.workloads.mooncake:Mooncake",
        config="servelab.plugins.workloads.mooncake:MooncakeConfig",
        summary="open loop: the Mooncake traces, long prompts whose hashes say what they share",
        paper=Paper(
            title="Mooncake: A KVCache-centric Disaggregated Architecture for LLM Serving",
            year=2025,
            id="arXiv 2407.00079",
        ),
        deviations=(
            "Where at least half of the gaps are 0, times inside a tick are drawn uniformly, in the order of "
            "the file; the tick is the median gap between different stamps. spread_ticks: false replays "
            "the stamps.",
            "Tokens are made up: prompts that share no block share no token prefix but by chance.",
        ),
        provides=frozenset({"workload.prompt_ids", "workload.truth"}),
        tier="stable",
    ),
    PluginSpec(
        name="mix",
        factory="servelab.plugins.workloads.mix:Mix",
        config="servelab.plugins.workloads.mix:MixConfig",
        summary="several workloads at the same time, each with labels, a beginning and a speed of its own",
        provides=PASSED_ON,
        tier="stable",
    ),
    PluginSpec(
        name="transform",
        factory="servelab.plugins.workloads.transform:Transform",
        config="servelab.plugins.workloads.transform:TransformConfig",
        summary="another workload's requests: scaled, thinned, sliced, with other times, lengths or labels",
        provides=PASSED_ON,
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
