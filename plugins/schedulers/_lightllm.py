"""LightLLM's batch composer, shared by the schedulers that differ in admission only.

Source: Gong et al., ASPLOS 2025, arXiv 2507.10150; router of the artifact (WuSiYu/lightllm-ae at 0da617f,
``lightllm/server/router/manager.py`` and ``req_queue.py``).

Mechanism: prompts and decodes run in separate steps. Every ``admission_interval`` decode steps, and at once
when nothing runs, an admission pass goes through the queue, first come first served, up to the first request
that the policy refuses or that does not fit; the prompts admitted run together in the next step. In a
decode step every running request makes one token; while pages are short the newest running request is dropped
(recomputed later) and goes to the front of the queue. A prompt longer than a step that has the device to
itself runs in chunks, of which pools with a window need to hold only one at a time.

Invariant: admission is in order and victims are the newest, so every running request arrived before every
waiting one, and the newest is the last of ``view.running``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, Hold, KVBudget, RequestView, StepPlan, StepView

NS_PER_MS = 1_000_000
Judge = Callable[[RequestView], str | None]
"""Asked about the candidates of one pass in turn: None admits, a text says why not. It counts every candidate
it was asked about as part of the batch."""


class ComposerConfig(BaseModel):
    """Settings that every policy on this composer has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    admission_interval: int = Field(
        2, ge=1, description="decode steps between admission passes (artifact server: 2; its toy study: 10)"
    )
    max_new_per_pass: int | None = Field(
        None, ge=1, description="requests one pass admits at most; None: no limit (artifact server: 1)"
    )
    max_num_seqs: int = Field(256, ge=1, description="running requests at most (ours, as vLLM's)")
    max_num_batched_tokens: int = Field(
        2048,
        ge=1,
        description="prompt tokens one pass admits at most, and tokens of a step; a longer one runs alone, "
        "in chunks (ours, as vLLM's; artifact toy study: 32768)",
    )
    mixed: bool = Field(
        False,
        description="run prompts in the same step as decodes; false: in steps of their own (as LightLLM)",
    )
    queue_limit_ms: float | None = Field(
        None,
        gt=0,
        description="reject a request that has waited longer and never ran; None: never (artifact server: "
        "8000, for a first token within 10 s)",
    )
    gap_limit_ms: float | None = Field(
        None,
        gt=0,
        description="abort a request whose last token is older, evicted ones too; None: never (artifact "
        "server: 1490, for gaps of at most 1.5 s)",
    )
    hold_steps: int = Field(
        4096, ge=1, description="steps of unchanged decoding to ask for at once; 1 plans every step (ours)"
    )


