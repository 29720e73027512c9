"""Schedulers, one line per technique: what each request does next."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

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
)


@hookimpl
def servelab_schedulers() -> Iterable[PluginSpec]:
    return TABLE
