"""Bench: serve a workload from start to end and let the observers measure it. A baseline, from no paper.

Mechanism: build the driver of the configured clock, announce the run, drive it, and announce its end,
whatever the end was: every log has its ``run_finished`` record, with status ``ok``, ``interrupted`` (Ctrl-C)
or ``failed`` and the reason. The executor is always closed.

Deviations: none. Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from servelab.core.api import Context
from servelab.core.bus import Bus
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.records import RunFinished, RunStarted

if TYPE_CHECKING:
    from servelab.core.compose import Run
    from servelab.core.engine.driver import Driver

Status = Literal["ok", "interrupted", "failed"]


class Bench:
    """Takes no settings and keeps no state."""

    def __init__(self, config: None, context: Context) -> None:
        pass

    def run(self, run: Run) -> None:
        """Serve the run's workload; figures are the observers' business.

        The first error is the one raised; what fails while the run is wound up is noted on it.
        """
        bus = driver = None
        error: BaseException | None = None
        try:
            bus = Bus(run.observers)
            run.engine.plan_log = bus.listens("planned")
            run.engine.token_log = bus.asks("tokens")
            driver = _driver(run, bus)
            bus.emit(RunStarted(t_ns=0, info=run.info))
            driver.run()
        except BaseException as exc:
            error = exc
        error = _attempt(run.executor.close, "closing the executor", error)
        if bus is not None and driver is not None:
            status, reason = _ending(error)
            last = RunFinished(t_ns=driver.now_ns, status=status, reason=reason)
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


def _driver(run: Run, bus: Bus) -> Driver:
    parts: dict[str, Any] = {
        "engines": [run.engine],
        "executors": [run.executor],
        "costs": [run.cost],
        "workload": run.workload,
        "truths": run.truths,
        "emit": bus.emit,
    }
    if run.config.clock.name == "virtual":
        from servelab.core.engine.virtual import VirtualDriver

        return VirtualDriver(**parts)
    from servelab.core.engine.wall import WallDriver

    return WallDriver(**parts)


def _ending(error: BaseException | None) -> tuple[Status, str]:
    if error is None:
        return "ok", ""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", str(error) or "keyboard interrupt"
    return "failed", error.what if isinstance(error, ServeLabError) else f"{type(error).__name__}: {error}"
