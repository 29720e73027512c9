"""Plugins broken on purpose, one way each: they prove that the suites notice, and say what to mend.

One module per kind, with a tuple ``MUTANTS``. A test runs them all; ``docs/reference/mutants.md`` lists them.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from servelab.core.testing.suite import PluginSuite, suite_of


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One broken plugin and the check that must notice."""

    suite: str
    """Kind of plugin, whose suite it must fail."""
    plugin: Any
    """The broken plugin, as ``PluginSuite.plugin`` takes it."""
    original: Any
    """What it was made from, which passes the whole suite; likewise."""
    check: str
    """The check that must fail."""
    message: str
    """What the failure must say."""
    breaks: str
    """What is wrong with it, in a few words."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Settings of both."""
    requires: tuple[str, ...] = ()
    """Modules it needs, such as torch; without them it is skipped."""

    @property
    def name(self) -> str:
        """Name of the broken class."""
        return str(getattr(self.plugin, "__name__", type(self.plugin).__name__))

    def suite_of(self, plugin: Any) -> type[PluginSuite]:
        """The suite of its kind for it or its original."""
        from servelab.core.testing import SUITES

        return suite_of(SUITES[self.suite], plugin, config=self.config)


def mutants() -> list[Mutant]:
    """All of them, by kind and as listed there."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [one for name in names for one in import_module(f"{__name__}.{name}").MUTANTS]