@dataclass(frozen=True, slots=True)
class Room:
    """KV memory at one admission pass in tokens, of whichever pool is tightest.

    Pools with a window count only where all have one: elsewhere a request does not grow there for long.
    """

    capacity: int
    used: int
    """In pages that somebody holds."""
    kept: int
    """Of these, held by paused requests and by programs between turns."""
    page_tokens: int

    @classmethod
    def of(cls, view: StepView) -> Self:
        kv = view.kv
        sizes, total, free, kept = kv.page_tokens, kv.total_pages, kv.free_pages, list(kv.pinned_pages)
        for request in view.paused:
            kept = [a + b for a, b in zip(kept, request.pages, strict=True)]
        pools = [i for i, window in enumerate(kv.window_tokens) if window is None] or range(len(sizes))
        return cls(
            capacity=min(total[i] * sizes[i] for i in pools),
            used=max((total[i] - free[i]) * sizes[i] for i in pools),
            kept=max(kept[i] * sizes[i] for i in pools),
            page_tokens=max(sizes[i] for i in pools),
        )

    def in_pages(self, tokens: int) -> int:
        """Tokens that fit in the pages which ``tokens`` tokens of one request take."""
        return -(-tokens // self.page_tokens) * self.page_tokens


class LightLLM(ABC):
    """The composer. State between steps: when the interval to the next admission pass began."""

    def __init__(self, config: ComposerConfig, ctx: Context) -> None:
        _check(config, ctx)
        self._config = config
        self._begin = 0
        """Step from which decode steps are counted."""

    @abstractmethod
    def admission(self, running: list[RequestView], room: Room) -> Judge:
        """Begin an admission pass, with at least one candidate."""

    def plan(self, view: StepView) -> StepPlan:
        config, step = self._config, view.step
        plan, pages, running = StepPlan(), view.kv.budget(), list(view.running)
        if config.queue_limit_ms is not None or config.gap_limit_ms is not None:
            running = self._give_up(view, plan, pages)
        if running and running[-1].pending_tokens > 1:  # a long prompt comes first, until it is through
            self._continue(plan, running[-1], pages)
            self._begin = step + 1
            return plan

        # not "at least the interval": an empty queue lets holds run past passes that would find nobody
        elapsed = step - self._begin
        due = not running or (elapsed > 0 and elapsed % config.admission_interval == 0)
        admitted = 0
        if config.mixed:
            self._decode(plan, running, pages)
        if due and len(view.waiting) and not plan.preemptions:
            admitted = self._admit(view, plan, running, pages)
        if not config.mixed and not admitted:
            self._decode(plan, running, view.kv.budget())  # the pass has used its own up

        if admitted or plan.preemptions:
            decoding = len(plan.work) > admitted
            self._begin = step if decoding else step + 1
        elif plan.work:
            steps = config.hold_steps
            if len(view.waiting):
                steps = min(steps, config.admission_interval - elapsed % config.admission_interval)
            if steps > 1 and not (plan.rejections or plan.aborts):
                plan.hold = Hold(steps)
        return plan

    def _give_up(self, view: StepView, plan: StepPlan, pages: KVBudget) -> list[RequestView]:
        """End requests that have missed their bounds; the running ones that are left."""
        now, left = view.now_ns, list[RequestView]()
        queue, gap = _limit(self._config.queue_limit_ms), _limit(self._config.gap_limit_ms)
        for request in view.waiting:
            last = request.last_token_ns
            if last is not None and now - last > gap:
                plan.abort(request, f"no token for {(now - last) / NS_PER_MS:.0f} ms")
            elif last is None and now - request.arrival_ns > queue:
                end = plan.reject if request.admitted_ns is None else plan.abort
                end(request, f"waited {(now - request.arrival_ns) / NS_PER_MS:.0f} ms")
        for request in view.running:
            last = request.last_token_ns
            if last is not None and now - last > gap:
                plan.abort(request, f"no token for {(now - last) / NS_PER_MS:.0f} ms")
                pages.give_back(request)
            else:
                left.append(request)
        return left

    def _continue(self, plan: StepPlan, request: RequestView, pages: KVBudget) -> None:
        """The next chunk of a prompt longer than a step."""
        n = min(request.pending_tokens, self._config.max_num_batched_tokens)
        if pages.take(request, n):
            plan.run(request, n)
        else:
            plan.preempt(request, "recompute", f"out of KV pages for its prompt: {pages.free} free")

    def _decode(self, plan: StepPlan, running: list[RequestView], pages: KVBudget) -> None:
        """One token of every running request; the newest go until the rest fits."""
        seats = running[: self._config.max_num_seqs]  # samples may be more
        ready = pages.take_decodes(seats)
        plan.work += ready
        last = len(running)  # running[:last] still run
        for index, request in enumerate(seats[len(ready) :], len(ready)):
            while index < last and not pages.take(request, 1):
                last -= 1
                plan.preempt(running[last], "recompute", "out of KV pages; newest running request")
                pages.give_back(running[last])
            if index >= last:
                break
            plan.work.append(request.next_token)

    def _admit(self, view: StepView, plan: StepPlan, running: list[RequestView], pages: KVBudget) -> int:
        """One pass over the queue: how many it admits. The first that cannot go stops it."""
        config = self._config
        left = config.max_num_batched_tokens - len(plan.work)
        alone = not running and not len(view.paused)
        judge: Judge | None = None
        admitted, seats = 0, len(running) + view.forking
        gone = {verdict.request.id for verdict in (*plan.rejections, *plan.aborts)}
        for request in view.waiting:
            if request.id in gone:
                continue
            n = request.pending_tokens
            if seats and seats + request.forks >= config.max_num_seqs:
                plan.defer(request, f"max_num_seqs {config.max_num_seqs} reached")
                break
            if admitted == config.max_new_per_pass:
                plan.defer(request, f"max_new_per_pass {admitted} reached")
                break
            if admitted and n > left:
                plan.defer(request, f"prompt of {n} tokens, {left} left in this pass")
                break
            if not pages.take(request, n):
                first = min(n, config.max_num_batched_tokens)
                if not alone or admitted or not _fits_in_chunks(view, request, first, pages):
                    plan.defer(request, f"out of KV pages for its {n} tokens: {pages.free} free")
                    break
                n = first
            judge = judge or self.admission(running, Room.of(view))
            reason = judge(request)
            # nothing would ever change the answer for a request that has the device to itself
            if reason is not None and (admitted or not alone):
                plan.defer(request, reason)
                break
            if n > left:
                plan.work.clear()  # it does not fit beside the decodes
                n = min(n, config.max_num_batched_tokens)
            plan.run(request, n)
            left -= n
            admitted += 1
            seats += 1 + request.forks
        return admitted


def _limit(ms: float | None) -> float:
    return math.inf if ms is None else ms * NS_PER_MS


def _fits_in_chunks(view: StepView, request: RequestView, first: int, pages: KVBudget) -> bool:
    """Whether a prompt that is too long for pools with a window fits one chunk behind the other: these let go
    of what came before. All other pools must hold it whole. Takes the first chunk.
    """
    windows = view.kv.window_tokens
    whole = zip(view.kv.pages_needed(request, request.pending_tokens), pages.free, windows, strict=True)
    fits = all(need <= free for need, free, window in whole if window is None)
    return any(windows) and fits and pages.take(request, first)


def _check(config: ComposerConfig, ctx: Context) -> None:
    """Refuse settings that the device, or the composer, cannot work with."""
    limits, where = ctx.limits, f"scheduler {ctx.name!r}"
    for name, ours, device in (
        ("max_num_batched_tokens", config.max_num_batched_tokens, limits.max_batch_tokens),
        ("max_num_seqs", config.max_num_seqs, limits.max_batch_requests),
    ):
        if ours > device:
            raise ConfigError(
                f"scheduler.{name} is {ours}",
                where=where,
                why=f"the engine accepts {device} per launch",
                do=f"lower scheduler.{name}, or raise engine.max_batch_tokens or _requests",
            )
    if config.max_num_seqs > config.max_num_batched_tokens:
        raise ConfigError(
            f"scheduler.max_num_seqs is {config.max_num_seqs}",
            where=where,
            why="a decode step runs one token of every running request, and max_num_batched_tokens is "
            f"{config.max_num_batched_tokens}",
            do="lower scheduler.max_num_seqs, or raise scheduler.max_num_batched_tokens",
        )
