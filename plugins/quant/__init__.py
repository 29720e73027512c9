"""Quantizers and KV codecs, one line per technique. None is in the tree so far."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

QUANTIZERS: tuple[PluginSpec, ...] = ()
KV_CODECS: tuple[PluginSpec, ...] = ()


@hookimpl
def servelab_quantizers() -> Iterable[PluginSpec]:
    return QUANTIZERS


@hookimpl
def servelab_kv_codecs() -> Iterable[PluginSpec]:
    return KV_CODECS
