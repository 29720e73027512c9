"""Attention backends and linear kernels, one line per technique."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE: tuple[PluginSpec, ...] = (
    PluginSpec(
        name="sdpa",
        factory="servelab.plugins.kernels.sdpa.backend:Sdpa",
        summary="PyTorch's scaled-dot-product attention over paged or contiguous KV: the reference",
        provides=frozenset(
            {"kernel.block_table", "kernel.contiguous_slot", "kernel.pre_rope", "kernel.partial"}
        ),
        tier="stable",
    ),
)


@hookimpl
def servelab_attention_backends() -> Iterable[PluginSpec]:
    return TABLE
