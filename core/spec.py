"""What a plugin declares about itself. Strings and data only: making a spec imports nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HOOK_API = (1, 0)
"""Version of hooks, views, plans and protocols, as (major, minor).

A plugin states the major version it was written for (``api="1"``); another major is refused. A minor
release only adds: new hooks, new optional hook arguments, new view fields, new plan fields with
defaults. Removing or renaming waits for the next major, after one minor release that warned.
"""

Tier = Literal["stable", "prototype"]
Runs = Literal["torch", "sim"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """Where a technique was published."""

    title: str
    """As published."""
    year: int
    """Of publication."""
    id: str
    """arXiv id, DOI or venue name: whatever finds it."""

    def __str__(self) -> str:
        return f"{self.title} ({self.year}, {self.id})"


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginSpec:
    """A cheap declaration of one plugin.

    Import paths are ``"package.module:Attribute"`` and are imported only when the plugin is selected.
    """

    name: str
    """Name within its kind; the value of ``+scheduler=`` and so on."""
    factory: str
    """Import path of ``factory(config, context)``, usually the plugin's class; see ``Context``."""
    config: str | None = None
    """Import path of the pydantic model of its section; ``None`` if it takes no settings."""
    summary: str = ""
    """One line for tables, without a full stop."""
    paper: Paper | Literal["baseline"] = "baseline"
    """Its source, or ``baseline``."""
    api: str = str(HOOK_API[0])
    """Major version of the hook API it was written for."""
    deviations: tuple[str, ...] = ()
    """How it differs from its source: what the docstring of its module lists, word for word."""
    tier: Tier = "prototype"
    """``stable``: held by tests and kept; ``prototype``: may change or go."""
    runs: tuple[Runs, ...] = ("torch", "sim")
    """Executor classes it works with; see ``families/executor.py``."""
    provides: frozenset[str] = frozenset()
    """Capabilities it brings, ``"family.capability"``; the vocabulary is in each family's module."""
    requires: frozenset[str] = frozenset()
    """Capabilities some other selected plugin must bring."""
    conflicts: frozenset[str] = frozenset()
    """Capabilities no other selected plugin may bring."""
    imports: tuple[str, ...] = ()
    """Top-level modules that must be installed (checked without importing them)."""
    probe: str | None = None
    """Import path of ``probe() -> str | None``: the reason it cannot run here, or ``None``."""
    describe_model: str | None = None
    """Executors only: import path of ``describe(model: ModelConfig) -> dict``, which reads the fields of a
    model's shape from its files where the configuration leaves them open."""
    diagnose: str | None = None
    """Import path of ``diagnose(model, online) -> Iterable[Finding]``: what the plugin needs of this machine,
    for ``servelab doctor`` (``core/findings.py``)."""
    oracle: bool = False
    """True if it may read true output lengths; every report of such a run is stamped."""
