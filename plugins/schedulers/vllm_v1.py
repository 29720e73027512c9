"""vLLM v1: one token budget per step, running requests first, preemption by recompute.

Source: vLLM's v1 scheduler (vllm-project/vllm, ``vllm/v1/core/sched/scheduler.py``, read at v0.10.2 in a
public fork). Paged KV and preemption are from Kwon et al., SOSP 2023, arXiv 2309.06180; the unified budget
has no paper.

Mechanism: there are no phases. Running requests come first, in order of admission: each runs as many of its
pending tokens as the budget allows. When pages run out, the youngest running request is dropped
(recomputed later) and put at the front of the waiting queue, until the pages suffice or the request
itself was the youngest. Only in a step that preempted nobody are waiting requests admitted, first come first
served, stopping at the first that does not fit.

Symbols: max_num_batched_tokens, max_num_seqs, long_prefill_token_threshold as in vLLM.

Deviations:
1. Requests are cut at ``engine.max_model_len`` by the core, not here.
2. Steady decoding is held (``StepPlan.hold``) instead of being planned again each step; the steps are equal.
3. Prefix-cache hits are the core's (``cached_tokens``); the released code looks them up inside the loop.
4. Planning a step ahead (``engine.max_in_flight=2``), a request in flight is not a victim: the step waits for
   its pages instead.
5. With several lanes (``engine.lanes``), the oldest request of a plan waits for pages that other lanes hold
   and does not give up its own.

Faithful when: tokens per step <= budget, decodes of older requests first; the victim is always the most
recently admitted; a preempted request precedes every request that never ran; no admission in a step that
preempted; free pages are conserved; recompute preserves the output.

Tier: stable.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, Hold, KVBudget, RequestView, StepPlan, StepView, Tokens


class VllmV1Config(BaseModel):
    """Settings of ``+scheduler=vllm_v1``. Defaults are vLLM's for its API server on smaller GPUs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_batched_tokens: int = Field(
        2048,
        ge=1,
        description="token budget of a step (vllm/engine/arg_utils.py: 2048 below 70 GB)",
    )
    max_num_seqs: int = Field(256, ge=1, description="running requests at most (same source: 256)")
    long_prefill_token_threshold: int = Field(
        0,
        ge=0,
        description="prompt tokens of one request per step at most; 0: no limit (vLLM's default)",
    )
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


class VllmV1:
    """Stateless between steps. O(running + admitted) per step."""

    def __init__(self, config: VllmV1Config, ctx: Context) -> None:
        limits = ctx.limits
        for name, ours, device in (
            ("max_num_batched_tokens", config.max_num_batched_tokens, limits.max_batch_tokens),
            ("max_num_seqs", config.max_num_seqs, limits.max_batch_requests),
        ):
            if ours > device:
                raise ConfigError(
                    f"scheduler.{name} is {ours}",
                    where="scheduler 'vllm_v1'",
                    why=f"the engine accepts {device} per launch",
                    do=f"lower scheduler.{name}, or raise engine.max_batch_tokens or _requests",
                )
        self.config = config
        self._lanes = limits.lanes > 1

    def plan(self, view: StepView) -> StepPlan:
        config = self.config
        budget = config.max_num_batched_tokens
        longest = config.long_prefill_token_threshold or budget
        pages = view.kv.budget()
        victims: list[RequestView] = []
        steady, short = True, False

        running = list(view.running)
        last = len(running)  # running[:last] are still running in this plan
        seats = running[: config.max_num_seqs]  # with lanes there may be more
        plan = StepPlan()
        work = plan.work
        work += pages.take_decodes(seats[:budget])
        budget -= len(work)
        for index, request in enumerate(seats[len(work) :], len(work)):  # the first of them is no such decode
            if index >= last or not budget:
                steady = False
                break
            n = request.pending_tokens
            if n != 1:
                steady = False
                if not n:
                    continue
                n = min(n, longest, budget)
            if not pages.take(request, n):
                last, fits = self._make_room(request, n, running[:last], pages, victims)
                if not fits:
                    short = True
                    break
            work.append(request.next_token if n == 1 else Tokens(request, n))
            budget -= n
        for victim in victims:
            plan.preempt(victim, "recompute", "out of KV pages; youngest running request")

        if not victims and not short:
            admitted = self._admit(view, plan, len(running) + view.forking, budget, pages)
            steady = steady and not admitted
        if steady and not victims and not short and work and config.hold_steps > 1:
            # nothing changes until an event, a finish or a full pool: the core ends the hold then
            plan.hold = Hold(config.hold_steps)
        return plan

    def _make_room(
        self,
        request: RequestView,
        n: int,
        running: list[RequestView],
        pages: KVBudget,
        victims: list[RequestView],
    ) -> tuple[int, bool]:
        """Give up the youngest until ``n`` tokens fit: how many still run, and whether they fit."""
        last = len(running)
        while True:
            victim = running[last - 1]
            if victim.in_flight:  # planned a step ahead: its pages only come back when its launch ends
                return last, False
            if self._lanes and last == 1:  # the oldest here: what is missing is in flight on other lanes,
                return last, False  # where each would drop its own in turn, for ever
            last -= 1
            victims.append(victim)
            pages.give_back(victim)
            if victim is request:
                return last, False
            if pages.take(request, n):
                return last, True

    def _admit(self, view: StepView, plan: StepPlan, running: int, budget: int, pages: KVBudget) -> bool:
        """Admit waiting requests in order until one does not fit; True if any was admitted."""
        config = self.config
        longest = config.long_prefill_token_threshold or budget
        admitted = False
        for request in view.waiting:
            if running and running + request.forks >= config.max_num_seqs:
                plan.defer(request, f"max_num_seqs {config.max_num_seqs} reached")
                break
            n = min(request.pending_tokens, longest, budget)
            if n < 1:
                plan.defer(request, "token budget used up")
                break
            if not pages.take(request, n):
                plan.defer(request, f"out of KV pages: {pages.free} free")
                break
            plan.run(request, n)
            budget -= n
            running += 1 + request.forks
            admitted = True
        return admitted
