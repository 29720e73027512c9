"""Plugins that are given as Python objects: what they declare, and whether they are to be called."""

from __future__ import annotations

import re
from typing import Any

from servelab.core.families import KINDS
from servelab.core.spec import PluginSpec


def spec_of(plugin: Any, summary: str) -> PluginSpec:
    """The attribute ``spec`` of an object, class or factory; without one, a spec that promises nothing."""
    spec = getattr(plugin, "spec", None)
    if isinstance(spec, PluginSpec):
        return spec
    made_by = plugin if callable(plugin) and hasattr(plugin, "__qualname__") else type(plugin)
    path = re.sub(r"[^\w.]", "", made_by.__qualname__)
    return PluginSpec(
        name=re.sub(r"[^a-z0-9_]", "", made_by.__name__.lower()).strip("_") or "python",
        factory=f"{made_by.__module__}:{path}",
        summary=summary,
    )


def is_factory(kind: str, plugin: object) -> bool:
    """A class, or something to call that lacks what the family's protocol asks for."""
    if isinstance(plugin, type):
        return True
    wanted = KINDS[kind].members
    return callable(plugin) and not (wanted and all(hasattr(plugin, name) for name in wanted))
