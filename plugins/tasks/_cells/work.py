"""Many cells: each in a process of its own, some side by side, those of an earlier try not again."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any, cast

from servelab.core.config import validate
from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.processes import context, died, duration, forks, settle, start
from servelab.core.registry import Registry
from servelab.core.run_folder import write_file
from servelab.plugins.tasks._cells.cell import CELL_SCHEMA, Cell, CellResult, Found, changed, key_of, measure

log = logging.getLogger("servelab.cells")

CELLS = "cells"
"""Folder of the cells' files in a run's folder."""

Propose = Callable[[Found], Sequence[Cell]]
"""The cells that are wanted, given those that are found. Asked again whenever one is found; what it answers
may depend on nothing else, so that a task can be taken up again. None new: the work is done."""
Left = Callable[[Found], float | None]
"""About how much weight is still to come, where proposals depend on results."""


@dataclass
class _Running:
    cell: Cell
    result: CellResult
    process: BaseProcess
    answer: Connection
    began: float


class Work:
    """Measures cells.

    Args:
        base: settings that cells change, see ``base_of``.
        folder: of the run: each cell that ended well leaves its file there; None: nowhere.
        earlier: folder of an earlier run, whose files are used where their key is the same; None: none.
        processes: cells side by side.
        registry: where plugins are; None: loaded here.

    Raises:
        ConfigError: the earlier folder has no cells.
    """

    def __init__(
        self,
        base: Mapping[str, Any],
        *,
        folder: Path | None = None,
        earlier: Path | None = None,
        processes: int = 1,
        registry: Registry | None = None,
    ) -> None:
        self._base, self._folder, self._processes = base, folder, processes
        self._earlier = _read_cells(earlier) if earlier is not None else {}
        self._registry = registry or Registry.load()
        self.found: dict[str, CellResult] = {}
        """By name, in the order in which they ended."""
        self._running: list[_Running] = []
        self._measured = 0.0
        """Weight of the cells measured here."""
        self._began = 0.0
        self._left: Left = lambda found: None

    def run(self, propose: Propose, left: Left = lambda found: None) -> Found:
        """Measure until nothing new is proposed; a cell that fails is noted, and the rest goes on.

        Args:
            propose: see ``Propose``.
            left: for the estimate of the time left; by default what is proposed.

        Raises:
            KeyboardInterrupt: what was running is given up; what was found stays in ``found``.
        """
        self._began, self._left = monotonic(), left
        try:
            while True:
                known = {*self.found, *(one.cell.name for one in self._running)}
                new = [cell for cell in propose(self.found) if cell.name not in known]
                if not new and not self._running:
                    return self.found
                if new and len(self._running) < self._processes:
                    self._begin(new[0])
                else:
                    self._await(new)
        finally:
            self._end()

    def _begin(self, cell: Cell) -> None:
        """Start a cell, or find it in an earlier run."""
        began = monotonic()
        blank = CellResult(name=cell.name, key="", changes=cell.changes, seed=0)
        try:
            settings = changed(self._base, cell.changes)
            blank = replace(blank, seed=int(settings.get("seed") or 0), key=key_of(settings, cell.meters))
            settings = validate(settings, self._registry).settings()
        except ServeLabError as error:
            self._note(cell, replace(blank, status="failed", error=str(error)), 0.0, [])
            return
        result = replace(blank, key=key_of(settings, cell.meters))
        if (old := self._earlier.get(result.key)) is not None:
            self._keep(replace(old, name=cell.name, changes=cell.changes))
            log.info("%s: taken from the earlier run", cell.name)
            return
        forked = forks()
        where = context(forked)
        ours, theirs = where.Pipe(duplex=False)
        given = (theirs, result, settings, cell.meters, self._registry if forked else None)
        process = where.Process(target=_work, args=given, daemon=True)
        start(process)
        theirs.close()
        self._running.append(_Running(cell, result, process, ours, began))

    def _await(self, new: Sequence[Cell]) -> None:
        """Until a running cell has ended."""
        ready = wait([one.answer for one in self._running])
        for one in [one for one in self._running if one.answer in ready]:
            try:
                result = cast(CellResult, one.answer.recv())
            except EOFError:
                one.process.join()
                said = died(one.process.exitcode or 0, "cell", one.cell.name)
                result = replace(one.result, status="failed", error=said)
            one.process.join()
            one.answer.close()
            self._running.remove(one)
            self._note(one.cell, result, monotonic() - one.began, new)

    def _note(self, cell: Cell, result: CellResult, wall_s: float, new: Sequence[Cell]) -> None:
        self._measured += cell.weight
        result = replace(result, wall_s=wall_s)
        self._keep(result)
        if result.ok:
            log.info("%s: done in %.1f s%s", cell.name, wall_s, self._outlook(new))
        else:
            log.error("%s: failed: %s%s", cell.name, result.reason, self._outlook(new))

    def _outlook(self, new: Sequence[Cell]) -> str:
        """About how long the rest takes, by the cells measured so far."""
        weight = self._left(self.found)
        if weight is None:
            weight = sum(cell.weight for cell in (*(one.cell for one in self._running), *new))
        if not weight or not self._measured:
            return ""
        return f"; about {duration((monotonic() - self._began) / self._measured * weight)} left"

    def _keep(self, result: CellResult) -> None:
        self.found[result.name] = result
        if self._folder is not None and result.ok:
            text = json.dumps(result.to_dict(), indent=1) + "\n"
            write_file(self._folder / CELLS / f"{result.key}.json", text)

    def _end(self) -> None:
        """Give up what still runs."""
        for one in self._running:
            one.process.terminate()
        for one in self._running:
            one.process.join()
            one.answer.close()
        self._running.clear()


def _work(
    answer: Connection,
    result: CellResult,
    settings: Mapping[str, Any],
    meters: tuple[str, ...],
    registry: Registry | None,
) -> None:
    """What a cell's process does."""
    settle()
    try:
        ended = measure(result, settings, meters, registry)
    except ServeLabError as error:
        ended = replace(result, status="failed", error=str(error))
    except Exception as error:
        text = "".join([f"{type(error).__name__}: {error}\n", *traceback.format_exception(error)])
        ended = replace(result, status="failed", error=text)
    answer.send(ended)
    answer.close()


def _read_cells(folder: Path) -> dict[str, CellResult]:
    """What an earlier run has left, by key."""
    found: dict[str, CellResult] = {}
    for path in sorted((folder / CELLS).glob("*.json")):
        try:
            result = CellResult(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                "the file of a cell cannot be read", where=str(path), why=str(error), do="remove it"
            ) from error
        if result.ok and result.schema_version == CELL_SCHEMA:
            found[result.key] = result
    if not found:
        raise ConfigError(
            "there is nothing to take up again",
            where=str(folder),
            why=f"no file of a finished cell is in its folder {CELLS}",
            do="name the folder of an earlier run of this task, or leave task.resume out",
        )
    return found
