"""Conformance of kind ``scheduler``."""

from __future__ import annotations

from typing import ClassVar

from servelab.core.testing.suite import PluginSuite


class SchedulerSuite(PluginSuite):
    """What is true of every scheduler; see ``servelab.core.families.scheduler``."""

    kind: ClassVar[str] = "scheduler"
    contract: ClassVar[str] = "servelab/core/families/scheduler.py"
