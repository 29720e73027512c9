"""Earliest deadline first, over any scheduler.

Source: Liu and Layland, "Scheduling Algorithms for Multiprogramming in a Hard-Real-Time Environment", Journal
of the ACM 20(1), 1973, doi:10.1145/321738.321743 (deadline-driven scheduling).

Mechanism: waiting requests stand in order of ``key = arrival + bound``. The bound is the request's own: on
its first token while it has none (``SLO.ttft_ns``), on its end (``SLO.e2el_ns``), or the earlier of the two
(``bound: earliest``). A request without such a bound has no deadline and stands last; equal deadlines are
served in order of arrival.

Symbols: d = arrival + bound, in nanoseconds of the run's clock.

Deviations:
1. Not preemptive: a running request goes on when one with an earlier deadline arrives.
2. A deadline that has passed still counts: late requests go first.

Faithful when: no waiting request overtakes one with an earlier deadline; with equal bounds it is first come,
first served; of two requests that can both meet their deadlines in one order only, both meet them.

Tier: stable.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field

from servelab.core.api import RequestView
from servelab.plugins.schedulers._ordered import Ordered, OrderedConfig


class EDFConfig(OrderedConfig):
    """Settings of ``+scheduler=edf``."""

    bound: Literal["ttft", "e2el", "earliest"] = Field(
        "earliest",
        description="which bound of a request makes its deadline: on its first token (until it has one), on "
        "its end, or the earlier of the two",
    )


class EDF(Ordered):
    """Stateless."""

    config: EDFConfig

    def key(self, request: RequestView) -> Any:
        slo, bound = request.slo, self.config.bound
        bounds = [math.inf]
        if slo is not None:
            if slo.ttft_ns is not None and bound != "e2el" and request.first_token_ns is None:
                bounds.append(slo.ttft_ns)
            if slo.e2el_ns is not None and bound != "ttft":
                bounds.append(slo.e2el_ns)
        return request.arrival_ns + min(bounds), request.arrival_ns
