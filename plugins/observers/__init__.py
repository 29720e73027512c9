"""Observers, one line per technique: who watches a run."""

from __future__ import annotations

from collections.abc import Iterable

from servelab.core.api import PluginSpec, hookimpl

TABLE: tuple[PluginSpec, ...] = ()


@hookimpl
def servelab_observers() -> Iterable[PluginSpec]:
    return TABLE
