"""The folder of a run: how files get there, and its logs and results as commands read them.

Standard library only. A run may have been killed, may be going on, or may have been told to leave files out;
what is there is read, and what is missing is said.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from servelab.core.errors import ConfigError, LogError, ServeLabError
from servelab.core.logs import EVENTS_FILE, PLANS_FILE, read_log
from servelab.core.records import Planned, Record, RunStarted

RESULTS_FILE = "results.json"
FILES = (EVENTS_FILE, PLANS_FILE, RESULTS_FILE)
"""A folder with one of these holds a run."""
LAST = "last"
"""Stands for the newest run below ``BASES``."""
BASES = ("outputs", "multirun")
"""Where Hydra puts runs and sweeps, in the folder a command is started in."""
SHOWN = 12
"""Jobs that a message names at most."""


WRITABLE = "free space, or choose another run folder (hydra.run.dir=...)"
"""What to do where a file cannot be written."""


def check_unused(folder: Path, who: str, names: Iterable[str] = FILES) -> None:
    """Refuse a folder that holds a run already.

    Args:
        who: would write there.
        names: of the files that must not be there.

    Raises:
        ConfigError: one of them is.
    """
    if found := [name for name in names if (folder / name).exists()]:
        raise in_use(folder, who, found)


def in_use(folder: Path, who: str, found: Iterable[str]) -> ConfigError:
    """The refusal itself."""
    return ConfigError(
        f"{who} will not write over another run",
        where=str(folder),
        why=f"the folder already holds {', '.join(found)}",
        do="choose another folder (hydra.run.dir=..., hydra.sweep.dir=... for a sweep), leave that setting "
        "out for a fresh one, or remove the old files",
    )


def write_file(path: Path, content: str | bytes, do: str = WRITABLE) -> None:
    """Write a file, and make the folder it is in.

    Raises:
        ServeLabError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise unwritable(path, error, do) from error


def unwritable(path: Path, error: OSError, do: str = WRITABLE) -> ServeLabError:
    """What to raise where a file cannot be written."""
    return ServeLabError(
        f"{path.name} cannot be written", where=str(path), why=error.strerror or str(error), do=do
    )


class RunFolderError(ServeLabError):
    """A folder that is no run's, or lacks a file that is needed."""


class RunFolder:
    """One run on disk. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def find(cls, given: str | Path) -> RunFolder:
        """The run that a user means.

        Args:
            given: its folder, a file in it, or ``last`` for the newest one below ``BASES``.

        Raises:
            RunFolderError: there is no run; names the jobs if it is the folder of a sweep.
        """
        path = Path(given)
        if str(given) == LAST and not path.exists():
            return cls(_newest())
        if path.is_file():
            path = path.parent
        if any((path / name).is_file() for name in FILES):
            return cls(path)
        raise _no_run(path)

    def __str__(self) -> str:
        return str(self.path)

    def has(self, name: str) -> bool:
        """Whether the file is there."""
        return (self.path / name).is_file()

    def events(self) -> Iterator[Record]:
        """The records of ``events.jsonl``, one at a time; a last line that was cut off is left out.

        Raises:
            RunFolderError: the run has no such file.
            LogError: see ``read_log``.
        """
        return self._log(EVENTS_FILE, "events")

    def plans(self) -> Iterator[Planned]:
        """The records of ``plan.jsonl``, likewise."""
        return cast("Iterator[Planned]", self._log(PLANS_FILE, "plans"))

    def results(self) -> dict[str, Any]:
        """``results.json`` as it was written.

        Raises:
            RunFolderError: there is none.
            LogError: it is not a JSON object.
        """
        path = self.path / RESULTS_FILE
        if not path.is_file():
            raise RunFolderError(
                f"the run has no {RESULTS_FILE}",
                where=str(self.path),
                why="observer 'report' writes it at the end of a run: it was not among 'observers', or the "
                "run was killed or goes on",
                do="run it again with observer 'report'",
            )
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            found, why = None, str(error)
        else:
            why = f"it holds {type(found).__name__}"
        if not isinstance(found, dict):
            raise LogError(
                f"{RESULTS_FILE} is not a JSON object", where=str(path), why=why, do="restore it from a copy"
            )
        return found

    def info(self) -> dict[str, Any]:
        """What the first record of the log says about the run; empty if there is no event log."""
        if self.has(EVENTS_FILE):
            for record in self.events():
                return dict(record.info) if isinstance(record, RunStarted) else {}
        return {}

    def _log(self, name: str, setting: str) -> Iterator[Record]:
        path = self.path / name
        if not path.is_file():
            raise RunFolderError(
                f"the run has no {name}",
                where=str(self.path),
                why=f"observer 'jsonl' writes it: it was not among 'observers', or its setting '{setting}' "
                "was false",
                do="run it again with observers=[jsonl,report]",
            )
        return read_log(path, allow_truncated=True)


def _no_run(path: Path) -> RunFolderError:
    jobs = _runs(path) if path.is_dir() else []
    if jobs:
        shown = [str(job) for job in jobs[:SHOWN]]
        more = f" and {len(jobs) - SHOWN} more" if len(jobs) > SHOWN else ""
        return RunFolderError(
            "this is a folder of runs, not of one run",
            where=str(path),
            why=f"it holds {len(jobs)}, as those of a sweep or of a day do",
            do=f"name one of them: {', '.join(shown)}{more}",
        )
    return RunFolderError(
        "there is no run",
        where=str(path),
        why=f"it holds none of {', '.join(FILES)}" if path.is_dir() else "there is no such folder",
        do=f"name the folder that the last line of a run shows; {LAST!r} is the newest below "
        f"{' and '.join(BASES)}",
    )


def _runs(path: Path, depth: int = 3) -> list[Path]:
    """Folders of runs below a folder, jobs of a sweep in their order."""
    found: list[Path] = []
    if depth:
        for child in sorted((c for c in path.iterdir() if c.is_dir()), key=_in_order):
            if any((child / name).is_file() for name in FILES):
                found.append(child)
            else:
                found += _runs(child, depth - 1)
    return found


def _in_order(path: Path) -> tuple[int, int, str]:
    """Jobs are numbered: 10 comes after 9."""
    return (0, int(path.name), "") if path.name.isdecimal() else (1, 0, path.name)


def _newest() -> Path:
    runs = [run for base in map(Path, BASES) if base.is_dir() for run in _runs(base)]
    if not runs:
        raise RunFolderError(
            "there is no last run",
            where=str(Path.cwd()),
            why=f"there is no run below {' or '.join(BASES)}",
            do="name the folder of the run",
        )
    return max(runs, key=_written)


def _written(run: Path) -> float:
    return max((run / name).stat().st_mtime for name in FILES if (run / name).is_file())
