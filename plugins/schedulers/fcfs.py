"""First come, first served, over any scheduler: the queue in order of arrival. A baseline, from no paper.

Mechanism: waiting requests stand in order of ``key = arrival`` (``by: request``), or of ``key = (arrival of
the program's first turn, arrival)`` (``by: program``: later turns of an early conversation go before
newcomers). It differs from the queue as it is, in order of arrival with preempted requests in front, only by
programs, and where a scheduler preempts another request than the youngest.

Symbols: none.

Deviations: none. Faithful when: with ``by: request`` and an inner scheduler that preempts the youngest, plans
are those of the inner scheduler; with ``by: program`` a second turn goes before a later program's first.

Tier: stable.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from servelab.core.api import RequestView
from servelab.plugins.schedulers._ordered import Ordered, OrderedConfig


class FCFSConfig(OrderedConfig):
    """Settings of ``+scheduler=fcfs``."""

    by: Literal["request", "program"] = Field(
        "request", description="whose arrival counts: the request's, or that of its program's first turn"
    )


class FCFS(Ordered):
    """Stateless."""

    config: FCFSConfig

    def key(self, request: RequestView) -> Any:
        if self.config.by == "request":
            return request.arrival_ns
        return request.program_arrival_ns, request.arrival_ns
