"""The life of a run, whatever a task does in it: announced, worked, closed, its end announced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from servelab.core.bus import Bus
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.records import RunFinished, RunStarted
from servelab.core.usage import Usage
from servelab.plugins.tasks import _collector as collector

if TYPE_CHECKING:
    from servelab.core.compose import Run

Status = Literal["ok", "interrupted", "failed"]


def announced(
    run: Run,
    info: Mapping[str, Any],
    work: Callable[[Bus], None],
    now_ns: Callable[[], int],
    energy_j: Callable[[], float | None] = lambda: None,
) -> None:
    """Do a task's work between the first and the last record of its run; the executor is always closed.

    Args:
        run: composed.
        info: what the first record says.
        work: gets the bus.
        now_ns: time of the last record.
        energy_j: until then.

    Raises:
        The first error, when everything is wound up; what fails meanwhile is noted on it.
    """
    simulated = getattr(run.executor, "simulated", False)  # a real model's tensors are not left waiting
    with collector.seldom() if simulated else nullcontext():
        bus, usage = None, Usage()
        error: BaseException | None = None
        try:
            bus = Bus(run.observers)
            bus.emit(RunStarted(t_ns=0, info=info))
            work(bus)
        except BaseException as exc:
            error = exc
        error = _attempt(run.close, "closing the executor", error)
        if bus is not None:
            status, reason = _ending(error)
            last = RunFinished(
                t_ns=now_ns(), status=status, reason=reason, energy_j=energy_j(), **usage.cost()
            )
            error = _attempt(partial(bus.emit, last), "ending the run", error)
        if error is not None:
            raise error


def _attempt(action: Callable[[], None], what: str, error: BaseException | None) -> BaseException | None:
    """Do one thing more; the error that stands afterwards."""
    try:
        action()
    except Exception as exc:
        if error is not None:
            error.add_note(f"while {what}: {type(exc).__name__}: {exc}")
        elif isinstance(exc, ServeLabError):
            return exc
        else:
            failed = PluginCallError(
                f"{what} raised {type(exc).__name__}: {exc}",
                do="mend the plugin",
                where="after the last request",
            )
            failed.__cause__ = exc
            return failed
    return error


def _ending(error: BaseException | None) -> tuple[Status, str]:
    if error is None:
        return "ok", ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", str(error) or "keyboard interrupt"
    return "failed", error.what if isinstance(error, ServeLabError) else f"{type(error).__name__}: {error}"
