"""Least loaded: each request to the instance that has least to serve. A baseline, from no paper.

Mechanism: ``argmin`` of the load over all active instances, as they last reported it; of equal ones the
lowest id. Load is the number of requests waiting or running (least outstanding requests, the usual baseline),
or tokens, or KV memory.

Deviations: none.
Faithful when: no instance is chosen that reported more load than another active one; a stale report is
believed.
Tier: stable.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, RequestSpec
from servelab.core.families.router import ClusterView, Dispatch, Moment, Route
from servelab.plugins.routers._load import MEASURES, Measure, load, nobody


class LeastLoadedConfig(BaseModel):
    """Settings of ``+router=least_loaded``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    by: Measure = Field("requests", description=MEASURES)


class LeastLoaded:
    """No state. Reads one row per active instance."""

    def __init__(self, config: LeastLoadedConfig, ctx: Context) -> None:
        self._by = config.by

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        ids = view.instances()
        if not ids:
            return nobody(view)
        return Dispatch(prefill=min(ids, key=lambda i: (load(view.row(i), self._by), i)))
