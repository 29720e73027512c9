"""Task: what is done with a composed run.

Intent: ``bench`` serves a workload and measures, ``quality`` compares quantizers, ``capacity`` and
experiments make many runs of their own (``_cells``); later ``serve``, ``calibrate``, ``validate``. A task
owns the order of things in a run, never a policy.

Capabilities: ``task.offline`` (serves nothing, so KV memory need not hold the longest request).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.compose import Run


class Task(Protocol):
    """Called once with the composed run."""

    def run(self, run: Run) -> float | None:
        """Do the work; returns the figure a sweeper may optimise, or None.

        Raises:
            ServeLabError: anything the user should read without a traceback.
        """
        ...
