"""Schedulers, one line per technique: what each request does next."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PAST_FUTURE = Paper(
    title="Past-Future Scheduler for LLM Serving under SLA Guarantees", year=2025, id="arXiv:2507.10150"
)

WRAPPED = frozenset(f"scheduler.{one}" for one in ("ahead", "chunks", "lanes", "layers", "retains", "swap"))
"""What wrappers pass on: a run has those of them that the inner scheduler provides."""

TABLE = (
    PluginSpec(
        name="vllm_v1",
        factory="servelab.plugins.schedulers.vllm_v1:VllmV1",
        config="servelab.plugins.schedulers.vllm_v1:VllmV1Config",
        summary="vLLM v1: one token budget, running requests first, preemption by recompute",
        deviations=(
            "Requests are cut at engine.max_model_len by the core, not here.",
            "Steady decoding is held (StepPlan.hold) instead of being planned again each step; the "
            "steps are equal.",
            "Prefix-cache hits are the core's (cached_tokens); the released code looks them up inside "
            "the loop.",
            "Planning a step ahead (engine.max_in_flight=2), a request in flight is not a victim: the "
            "step waits for its pages instead.",
        ),
        tier="stable",
        provides=frozenset({"scheduler.chunks", "scheduler.lanes", "scheduler.ahead"}),
    ),
    PluginSpec(
        name="pastfuture",
        factory="servelab.plugins.schedulers.pastfuture:PastFuture",
        config="servelab.plugins.schedulers.pastfuture:PastFutureConfig",
        summary="LightLLM's Past-Future: admission by the predicted peak of KV demand, lengths from the past",
        paper=PAST_FUTURE,
        deviations=(
            "When nothing runs, the head of the queue is admitted as soon as its prompt fits; the "
            "released code would wait for ever if its predicted peak is above the bound.",
            "A page belongs to one request: page_tokens - 1 is added to every a. With pages of one "
            "token M* is the paper's.",
            "An evicted request is drawn on what it has produced; the artifact's server draws it afresh.",
            "Every draw is cut at the request's max_new_tokens. H begins with the longest output the "
            "model allows (cut like any draw); LightLLM derives it from its own limits on totals and "
            "prompts.",
            "Completed requests enter H, length-capped ones too: that is the KV they took. Cancelled "
            "and aborted ones do not: their lengths would be too short.",
            "Any number of requests per pass (artifact's server: one; its toy study: no limit). No "
            "aborts for the SLA.",
            "A prompt longer than the token budget runs in chunks; LightLLM runs it whole.",
            "Each of several samples of one prompt counts with the whole prompt, though they share its "
            "pages.",
        ),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="aggressive",
        factory="servelab.plugins.schedulers.aggressive:Aggressive",
        config="servelab.plugins.schedulers.aggressive:AggressiveConfig",
        summary="Past-Future's baseline: admission by the KV memory free now, output growth ignored",
        paper=PAST_FUTURE,
        deviations=(
            "The first of an empty batch is admitted as soon as its prompt fits.",
            "Used and wanted KV count in whole pages. With pages of one token the rule is the artifact's.",
            "A prompt longer than the token budget runs in chunks; LightLLM runs it whole.",
            "The rule is the toy study's; the artifact's server tests used < 0.95 * capacity and used + "
            "prompt < capacity. The toy study leaves out what an evicted request has produced.",
        ),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="conservative",
        factory="servelab.plugins.schedulers.conservative:Conservative",
        config="servelab.plugins.schedulers.conservative:ConservativeConfig",
        summary="Past-Future's baseline: admission by prompt plus output cap, no eviction",
        paper=PAST_FUTURE,
        deviations=(
            "The first of an empty batch is admitted as soon as its prompt fits.",
            "Each request counts in whole pages. With pages of one token the rule is the artifact's.",
            "A prompt longer than the token budget runs in chunks; LightLLM runs it whole.",
            "The cap is each request's own; the artifact's server assumes 12000 tokens for everyone.",
        ),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="pf_oracle",
        factory="servelab.plugins.schedulers.pf_oracle:PFOracle",
        config="servelab.plugins.schedulers.pf_oracle:PFOracleConfig",
        summary="Past-Future's theoretical optimum: the peak of KV demand from true output lengths",
        paper=PAST_FUTURE,
        deviations=(
            "The first of an empty batch is admitted as soon as its prompt fits.",
            "A page belongs to one request: page_tokens - 1 is added to every a. With pages of one "
            "token M* is the paper's.",
            "Lengths are cut at max_new_tokens.",
            "A prompt longer than the token budget runs in chunks; LightLLM runs it whole.",
            "Each of several samples of one prompt counts with the whole prompt, though they share its "
            "pages.",
        ),
        provides=frozenset({"scheduler.chunks"}),
        requires=frozenset({"workload.truth"}),
        oracle=True,
    ),
    PluginSpec(
        name="fcfs",
        factory="servelab.plugins.schedulers.fcfs:FCFS",
        config="servelab.plugins.schedulers.fcfs:FCFSConfig",
        summary="an order over any scheduler: first come, first served, by request or by program",
        provides=WRAPPED,
        tier="stable",
    ),
    PluginSpec(
        name="priority",
        factory="servelab.plugins.schedulers.priority:Priority",
        config="servelab.plugins.schedulers.priority:PriorityConfig",
        summary="an order over any scheduler: the more important first; the least important is preempted",
        deviations=(
            "Running requests of equal priority stand in order of admission when the inner scheduler "
            "chooses a victim; vLLM takes the one that arrived last.",
        ),
        provides=WRAPPED,
        tier="stable",
    ),
    PluginSpec(
        name="edf",
        factory="servelab.plugins.schedulers.edf:EDF",
        config="servelab.plugins.schedulers.edf:EDFConfig",
        summary="an order over any scheduler: earliest deadline first, deadlines from the requests' SLOs",
        paper=Paper(
            title="Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment",
            year=1973,
            id="doi:10.1145/321738.321743",
        ),
        deviations=(
            "Not preemptive: a running request goes on when one with an earlier deadline arrives.",
            "A deadline that has passed still counts: late requests go first.",
        ),
        provides=WRAPPED,
        tier="stable",
    ),
    PluginSpec(
        name="sjf",
        factory="servelab.plugins.schedulers.sjf:SJF",
        config="servelab.plugins.schedulers.sjf:SJFConfig",
        summary="an order over any scheduler: shortest job first, output lengths predicted from the past",
        deviations=(
            "The predictor is a running mean by class and prompt length, not a learned ranking: it sees no "
            "text.",
            "Not preemptive.",
            "Long jobs can wait for as long as shorter ones keep coming.",
        ),
        provides=WRAPPED,
    ),
    PluginSpec(
        name="sjf_oracle",
        factory="servelab.plugins.schedulers.sjf_oracle:SJFOracle",
        config="servelab.plugins.schedulers.sjf_oracle:SJFOracleConfig",
        summary="an order over any scheduler: shortest job first by true output lengths",
        deviations=(
            "Not preemptive.",
            "Long jobs can wait for as long as shorter ones keep coming.",
        ),
        provides=WRAPPED,
        requires=frozenset({"workload.truth"}),
        oracle=True,
        tier="stable",
    ),
)


@hookimpl
def servelab_schedulers() -> Iterable[PluginSpec]:
    return TABLE
