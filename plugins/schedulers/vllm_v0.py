"""vLLM v0: whole prompts first, in steps of their own; preemption by recompute or swap.

Source: vLLM's first scheduler (vllm-project/vllm, ``vllm/core/scheduler.py`` at 0054e1f). Paged KV and both
ways of preemption are from Kwon et al., SOSP 2023, arXiv 2309.06180.

Mechanism: unless somebody is swapped out, waiting requests are admitted first come first served, whole
prompts only, up to the first for which the token budget, a seat or KV pages (beyond a watermark) are
missing. A step that admits runs these prompts and nothing else: decodes stall. Otherwise every running
request makes one token, oldest first; while there is no page for it, the youngest running request is
preempted. Only if nobody was, swapped requests come back, oldest first. With ``enable_chunked_prefill`` one
step holds it all under one token budget: running requests, then swapped ones, then new prompts, cut to fit.

Symbols: max_num_seqs, max_num_batched_tokens, delay_factor, preemption_mode, enable_chunked_prefill and the
watermark as in vLLM.

Deviations:
1. Steady decoding is held (``StepPlan.hold``), also while the queue is blocked; the steps are equal.
2. Pages that a swap frees come back when its transfer has ended, and a request swapped in runs then; the
   released code counts both within the step. Until then requests short of a page sit out, and nobody else
   is preempted.
3. A victim that the host tier has no room for is recomputed, and the log says so; the released code aborts
   the engine.
4. Each of several samples of one prompt is preempted alone; the released code preempts all of them.
5. A request that has outgrown max_num_batched_tokens when it is recomputed runs in several prompt steps;
   the released code drops it.
6. The watermark holds while anybody runs: the core promises that every request that fits alone is served.
7. Several victims of one step keep their order in the queue; the released code reverses it.
8. Chunked, nobody is admitted in a step that preempted; the released code may.

Faithful when: no step holds both prompts and decodes, unless chunked; the victim is always the youngest
running request; a preempted request precedes every request that never ran; nobody is admitted in a step
that preempted; no step swaps in and out; pages are conserved; neither way of preemption changes the output.

Tier: prototype: its published throughput is not reproduced yet.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import (
    ConfigError,
    Context,
    Hold,
    Record,
    RequestFinished,
    RequestView,
    StepPlan,
    StepView,
    TransferEnded,
    TransferStarted,
)
from servelab.plugins.schedulers._device import check_device
from servelab.plugins.schedulers._prompts import PromptBudget

_age = attrgetter("arrival_ns")


class VllmV0Config(BaseModel):
    """Settings of ``+scheduler=vllm_v0``. Defaults are vLLM v0's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        description="token budget of a step; longer prompts are rejected unless chunked. None: the longest "
        "request but at least 2048, chunked 512 (vllm/config.py), and at most engine.max_batch_tokens",
    )
    max_num_seqs: int = Field(
        256, ge=1, description="running requests at most (vllm/engine/arg_utils.py: 256)"
    )
    delay_factor: float = Field(
        0.0,
        ge=0,
        description="while requests run, admit only when the oldest has waited so many times the duration of "
        "the last prompt step; 0: at once (vLLM's default)",
    )
    watermark: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="share of KV pages that admissions leave free (vllm/core/block_manager_v1.py: 0.01)",
    )
    preemption_mode: Literal["auto", "recompute", "swap"] = Field(
        "auto",
        description="auto: recompute, but swap samples of a prompt that has several (vLLM's default); a swap "
        "needs executor.num_host_pages",
    )
    enable_chunked_prefill: bool = Field(
        False, description="cut prompts to the token budget and run them with decodes (vLLM v0's default: no)"
    )
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


