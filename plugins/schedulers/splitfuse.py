"""Dynamic SplitFuse: every forward pass has the same size; long prompts are cut, short ones put together.

Source: Holmes et al., "DeepSpeed-FastGen: High-throughput Text Generation for LLMs via MII and
DeepSpeed-Inference", 2024, arXiv 2401.08671; released code microsoft/DeepSpeed-MII
(``mii/batching/ragged_batching.py``) and microsoft/DeepSpeed
(``deepspeed/inference/v2/ragged/manager_configs.py``).

Mechanism: requests stand in a buffer, first in first out; one that has made a token goes to its end. A pass
takes generations first, one token each, skipping those that find no page; then prompts in order, as many of
their tokens as are left, provided that all that is left of the prompt would fit in free pages, else none
after it either. At most the last of them is cut, and stays at the front. If nothing can run, the last in
the buffer that holds KV is reset: its KV is dropped, and it goes to the end as a prompt with all it has
produced.

Symbols: max_ragged_batch_size (tokens), max_ragged_sequence_count (requests) as in DeepSpeed, whose KV
blocks have 128 tokens: ``kvcache.page_tokens=128``.

Deviations:
1. Steady decoding is held (``StepPlan.hold``), also while the queue is blocked; the steps are equal.
2. A reset keeps its place behind everybody who had arrived by then; others keep the order of the queue.
3. In pools with a window, what is left of a prompt counts no more than the window and a pass.
4. Passes are planned while the one before runs only with engine.max_in_flight=2; a request in flight is not
   reset then.

Faithful when: tokens of a pass <= 768, and 768 whenever so many are pending and KV permits; only the last
piece of a prompt samples; at most one prompt is cut in a pass; generations precede prompts; tokens equal
those of unsplit runs.

Tier: prototype: its published throughput is not reproduced yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, Hold, RequestView, StepPlan, StepView
from servelab.plugins.schedulers._decode import decodes
from servelab.plugins.schedulers._device import check_device
from servelab.plugins.schedulers._prompts import PromptBudget


class SplitFuseConfig(BaseModel):
    """Settings of ``+scheduler=splitfuse``. Defaults are DeepSpeed's (``manager_configs.py``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_ragged_batch_size: int = Field(768, ge=1, description="tokens of a pass at most")
    max_ragged_sequence_count: int = Field(512, ge=1, description="requests of a pass at most")
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


class SplitFuse:
    """State: the order of the buffer. O(running log running + admitted) per step."""

    def __init__(self, config: SplitFuseConfig, ctx: Context) -> None:
        tokens, requests = config.max_ragged_batch_size, config.max_ragged_sequence_count
        limits = ctx.limits
        check_device(ctx, tokens={"max_ragged_batch_size": tokens}, requests={})
        check_device(ctx, tokens={}, requests={"max_ragged_sequence_count": min(requests, tokens)})
        self.config = config
        self._most = min(requests, tokens, limits.max_batch_requests)
        self._resets: dict[str, tuple[int, int]] = {}
        """When waiting requests were reset: time, and number among all resets."""
        self._order: dict[str, int] = {}
        """Generations as they stand in the buffer; empty: as they run."""

    def plan(self, view: StepView) -> StepPlan:
        config, plan = self.config, StepPlan()
        pages = PromptBudget(view, 0.0, config.max_ragged_batch_size)
        running = list(view.running)
        generations = [r for r in running if decodes(r)]
        if self._order:  # else all of them had a token in the last pass, in this order
            generations.sort(key=lambda r: self._order.get(r.id, len(self._order)))
        prompts = [r for r in running if not decodes(r)]

        served: list[RequestView] = []
        for request in generations:
            if len(served) >= self._most:
                break
            if request.pending_tokens and pages.take(request, 1):
                plan.work.append(request.next_token)
                served.append(request)
        steady = len(served) == len(running) > 0
        self._put_back(generations, served, running)
        left = config.max_ragged_batch_size - len(plan.work)
        for request in chain(prompts, self._buffer(view)):
            n = min(request.pending_tokens, left)
            if n < 1 or len(plan.work) >= self._most:
                break
            if not pages.admit(request, n, busy=False):
                if request not in prompts:
                    plan.defer(request, f"{request.pending_tokens} tokens do not fit in {pages.free} pages")
                break
            plan.run(request, n)
            self._resets.pop(request.id, None)
            left -= n
            steady = False

        if not plan.work:
            self._reset(view, plan, [*prompts, *generations])
        elif steady and config.hold_steps > 1:
            plan.hold = Hold(config.hold_steps)
        return plan

    def _put_back(
        self, generations: list[RequestView], served: list[RequestView], running: list[RequestView]
    ) -> None:
        """Who has a token goes to the end of the buffer, behind those that were left out."""
        if len(served) < len(generations):
            ids = {request.id: None for request in served}
            generations = [r for r in generations if r.id not in ids] + served
        self._order = {}
        if generations != running:
            self._order = {request.id: k for k, request in enumerate(generations)}

    def _buffer(self, view: StepView) -> Iterable[RequestView]:
        """Waiting requests in order; those that were reset stand where they were put then."""
        if not len(view.waiting):
            self._resets.clear()
        return self._merged(view.waiting) if self._resets else view.waiting

    def _merged(self, waiting: Iterable[RequestView]) -> Iterator[RequestView]:
        """The queue has whoever was preempted in front; each goes behind those who had arrived by then."""
        back: list[RequestView] = []
        for request in waiting:
            if request.id in self._resets and request.preemptions:
                back.append(request)
                back.sort(key=self._put_in)
                continue
            while back and self._put_in(back[0])[0] < request.arrival_ns:
                yield back.pop(0)
            yield request
        yield from back

    def _put_in(self, request: RequestView) -> tuple[int, int]:
        return self._resets[request.id]

    def _reset(self, view: StepView, plan: StepPlan, holders: list[RequestView]) -> None:
        """Nothing can run: drop the last that holds KV, unless a launch in flight will bring some."""
        if not holders or any(request.in_flight for request in holders):
            return
        victim = holders[-1]
        plan.preempt(victim, "recompute", "nothing fits in free KV pages; last in the buffer")
        self._resets[victim.id] = view.now_ns, len(self._resets)
