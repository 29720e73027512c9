"""Round robin: each request to the next instance in turn. A baseline, from no paper.

Mechanism: the k-th request (from 0) goes to active instance ``k mod n``, in order of ids.

Deviations: none.
Faithful when: requests per instance differ by at most 1 while the instances stay the same; one instance gets
everything, and its run is that without a router.
Tier: stable.
"""

from __future__ import annotations

from servelab.core.api import Context, RequestSpec
from servelab.core.families.router import ClusterView, Dispatch, Moment, Route
from servelab.plugins.routers._load import nobody


class RoundRobin:
    """State: a counter. O(1) per request; reads no row."""

    def __init__(self, config: None, ctx: Context) -> None:
        self._count = 0

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        ids = view.instances()
        if not ids:
            return nobody(view)
        self._count += 1
        return Dispatch(prefill=ids[(self._count - 1) % len(ids)])