class VllmV0:
    """State: transfers under way and the duration of the last prompt step. O(running + admitted) per step."""

    def __init__(self, config: VllmV0Config, ctx: Context) -> None:
        limits = ctx.limits
        usual = 512 if config.enable_chunked_prefill else max(limits.max_model_len, 2048)
        self.max_num_batched_tokens = config.max_num_batched_tokens or min(usual, limits.max_batch_tokens)
        check_device(
            ctx,
            tokens={"max_num_batched_tokens": self.max_num_batched_tokens},
            requests={"max_num_seqs": config.max_num_seqs},
        )
        if config.max_num_seqs > self.max_num_batched_tokens:
            raise ConfigError(
                f"scheduler.max_num_seqs is {config.max_num_seqs}",
                where=f"scheduler {ctx.name!r}",
                why="a decode step runs one token of every running request, and max_num_batched_tokens is "
                f"{self.max_num_batched_tokens}",
                do="lower scheduler.max_num_seqs, or raise scheduler.max_num_batched_tokens",
            )
        self.config = config
        self._transfers: dict[int, str] = {}
        """Under way, by number: ``out`` or ``in``."""
        self._returned: dict[str, None] = {}
        """Requests that were swapped in: they stand behind younger ones in order of admission."""
        self._prompts_began: int | None = None
        """When the last step was planned, if it ran prompts."""
        self._prompts_took = 0

    def on_event(self, record: Record) -> None:
        if isinstance(record, TransferStarted):
            self._transfers[record.transfer] = record.direction
            if record.direction == "in":
                self._returned[record.request] = None
        elif isinstance(record, TransferEnded):
            del self._transfers[record.transfer]
        elif isinstance(record, RequestFinished):
            self._returned.pop(record.request, None)

    def plan(self, view: StepView) -> StepPlan:
        if self._prompts_began is not None:
            self._prompts_took = view.now_ns - self._prompts_began
            self._prompts_began = None
        step = _Step(self, view)
        if self.config.enable_chunked_prefill:
            step.chunked()
        else:
            step.prompts_first()
        return step.plan

    def by_age(self, view: StepView) -> list[RequestView]:
        """Running requests, oldest first."""
        running = list(view.running)
        return sorted(running, key=_age) if self._returned else running

    def coming(self, direction: str) -> int:
        """Transfers under way in one direction."""
        return sum(under_way == direction for under_way in self._transfers.values())

    def ran_prompts(self, now_ns: int) -> None:
        """A step of prompts is planned now."""
        self._prompts_began = now_ns

    def delayed_until(self, view: StepView) -> int | None:
        """First nanosecond at which the oldest waiting request has waited long enough; None: it has."""
        if not self.config.delay_factor or not len(view.waiting):
            return None
        oldest = min(request.arrival_ns for request in view.waiting)
        until = oldest + int(self.config.delay_factor * self._prompts_took) + 1
        return until if until > view.now_ns else None


