"""Work in a process of its own: it cannot harm its neighbours, and its memory goes with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from contextlib import suppress
from multiprocessing.process import BaseProcess
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def forks() -> bool:
    """Whether a new process may be a copy of this one, which is quick; not where threads hold locks."""
    return sys.platform == "linux" and threading.active_count() == 1


def context(forked: bool) -> Any:
    """Where processes are made."""
    return multiprocessing.get_context("fork" if forked else "spawn")


def start(process: BaseProcess) -> None:
    """Start a process with SIGINT and SIGTERM held back until it has called ``settle``."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def settle() -> None:
    """First call in a new process: signals of the terminal reach its parent, which hands them on once."""
    with suppress(OSError):
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # it may write to the terminal all the same
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed leaves no process running behind."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def duration(seconds: float) -> str:
    """How long it took, or may take: ``9.5 s``, ``2 min 05 s``, ``1 h 02 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def in_one_line(error: str) -> str:
    """The first line of an error's text, with the first point of the list that it announces."""
    first, *more = error.strip().splitlines() or [""]
    return f"{first} {more[0].strip(' -')}" if first.endswith(":") and more else first


def died(exitcode: int, what: str, where: str) -> str:
    """What to say of a process that did not come to say how it ended.

    Args:
        exitcode: as ``multiprocessing`` has it.
        what: whose process it was: "job", "cell".
        where: its folder or name.
    """
    if exitcode < 0:
        name = signal.Signals(-exitcode).name
        said = f"the {what}'s process was ended by {name}"
        why = (
            "the system does this to a process that takes more memory than there is"
            if name == "SIGKILL"
            else "a library crashed, or somebody sent the signal"
        )
        do = (
            "give it less to do (a smaller model, fewer KV pages), or run fewer of them at a time"
            if name == "SIGKILL"
            else f"run this {what} alone, with PYTHONFAULTHANDLER=1"
        )
    else:
        said = f"the {what}'s process left with status {exitcode} before the {what} was over"
        why, do = "a library ended it", f"run this {what} alone"
    return f"{said}\n  where: {where}\n  why:   {why}\n  do:    {do}"
