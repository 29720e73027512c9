"""Conformance of kind ``executor``."""

from __future__ import annotations

from typing import ClassVar

from servelab.core.testing.suite import PluginSuite


class ExecutorSuite(PluginSuite):
    """What is true of every executor; see ``servelab.core.families.executor``."""

    kind: ClassVar[str] = "executor"
    contract: ClassVar[str] = "servelab/core/families/executor.py"
