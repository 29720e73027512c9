"""Conformance of kind ``cost``."""

from __future__ import annotations

from typing import ClassVar

from servelab.core.testing.suite import PluginSuite


class CostSuite(PluginSuite):
    """What is true of every cost; see ``servelab.core.families.cost``."""

    kind: ClassVar[str] = "cost"
    contract: ClassVar[str] = "servelab/core/families/cost.py"
