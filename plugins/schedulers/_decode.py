"""One token of every request that decodes; the youngest running requests go while pages are short."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from servelab.core.api import RequestView, StepPlan


class Pages(Protocol):
    """As ``KVBudget``."""

    def take(self, request: RequestView, n: int) -> bool: ...
    def give_back(self, request: RequestView) -> None: ...


def decodes(request: RequestView) -> bool:
    """Whether its prompt (after a preemption: prompt and output so far) is computed."""
    return request.pending_tokens == 1 and request.generated_tokens > 0


def decode(plan: StepPlan, running: Sequence[RequestView], pages: Pages, most: int) -> None:
    """Plan one token of every request that decodes, in the given order, and drop the last ones meanwhile.

    Args:
        plan: where work and preemptions go.
        running: who runs, oldest first; the victims are the last that have not been considered yet.
        pages: what is free.
        most: requests that a step runs; samples of one prompt may be more.
    """
    work = plan.work
    last = len(running)  # running[:last] still run
    for index, request in enumerate(running):
        if index >= last or len(work) >= most:
            break
        if not decodes(request):
            continue
        while index < last and request.slack_tokens < 1 and not pages.take(request, 1):
            last -= 1
            plan.preempt(running[last], "recompute", "out of KV pages; youngest running request")
            pages.give_back(running[last])
        if index < last:
            work.append(request.next_token)
