"""Schedulers, one line per technique: what each request does next."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

PAST_FUTURE = Paper(
    title="Past-Future Scheduler for LLM Serving under SLA Guarantees", year=2025, id="arXiv:2507.10150"
)

WRAPPED = frozenset(f"scheduler.{one}" for one in ("ahead", "chunks", "lanes", "layers", "retains", "swap"))
"""What wrappers pass on: a run has those of them that the inner scheduler provides."""
PAGED_ATTENTION = Paper(
    title="Efficient Memory Management for Large Language Model Serving with PagedAttention",
    year=2023,
    id="arXiv:2309.06180",
)
SARATHI = Paper(
    title="Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve",
    year=2024,
    id="arXiv:2403.02310",
)
ORCA = Paper(
    title="Orca: A Distributed Serving System for Transformer-Based Generative Models",
    year=2022,
    id="OSDI 2022",
)
FASTGEN = Paper(
    title="DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and DeepSpeed-Inference",
    year=2024,
    id="arXiv:2401.08671",
)

HELD = "Steady decoding is held (StepPlan.hold), also while the queue is blocked; the steps are equal."
ALONE = (
    "The watermark holds while anybody runs: the core promises that every request that fits alone is served."
)

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
            "With several lanes (engine.lanes), the oldest request of a plan waits for pages that other "
            "lanes hold and does not give up its own.",
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
            "Any number of requests per pass (artifact's server: one; its toy study: no limit), and nobody "
            "is ended for the SLA, unless queue_limit_ms and gap_limit_ms say when; the latter then ends "
            "evicted requests as well.",
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
            "The rule is the toy study's, which leaves out what an evicted request has produced. That of the "
            "artifact's server, used < 0.95 * capacity and used + prompt < capacity, is start_below=0.95 and "
            "watermark=1.",
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
            "By default the cap is each request's own; the artifact's server assumes 12000 tokens for "
            "everyone.",
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
    PluginSpec(
        name="vllm_v0",
        factory="servelab.plugins.schedulers.vllm_v0:VllmV0",
        config="servelab.plugins.schedulers.vllm_v0:VllmV0Config",
        summary="vLLM v0: whole prompts first in steps of their own, preemption by recompute or swap",
        paper=PAGED_ATTENTION,
        deviations=(
            HELD,
            "Pages that a swap frees come back when its transfer has ended, and a request swapped in runs "
            "then; the released code counts both within the step. Until then requests short of a page sit "
            "out, and nobody else is preempted.",
            "A victim that the host tier has no room for is recomputed, and the log says so; the released "
            "code aborts the engine.",
            "Each of several samples of one prompt is preempted alone; the released code preempts all of "
            "them.",
            "A request that has outgrown max_num_batched_tokens when it is recomputed runs in several "
            "prompt steps; the released code drops it.",
            ALONE,
            "Several victims of one step keep their order in the queue; the released code reverses it.",
            "Chunked, nobody is admitted in a step that preempted; the released code may.",
        ),
        provides=frozenset({"scheduler.chunks", "scheduler.swap"}),
        requires=frozenset({"kvcache.swap"}),
    ),
    PluginSpec(
        name="sarathi",
        factory="servelab.plugins.schedulers.sarathi:Sarathi",
        config="servelab.plugins.schedulers.sarathi:SarathiConfig",
        summary="Sarathi-Serve: all decodes, then chunks of prompts up to a fixed token budget",
        paper=SARATHI,
        deviations=(
            HELD,
            "Pages are the core's, reserved as tokens run: what is left of a running prompt is counted as "
            "taken in every plan. In pools with a window that is no more than the window and a chunk.",
            "A decode asks for a page when its last one is full; the released code preempts for any decode "
            "while no page is free.",
            ALONE,
            "Nobody is admitted in a step that preempted.",
            "A prompt longer than chunk_schedule_max_tokens stays at the last stage; the released code "
            "stops there.",
        ),
        provides=frozenset({"scheduler.ahead", "scheduler.chunks"}),
    ),
    PluginSpec(
        name="orca",
        factory="servelab.plugins.schedulers.orca:Orca",
        config="servelab.plugins.schedulers.orca:OrcaConfig",
        summary="Orca: a new batch every iteration, whole prompts beside decodes, worst-case KV reservation",
        paper=ORCA,
        deviations=(
            HELD,
            "An iteration has engine.max_batch_tokens tokens; the port has no limit. A prompt that is "
            "longer is rejected, one that does not fit beside the decodes waits.",
            "The reservation is an account over the KV cache's pages. Each of several samples of one "
            "prompt reserves for itself, and all that one request asks for must fit the pool, else it is "
            "rejected.",
            "The first of an empty batch is admitted as soon as its prompt fits. Only in pools that "
            "shrink during a run, or with reserve=kvcache over a cache that reserves nothing, may a "
            "decode find no page: the youngest is dropped then.",
            "One batch is in flight; the paper's pipelines have one per stage.",
        ),
        provides=frozenset({"scheduler.ahead"}),
    ),
    PluginSpec(
        name="static_batch",
        factory="servelab.plugins.schedulers.static_batch:StaticBatch",
        config="servelab.plugins.schedulers.static_batch:StaticBatchConfig",
        summary="request-level batching: a batch runs until its last member has finished, then the next",
        paper=ORCA,
        deviations=(
            HELD,
            "An iteration has engine.max_batch_tokens tokens, the port has no limit: a batch ends where "
            "its prompts fill one, and a prompt that is longer is rejected.",
            "The reservation is an account over the KV cache's pages; each of several samples reserves "
            "for itself. The first of a batch is admitted as soon as its prompt fits. Only in pools that "
            "shrink during a run, or with reserve=kvcache over a cache that reserves nothing, may a "
            "decode find no page: the youngest is dropped then.",
            "With keep_padding a finished place costs the linear layers of one token, as FasterTransformer, "
            "whose decode attention leaves finished sequences out; as background work, which cost models "
            "price by itself. It runs where nothing is timed for real: the torch executor refuses background "
            "work.",
            "KV of finished members is free at once, also with keep_padding: nobody could be admitted to "
            "it before the batch ends.",
        ),
        provides=frozenset({"scheduler.ahead"}),
    ),
    PluginSpec(
        name="splitfuse",
        factory="servelab.plugins.schedulers.splitfuse:SplitFuse",
        config="servelab.plugins.schedulers.splitfuse:SplitFuseConfig",
        summary="Dynamic SplitFuse: passes of one size, long prompts cut and short ones put together",
        paper=FASTGEN,
        deviations=(
            HELD,
            "A reset keeps its place behind everybody who had arrived by then; others keep the order of "
            "the queue.",
            "In pools with a window, what is left of a prompt counts no more than the window and a pass.",
            "Passes are planned while the one before runs only with engine.max_in_flight=2; a request in "
            "flight is not reset then.",
        ),
        provides=frozenset({"scheduler.ahead", "scheduler.chunks"}),
    ),
)


@hookimpl
def servelab_schedulers() -> Iterable[PluginSpec]:
    return TABLE
