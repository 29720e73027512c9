"""Bench: serve a workload from start to end and let the observers measure it. A baseline, from no paper.

Mechanism: announce the run, build the driver of the configured clock, drive it, compare a quantized model
with the unquantized one (``core/quality.py``), and announce the end, whatever it was: every log has its
``run_finished`` record, with status ``ok``, ``interrupted`` (Ctrl-C) or ``failed`` and the reason. The
executor is always closed.

Deviations: none. Tier: stable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from servelab.core import quality
from servelab.core.api import Context
from servelab.core.bus import Bus
from servelab.plugins.tasks._life import announced

if TYPE_CHECKING:
    from servelab.core.compose import Run
    from servelab.core.engine.driver import Driver


class Bench:
    """Takes no settings and keeps no state."""

    def __init__(self, config: None, context: Context) -> None:
        pass

    def run(self, run: Run) -> None:
        """Serve the run's workload; figures are the observers' business."""
        driver: Driver | None = None

        def serve(bus: Bus) -> None:
            nonlocal driver
            driver = _driver(run, bus)
            driver.run()
            heard = bus.listens("quality")
            if heard and run.config.quant and run.quantizer and run.info["quality"]["measured"]:
                quality.measure(run, {run.config.quant.name: run.quantizer}, bus.emit, driver.now_ns)

        announced(
            run,
            run.info,
            serve,
            lambda: driver.now_ns if driver else 0,
            lambda: driver.energy_j if driver else None,
        )


def _driver(run: Run, bus: Bus) -> Driver:
    parts = run.for_driver(bus)
    if run.config.clock.name == "virtual":
        from servelab.core.engine.virtual import VirtualDriver

        return VirtualDriver(**parts)
    from servelab.core.engine.wall import WallDriver

    return WallDriver(**parts)
