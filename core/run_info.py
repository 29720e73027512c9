"""What identifies a run, in JSON types: settings, plugins, versions, seed, stamps, KV layout."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from servelab.core import quality
from servelab.core.capabilities import Selected
from servelab.core.config import Choice, RunConfig
from servelab.core.environment import environment
from servelab.core.layout import Capacity, KVLayout
from servelab.core.registry import Registry

if TYPE_CHECKING:
    from servelab.core.families.executor import Executor

INFO_SCHEMA = 1
"""Version of ``Run.info``; raised when a key changes meaning or goes away."""


def run_info(
    config: RunConfig,
    registry: Registry,
    selected: Iterable[Selected],
    layout: KVLayout,
    capacity: Capacity,
    executor: Executor,
    described: dict[str, Any],
) -> dict[str, Any]:
    oracles = [one for root in selected for one in root.everyone() if one.spec.oracle]
    weights = executor.describe() if hasattr(executor, "describe") else {}
    return {
        "schema": INFO_SCHEMA,
        **environment(),
        "seed": config.seed,
        "clock": config.clock.name,
        "settings": config.settings(),
        "model": config.model.name,
        "tokenizer": config.model.name if getattr(executor, "tokenizer", None) else None,
        **({"weights": weights} if weights else {}),
        "plugins": _plugins_info(config, registry),
        "stamps": [
            *(f"oracle: {one.spec.name}" for one in oracles),
            *_lane_stamps(config, selected),
            *(_quant_stamps(config, selected, weights) if config.quant else []),
        ],
        "kv": _kv_info(layout, capacity),
        **({"cluster": {"instances": config.cluster.instances}} if config.router else {}),
        "workload": described,
        **({"quality": _quality_info(config, selected)} if config.quant else {}),
    }


def _quant_stamps(config: RunConfig, selected: Iterable[Selected], weights: dict[str, Any]) -> list[str]:
    """Where the unquantized weights are from, and whether prices know that these are others."""
    stamps = [f"reference_weights: {weights.get('quantization', 'unknown')}"]
    if config.clock.name == "virtual" and not any("cost.quant" in one.provides for one in selected):
        stamps.append(f"prices: cost {config.cost.name!r} prices quantized linears as unquantized ones")
    return stamps


def _quality_info(config: RunConfig, selected: Iterable[Selected]) -> dict[str, Any]:
    """Whether the quality of a quantized run is measured, and on what, or why not."""
    if not config.quality.max_tokens:
        return {"measured": False, "why": "quality.max_tokens=0"}
    if not any("executor.quality" in one.provides for one in selected):
        return {"measured": False, "why": f"executor {config.executor.name!r} runs no model"}
    return {"measured": True, "corpus": quality.describe()}


def _lane_stamps(config: RunConfig, selected: Iterable[Selected]) -> list[str]:
    """Lanes are free hardware unless the cost model prices them together: reports must say so."""
    together = any("cost.lanes" in one.provides for one in selected)
    return [] if config.engine.lanes == 1 or together else ["lanes: each priced as if alone on the device"]


def _plugins_info(config: RunConfig, registry: Registry) -> dict[str, Any]:
    """By kind: what is selected, where it comes from and how it is set; a list for observers."""
    found: dict[str, Any] = {}
    for kind, choice in config.choices():
        about = _plugin_info(kind, choice, registry)
        if kind == "observer":
            found.setdefault(kind, []).append(about)
        else:
            found[kind] = about
    return found


def _plugin_info(kind: str, choice: Choice, registry: Registry) -> dict[str, Any]:
    spec, provider = registry.spec(kind, choice.name), registry.provider(kind, choice.name)
    parts = [{"kind": part.kind, **_plugin_info(part.kind, part, registry)} for part in choice.parts()]
    return {
        "name": spec.name,
        "distribution": provider.distribution,
        "version": provider.version,
        "paper": str(spec.paper),
        "deviations": list(spec.deviations),
        "tier": spec.tier,
        "oracle": spec.oracle,
        "settings": choice.settings(),
        "non_default": choice.changed(),
        **({"parts": parts} if parts else {}),
    }


def _kv_info(layout: KVLayout, capacity: Capacity) -> dict[str, Any]:
    host = capacity.host_pages or (0,) * len(layout.pools)
    pools = [
        {
            "id": pool.id,
            "layers": len(pool.layers),
            "page_tokens": pool.page_tokens,
            "bytes_per_page": pool.bytes_per_page,
            "codec": pool.codec,
            "key_space": pool.key_space,
            "window_tokens": pool.window_tokens,
            "pages": pages,
            "host_pages": host_pages,
        }
        for pool, pages, host_pages in zip(layout.pools, capacity.device_pages, host, strict=True)
    ]
    return {"addressing": layout.addressing, "bytes_per_token": layout.bytes_per_token, "pools": pools}
