"""The virtual clock: time jumps from one instant to the next. Bit-repeatable over any number of engines."""

from __future__ import annotations

from servelab.core.engine.driver import Driver
from servelab.core.events import Event


class VirtualDriver(Driver):
    """Discrete-event driver; the cost models say how long everything takes."""

    def post(self, time_ns: int, event: Event, engine: int = 0) -> None:
        """Put an event on the clock (lost instances, tool answers, anything a scenario needs)."""
        self._push(time_ns, event.ORDER, engine, event)

    def _loop(self) -> None:
        heap = self._heap
        while True:
            self._refill()
            if not heap or self._over:
                break
            now = self.now_ns = heap[0][0]
            self._run_due(now)
            self._schedule_touched(now)
            if self._events or self._upcoming is not None:
                self._in_vain = 0
            else:
                self._check_progress()
        self._check_stall()
