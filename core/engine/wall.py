"""The wall clock: the same heap, waited for in real time, and a mailbox for what happens outside.

The only place in the core that reads a clock. Times are nanoseconds since the run began. Executors that do
real work are called between two turns of the loop where nothing could be decided meanwhile (one engine, one
launch at a time), and in worker threads otherwise; launches of executors that take no time of their own
(``simulated``) stay on the heap, so that they last as long as the cost model says.
"""

from __future__ import annotations

from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic_ns
from typing import Any

from servelab.core.engine.driver import Driver
from servelab.core.errors import PluginCallError, PluginError, ServeLabError
from servelab.core.events import Batch, Event, LaunchDone, StartTransfer, TransferDone
from servelab.core.families.executor import Executor

_Mail = tuple[int, Event, int] | BaseException | None
_LONGEST_WAIT_S = 3600.0
"""Sleeps are cut to this: a pin until the end of time must not overflow a timeout."""


class _Worker(Thread):
    """Runs the launches of one lane, or the transfers of one engine, in order."""

    def __init__(self, driver: WallDriver, engine: int, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.jobs: SimpleQueue[Batch | StartTransfer | None] = SimpleQueue()
        self._driver = driver
        self._engine = engine

    def run(self) -> None:
        executor = self._driver.executors[self._engine]
        while (job := self.jobs.get()) is not None and not self._driver._stopping:
            try:
                event = self._work(executor, job)
            except BaseException as exc:  # the main thread raises it
                self._driver._mail.put(exc)
                return
            self._driver.post(event, self._engine)

    def _work(self, executor: Executor, job: Batch | StartTransfer) -> Event:
        if isinstance(job, StartTransfer):
            executor.transfer(job.transfer)
            return TransferDone(job.transfer.id)
        return self._driver._run_launch(executor, job)


class WallDriver(Driver):
    """Real-time driver.

    Args:
        keep_open: stay and serve what is posted until ``close``; otherwise the run ends with the workload.

    ``post`` and ``close`` may be called from any thread. With one engine that runs one launch at a time,
    ``launch`` is called from the thread of ``run``: handing every step to another thread and back costs more
    than it brings, since a scheduler is asked again only when the launch has ended. Otherwise, and always for
    ``transfer``, executors that do real work are called from worker threads, one per lane and one for
    transfers; everything else from the thread of ``run``.
    """

    def __init__(self, *, keep_open: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._mail: SimpleQueue[_Mail] = SimpleQueue()
        self._began = monotonic_ns()
        self._workers: dict[tuple[int, int], _Worker] = {}
        self._open = keep_open
        self._stopping = False
        limits = self.engines[0].limits
        self._inline = len(self.engines) == 1 and limits.lanes == 1 and limits.max_in_flight == 1
        self._launched: Batch | None = None
        """To be run before the next turn of the loop."""

    @property
    def energy_j(self) -> None:
        """Time is real, and so is what devices draw: nobody here has measured it."""
        return None

    def clock(self) -> int:
        """Nanoseconds since the run began."""
        return monotonic_ns() - self._began

    def post(self, event: Event, engine: int = 0) -> None:
        """Hand an event to an engine at the next turn of the loop; it happened now."""
        self._mail.put((engine, event, self.clock()))

    def close(self) -> None:
        """With ``keep_open``: end the run when everything posted so far has been served."""
        self._mail.put(None)

    def _loop(self) -> None:
        self._began = monotonic_ns()
        try:
            self._serve()
        except BaseException as exc:
            self._stop()
            while not self._mail.empty():  # other workers may have failed too
                if isinstance(mail := self._mail.get(), Exception):
                    exc.add_note(f"also, in a worker thread: {type(mail).__name__}: {mail}")
            raise
        self._stop()

    def _stop(self) -> None:
        """Let workers finish the job they are on, and no other."""
        self._stopping = True
        for worker in self._workers.values():
            worker.jobs.put(None)
        for worker in self._workers.values():
            worker.join()

    def _serve(self) -> None:
        while True:
            self._refill()
            if not self._wait():
                return
            now = self.now_ns = self.clock()
            self._refill(now)
            self._run_due(now)
            self._schedule_touched(now)
            if self._launched is not None:
                batch, self._launched = self._launched, None
                self.post(self._guard("executor", self._run_launch, self.executors[0], batch))
            elif self._events or self._upcoming is not None or self._open or not self._mail.empty():
                self._in_vain = 0
            else:
                self._check_progress()

    def _run_launch(self, executor: Executor, batch: Batch) -> LaunchDone:
        if batch.steps != 1:
            raise PluginError(
                f"launch {batch.launch} has {batch.steps} steps",
                why="an executor that does real work must answer horizon() with 1",
                do="mend the executor's horizon()",
            )
        outcomes = executor.launch(batch, 1)
        return LaunchDone(batch.lane, batch.launch, [self.clock()], outcomes)

    def _wait(self) -> bool:
        """Sleep until mail comes or the next entry is due; False when the run is over."""
        if self._mail.empty():
            if not self._open and self._over:
                return False
            timeout = None
            if self._heap:
                timeout = min(max(0, self._heap[0][0] - self.clock()) / 1e9, _LONGEST_WAIT_S)
            elif not any(engine.in_flight for engine in self.engines):
                self._check_stall()
            try:
                self._read(self._mail.get(timeout=timeout))
            except Empty:
                return True
        while not self._mail.empty():
            self._read(self._mail.get())
        return True

    def _read(self, mail: _Mail) -> None:
        """Put an event on the heap at its time: a launch's end, else now."""
        if mail is None:
            self._open = False
        elif isinstance(mail, tuple):
            index, event, posted_ns = mail
            at = min(posted_ns, self.clock())
            if isinstance(event, LaunchDone):  # its worker may have been stopped after it read the clock
                at = max(event.ends_ns[-1], self._handed_ns)
                event = replace(event, ends_ns=[*event.ends_ns[:-1], at])
            self._push(at, event.ORDER, index, event)
        elif isinstance(mail, ServeLabError | KeyboardInterrupt | SystemExit):
            raise mail
        else:
            raise PluginCallError(
                f"the executor raised {type(mail).__name__}: {mail}",
                where="a worker thread of the wall-clock driver",
                why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                do="mend the executor",
            ) from mail

    def _launch(self, index: int, batch: Batch, now: int) -> None:
        if self.executors[index].simulated:
            super()._launch(index, batch, now)
        elif self._inline:
            self._launched = batch
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
