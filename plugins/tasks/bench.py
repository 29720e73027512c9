"""Bench: serve a workload from start to end and let the observers measure it. A baseline, from no paper.

Mechanism: build the driver of the configured clock, announce the run, drive it, and announce its end,
whatever the end was: every log has its ``run_finished`` record, with status ``ok``, ``interrupted`` (Ctrl-C)
or ``failed`` and the reason. The executor is always closed.

Deviations: none. Tier: stable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from servelab.core.api import Context
from servelab.core.bus import Bus
from servelab.core.errors import ServeLabError
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
        """Serve the run's workload; figures are the observers' business."""
        try:
            bus = Bus(run.observers)
            driver = _driver(run, bus)
            run.engine.plan_log = bus.listens("planned")
            status: Status = "ok"
            reason = ""
            try:
                bus.emit(RunStarted(t_ns=0, info=run.info))
                driver.run()
            except BaseException as exc:
                status, reason = _ending(exc)
                _finish(bus, driver, status, reason, exc)
                raise
            _finish(bus, driver, status, reason, None)
        finally:
            run.executor.close()


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


def _ending(exc: BaseException) -> tuple[Status, str]:
    if isinstance(exc, KeyboardInterrupt):
        return "interrupted", "keyboard interrupt"
    return "failed", exc.what if isinstance(exc, ServeLabError) else f"{type(exc).__name__}: {exc}"


def _finish(bus: Bus, driver: Driver, status: Status, reason: str, cause: BaseException | None) -> None:
    """Emit the last record. The error that ended the run stays the one raised."""
    try:
        bus.emit(RunFinished(t_ns=driver.now_ns, status=status, reason=reason))
    except Exception as exc:
        if cause is None:
            raise
        cause.add_note(f"while ending the run: {type(exc).__name__}: {exc}")
