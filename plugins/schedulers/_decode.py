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
    """Whether its next token is its only one: its prompt is computed, or in flight."""
    return (
        request.pending_tokens < 2
        and request.computed_tokens + request.in_flight_tokens >= request.prompt_tokens
    )


def decode(plan: StepPlan, running: Sequence[RequestView], pages: Pages, most: int) -> bool:
    """Plan one token of every request that decodes, in the given order, and drop the last ones meanwhile.

    Requests in flight (planning a step ahead) are no victims: their pages only come back when it ends.

    Args:
        plan: where work and preemptions go.
        running: who runs, oldest first; victims are the last that have not been considered yet.
        pages: what is free.
        most: requests that a step runs; samples of one prompt may be more.

    Returns:
        Whether pages were short: somebody was preempted, or waits for a page.
    """
    work = plan.work
    last = len(running)  # running[:last] still run
    for index, request in enumerate(running):
        if index >= last or len(work) >= most:
            break
        if not decodes(request) or not request.pending_tokens:
            continue
        while request.slack_tokens < 1 and not pages.take(request, 1):
            victim = running[last - 1]
            if victim.in_flight:
                return True
            last -= 1
            plan.preempt(victim, "recompute", "out of KV pages; youngest running request")
            pages.give_back(victim)
            if victim is request:
                break
        else:
            work.append(request.next_token)
    return last < len(running)
