"""Routers, one line per technique: which instance does what."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="round_robin",
        factory="servelab.plugins.routers.round_robin:RoundRobin",
        summary="each request to the next instance in turn, whatever its load",
        tier="stable",
    ),
    PluginSpec(
        name="least_loaded",
        factory="servelab.plugins.routers.least_loaded:LeastLoaded",
        config="servelab.plugins.routers.least_loaded:LeastLoadedConfig",
        summary="each request to the instance with the least of requests, tokens or KV memory to serve",
        tier="stable",
    ),
    PluginSpec(
        name="power_of_two",
        factory="servelab.plugins.routers.power_of_two:PowerOfTwo",
        config="servelab.plugins.routers.power_of_two:PowerOfTwoConfig",
        summary="each request to the less loaded of two instances drawn at random",
        paper=Paper(
            title="The Power of Two Choices in Randomized Load Balancing",
            year=2001,
            id="IEEE TPDS 12(10), doi:10.1109/71.963420",
        ),
        deviations=(
            "The instances drawn are distinct; the paper draws each from all of them.",
            "Of equally loaded ones the lowest id is taken; the paper leaves it open.",
        ),
        tier="stable",
    ),
)


@hookimpl
def servelab_routers() -> Iterable[PluginSpec]:
    return TABLE
