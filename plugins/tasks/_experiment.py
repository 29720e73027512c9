"""What tasks of many runs share: their life, and what they leave.

A task states which runs it wants (``cells``), the table that follows from them (``rows``) and drawings of
them (``plots``), each a function of what was measured so far: so it can be interrupted, taken up again and
tested without running anything. ``_cells`` runs the cells.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, ServeLabError
from servelab.plugins.tasks._cells import Cell, Found, Work
from servelab.plugins.tasks._cells.cell import base_of
from servelab.plugins.tasks._leave import leave
from servelab.plugins.tasks._rows import Column, Row, tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from servelab.core.compose import Run

T = TypeVar("T")
log = logging.getLogger("servelab.experiment")


class ManyRunsConfig(BaseModel):
    """Settings that every task of many runs has."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    processes: int = Field(
        1, ge=1, le=1024, description="runs side by side, each in a process of its own; results are the same"
    )
    resume: Path | None = Field(
        None,
        description="folder of an earlier run of this task: runs with equal settings are taken from there",
    )


class ManyRuns(ABC):
    """Base of such tasks."""

    title: ClassVar[str]

    def __init__(self, config: Any, context: Context) -> None:
        self.name, self._folder = context.name, context.run_dir
        self._many: ManyRunsConfig = config

    @abstractmethod
    def cells(self, found: Found) -> Sequence[Cell]:
        """The runs that are wanted, given those that are found; see ``_cells.work.Propose``."""

    def left(self, found: Found) -> float | None:
        """About how much weight of cells is still to come; None: what ``cells`` proposes."""
        return None

    @abstractmethod
    def rows(self, found: Found) -> Sequence[Row]:
        """The table, of whatever is there."""

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        """Drawings by the name of their file; none where nothing is measured."""
        return {}

    def columns(self, rows: Sequence[Row]) -> Sequence[Column]:
        """What a sweep over such tasks compares: how many of the judged claims hold."""
        counts = tally(rows)
        judged = counts["hold"] + counts["do_not_hold"]
        return [Column("claims", "hold %", 100 * counts["hold"] / judged, 1, 0)] if judged else []

    def extra(self, found: Found) -> Mapping[str, Any]:
        """What else goes into ``experiment.json``."""
        return {}

    def complain(self, found: Found) -> None:  # noqa: B027
        """Raise what a user must know after everything has been told: a search without an end."""

    def prepare(self, run: Run) -> None:  # noqa: B027
        """Look at the task's own run before its cells are made."""

    def run(self, run: Run) -> float | None:
        """Measure, write and tell; returns the share of judged rows that hold, for sweepers.

        Raises:
            ServeLabError: cells failed; said after everything else.
            KeyboardInterrupt: after what was measured has been written.
        """
        run.executor.close()  # each cell has its own
        self.prepare(run)
        work = Work(
            base_of(run.config),
            folder=self._folder,
            earlier=self._many.resume,
            processes=self._many.processes,
            registry=run.registry,
        )
        error: BaseException | None = None
        try:
            work.run(self.cells, self.left)
        except BaseException as exc:
            error = exc
        # what was measured is written and said however it ended
        interrupted = isinstance(error, KeyboardInterrupt)
        status = "ok" if error is None else "interrupted" if interrupted else "failed"
        rows: list[Row] = []
        try:
            rows += self.rows(work.found)
            leave(self, run, status, rows, work.found, self._folder)
        except Exception as second:
            if error is None:
                raise
            error.add_note(f"while telling what was measured: {second}")
        if error is not None:
            raise error
        if failed := [one for one in work.found.values() if not one.ok]:
            raise ServeLabError(
                f"{len(failed)} of {len(work.found)} runs failed",
                where=", ".join(one.name for one in failed[:8]) + (", ..." if len(failed) > 8 else ""),
                why=failed[0].reason,
                do="mend the cause; the same command with task.resume=FOLDER measures only what is missing",
            )
        self.complain(work.found)
        counts = tally(rows)
        judged = counts["hold"] + counts["do_not_hold"]
        return counts["hold"] / judged if judged else None


def values(found: Found, names: Sequence[str], figure: Callable[[Any], T | None]) -> list[T]:
    """A figure of some cells, of those that ended well and have it."""
    got = [figure(found[name]) for name in names if name in found and found[name].ok]
    return [value for value in got if value is not None]


# ---------------------------------------------------------------- settings of cells

EQUAL_STEPS: Mapping[str, Any] = {"name": "scripted", "step_ns": 1_000_000, "token_ns": 0, "context_ns": 0}
"""Section ``cost`` where steps are counted, and time decides nothing."""


def backlog(requests: int, **more: Any) -> dict[str, Any]:
    """Section ``workload``: so many synthetic requests at once, without token ids."""
    return {
        "name": "synthetic",
        "num_requests": requests,
        "request_rate": "inf",
        "with_prompt_ids": False,
        **more,
    }


def uniform(low: int, high: int, scale: int = 1) -> dict[str, Any]:
    """A uniform law of lengths, divided by a scale."""
    return {"law": "uniform", "min": max(1, low // scale), "max": high // scale}
