"""Cost models, one line per technique: the price of a batch."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="scripted",
        factory="servelab.plugins.costmodels.scripted:ScriptedCost",
        config="servelab.plugins.costmodels.scripted:ScriptedCostConfig",
        summary="prices from a list or a straight line in tokens and context",
        tier="stable",
    ),
    PluginSpec(
        name="roofline",
        factory="servelab.plugins.costmodels.roofline.cost:RooflineCost",
        config="servelab.plugins.costmodels.roofline.factors:RooflineConfig",
        summary="FLOPs and bytes of every operation over a device's peaks, smooth maximum, overheads",
        provides=frozenset({"cost.quant"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_cost_models() -> Iterable[PluginSpec]:
    return TABLE
