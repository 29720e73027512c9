"""Priority, over any scheduler: the more important first, then first come, first served.

Source: vLLM's priority policy (vllm-project/vllm, ``vllm/v1/core/sched/``, policy ``priority``), there with
the opposite sign: a lower number goes first.

Mechanism: waiting requests stand in order of ``key = (-priority, arrival)``; running ones too, so that the
least important is preempted first and runs last. A running request is never preempted only because a more
important one arrives.

Symbols: priority = ``RequestSpec.priority``, higher is more important.

Deviations:
1. Running requests of equal priority stand in order of admission when the inner scheduler chooses a victim;
   vLLM takes the one that arrived last.

Faithful when: no waiting request overtakes one of higher priority, or of the same and an earlier arrival;
victims have the lowest priority that runs.

Tier: stable.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from servelab.core.api import RequestView
from servelab.plugins.schedulers._ordered import Ordered, OrderedConfig


class PriorityConfig(OrderedConfig):
    """Settings of ``+scheduler=priority``."""

    running: bool = Field(
        True,
        description="order running requests too, so that the least important is preempted first (as vLLM)",
    )


class Priority(Ordered):
    """Stateless."""

    def key(self, request: RequestView) -> Any:
        return -request.priority, request.arrival_ns
