"""Schedulers, one line per technique: what each request does next."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PAST_FUTURE = Paper(
    title="Past-Future Scheduler for LLM Serving under SLA Guarantees", year=2025, id="arXiv:2507.10150"
)
_ALONE = "When nothing runs, the head of the queue is admitted as soon as its prompt fits."
_PAGES = "KV demand counts whole pages per request; with pages of one token it is the paper's."
_CHUNKS = "A prompt longer than the token budget runs in chunks."

TABLE = (
    PluginSpec(
        name="vllm_v1",
        factory="servelab.plugins.schedulers.vllm_v1:VllmV1",
        config="servelab.plugins.schedulers.vllm_v1:VllmV1Config",
        summary="vLLM v1: one token budget, running requests first, preemption by recompute",
        deviations=(
            "Requests are cut at engine.max_model_len by the core.",
            "Steady decoding is held instead of being planned again each step; the steps are the same.",
            "Prefix-cache hits are looked up by the core.",
            "Planning a step ahead, a request in flight is not a victim: the step waits for its pages.",
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
            _ALONE,
            _PAGES,
            _CHUNKS,
            "Draws are cut at the request's output cap; an evicted request is drawn on what it has produced.",
            "Any number of requests per admission pass; no aborts for the SLA.",
        ),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="aggressive",
        factory="servelab.plugins.schedulers.aggressive:Aggressive",
        config="servelab.plugins.schedulers.aggressive:AggressiveConfig",
        summary="Past-Future's baseline: admission by the KV memory free now, output growth ignored",
        paper=PAST_FUTURE,
        deviations=(_ALONE, _PAGES, _CHUNKS),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="conservative",
        factory="servelab.plugins.schedulers.conservative:Conservative",
        config="servelab.plugins.schedulers.conservative:ConservativeConfig",
        summary="Past-Future's baseline: admission by prompt plus output cap, no eviction",
        paper=PAST_FUTURE,
        deviations=(_ALONE, _PAGES, _CHUNKS, "The cap is each request's own."),
        provides=frozenset({"scheduler.chunks"}),
    ),
    PluginSpec(
        name="pf_oracle",
        factory="servelab.plugins.schedulers.pf_oracle:PFOracle",
        config="servelab.plugins.schedulers.pf_oracle:PFOracleConfig",
        summary="Past-Future's theoretical optimum: the peak of KV demand from true output lengths",
        paper=PAST_FUTURE,
        deviations=(_ALONE, _PAGES, _CHUNKS, "Lengths are cut at the request's output cap."),
        provides=frozenset({"scheduler.chunks"}),
        requires=frozenset({"workload.truth"}),
        oracle=True,
    ),
)


@hookimpl
def servelab_schedulers() -> Iterable[PluginSpec]:
    return TABLE
