"""The virtual clock: one heap of (time, class, sequence) over any number of engines. Bit-repeatable.

At one instant events run in the order of their class (``core/events.py``), then in the order they were
posted; when none is left, each engine that was touched gets ``Schedule``, in order of its index.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from typing import Any

from servelab.core.engine.driver import Driver
from servelab.core.errors import StallError
from servelab.core.events import (
    Abort,
    Arrive,
    Batch,
    Command,
    Emit,
    Event,
    Interrupt,
    Launch,
    LaunchDone,
    Schedule,
    SetTimer,
    StartTransfer,
    Timer,
    TransferDone,
)
from servelab.core.records import RequestFinished
from servelab.core.request import Arrival, Cancel

_SCHEDULE = Schedule()
_TIMER = Timer()


@dataclass(slots=True, eq=False)
class _Flying:
    """A launch on the clock. It executes when it ends, so an interrupt only shortens it."""

    batch: Batch
    ends_ns: list[int]
    steps: int


class VirtualDriver(Driver):
    """Discrete-event driver; ``cost`` says how long everything takes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._heap: list[tuple[int, int, int, int, Any]] = []
        self._sequence = 0
        self._events = 0
        """Entries of the heap that are not timers."""
        self._flying: dict[tuple[int, int], _Flying] = {}
        self._lane_end: dict[tuple[int, int], int] = {}
        self._timers: set[tuple[int, int]] = set()
        self._touched: set[int] = set()

    def post(self, time_ns: int, event: Event, engine: int = 0) -> None:
        """Put an event on the clock (lost instances, tool answers, anything a scenario needs)."""
        self._push(time_ns, event.ORDER, engine, event)

    def _push(self, time_ns: int, order: int, engine: int, what: Any) -> None:
        self._sequence += 1
        self._events += what is not _TIMER
        heappush(self._heap, (time_ns, order, self._sequence, engine, what))

    def _loop(self) -> None:
        heap, upcoming = self._heap, self._next_arrival()
        while True:
            while upcoming is not None and (not heap or upcoming.time_ns <= heap[0][0]):
                self._accept(upcoming)
                upcoming = self._next_arrival()
            if not heap or (not self._events and upcoming is None and self._idle):
                break
            now = self.now_ns = heap[0][0]
            while heap and heap[0][0] == now:
                _, _, _, index, what = heappop(heap)
                self._fire(index, what, now)
            touched = sorted(self._touched)
            self._touched.clear()
            for index in touched:
                self._do(index, self.engines[index].handle(_SCHEDULE, now), now)
        for engine in self.engines:
            if engine.requests:
                raise StallError(
                    f"engine {engine.index} has requests that nothing will ever run",
                    where=f"scheduler {engine.scheduler_name!r}, t={self.now_ns} ns",
                    why=engine.stall_reason(),
                    do="plan them, reject them with a reason, or set wake_at",
                )

    def _accept(self, item: Arrival | Cancel) -> None:
        index = self._home_of(item)
        event = Abort(item.request_id) if isinstance(item, Cancel) else Arrive(item.spec)
        self._push(item.time_ns, event.ORDER, index, event)

    def _fire(self, index: int, what: Any, now: int) -> None:
        event: Event
        self._events -= what is not _TIMER
        if isinstance(what, _Flying):
            batch, steps = what.batch, what.steps
            if self._flying.get((index, batch.launch)) is not what or what.ends_ns[steps - 1] != now:
                return  # superseded by an interrupt, or already ended
            del self._flying[index, batch.launch]
            outcomes = self.executors[index].launch(batch, steps)
            event = LaunchDone(batch.lane, batch.launch, what.ends_ns[:steps], outcomes)
        elif isinstance(what, StartTransfer):
            self.executors[index].transfer(what.transfer)
            event = TransferDone(what.transfer.id)
        else:
            event = what
            if event is _TIMER:
                self._timers.discard((index, now))
        self._touched.add(index)
        self._do(index, self.engines[index].handle(event, now), now)

    def _do(self, index: int, commands: list[Command], now_ns: int) -> None:
        for command in commands:
            kind = type(command)
            if kind is Emit:
                record = command.record  # type: ignore[union-attr]
                self._emit(record)
                if type(record) is RequestFinished:
                    for item in self._finished(record):
                        self._accept(item)
            elif isinstance(command, Launch):
                self._launch(index, command.batch, now_ns)
            elif isinstance(command, Interrupt):
                self._interrupt(index, command, now_ns)
            elif isinstance(command, StartTransfer):
                took = max(1, self.costs[index].transfer_time(command.transfer))
                self._push(now_ns + took, TransferDone.ORDER, index, command)
            elif isinstance(command, SetTimer) and (index, command.at_ns) not in self._timers:
                self._timers.add((index, command.at_ns))
                self._push(command.at_ns, Timer.ORDER, index, _TIMER)

    def _launch(self, index: int, batch: Batch, now: int) -> None:
        start = max(now, self._lane_end.get((index, batch.lane), 0))
        steps = batch.steps
        ends = list(accumulate(self._prices(index, batch, steps), initial=start))[1:]
        flying = _Flying(batch, ends, steps)
        self._flying[index, batch.launch] = flying
        self._lane_end[index, batch.lane] = ends[-1]
        self._push(ends[-1], LaunchDone.ORDER, index, flying)

    def _interrupt(self, index: int, command: Interrupt, now: int) -> None:
        """End a launch with the step in progress: the first that ends now or later."""
        flying = self._flying.get((index, command.launch))
        if flying is None:
            return
        steps = next(k for k, end in enumerate(flying.ends_ns, 1) if end >= now)
        if steps < flying.steps:
            flying.steps = steps
            end = flying.ends_ns[steps - 1]
            self._lane_end[index, command.lane] = end
            self._push(end, LaunchDone.ORDER, index, flying)
