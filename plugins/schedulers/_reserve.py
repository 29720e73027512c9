"""KV memory reserved for the most a request may ever need, as servers without paging do.

The core reserves pages as tokens run. A request is admitted only if what it and all running requests may
still take fits in what is free; that stays so until each has ended, so that no decode ever fails.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from servelab.core.api import KVBudget, RequestView, StepPlan, StepView

Reserve = Literal["request_max", "model_max", "kvcache"]


class Reservations:
    """Pages promised to running requests, for one admission pass.

    Args:
        view: of this call.
        reserve: ``request_max`` tokens of its prompt and its cap, ``model_max`` the longest request there may
            be, ``kvcache`` nothing but what the kvcache takes at admission.
        running: who runs.
    """

    def __init__(self, view: StepView, reserve: Reserve, running: Iterable[RequestView]) -> None:
        kv = self._kv = view.kv
        self._reserve: Reserve = reserve
        self._longest = view.limits.max_model_len
        self._free = kv.free_pages
        self._windows = kv.window_tokens if any(kv.window_tokens) else ()
        self._promised = [0] * len(self._free)
        for request in running:
            self._add(self.needs(request))

    def needs(self, request: RequestView) -> list[int]:
        """Further pages, per pool, that it may come to hold, with those of samples still to start."""
        if self._reserve == "kvcache":
            return [0] * len(self._free)
        kv = self._kv
        most = self._longest
        if self._reserve == "request_max":
            most = request.prompt_tokens + request.max_new_tokens
        need = list(kv.pages_needed(request, most - request.computed_tokens - request.in_flight_tokens))
        if not (self._windows or request.forks):
            return need
        held = request.pages
        for i, window in enumerate(self._windows):
            if window is not None:  # it never holds more than its prompt, then its window
                page = kv.page_tokens[i]
                prompt = kv.pages_needed(request, request.pending_tokens)[i]
                need[i] = min(need[i], max(prompt, -(-(window + page - 1) // page) - held[i]))
        return [pages + request.forks * (pages + had) for pages, had in zip(need, held, strict=True)]

    def reserve(self, request: RequestView) -> bool:
        """Promise a waiting request all it may need; False (and nothing) if that is not free."""
        need = self.needs(request)
        promised = zip(need, self._promised, self._free, strict=True)
        if any(pages + others > free for pages, others, free in promised):
            return False
        self._add(need)
        return True

    def never(self, request: RequestView) -> bool:
        """Whether a waiting request may need more than there is."""
        need, total = self.needs(request), self._kv.total_pages
        return any(pages > there for pages, there in zip(need, total, strict=True))

    @property
    def free(self) -> tuple[int, ...]:
        """Pages neither held nor promised, per pool."""
        return tuple(a - b for a, b in zip(self._free, self._promised, strict=True))

    def _add(self, pages: list[int]) -> None:
        self._promised = [a + b for a, b in zip(self._promised, pages, strict=True)]


class Door:
    """Admits waiting requests to one step: prompts run whole, and all they may need is reserved.

    Args:
        view: of this call.
        plan: where work, rejections and reasons go.
        running: who runs.
        pages: what is free now.
        most: running requests at most.
        reserve: see ``Reservations``.
    """

    def __init__(
        self,
        view: StepView,
        plan: StepPlan,
        running: list[RequestView],
        pages: KVBudget,
        most: int,
        reserve: Reserve,
    ) -> None:
        self._view, self._plan, self._pages, self._most = view, plan, pages, most
        self._reserve: Reserve = reserve
        self._running = running
        self._reservations: Reservations | None = None
        self.seats = len(running) + view.forking
        """Places taken, with those of samples still to start."""
        self._limit = view.limits.max_batch_tokens
        self._left = self._limit - len(plan.work)

    def opens_to(self, waiting: Iterable[RequestView]) -> bool:
        """Requests in order, up to the first that does not fit; True if any was let in or refused."""
        changed = False
        for request in waiting:
            if not self._opens(request):
                break
            changed = True
        return changed

    def _opens(self, request: RequestView) -> bool:
        """Let the next one in, refuse it for good, or keep it and everybody after it waiting (False)."""
        n, seats = request.pending_tokens, self.seats
        if n > self._limit:
            what = f"its prompt of {n} tokens runs whole; engine.max_batch_tokens is {self._limit}"
            return self._refuse(request, what)
        if seats and seats + request.forks >= self._most:
            return self._keep(request, f"max_num_seqs {self._most} reached")
        if n > self._left:
            return self._keep(request, f"prompt of {n} tokens, {self._left} left in this iteration")
        reserved = self._reservations or Reservations(self._view, self._reserve, self._running)
        self._reservations = reserved
        if not reserved.reserve(request):
            if request.forks and reserved.never(request):
                there = self._view.kv.total_pages
                what = f"its {1 + request.forks} samples may need more than {there} KV pages"
                return self._refuse(request, what)
            if seats or request.forks:  # else nothing would ever change the answer
                return self._keep(request, f"{reserved.free} KV pages are not reserved")
        if not self._pages.take(request, n):
            return self._keep(request, f"out of KV pages for its prompt: {self._pages.free} free")
        self._plan.run(request, n)
        self._left -= n
        self.seats += 1 + request.forks
        return True

    def _keep(self, request: RequestView, reason: str) -> bool:
        self._plan.defer(request, reason)
        return False

    def _refuse(self, request: RequestView, reason: str) -> bool:
        if request.admitted_ns is None:
            self._plan.reject(request, reason)
        else:  # it ran before: a sample that could not share its prompt's pages, or one that was dropped
            self._plan.abort(request, reason)
        return True
