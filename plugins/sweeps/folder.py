"""What a sweep leaves on disk about its jobs, and what of an earlier try is kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.processes import in_one_line
from servelab.core.run_folder import put_file

JOB_FILE = "job.json"
ERROR_FILE = "error.txt"
REPORT_FILE = "report.txt"
STOP_FILE = ".stop"
"""In the sweep's folder while it is being ended: holds the number of the signal."""
LOCK_FILE = ".lock"
EARLIER = "earlier-"
"""Folders in a job's folder: the files of earlier tries."""
JOB_SCHEMA = 1

JobStatus = Literal["waiting", "running", "ok", "failed", "interrupted"]
AGAIN = "free space; `servelab sweep FOLDER` makes the comparison again"
"""What to do where the comparison cannot be written."""


@dataclass(frozen=True, kw_only=True)
class JobState:
    """``job.json``."""

    number: int
    """Counted from 0, as Hydra does; the name of its folder, unless ``hydra.sweep.subdir`` says otherwise."""
    overrides: list[str]
    config: dict[str, Any]
    """As composed, before defaults of plugins' settings; what a resume is held against."""
    servelab: str
    """The version that ran it."""
    status: JobStatus = "waiting"
    reason: str = ""
    """Why it is not ok, one line."""
    wall_s: float = 0.0
    """Real time from start to end, loading included."""
    files: list[str] = field(default_factory=list)
    """What was in its folder when it ended well."""
    schema_version: int = JOB_SCHEMA

    def write(self, folder: Path) -> None:
        """At once or not at all: a reader never sees half of it."""
        put_file(folder / JOB_FILE, json.dumps(asdict(self), indent=2) + "\n")

    def finished(self, folder: Path) -> bool:
        """Ended well, and everything it wrote is still there."""
        return self.status == "ok" and all((folder / name).exists() for name in self.files)


def read_state(folder: Path) -> JobState | None:
    """How a job stands; None where no job of a sweep is.

    Raises:
        ConfigError: the file is not one of ours.
    """
    path = folder / JOB_FILE
    try:
        return JobState(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{JOB_FILE} cannot be read", where=str(path), why=str(error), do="remove the job's folder"
        ) from error


def job_folders(sweep: Path) -> Iterator[tuple[Path, JobState]]:
    """The jobs of a sweep, those still waiting included, in order of their number."""
    found = [(path.parent, read_state(path.parent)) for path in sweep.rglob(JOB_FILE)]
    jobs = [(folder, state) for folder, state in found if state is not None]
    return iter(sorted(jobs, key=lambda pair: pair[1].number))


def bare(overrides: Iterable[str]) -> list[str]:
    """Overrides as one types them: without the signs that only Hydra needs."""
    return [str(one).lstrip("+") for one in overrides]


def dict_of(overrides: Iterable[str]) -> dict[str, str]:
    """Key to value of a job's overrides."""
    split = (one.partition("=") for one in bare(overrides))
    return {key: value for key, _, value in split}


def differing(jobs: Sequence[Mapping[str, str]]) -> list[str]:
    """The keys in which jobs differ, in the order of the command line."""
    keys = dict.fromkeys(key for one in jobs for key in one)
    return [key for key in keys if len({one.get(key) for one in jobs}) > 1]


def files_of(folder: Path) -> list[str]:
    """Names in a job's folder that are its results."""
    own = {JOB_FILE, ".hydra"}
    return sorted(p.name for p in folder.iterdir() if p.name not in own and not p.name.startswith(EARLIER))


def put_aside(folder: Path, keep: str) -> Path | None:
    """Move what an earlier try left into a folder of its own; returns it, or None if nothing was there.

    Args:
        keep: a file that stays, as it is being written.

    Raises:
        ServeLabError: a file cannot be moved.
    """
    old = [name for name in files_of(folder) if name != keep]
    if not old:
        return None
    number = 1
    while (aside := folder / f"{EARLIER}{number}").exists():
        number += 1
    try:
        aside.mkdir()
        for name in old:
            (folder / name).rename(aside / name)
    except OSError as error:
        raise ServeLabError(
            "the files of an earlier try cannot be put aside",
            where=str(folder),
            why=error.strerror or str(error),
            do="move them away by hand, or choose another hydra.sweep.dir",
        ) from error
    return aside


def fail(folder: Path, state: JobState, text: str, wall_s: float) -> JobState:
    """Note that a job failed, with the whole text in ``error.txt``."""
    put_file(folder / ERROR_FILE, text.rstrip() + "\n")
    reason = in_one_line(text.strip().removeprefix("servelab: ")) or "no reason given"
    ended = replace(state, status="failed", reason=reason, wall_s=wall_s)
    ended.write(folder)
    return ended