class _Step:
    """One plan in the making."""

    def __init__(self, policy: VllmV0, view: StepView) -> None:
        config = policy.config
        self.policy, self.config, self.view = policy, config, view
        self.plan = StepPlan()
        self.pages = PromptBudget(view, config.watermark, policy.max_num_batched_tokens)
        self.running = policy.by_age(view)
        self.seats = len(self.running) + view.forking + policy.coming("in")
        self.budget = policy.max_num_batched_tokens
        self.steady = True
        """Nothing would be planned differently before the next event."""
        self.short = False
        """Somebody who runs was preempted, or sits out for want of a page."""
        self._host = list(view.kv.free_host_pages)
        self._leaving = policy.coming("out")
        self._coming = [0] * len(view.kv.total_pages)
        """Pages that come back with the swaps of this plan, not yet counted on by anybody."""

    # ------------------------------------------------------------ the two modes

    def prompts_first(self) -> None:
        unfinished = next((r for r in self.running if r.pending_tokens > 1), None)
        if unfinished is not None:  # outgrown the budget and recomputed: nothing else before it is through
            self._recompute_on(unfinished)
            return
        until = None
        if not len(self.view.swapped) and not self._leaving:
            until = self.policy.delayed_until(self.view) if self.seats else None
            if until is None:
                self._admit()
        if self.plan.work:
            return
        self._run_running()
        self._swap_in()
        self._hold(until)

    def chunked(self) -> None:
        for request in self.running:
            if request.pending_tokens > 1:
                self.pages.promise(request)
        self._run_running()
        self._swap_in()
        until = None
        if not self.short:
            until = self.policy.delayed_until(self.view) if self.seats else None
            if until is None:
                self._admit()
        self._hold(until)

    def _hold(self, until: int | None) -> None:
        plan = self.plan
        if self.steady and plan.work and self.config.hold_steps > 1:
            plan.hold = Hold(self.config.hold_steps, until)

    # ------------------------------------------------------------------ running

    def _recompute_on(self, request: RequestView) -> None:
        n = min(request.pending_tokens, self.budget)
        if self.pages.take(request, n):
            self.plan.run(request, n)
            self.policy.ran_prompts(self.view.now_ns)
        else:
            self.plan.preempt(request, "recompute", f"out of KV pages for its prompt: {self.pages.free} free")

    def _run_running(self) -> None:
        """Tokens of running requests, oldest first; the youngest go until the rest has its pages."""
        running = self.running
        last = len(running)
        for index, request in enumerate(running[: self.config.max_num_seqs]):
            if index >= last:
                break
            pending = request.pending_tokens
            n = min(pending, self.budget)
            if n < 1:  # chunks before it took the rest
                self.steady = False
                break
            if pending > 1:
                self.steady = False
            if n > request.slack_tokens:
                last, fits = self._make_room(request, n, last)
                if not fits:
                    continue
            self.plan.run(request, n)
            self.budget -= n

    def _make_room(self, request: RequestView, n: int, last: int) -> tuple[int, bool]:
        """Pages for the request: how many still run, and whether it has them now."""
        while True:
            if self.pages.take(request, n):
                return last, True
            self.steady, self.short = False, True
            if self._leaving or self._waits(request, n):
                return last, False
            last -= 1
            victim = self.running[last]
            self._preempt(victim)
            if victim is request:
                return last, False

    def _waits(self, request: RequestView, n: int) -> bool:
        """Whether pages that a swap of this plan frees will do for it."""
        need = self.view.kv.pages_needed(request, n)
        left = [have - pages for have, pages in zip(self._coming, need, strict=True)]
        if min(left) < 0:
            return False
        self._coming = left
        return True

    def _preempt(self, victim: RequestView) -> None:
        spec, mode = victim.spec, self.config.preemption_mode
        several = spec.n > 1 or spec.sample > 0
        swap = mode == "swap" or (mode == "auto" and several)
        reason = "out of KV pages; youngest running request"
        if swap and (obstacle := self._obstacle(victim)):
            swap, reason = False, f"{reason}; not swapped: {obstacle}"
        if swap:
            self.plan.preempt(victim, "swap", reason)
            self.pages.forget(victim)
            self._host = [have - pages for have, pages in zip(self._host, victim.pages, strict=True)]
            self._coming = [have + pages for have, pages in zip(self._coming, victim.pages, strict=True)]
        else:
            self.plan.preempt(victim, "recompute", reason)
            self.pages.give_back(victim)

    def _obstacle(self, victim: RequestView) -> str:
        """Why the host tier cannot take it; empty: it can."""
        if not any(self.view.kv.total_host_pages):
            return "this run has no host pages (executor.num_host_pages)"
        if all(pages <= have for pages, have in zip(victim.pages, self._host, strict=True)):
            return ""
        return f"it holds {victim.pages} pages, {tuple(self._host)} are free on the host"

    # ---------------------------------------------------------------- swapping in

    def _swap_in(self) -> None:
        """Swapped requests come back, oldest first, up to the first that does not fit."""
        if self.short or self._leaving:
            return
        for request in sorted(self.view.swapped, key=_age):
            if self.seats and self.seats >= self.config.max_num_seqs:
                break
            if not self.budget or not self.pages.admit(request, 1, busy=bool(self.seats)):
                break
            self.plan.swap_in(request, "its KV pages and a seat are free again")
            self.seats += 1
            self.budget -= 1
            self.steady = False

    # ------------------------------------------------------------------ admitting

    def _admit(self) -> None:
        """Prompts in order, up to the first that has to wait."""
        config, plan, whole = self.config, self.plan, not self.config.enable_chunked_prefill
        limit = self.policy.max_num_batched_tokens
        for request in self.view.waiting:
            pending = request.pending_tokens
            if whole and pending > limit and request.admitted_ns is None:
                plan.reject(
                    request, f"prompt of {pending} tokens is longer than max_num_batched_tokens {limit}"
                )
                self.steady = False
                continue
            n = min(pending, limit) if whole else min(pending, self.budget)
            if n < 1 or n > self.budget:
                plan.defer(request, f"{pending} tokens, {self.budget} left in this step")
                break
            if self.seats and self.seats + request.forks >= config.max_num_seqs:
                plan.defer(request, f"max_num_seqs {config.max_num_seqs} reached")
                break
            if not self.pages.admit(request, n, busy=bool(self.seats)):
                plan.defer(request, f"out of KV pages: {self.pages.free} free")
                break
            plan.run(request, n)
            self.policy.ran_prompts(self.view.now_ns)
            self.budget -= n
            self.seats += 1 + request.forks
            self.steady = False
            if n < pending and whole:  # it outgrew the budget: alone, until it is through
                break
