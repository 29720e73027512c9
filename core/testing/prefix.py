"""Conformance of kind ``prefix``."""

from __future__ import annotations

from typing import ClassVar

from servelab.core.testing.suite import PluginSuite


class PrefixSuite(PluginSuite):
    """What is true of every prefix; see ``servelab.core.families.prefix``."""

    kind: ClassVar[str] = "prefix"
    contract: ClassVar[str] = "servelab/core/families/prefix.py"
