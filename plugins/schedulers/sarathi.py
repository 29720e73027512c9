"""Sarathi-Serve: all decodes first, the rest of a fixed token budget filled with chunks of prompts.

Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024,
arXiv 2403.02310; released code microsoft/sarathi-serve at 13f16cf,
``sarathi/core/scheduler/sarathi_scheduler.py``.

Mechanism: a step has room for ``C = chunk_size`` tokens. Every running request whose prompt is computed
makes one token, oldest first, however many they are; while there is no page for it, the youngest running
request not yet considered is dropped (recomputed later), a half computed prompt like any other. What the
decodes leave of C goes to prompts under way, then to waiting requests, first come first served, up to the
first that does not fit. All the KV pages of a prompt are its own from admission on, and admissions leave a
watermark free.

Chunks may shrink as a prompt goes on (``enable_dynamic_chunking_schedule``), because later ones attend to
more: C is then one of ``chunk_schedule_stages`` sizes from ``high_chunk_size`` down to ``low_chunk_size``,
evenly spaced and rounded to 32, each for an equal part of the first ``chunk_schedule_max_tokens`` tokens of
the prompt.

Symbols: C -> ``chunk_size``; all other names are the released code's.

Deviations:
1. Steady decoding is held (``StepPlan.hold``), also while the queue is blocked; the steps are equal.
2. Pages are the core's, reserved as tokens run: what is left of a running prompt is counted as taken in
   every plan. In pools with a window that is no more than the window and a chunk.
3. A decode asks for a page when its last one is full; the released code preempts for any decode while no page
   is free.
4. The watermark holds while anybody runs: the core promises that every request that fits alone is served.
5. Nobody is admitted in a step that preempted.
6. A prompt longer than chunk_schedule_max_tokens stays at the last stage; the released code stops there.

Faithful when: every request whose prompt is computed makes a token in every step, unless preempted; tokens
of a step <= max(C, decodes); p prompt tokens beside d decodes take ceil(p / (C - d)) steps: C = 512, d =
30, p = 1000 gives 482, 482, 36; tokens of a step, and so its time, do not depend on how long prompts are;
tokens equal those of unchunked runs.

Tier: prototype: its published gain over vLLM is reproduced in the simulator only (``sarathi_capacity``).
"""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.core.api import Context, Hold, RequestView, StepPlan, StepView
from servelab.plugins.schedulers._decode import decode, decodes
from servelab.plugins.schedulers._device import check_device
from servelab.plugins.schedulers._prompts import PromptBudget

ALIGNMENT = 32
"""Tokens that chunk sizes of a schedule are multiples of (released code)."""


