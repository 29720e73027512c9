"""Log: every record of a run as one JSON object per line (baseline).

``events.jsonl`` holds all records but plans, ``plan.jsonl`` the plans with their reasons. ``core/logs.py``
defines the coding and reads both back (``read_log``).

Lines are coded and written every 1000 records, at the end of the run and, where the clock is real, whenever
it has moved on by a second: many at once take less time. After a crash the last line may be cut off:
``read_log`` says so, or skips it when told ``allow_truncated=True``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, Context, PluginError, ServeLabError, hookimpl
from servelab.core.logs import EVENTS_FILE, EVENTS_LOG, PLANS_FILE, PLANS_LOG, Encoder, header, read_log
from servelab.core.records import Planned, Record, RunFinished, RunStarted
from servelab.core.run_folder import WRITABLE, check_unused, in_use, unwritable

__all__ = ["JsonlConfig", "JsonlObserver", "read_log"]
"""``read_log`` lives in ``servelab.core.logs``; this is the path it had before."""

FLUSH_RECORDS = 1000
FLUSH_NS = 1_000_000_000
"""A file is written after so many records, and when the records' own time has moved on by this much."""


class JsonlConfig(BaseModel):
    """Settings of the ``jsonl`` observer."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    events: bool = Field(default=True, description=f"Write {EVENTS_FILE}: every record but plans.")
    plans: bool = Field(default=True, description=f"Write {PLANS_FILE}: every plan with its reasons.")


class JsonlObserver:
    """Writes the log of a run into its folder.

    State: the previous request list per engine and lane. Cost per record: linear in the batch, at C speed
    when the batch did not change.
    """

    def __init__(self, config: JsonlConfig, ctx: Context) -> None:
        if ctx.run_dir is None:
            raise ConfigError(
                "observer 'jsonl' has nowhere to write",
                why="this run has no folder",
                do="give the run a folder, or leave 'jsonl' out of 'observers'",
            )
        check_unused(ctx.run_dir, f"observer {ctx.name!r}")
        self._folder = ctx.run_dir
        self._config = config
        self._events: _LogFile | None = None
        self._plans: _LogFile | None = None
        self._opened = False
        self._told = False
        """Whether it is known already that files cannot be written, most likely for the other one too."""

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        if not self._opened:
            self._open(isinstance(record, RunStarted) and record.info.get("clock") == "virtual")
        target = self._plans if record.ev == Planned.ev else self._events
        if target is not None:
            try:
                target.write(record)
            except ServeLabError as error:
                self._told |= isinstance(error.__cause__, OSError)
                raise

    @hookimpl
    def servelab_on_run_finished(self, record: RunFinished) -> None:
        self.close()

    def close(self) -> None:
        """Write out what is buffered and close the files; further calls do nothing.

        Raises:
            ServeLabError: the rest could not be written.
        """
        files = (self._events, self._plans)
        self._events = self._plans = None
        errors: list[ServeLabError] = []
        for file in files:
            try:
                if file is not None:
                    file.close()
            except ServeLabError as error:
                errors.append(error)
        if errors and not self._told:
            raise errors[0]

    def _open(self, virtual: bool) -> None:
        self._opened = True
        every_ns = None if virtual else FLUSH_NS
        if self._config.events:
            self._events = _LogFile(self._folder / EVENTS_FILE, EVENTS_LOG, every_ns)
        if self._config.plans:
            self._plans = _LogFile(self._folder / PLANS_FILE, PLANS_LOG, every_ns)


class _LogFile:
    """One file being written.

    Args:
        path: of the file.
        log: what its header says it is.
        every_ns: by how much the records' time moves on at most until they are written; None: their number
            alone counts.
    """

    def __init__(self, path: Path, log: str, every_ns: int | None) -> None:
        self._path = path
        self._encode = Encoder()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: TextIO = path.open("x", encoding="utf-8", newline="\n", buffering=1 << 18)
        except FileExistsError as error:
            if not path.exists():
                raise _cannot_write(path, error) from error  # the folder's own path is a file
            raise in_use(path.parent, "observer 'jsonl'", [path.name]) from error
        except OSError as error:
            raise _cannot_write(path, error) from error
        self._every_ns = math.inf if every_ns is None else every_ns
        self._due_ns = self._every_ns
        self._records: list[Record] = []
        """Not written yet."""
        self._stream.write(_dumps(header(log)) + "\n")

    def write(self, record: Record) -> None:
        """Write it now or later."""
        self._records.append(record)
        now = record.t_ns
        if len(self._records) >= FLUSH_RECORDS or now >= self._due_ns or type(record) is RunStarted:
            self._due_ns = now + self._every_ns
            self._flush()

    def _flush(self) -> None:
        records = iter(self._records)
        try:
            for record in records:
                self._stream.write(_dumps(self._encode(record)) + "\n")
            self._stream.flush()
        except OSError as error:
            raise _cannot_write(self._path, error) from error
        except (TypeError, ValueError) as error:
            raise PluginError(
                f"a record cannot be written to {self._path.name}",
                where=f"record {record.ev!r} at {record.t_ns} ns",
                why=f"it holds something that JSON does not know: {error}",
                do="put only text, finite numbers, booleans, lists and dicts into records",
            ) from error
        finally:
            self._records = list(records)  # none, or those behind the one that cannot be written

    def close(self) -> None:
        try:
            self._flush()
        finally:
            try:
                self._stream.close()
            except OSError as error:
                raise _cannot_write(self._path, error) from error


_dumps: Callable[[Any], str] = json.JSONEncoder(
    separators=(",", ":"), allow_nan=False, check_circular=False
).encode


def _cannot_write(path: Path, error: OSError) -> ServeLabError:
    do = f"{WRITABLE}; or switch it off with the 'events' and 'plans' settings of observer 'jsonl'"
    return unwritable(path, error, do)
