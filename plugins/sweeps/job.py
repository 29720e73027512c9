"""One job of a sweep, in a process of its own.

A process each: a job that crashes, or that the system kills for its memory, takes no other with it; memory
and settings of libraries do not leak from one job into the next, and peak memory is the job's own.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from servelab.core import __version__
from servelab.core.errors import ServeLabError
from servelab.core.interrupt import interrupted_by
from servelab.core.processes import context, died, duration, forks, settle, start
from servelab.core.registry import import_target
from servelab.plugins.sweeps.folder import (
    REPORT_FILE,
    STOP_FILE,
    JobState,
    bare,
    fail,
    files_of,
    job_folders,
    put_aside,
    read_state,
)

log = logging.getLogger("servelab.sweep")

Task = Callable[[DictConfig], Any]
POLL_S = 0.2
"""How often a waiting job looks whether the sweep is being ended."""


@dataclass
class Job:
    """What the launcher calls instead of the task: runs it, and never raises for a job that failed.

    Launchers may send it to other processes, so it holds nothing that cannot be pickled.
    """

    task: Task
    sweep: Path
    """The sweep's folder."""
    summary: str = ""
    """See ``Sweeper``."""
    total: int = 0
    swept: frozenset[str] = frozenset()
    """The settings that differ between jobs."""
    process: int = 0
    """The sweep's own; where jobs are started elsewhere, several run at once."""

    def __call__(self, cfg: DictConfig) -> None:
        hydra = HydraConfig.get()
        folder, number = Path(hydra.runtime.output_dir), int(hydra.job.num)
        parallel = os.getpid() != self.process
        if parallel:  # of a launcher: the sweep's own process hears of signals, and tells by the stop file
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if self._stopped() is not None:
            return self._leave(parallel)
        state = read_state(folder)
        assert state is not None  # the sweeper has written it
        given = bare(state.overrides)
        title = f"job {number} ({number + 1} of {self.total})"
        spelled = " ".join(one for one in given if one.partition("=")[0] in self.swept) or " ".join(given)
        if state.finished(folder):
            log.info("%s skipped, finished earlier: %s", title, spelled)
            return None
        log.info("%s began: %s", title, spelled)
        try:
            aside = put_aside(folder, f"{hydra.job.name}.log") if state.status != "waiting" else None
        except ServeLabError as error:
            state = fail(folder, state, str(error), 0.0)
        else:
            if aside is not None:
                log.info("%s: files of an earlier try are now in %s", title, aside)
            state = replace(state, status="running", reason="", servelab=__version__, wall_s=0.0, files=[])
            state.write(folder)
            state = self._run(cfg, folder, state, parallel)
        self._tell(title, folder, state)
        return self._leave(parallel) if self._stopped() is not None else None

    def _run(self, cfg: DictConfig, folder: Path, state: JobState, parallel: bool) -> JobState:
        """Start the process, hand on a signal that ends the sweep, and see what came of it."""
        forked = forks()
        began, work = monotonic(), _Work(self.task, folder, state, parallel, forked=forked)
        process: BaseProcess = context(forked).Process(target=work, args=(cfg, HydraConfig.instance().cfg))
        start(process)
        told = False
        while not wait([process.sentinel], POLL_S):
            number = self._stopped()
            if number is not None and not told and process.pid is not None:
                told = True
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        process.join()
        ended = read_state(folder)
        if ended is not None and ended.status == "running" and told:  # before it could say so
            ended = replace(state, status="interrupted", reason="before it began", wall_s=monotonic() - began)
            ended.write(folder)
        if ended is None or ended.status == "running":
            return fail(folder, state, died(process.exitcode or 0, "job", str(folder)), monotonic() - began)
        return ended

    def _tell(self, title: str, folder: Path, state: JobState) -> None:
        """The line that tells the end of a job."""
        ok, about = state.status == "ok", state.reason
        if ok and self.summary:
            with suppress(ServeLabError):  # the comparison tells it
                about = import_target(self.summary)(folder)
        log.log(
            logging.INFO if ok else logging.ERROR,
            "%s %s in %s%s%s",
            title,
            "done" if ok else state.status,
            duration(state.wall_s),
            f": {about}" if about else "",
            self._outlook(),
        )

    def _stopped(self) -> int | None:
        """The signal that ends the sweep."""
        try:
            return int((self.sweep / STOP_FILE).read_text())
        except (OSError, ValueError):
            return None

    def _leave(self, parallel: bool) -> None:
        if not parallel:
            raise interrupted_by(self._stopped() or signal.SIGINT)

    def _outlook(self) -> str:
        """How long the rest may take, by the jobs that ended so far."""
        ended = [state.wall_s for _, state in job_folders(self.sweep) if state.status in ("ok", "failed")]
        left = self.total - len(ended)
        if left < 1 or not ended or os.getpid() != self.process:
            return ""
        return f"; {left} left, about {duration(left * sum(ended) / len(ended))}"


@dataclass
class _Work:
    """What the job's process does."""

    task: Task
    folder: Path
    state: JobState
    parallel: bool
    """Other jobs run at the same time."""
    forked: bool

    def __call__(self, cfg: DictConfig, hydra: DictConfig) -> None:
        """Run the job and note how it ended, whatever it was."""
        began = monotonic()
        try:
            self._settle(hydra)
            with (self.folder / REPORT_FILE).open("w", encoding="utf-8") as report, redirect_stdout(report):
                self.task(cfg)
        except KeyboardInterrupt as exc:
            reason = str(exc) or "keyboard interrupt"
            interrupted = replace(self.state, status="interrupted", reason=reason)
            replace(interrupted, wall_s=monotonic() - began).write(self.folder)
        except CompactHydraException as exc:
            more = traceback.format_exception(exc.__cause__) if exc.__cause__ else []  # if asked for
            fail(self.folder, self.state, "\n\n".join([str(exc), "".join(more)]), monotonic() - began)
        except BaseException as exc:
            text = "".join([f"{type(exc).__name__}: {exc}\n\n", *traceback.format_exception(exc)])
            fail(self.folder, self.state, text, monotonic() - began)
        else:
            ended = replace(self.state, status="ok", wall_s=monotonic() - began, files=files_of(self.folder))
            ended.write(self.folder)

    def _settle(self, hydra: DictConfig) -> None:
        settle()
        if self.parallel:
            _hide_terminal()
        if not self.forked:
            setup_globals()
            HydraConfig.instance().set_config(hydra)
            configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)


def _hide_terminal() -> None:
    """Several jobs at once must not draw over one another's progress line."""

    class Plain(io.TextIOWrapper):
        def isatty(self) -> bool:
            return False

    sys.stderr = Plain(os.fdopen(os.dup(2), "wb"), line_buffering=True)
