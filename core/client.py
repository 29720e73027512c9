"""The mailbox side of a running engine: requests go in from any thread, their tokens and ends come out."""

from __future__ import annotations

import atexit
from queue import SimpleQueue
from threading import RLock, Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from servelab.core.bus import Bus
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import ServeLabError
from servelab.core.events import Abort, Arrive
from servelab.core.hookspecs import hookimpl
from servelab.core.records import (
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RunFinished,
    RunStarted,
    TokensEmitted,
)
from servelab.core.request import RequestSpec, sample_id
from servelab.core.usage import Usage

if TYPE_CHECKING:
    from servelab.core.compose import Run

Event = RequestArrived | RequestAdmitted | TokensEmitted | RequestFinished
_AT_EXIT_S = 10.0
"""How long the interpreter's exit waits for the launch that is running."""


class Box:
    """What became of one request, in order. None: the engine stopped before its end.

    Args:
        live: hand every record over as it comes; otherwise all of them with the last, so that whoever waits
            for the whole is not woken at every token (on two cores that costs a fifth of the throughput).
        samples: requests that share the box: the outputs drawn from one prompt.
    """

    def __init__(self, live: bool, samples: int = 1) -> None:
        self._live = live
        self._left = samples
        self._held: list[Event] = []
        self._queue: SimpleQueue[Event | None] = SimpleQueue()

    def put(self, event: Event | None) -> None:
        if event is None or self._live:
            self._queue.put(event)
            return
        self._held.append(event)
        self._left -= isinstance(event, RequestFinished)
        if not self._left:
            for held in self._held:
                self._queue.put(held)

    def get(self) -> Event | None:
        """The next record; waits for it."""
        return self._queue.get()


class Mailbox:
    """An observer that hands every record of a request to whoever sent it."""

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        """Of the requests that somebody waits for."""

    @hookimpl
    def servelab_on_tokens_emitted(self, record: Event) -> None:
        box = self.boxes.get(record.request)
        if box is not None:
            box.put(record)

    servelab_on_request_arrived = servelab_on_request_admitted = servelab_on_tokens_emitted

    @hookimpl
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        if record.outcome != "unfinished":  # the engine is stopping: the client tells why
            self.servelab_on_tokens_emitted(record)
            self.boxes.pop(record.request, None)


class Client:
    """Serves a composed run on the wall clock, in a thread of its own, until ``close``.

    Methods may be called from any thread. When the thread ends, whatever the reason, it lets go of the engine
    and the model, and whoever waits is told.
    """

    def __init__(self, run: Run) -> None:
        self._mailbox = Mailbox()
        bus = Bus((*run.observers, self._mailbox))
        driver = WallDriver(keep_open=True, **run.for_driver(bus))  # the mailbox asks for tokens
        self._lock = RLock()
        self._driver: WallDriver | None = driver
        """None once it has stopped."""
        self._error: BaseException | None = None
        self._late: Exception | None = None
        self._thread = Thread(
            target=self._serve, args=(driver, bus, run.info), name="servelab client", daemon=True
        )
        self._thread.start()
        _running.add(self)

    def _serve(self, driver: WallDriver, bus: Bus, info: dict[str, Any]) -> None:
        usage = Usage()
        try:
            bus.emit(RunStarted(t_ns=0, info=info))
            driver.run()
        except BaseException as exc:
            self._error = exc
        last = RunFinished(t_ns=driver.now_ns, status="ok", **usage.cost())
        if self._error is not None:
            last.status, last.reason = "failed", str(self._error)
        try:
            try:
                bus.emit(last)
            finally:
                driver.executors[0].close()
        except Exception as exc:
            self._late = exc
        with self._lock:
            self._driver = None
            for box in self._mailbox.boxes.values():
                box.put(None)

    def send(self, spec: RequestSpec, *, live: bool = False) -> Box:
        """Hand a request to the engine; its records, of all its samples, come through the box until each has
        ended.

        Args:
            live: see ``Box``.

        Raises:
            ServeLabError: the engine has stopped.
        """
        box = Box(live, spec.n)
        with self._lock:
            if self._driver is None or not self._thread.is_alive():  # no thread: this is a fork
                raise self._stopped() from self._error
            self._mailbox.boxes |= dict.fromkeys(_ids(spec), box)
            self._driver.post(Arrive(spec))
        return box

    def receive(self, box: Box) -> Event:
        """The next record of a request; waits for it.

        Raises:
            ServeLabError: the engine stopped before.
        """
        event = box.get()
        if event is None:
            raise self._stopped() from self._error
        return event

    def forget(self, spec: RequestSpec) -> None:
        """Stop listening to a request and give up those of its samples that are still there."""
        with self._lock:
            waited_for = [self._mailbox.boxes.pop(id, None) for id in _ids(spec)]
            if any(waited_for) and self._driver is not None:
                self._driver.post(Abort(spec.id))

    def _stopped(self) -> ServeLabError:
        if self._error is None:
            return ServeLabError("the engine is closed", where="LLM", do="make a new LLM")
        why, do = f"{type(self._error).__name__}: {self._error}", "mend the cause"
        if isinstance(self._error, ServeLabError):
            why, do = self._error.in_short, self._error.do or do
        return ServeLabError("the engine has stopped", where="LLM", why=why, do=f"{do}; then make a new LLM")

    def let_go(self) -> None:
        """Stop when what was sent has been served. Takes no lock and waits for nothing: for finalizers."""
        driver = self._driver
        if driver is not None:
            driver.close()

    def close(self, timeout_s: float | None = None) -> None:
        """Give up what runs, stop, and wait for that. Harmless when repeated.

        Raises:
            ServeLabError: an observer or the executor failed at the end; told once.
        """
        with self._lock:
            if self._driver is not None:
                for request_id in list(self._mailbox.boxes):
                    self._driver.post(Abort(request_id, "the LLM was closed"))
            self.let_go()
        self._thread.join(timeout_s)
        late, self._late = self._late, None
        if late is not None:
            raise late


def _ids(spec: RequestSpec) -> list[str]:
    return [sample_id(spec.id, k) for k in range(spec.n)]


_running: WeakSet[Client] = WeakSet()


@atexit.register
def _close_all() -> None:
    """A launch must not run while the interpreter goes away."""
    for client in list(_running):
        client.close(_AT_EXIT_S)
