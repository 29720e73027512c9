"""The wall clock: the same heap, waited for in real time, and a mailbox for what happens outside.

The only place in the core that reads a clock. Times are nanoseconds since the run began. Executors that do
real work run in worker threads and report when they are done; launches of executors that take no time of
their own (``simulated``) stay on the heap, so that they last as long as the cost model says.
"""

from __future__ import annotations

from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic_ns
from typing import Any

from servelab.core.engine.driver import Driver
from servelab.core.errors import PluginCallError, PluginError, ServeLabError
from servelab.core.events import Batch, Event, LaunchDone, StartTransfer, TransferDone
from servelab.core.families.executor import Executor

_Mail = tuple[int, Event] | BaseException


class _Worker(Thread):
    """Runs the launches of one lane, or the transfers of one engine, in order."""

    def __init__(self, driver: WallDriver, engine: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: SimpleQueue[Batch | StartTransfer | None] = SimpleQueue()
        self._driver = driver
        self._engine = engine

    def run(self) -> None:
        executor = self._driver.executors[self._engine]
        while (job := self.jobs.get()) is not None:
            try:
                event = self._work(executor, job)
            except BaseException as exc:  # the main thread raises it
                self._driver._mail.put(exc)
                return
            self._driver._mail.put((self._engine, event))

    def _work(self, executor: Executor, job: Batch | StartTransfer) -> Event:
        if isinstance(job, StartTransfer):
            executor.transfer(job.transfer)
            return TransferDone(job.transfer.id)
        if job.steps != 1:
            raise PluginError(
                f"launch {job.launch} has {job.steps} steps",
                why="an executor that does real work must answer horizon() with 1",
                do="mend the executor's horizon()",
            )
        outcomes = executor.launch(job, 1)
        return LaunchDone(job.lane, job.launch, [self._driver.clock()], outcomes)


class WallDriver(Driver):
    """Real-time driver. ``post`` may be called from any thread."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mail: SimpleQueue[_Mail] = SimpleQueue()
        self._began = monotonic_ns()
        self._workers: dict[tuple[int, int], _Worker] = {}

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
            for worker in self._workers.values():
                worker.jobs.put(None)
            for worker in self._workers.values():
                worker.join(timeout=5)

    def _serve(self) -> None:
        while True:
            self._refill()
            mail = self._wait()
            if mail is None:
                return
            now = self.now_ns = self.clock()
            self._refill(now)
            self._run_due(now, now)
            for index, event in mail:
                self._deliver(index, event, now)
            self._schedule_touched(now)

    def _wait(self) -> list[tuple[int, Event]] | None:
        """Sleep until mail comes or the next entry is due; None when the run is over."""
        first: _Mail | None = None
        if self._mail.empty() and self._over:
            return None
        if self._heap:
            left = self._heap[0][0] - self.clock()
            if left > 0:
                try:
                    first = self._mail.get(timeout=left / 1e9)
                except Empty:
                    return []
        elif any(engine.in_flight for engine in self.engines) or not self._mail.empty():
            first = self._mail.get()
        else:
            self._check_stall()
        mail: list[tuple[int, Event]] = []
        while first is not None:
            mail.append(self._open(first))
            first = None if self._mail.empty() else self._mail.get()
        return mail

    @staticmethod
    def _open(mail: _Mail) -> tuple[int, Event]:
        if not isinstance(mail, BaseException):
            return mail
        if isinstance(mail, ServeLabError | KeyboardInterrupt | SystemExit):
            raise mail
        raise PluginCallError(
            f"the executor raised {type(mail).__name__}: {mail}",
            where="a worker thread of the wall-clock driver",
            why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
            do="mend the executor",
        ) from mail

    def _launch(self, index: int, batch: Batch, now: int) -> None:
        if self.executors[index].simulated:
            super()._launch(index, batch, now)
        else:
            self._worker(index, batch.lane).jobs.put(batch)

    def _transfer(self, index: int, command: StartTransfer, now: int) -> None:
        if self.executors[index].simulated:
            super()._transfer(index, command, now)
        else:
            self._worker(index, -1).jobs.put(command)

    def _worker(self, index: int, lane: int) -> _Worker:
        """The thread of a lane (or, with lane -1, of the engine's transfers), started on first use."""
        worker = self._workers.get((index, lane))
        if worker is None:
            what = f"lane {lane}" if lane >= 0 else "transfers"
            worker = self._workers[index, lane] = _Worker(self, index, f"servelab engine {index} {what}")
            worker.start()
        return worker