class SarathiConfig(BaseModel):
    """Settings of ``+scheduler=sarathi``. Defaults are the released code's (``sarathi/config/config.py``)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_size: int = Field(
        512,
        ge=1,
        description="tokens of a step, C, that prompts fill up (paper: 512 under a strict, 2048 under a "
        "relaxed bound on the time between tokens)",
    )
    max_num_seqs: int = Field(128, ge=1, description="running requests at most")
    watermark: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of KV pages that admissions leave free (base_block_space_manager.py: 0.01)",
    )
    enable_dynamic_chunking_schedule: bool = Field(
        False, description="shrink chunks as a prompt goes on; the four settings below state how"
    )
    low_chunk_size: int | None = Field(None, ge=1, description="C of the last stage, a multiple of 32")
    high_chunk_size: int | None = Field(None, ge=1, description="C of the first stage, a multiple of 32")
    chunk_schedule_max_tokens: int | None = Field(
        None, ge=1, description="prompt tokens that the stages divide among them"
    )
    chunk_schedule_stages: int | None = Field(None, ge=1, le=4096, description="stages")
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )

    @model_validator(mode="after")
    def _schedule_is_stated(self) -> Self:
        if self.enable_dynamic_chunking_schedule:
            low, high = self.low_chunk_size, self.high_chunk_size
            if not (low and high and self.chunk_schedule_max_tokens and self.chunk_schedule_stages):
                raise ValueError(
                    "enable_dynamic_chunking_schedule needs low_chunk_size, high_chunk_size, "
                    "chunk_schedule_max_tokens and chunk_schedule_stages"
                )
            if low > high or low % ALIGNMENT or high % ALIGNMENT:
                raise ValueError(
                    f"low_chunk_size {low} and high_chunk_size {high} must be multiples of {ALIGNMENT}, "
                    "the first no greater than the second"
                )
        return self


class ChunkSchedule:
    """C by how much of a prompt is computed."""

    def __init__(self, config: SarathiConfig) -> None:
        self.sizes: tuple[int, ...] = (config.chunk_size,)
        self._per_stage = 1
        if not config.enable_dynamic_chunking_schedule:
            return
        low, high, stages = config.low_chunk_size, config.high_chunk_size, config.chunk_schedule_stages
        assert low and high and stages and config.chunk_schedule_max_tokens
        between = max(1, stages - 1)
        rising = [low + (high - low) * k // between for k in range(stages)]
        self.sizes = tuple(round(size / ALIGNMENT) * ALIGNMENT for size in reversed(rising))
        self._per_stage = -(-config.chunk_schedule_max_tokens // stages)

    def size(self, computed_tokens: int) -> int:
        """C for the next chunk of a prompt of which so many tokens are computed."""
        return self.sizes[min(computed_tokens // self._per_stage, len(self.sizes) - 1)]


class Sarathi:
    """Stateless between steps. O(running + admitted) per step."""

    def __init__(self, config: SarathiConfig, ctx: Context) -> None:
        self.config = config
        self.chunks = ChunkSchedule(config)
        name = "high_chunk_size" if config.enable_dynamic_chunking_schedule else "chunk_size"
        self._most = max(self.chunks.sizes)
        check_device(ctx, tokens={name: self._most}, requests={"max_num_seqs": config.max_num_seqs})

    def plan(self, view: StepView) -> StepPlan:
        config = self.config
        plan = StepPlan()
        pages = PromptBudget(view, config.watermark, self._most)
        running = list(view.running)
        prompts = [request for request in running if not decodes(request)]
        for request in prompts:
            pages.promise(request)

        short = decode(plan, running, pages, config.max_num_seqs)
        steady = not short and len(plan.work) == len(running) > 0
        used = self._go_on(plan, prompts, pages)
        if not short and not plan.preemptions:
            steady = not self._admit(view, plan, len(running) + view.forking, used, pages) and steady
        if steady and config.hold_steps > 1:
            # who waits keeps waiting: pages and places only come back at an event
            plan.hold = Hold(config.hold_steps)
        return plan

    def _go_on(self, plan: StepPlan, prompts: list[RequestView], pages: PromptBudget) -> int:
        """Next chunks of prompts under way, as far as C goes; the tokens of the step so far."""
        used = len(plan.work)
        gone = {preemption.request.id for preemption in plan.preemptions}
        for request in prompts:
            n = min(request.pending_tokens, self.chunks.size(request.computed_tokens) - used)
            if request.id in gone or n < 1 or len(plan.work) >= self.config.max_num_seqs:
                continue
            if pages.take(request, n):
                plan.run(request, n)
                used += n
            else:  # its pages were its own: the pool has shrunk
                plan.preempt(request, "recompute", f"out of KV pages for its prompt: {pages.free} free")
                pages.give_back(request)
        return used

    def _admit(self, view: StepView, plan: StepPlan, seats: int, used: int, pages: PromptBudget) -> bool:
        """Waiting requests in order, up to the first that does not fit; True if any was admitted."""
        config = self.config
        admitted = False
        for request in view.waiting:
            if seats and seats + request.forks >= config.max_num_seqs:
                plan.defer(request, f"max_num_seqs {config.max_num_seqs} reached")
                break
            n = min(request.pending_tokens, self.chunks.size(request.computed_tokens) - used)
            if n < 1:
                plan.defer(request, f"no room for a chunk beside {used} tokens")
                break
            if not pages.admit(request, n, busy=bool(seats)):
                plan.defer(request, f"out of KV pages for its prompt: {pages.free} free")
                break
            plan.run(request, n)
            used += n
            seats += 1 + request.forks
            admitted = True
        return admitted
