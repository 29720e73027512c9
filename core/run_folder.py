"""The folder of a run: what it begins with, how files get there, and how commands read them.

It explains itself before anything runs. A run may have been killed, may be going on, or may have been told to
leave files out; what is there is read, and what is missing is said. Reading needs the standard library only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

from servelab.core.environment import environment
from servelab.core.errors import ConfigError, LogError, ServeLabError
from servelab.core.logs import EVENTS_FILE, PLANS_FILE, read_log
from servelab.core.records import Planned, Record, RunStarted

if TYPE_CHECKING:
    from servelab.core.config import RunConfig

CONFIG_FILE = "resolved_config.yaml"
ENV_FILE = "env.json"
ENV_SCHEMA = 1
"""Version of ``env.json``; raised when a key changes meaning or goes away."""
RESULTS_FILE = "results.json"
FILES = (EVENTS_FILE, PLANS_FILE, RESULTS_FILE)
"""A folder with one of these holds a run."""
LAST = "last"
"""Stands for the newest run below ``BASES``."""
BASES = ("outputs", "multirun")
"""Where Hydra puts runs and sweeps, in the folder a command is started in."""
SHOWN = 12
"""Jobs that a message names at most."""


HEADER = """\
# Every effective setting of this run, defaults included. Again, in a new folder:
#   python run.py --config-dir FOLDER_OF_THIS_FILE --config-name resolved_config
# and with other values: ... seed=1 scheduler.max_num_seqs=8
"""
DEFAULTS = ["config", "_self_"]
"""Hydra's own settings come from ``configs/config.yaml``; the sections below stand over it."""

WRITABLE = "free space, or choose another run folder (hydra.run.dir=...)"
"""What to do where a file cannot be written."""


# ---------------------------------------------------------------- writing


def check_place(argv: Sequence[str]) -> None:
    """Refuse a place for the run's folder where none can be made, before Hydra tries and shows a traceback.

    Args:
        argv: Hydra's arguments.

    Raises:
        ServeLabError: a file is in the way, or the folder may not be written.
    """
    sweep = bool({"-m", "--multirun"} & set(argv))
    key, stated = ("hydra.sweep.dir", BASES[1]) if sweep else ("hydra.run.dir", BASES[0])
    for arg in argv:
        name, _, value = arg.partition("=")
        stated = value.strip("'\"") if name.lstrip("+") == key else stated
    known, reference, _ = stated.partition("${")
    folder = Path(known)
    if reference and not known.endswith("/"):
        folder = folder.parent  # the last name goes on with what Hydra fills in
    there = next((place for place in (folder, *folder.parents) if os.path.exists(place)), Path())
    try:
        with TemporaryDirectory(dir=there):
            return
    except OSError as error:
        raise ServeLabError(
            "the run's folder cannot be made",
            where=f"{key}={stated}",
            why=f"{there.absolute()}: {error.strerror or error}",
            do=f"start in a folder that can be written, or name another: {key}=FOLDER",
        ) from error


def begin(folder: Path, config: RunConfig, overrides: Sequence[str]) -> None:
    """Write ``resolved_config.yaml`` and ``env.json``, so that a run that is killed leaves them too.

    Args:
        folder: of the run; made if it is not there.
        config: as composed: with what was read from the model's files and from memory.
        overrides: what the command line stated, for ``env.json``.

    Raises:
        ConfigError: the folder holds a run already.
        ServeLabError: a file cannot be written.
    """
    texts = {CONFIG_FILE: config_text(config), ENV_FILE: env_text(overrides)}
    check_unused(folder, "a run", texts)
    for name, text in texts.items():
        write_file(folder / name, text)


def config_text(config: RunConfig) -> str:
    """The settings as a primary configuration of Hydra."""
    from omegaconf import OmegaConf

    settings: dict[str, Any] = _escaped(config.settings())
    return HEADER + OmegaConf.to_yaml(OmegaConf.create({"defaults": DEFAULTS, **settings}))


def _escaped(value: Any) -> Any:
    """Text with ``${`` is text, not a reference to another setting."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list | tuple) else value


def env_text(overrides: Sequence[str]) -> str:
    """What the run ran on and what it was told, as JSON."""
    facts = {"schema_version": ENV_SCHEMA, **environment(), "overrides": list(overrides)}
    return json.dumps(facts, indent=2) + "\n"


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
    """Write a file, at once or not at all, and make the folder it is in.

    Raises:
        ServeLabError: it cannot be written.
    """
    try:
        put_file(path, content)
    except OSError as error:
        raise unwritable(path, error, do) from error


def put_file(path: Path, content: str | bytes) -> None:
    """Likewise, for those who have their own words for an ``OSError``. A reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def unwritable(path: Path, error: OSError, do: str = WRITABLE) -> ServeLabError:
    """What to raise where a file cannot be written."""
    return ServeLabError(
        f"{path.name} cannot be written", where=str(path), why=error.strerror or str(error), do=do
    )


# ---------------------------------------------------------------- reading


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
