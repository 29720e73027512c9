"""Power of two choices: each request to the less loaded of two instances drawn at random.

Source: Mitzenmacher, "The Power of Two Choices in Randomized Load Balancing", IEEE TPDS 12(10), 2001.

Mechanism: draw ``choices`` instances, read their rows, take the least loaded. Two choices instead of one
bring the longest of n queues from about ``ln n / ln ln n`` to ``ln ln n / ln 2``, while only two instances
have to be asked; more choices gain little.

Deviations:
1. The instances drawn are distinct; the paper draws each from all of them.
2. Of equally loaded ones the lowest id is taken; the paper leaves it open.

Faithful when: n balls in n bins have the paper's largest loads, far below those of one choice; mean sojourn
of exponential jobs at load rho is ``sum over i >= 1 of rho^(2^i - 2)``; with two instances it is
least_loaded; exactly ``choices`` rows are read per request.
Tier: stable.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, RequestSpec
from servelab.core.families.router import ClusterView, Dispatch, Moment, Route
from servelab.plugins.routers._load import MEASURES, Measure, load, nobody


class PowerOfTwoConfig(BaseModel):
    """Settings of ``+router=power_of_two``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: int = Field(2, ge=1, description="instances drawn per request, d in the paper; 1: at random")
    by: Measure = Field("requests", description=MEASURES)


class PowerOfTwo:
    """State: its generator."""

    def __init__(self, config: PowerOfTwoConfig, ctx: Context) -> None:
        self.config = config
        self._rng = ctx.rng

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        ids = view.instances()
        if not ids:
            return nobody(view)
        drawn = sorted(self._rng.sample(ids, min(self.config.choices, len(ids))))
        return Dispatch(prefill=min(drawn, key=lambda i: (load(view.row(i), self.config.by), i)))
