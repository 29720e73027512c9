"""The mailbox side of a running engine: requests go in from any thread, their tokens and ends come out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

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
from servelab.core.request import Arrival, RequestSpec

if TYPE_CHECKING:
    from servelab.core.compose import Run

Event = RequestArrived | RequestAdmitted | TokensEmitted | RequestFinished
_POLL_S = 0.2
"""How often a waiting client looks whether the engine's thread still lives."""


class NoTraffic:
    """A workload without requests of its own: everything comes through the mailbox."""

    def __init__(self, config: None = None, context: object = None) -> None:
        pass

    def arrivals(self) -> Iterator[Arrival]:
        return iter(())

    def react(self, finished: RequestFinished) -> Iterable[Arrival]:
        return ()

    def describe(self) -> dict[str, Any]:
        return {}


class Mailbox:
    """An observer that hands every record of a request to whoever sent it."""

    def __init__(self) -> None:
        self.boxes: dict[str, SimpleQueue[Event]] = {}

    @hookimpl
    def servelab_on_request_arrived(self, record: RequestArrived) -> None:
        self._put(record)

    @hookimpl
    def servelab_on_request_admitted(self, record: RequestAdmitted) -> None:
        self._put(record)

    @hookimpl
    def servelab_on_tokens_emitted(self, record: TokensEmitted) -> None:
        self._put(record)

    @hookimpl
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        self._put(record)

    def _put(self, record: Event) -> None:
        box = self.boxes.get(record.request)
        if box is not None:
            box.put(record)


class Client:
    """Serves a composed run on the wall clock, in a thread of its own, until ``close``.

    Methods may be called from any thread.
    """

    def __init__(self, run: Run) -> None:
        self._mailbox, self._executor = Mailbox(), run.executor
        bus = Bus((*run.observers, self._mailbox))
        run.engine.plan_log = bus.listens("planned")
        run.engine.token_log = True
        self._driver = WallDriver(
            keep_open=True,
            engines=[run.engine],
            executors=[run.executor],
            costs=[run.cost],
            workload=run.workload,
            truths=run.truths,
            emit=bus.emit,
        )
        self._error: BaseException | None = None
        self._closed = False
        self._thread = Thread(target=self._serve, args=(bus, run.info), name="servelab client", daemon=True)
        self._thread.start()

    def _serve(self, bus: Bus, info: dict[str, Any]) -> None:
        try:
            bus.emit(RunStarted(t_ns=0, info=info))
            self._driver.run()
        except BaseException as exc:
            self._error = exc
        failed = self._error is not None
        try:
            bus.emit(
                RunFinished(
                    t_ns=self._driver.now_ns,
                    status="failed" if failed else "ok",
                    reason=str(self._error) if failed else "",
                )
            )
        except Exception as exc:
            self._error = self._error or exc

    def send(self, spec: RequestSpec) -> SimpleQueue[Event]:
        """Hand a request to the engine; its records come through the queue, the last is its end.

        Raises:
            ServeLabError: the engine has stopped.
        """
        self._check()
        box: SimpleQueue[Event] = SimpleQueue()
        self._mailbox.boxes[spec.id] = box
        self._driver.post(Arrive(spec))
        return box

    def receive(self, box: SimpleQueue[Event]) -> Event:
        """The next record of a request; waits for it.

        Raises:
            ServeLabError: the engine stopped before.
        """
        while True:
            try:
                return box.get(timeout=_POLL_S)
            except Empty:
                if not self._thread.is_alive() and box.empty():
                    self._check()

    def forget(self, request_id: str) -> None:
        """Stop listening to a request and give it up if it is still there."""
        if self._mailbox.boxes.pop(request_id, None) is not None and self._thread.is_alive():
            self._driver.post(Abort(request_id))

    def _check(self) -> None:
        if self._error is not None:
            raise ServeLabError(
                "the engine has stopped",
                why=f"{type(self._error).__name__}: {self._error}",
                do="mend the cause and make a new LLM",
            ) from self._error
        if self._closed or not self._thread.is_alive():
            raise ServeLabError("the engine is closed", do="make a new LLM")

    def close(self) -> None:
        """Serve what was sent, then stop. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._driver.close()
        self._thread.join()
        self._executor.close()
