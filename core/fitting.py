"""Whether the parts of a run fit one another: layout and model, pools and the longest request, cluster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from servelab.core.config import RunConfig
from servelab.core.errors import CapabilityError, PluginError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.layout import Capacity, KVLayout

if TYPE_CHECKING:
    from servelab.core.families.executor import Executor
    from servelab.core.families.kvcache import KVCache


def check_layout(layout: object, kvcache: str, model: ModelFacts) -> None:
    """Whether a kvcache's layout fits the model.

    Raises:
        CapabilityError: the model has windows, and the layout keeps every token.
        PluginError: no layout, or a pool that keeps less than a layer sees.
    """
    if not isinstance(layout, KVLayout) or not layout.pools:
        raise PluginError(
            f"kvcache {kvcache!r} proposed no usable layout",
            where=f"kvcache {kvcache!r}, layout()",
            why=f"it returned {layout!r:.60}",
            do="return a KVLayout with at least one pool",
        )
    if any(model.windows) and all(pool.retention == "full" for pool in layout.pools):
        raise CapabilityError(
            f"model {model.name!r} has layers with a sliding window",
            where=f"kvcache {kvcache!r}",
            why="its layout keeps every token in every layer, so memory would be counted too high",
            do="take a kvcache with window pools, or leave model.windows empty to study full attention",
        )
    for pool in layout.pools:
        kept = pool.window_tokens
        if kept is None:
            continue
        for layer in pool.layers:
            window = model.windows[layer] if model.windows else None
            if window is None or window > kept:
                raise PluginError(
                    f"pool {pool.id!r} keeps {kept} tokens of layer {layer}",
                    where=f"kvcache {kvcache!r}, layout()",
                    why=f"the layer sees {'all tokens' if window is None else f'{window} tokens'}",
                    do="mend the kvcache: give the layer a pool that keeps what it sees",
                )


def check_cluster(config: RunConfig, executor: Executor) -> None:
    """Whether the run may have so many instances, and a router.

    Raises:
        CapabilityError: several instances without a router, or on an executor or a clock that has only one.
    """
    many = max(config.cluster.instances, config.cluster.max_instances or 1)
    if many > 1 and config.router is None:
        raise CapabilityError(
            f"nobody says which of {many} instances a request goes to",
            where="cluster.instances",
            why="no router is selected",
            do="choose one (+router=round_robin, +router=least_loaded), or set cluster.instances=1",
        )
    if many > 1 and not executor.simulated:
        raise CapabilityError(
            f"executor {config.executor.name!r} runs one instance, not {many}",
            where="cluster.instances",
            why="it does real work: several of it would share this machine and disturb each other's times",
            do="set cluster.instances=1, or choose an executor that simulates (executor=sim)",
        )
    if config.router is not None and config.clock.name != "virtual":
        raise CapabilityError(
            f"router {config.router.name!r} needs the virtual clock",
            where="clock.name",
            why=f"the {config.clock.name} clock drives one engine, whose requests go straight to it",
            do="set clock=virtual, or leave the router out: router=null",
        )


def check_shareable(layout: KVLayout, prefix: str) -> None:
    """Full pages of all pools must stand for the same tokens, and stay where they are."""
    windows = [pool.id for pool in layout.pools if pool.retention != "full"]
    sizes = {pool.page_tokens for pool in layout.pools}
    if windows or len(sizes) > 1:
        raise CapabilityError(
            f"prefix {prefix!r} cannot reuse the pages of this KV layout",
            where="the KV layout",
            why=f"pools that let go of old tokens: {', '.join(windows)}"
            if windows
            else f"its pools have pages of {', '.join(map(str, sorted(sizes)))} tokens",
            do="run without a prefix store (prefix=null), or with a kvcache that keeps every token",
        )


def check_accepted(kernel: str, kvcache: str, refused: Iterable[str]) -> None:
    if reasons := list(refused):
        raise CapabilityError(
            f"kernel {kernel!r} cannot read the KV layout",
            where=f"layout of kvcache {kvcache!r}",
            why="; ".join(reasons),
            do="choose another kernel or another kvcache",
        )


def check_pools(capacity: Capacity, layout: KVLayout, executor: str) -> None:
    """One number of pages per pool, on each tier."""
    for pages in (capacity.device_pages, capacity.host_pages or capacity.device_pages):
        if len(pages) != len(layout.pools):
            raise PluginError(
                f"executor {executor!r} reports pages for {len(pages)} pools",
                where=f"executor {executor!r}, capacity()",
                why=f"the layout has {len(layout.pools)}",
                do="report one number per pool, in the order of the layout",
            )


def check_capacity(
    capacity: Capacity, layout: KVLayout, kvcache: KVCache, config: RunConfig, limits: Limits
) -> None:
    """Every pool must be able to hold one request of the greatest length, or that one would wait for ever."""
    executor, longest = config.executor.name, limits.max_model_len
    for pool, have in zip(layout.pools, capacity.device_pages, strict=True):
        tokens = pool.most_tokens(longest, limits.max_batch_tokens)
        need = kvcache.pages_for(pool, None, tokens)
        if need > have:
            fits, window = kvcache.tokens_in(pool, have), pool.window_tokens
            held = (
                f"a window of {window} and a step of {limits.max_batch_tokens}, " if tokens < longest else ""
            )
            raise CapabilityError(
                "KV memory cannot hold one request of the greatest length",
                where=f"pool {pool.id!r} of kvcache {config.kvcache.name!r} on executor {executor!r}",
                why=f"{held}{tokens} tokens need {need} pages of {pool.page_tokens} tokens, "
                f"the pool has {have}",
                do=f"raise executor.num_kv_pages to at least {need} (or the memory it follows from), "
                f"{'lower engine.max_batch_tokens, ' if window else ''}"
                f"or lower engine.max_model_len to at most {fits}",
            )
