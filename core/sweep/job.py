"""One job of a sweep, in a process of its own.

A process each: a job that crashes, or that the system kills for its memory, takes no other with it; memory
and settings of libraries do not leak from one job into the next, and peak memory is the job's own.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log, setup_globals
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from servelab.core import __version__
from servelab.core.interrupt import interrupted_by
from servelab.core.sweep.folder import (
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
    total: int = 0
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
        title, spelled = f"job {number} ({number + 1} of {self.total})", " ".join(bare(state.overrides))
        if state.finished(folder):
            log.info("%s skipped, finished earlier: %s", title, spelled)
            return None
        log.info("%s began: %s", title, spelled)
        aside = put_aside(folder, f"{hydra.job.name}.log") if state.status != "waiting" else None
        if aside is not None:
            log.info("%s: files of an earlier try are now in %s", title, aside)
        state = replace(state, status="running", reason="", servelab=__version__, wall_s=0.0, files=[])
        state.write(folder)
        state = self._run(cfg, folder, state, parallel)
        log.log(
            logging.INFO if state.status == "ok" else logging.ERROR,
            "%s %s in %s%s%s",
            title,
            "done" if state.status == "ok" else state.status,
            _time(state.wall_s),
            f": {state.reason}" if state.reason else "",
            self._outlook(),
        )
        return self._leave(parallel) if self._stopped() is not None else None

    def _run(self, cfg: DictConfig, folder: Path, state: JobState, parallel: bool) -> JobState:
        """Start the process, hand on a signal that ends the sweep, and see what came of it."""
        forks = sys.platform == "linux" and threading.active_count() == 1
        began = monotonic()
        process = multiprocessing.get_context("fork" if forks else "spawn").Process(
            target=_work, args=(self.task, cfg, HydraConfig.instance().cfg, folder, state, parallel, forks)
        )
        process.start()
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
            return fail(folder, state, _died(process.exitcode or 0, folder), monotonic() - began)
        return ended

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
        return f"; {left} left, about {_time(left * sum(ended) / len(ended))}"


def _work(
    task: Task, cfg: DictConfig, hydra: DictConfig, folder: Path, state: JobState, parallel: bool, forked: bool
) -> None:
    """In the job's process: run it and note how it ended."""
    with suppress(OSError):
        os.setpgid(0, 0)  # Ctrl-C reaches the sweep, which hands it on once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if parallel:
        _hide_terminal()
    if not forked:
        setup_globals()
        HydraConfig.instance().set_config(hydra)
        configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    began = monotonic()
    try:
        with (folder / REPORT_FILE).open("w", encoding="utf-8") as report, redirect_stdout(report):
            task(cfg)
    except KeyboardInterrupt as exc:
        reason = str(exc) or "keyboard interrupt"
        replace(state, status="interrupted", reason=reason, wall_s=monotonic() - began).write(folder)
    except CompactHydraException as exc:
        fail(folder, state, str(exc), monotonic() - began)
    except BaseException as exc:
        text = "".join([f"{type(exc).__name__}: {exc}\n\n", *traceback.format_exception(exc)])
        fail(folder, state, text, monotonic() - began)
    else:
        ended = replace(state, status="ok", wall_s=monotonic() - began, files=files_of(folder))
        ended.write(folder)


def warm_up() -> None:
    """Load once what every job needs and no job changes, so that forked processes have it."""
    import servelab.core.compose
    from servelab.core.registry import Registry

    Registry.load()


def _end_with_parent() -> None:
    """A sweep that was killed leaves no job running behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _hide_terminal() -> None:
    """Several jobs at once must not draw over one another's progress line."""

    class Plain(io.TextIOWrapper):
        def isatty(self) -> bool:
            return False

    sys.stderr = Plain(os.fdopen(os.dup(2), "wb"), line_buffering=True)


def _died(exitcode: int, folder: Path) -> str:
    """A process that did not come to say how it ended."""
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        what = f"the job's process was ended by {name}"
        why = "the system does this to a process that takes more memory than there is" if name == "SIGKILL" \
            else "a library crashed, or somebody sent the signal"
        do = "give it less to do (a smaller model, fewer KV pages), or run fewer jobs at a time" \
            if name == "SIGKILL" else "run this job alone, with PYTHONFAULTHANDLER=1"
    else:
        what = f"the job's process left with status {exitcode} before the job was over"
        why, do = "a library ended it", "run this job alone"
    return f"{what}\n  where: {folder}\n  why:   {why}\n  do:    {do}"


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
