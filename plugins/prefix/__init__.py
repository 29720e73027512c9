"""Prefix stores, one line per technique: reuse of KV that was computed before."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="hash",
        factory="servelab.plugins.prefix.hash:HashStore",
        config="servelab.plugins.prefix.hash:HashConfig",
        summary="full pages found again by a chain of hashes, least recently released evicted first",
        deviations=(
            "Pages are published when their launch has landed; vLLM does so when it is planned. So "
            "requests admitted in one step do not share with each other.",
            "Pages without a key return to the kvcache and are taken before any cached page; vLLM has "
            "one queue.",
            "H is BLAKE2b; vLLM's default is SHA-256 of pickled tuples, with a random seed per process.",
            "No events for routers, no reset. Prompt log-probs, which vLLM computes uncached, do not "
            "exist here.",
        ),
        provides=frozenset(
            {"prefix.exact", "prefix.fork", "prefix.owns_pool", "prefix.page_sharing", "prefix.probe"}
        ),
        requires=frozenset({"kvcache.block_table"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_prefix_stores() -> Iterable[PluginSpec]:
    return TABLE
