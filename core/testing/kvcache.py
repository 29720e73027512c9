"""Conformance of kind ``kvcache``."""

from __future__ import annotations

from typing import ClassVar

from servelab.core.testing.suite import PluginSuite


class KVCacheSuite(PluginSuite):
    """What is true of every kvcache; see ``servelab.core.families.kvcache``."""

    kind: ClassVar[str] = "kvcache"
    contract: ClassVar[str] = "servelab/core/families/kvcache.py"
