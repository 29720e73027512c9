"""Attention backends and linear kernels, one line per technique. None is in the tree so far."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE: tuple[PluginSpec, ...] = ()


@hookimpl
def servelab_attention_backends() -> Iterable[PluginSpec]:
    return TABLE
