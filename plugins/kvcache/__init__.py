"""KV caches, one line per technique: which pages a request gets."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import Paper, PluginSpec, hookimpl

TABLE = (
    PluginSpec(
        name="paged",
        factory="servelab.plugins.kvcache.paged:Paged",
        config="servelab.plugins.kvcache.paged:PagedConfig",
        summary="fixed pages and a block table per sequence",
        paper=Paper(
            title="Efficient Memory Management for Large Language Model Serving with PagedAttention",
            year=2023,
            id="arXiv:2309.06180",
        ),
        deviations=(
            "No null page: a table begins with the first page still held.",
            "The watermark is 0 unless set, and does not hold for a request that would run alone.",
        ),
        provides=frozenset({"kvcache.block_table", "kvcache.fork", "kvcache.swap"}),
        tier="stable",
    ),
)


@hookimpl
def servelab_kvcaches() -> Iterable[PluginSpec]:
    return TABLE
