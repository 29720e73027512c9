"""The wall clock: real time, launches in worker threads, a mailbox for everything that happens.

The only place in the core that reads a clock. Times are nanoseconds since the run began. Executors that take
no time of their own (``simulated``) are paced: the worker waits what the cost model says.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from queue import Empty, SimpleQueue
from threading import Event as Flag
from threading import Thread
from time import monotonic_ns
from typing import Any

from servelab.core.engine.driver import Driver
from servelab.core.errors import PluginCallError, PluginError, ServeLabError, StallError
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


@dataclass(slots=True, eq=False)
class _Job:
    """A launch or transfer for a worker."""

    batch: Batch | None
    transfer: StartTransfer | None
    interrupt: Flag


class _Worker(Thread):
    """Runs the launches of one lane, or the transfers of one engine, in order."""

    def __init__(self, driver: WallDriver, engine: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._driver = driver
        self._engine = engine
        self._executor = driver.executors[engine]

    def run(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                event = self._launch(job) if job.batch is not None else self._transfer(job)
            except BaseException as exc:  # the main thread raises it
                self._driver._mail.put(exc)
                return
            if event is not None:
                self._driver._mail.put((self._engine, event))

    def _launch(self, job: _Job) -> Event | None:
        batch, driver = job.batch, self._driver
        assert batch is not None
        if not self._executor.simulated:
            if batch.steps != 1:
                raise PluginError(
                    f"launch {batch.launch} has {batch.steps} steps",
                    why="an executor that takes real time must answer horizon() with 1",
                    do="mend the executor's horizon()",
                )
            outcomes = self._executor.launch(batch, 1)
            return LaunchDone(batch.lane, batch.launch, [driver.clock()], outcomes)
        prices = driver._prices(self._engine, batch, batch.steps)
        ends = list(accumulate(prices, initial=driver.clock()))[1:]
        if not self._wait(ends[-1], job):
            return None
        if job.interrupt.is_set():
            now = driver.clock()
            steps = next((k for k, end in enumerate(ends, 1) if end >= now), len(ends))
            job.interrupt.clear()
            if not self._wait(ends[steps - 1], job):
                return None
            ends = ends[:steps]
        return LaunchDone(batch.lane, batch.launch, ends, self._executor.launch(batch, len(ends)))

    def _transfer(self, job: _Job) -> Event | None:
        assert job.transfer is not None
        transfer = job.transfer.transfer
        if self._executor.simulated:
            took = max(1, self._driver.costs[self._engine].transfer_time(transfer))
            if not self._wait(self._driver.clock() + took, job):
                return None
        self._executor.transfer(transfer)
        return TransferDone(transfer.id)

    def _wait(self, until_ns: int, job: _Job) -> bool:
        """Sleep until a time, an interrupt, or the end of the run (then False)."""
        left = until_ns - self._driver.clock()
        if left > 0:
            job.interrupt.wait(left / 1e9)
        return not self._driver._closing


class WallDriver(Driver):
    """Real-time driver. ``post`` may be called from any thread."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mail: SimpleQueue[tuple[int, Event] | BaseException] = SimpleQueue()
        self._began = monotonic_ns()
        self._closing = False
        self._workers: dict[tuple[int, int], _Worker] = {}
        self._running: dict[tuple[int, int], _Job] = {}
        self._due: list[tuple[int, int, int, Arrival | Cancel | Timer, int]] = []
        self._sequence = 0
        self._timers: set[tuple[int, int]] = set()

    def clock(self) -> int:
        """Nanoseconds since the run began."""
        return monotonic_ns() - self._began

    def post(self, event: Event, engine: int = 0) -> None:
        """Hand an event to an engine at the next turn of the loop; thread-safe."""
        self._mail.put((engine, event))

    def _loop(self) -> None:
        self._began = monotonic_ns()
        try:
            self._serve()
        finally:
            self._closing = True
            for job in self._running.values():
                job.interrupt.set()
            for worker in self._workers.values():
                worker.jobs.put(None)
            for worker in self._workers.values():
                worker.join(timeout=5)

    def _serve(self) -> None:
        self._refill()
        while (mail := self._collect()) is not None:
            now = self.now_ns = self.clock()
            touched = set()
            for index, event in mail:
                touched.add(index)
                self._do(index, self.engines[index].handle(event, now), now)
            while self._due and self._due[0][0] <= now:
                index, event = self._take_due()
                touched.add(index)
                self._do(index, self.engines[index].handle(event, now), now)
            for index in sorted(touched):
                self._do(index, self.engines[index].handle(_SCHEDULE, now), now)

    def _refill(self) -> None:
        """Put the workload's next item on the clock; one ahead is enough, they come in time order."""
        item = self._next_arrival()
        if item is not None:
            self._later(item.time_ns, item, -1)

    def _later(self, time_ns: int, item: Arrival | Cancel | Timer, index: int) -> None:
        self._sequence += 1
        order = Timer.ORDER if isinstance(item, Timer) else Arrive.ORDER
        heappush(self._due, (time_ns, order, self._sequence, item, index))

    def _take_due(self) -> tuple[int, Event]:
        """The first due item as an event and the engine it is for."""
        time_ns, _, _, item, index = heappop(self._due)
        if isinstance(item, Timer):
            self._timers.discard((index, time_ns))
            return index, item
        home = self._home_of(item)
        if index < 0:  # from the workload's stream, not a reaction
            self._refill()
        return home, Abort(item.request_id) if isinstance(item, Cancel) else Arrive(item.spec)

    def _collect(self) -> list[tuple[int, Event]] | None:
        """Wait for mail or the next due item; None when the run is over."""
        mail: list[tuple[int, Event]] = []
        first: tuple[int, Event] | BaseException | None = None
        if self._idle and self._mail.empty() and all(isinstance(d[3], Timer) for d in self._due):
            return None
        if self._due:
            left = self._due[0][0] - self.clock()
            if left > 0:
                try:
                    first = self._mail.get(timeout=left / 1e9)
                except Empty:
                    return mail
        elif any(e.in_flight for e in self.engines):
            first = self._mail.get()
        else:
            for engine in self.engines:
                if engine.requests:
                    raise StallError(
                        f"engine {engine.index} has requests that nothing will ever run",
                        where=f"scheduler {engine.scheduler_name!r}",
                        why=engine.stall_reason(),
                        do="plan them, reject them with a reason, or set wake_at",
                    )
        while first is not None:
            if isinstance(first, ServeLabError | KeyboardInterrupt | SystemExit):
                raise first
            if isinstance(first, BaseException):
                raise PluginCallError(
                    f"the executor raised {type(first).__name__}: {first}",
                    where="a worker thread of the wall-clock driver",
                    why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                    do="mend the executor",
                ) from first
            mail.append(first)
            first = None if self._mail.empty() else self._mail.get()
        return mail

    def _do(self, index: int, commands: list[Command], now_ns: int) -> None:
        for command in commands:
            if isinstance(command, Emit):
                record = command.record
                self._emit(record)
                if isinstance(record, RequestFinished):
                    for item in self._finished(record):
                        self._later(item.time_ns, item, index)
            elif isinstance(command, Launch):
                job = _Job(command.batch, None, Flag())
                self._running[index, command.batch.lane] = job
                self._worker(index, command.batch.lane).jobs.put(job)
            elif isinstance(command, Interrupt):
                job = self._running[index, command.lane]
                if job.batch is not None and job.batch.launch == command.launch:
                    job.interrupt.set()
            elif isinstance(command, StartTransfer):
                self._worker(index, -1).jobs.put(_Job(None, command, Flag()))
            elif isinstance(command, SetTimer) and (index, command.at_ns) not in self._timers:
                self._timers.add((index, command.at_ns))
                self._later(command.at_ns, Timer(), index)

    def _worker(self, index: int, lane: int) -> _Worker:
        """The thread of a lane (or, with lane -1, of the engine's transfers), started on first use."""
        worker = self._workers.get((index, lane))
        if worker is None:
            what = f"lane {lane}" if lane >= 0 else "transfers"
            worker = self._workers[index, lane] = _Worker(self, index, f"servelab engine {index} {what}")
            worker.start()
        return worker
