"""Notices what a policy may not touch: clocks, chance that is not its own, the environment."""

from __future__ import annotations

import datetime
import gc
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_CLOCKS = {
    getattr(time, name): f"time.{name}"
    for name in (
        "time",
        "time_ns",
        "monotonic",
        "monotonic_ns",
        "perf_counter",
        "perf_counter_ns",
        "process_time",
        "process_time_ns",
        "sleep",
    )
}
_GLOBAL = random.Random.__init__.__globals__["_inst"]
"""The generator behind ``random.random`` and its like."""


def _forbidden_call(function: Any) -> str | None:
    """The name of a built-in that a policy may not call."""
    owner = getattr(function, "__self__", None)
    if owner is time and function in _CLOCKS:
        return _CLOCKS[function]
    name = getattr(function, "__name__", "")
    if owner is _GLOBAL:
        return f"random.{name}"
    if function is os.urandom:
        return "os.urandom"
    if name in ("now", "utcnow", "today") and owner in (datetime.datetime, datetime.date):
        return f"{owner.__name__}.{name}"
    return None


def _forbidden_frame(frame: FrameType) -> str | None:
    """The name of a function written in Python that a policy may not call."""
    module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
    if module == "random" and frame.f_locals.get("self") is _GLOBAL:
        return f"random.{name}"
    if module == "os" and frame.f_locals.get("self") in (os.environ, os.environb):
        return f"os.environ ({name})"
    return None


@contextmanager
def forbidden_calls(report: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, calls of clocks, of the global generator and of the environment are reported by name.

    It sees calls, not names: also of a function that was imported from its module before. No garbage is
    collected meanwhile, because what others do at collections (hypothesis reads a clock) is not the policy's.
    """

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        found = None
        if event == "c_call":
            found = _forbidden_call(argument)
        elif event == "call":
            found = _forbidden_frame(frame)
        if found is not None:
            report(found)

    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()


def guarded(
    method: Callable[..., Any], name: str, report: Callable[[str], None] | None
) -> Callable[..., Any]:
    """A method that reports forbidden calls made in it, with its name; None: as it is."""
    if report is None:
        return method

    def called(*args: Any) -> Any:
        with forbidden_calls(lambda what: report(f"{what} in {name}()")):
            return method(*args)

    return called
