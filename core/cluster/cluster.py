"""Instances behind a router: asks it where requests go, and carries its answers out.

The driver owns time and hands over what concerns several instances: arrivals, the records of all engines,
and the end of every instant. A request that waits at the router is in no engine; records of what happens to
it there have ``engine=-1``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from servelab.core.cluster.pricing import Prices
from servelab.core.cluster.rows import Member, constant_fields, report, settled
from servelab.core.cluster.view import View
from servelab.core.engine.state import arrival_record
from servelab.core.errors import CapabilityError, PluginError, StallError, WorkloadError
from servelab.core.families.router import Dispatch, Hold, Moment, Reject, Router
from servelab.core.records import (
    ROUTER,
    Ending,
    Record,
    RequestFinished,
    RequestHeld,
    RequestPreempted,
    RequestRouted,
    StepDone,
)
from servelab.core.request import RequestSpec, samples_of

if TYPE_CHECKING:
    from servelab.core.engine.driver import Driver
    from servelab.core.engine.engine import Engine
    from servelab.core.facts import HardwareFacts


@dataclass(slots=True, eq=False)
class Waiting:
    """A request held at the router."""

    spec: RequestSpec
    arrival_ns: int
    until_ns: int
    asked: int
    """How many reports there had been, or what time it was, when the router was asked last."""


class Cluster:
    """One router over the engines of a driver.

    Args:
        router: the plugin.
        name: its name, for messages.
        engines: instances, in order of their index.
        report_interval_ns: time between the reports of an instance; 0: it reports whatever happens to it.
        model: name of the model they run.
        hardware: what they run on.
    """

    def __init__(
        self,
        router: Router,
        name: str,
        engines: Sequence[Engine],
        *,
        report_interval_ns: int = 0,
        model: str = "",
        hardware: HardwareFacts | None = None,
    ) -> None:
        self.name = name
        self._route = router.route
        self._interval = report_interval_ns
        self._tp = hardware.tp if hardware else 1
        self._price_per_hour = (hardware.price_per_hour if hardware else None) or 0.0
        self._model = model
        self.members: list[Member] = []
        self._about: list[Any] = []
        self.held: dict[str, Waiting] = {}
        """Requests that wait at the router, in order of arrival."""
        self._reports = 0
        """Periodic ones ever made; else when something was last reported."""
        self._driver: Driver
        layout = engines[0].layout
        self.view = View(
            members=self.members,
            about=self._about,
            live=not report_interval_ns,
            sync=self._sync,
            model=model,
            transfer_ns=self._transfer_ns,
            kv_bytes=lambda tokens: round(tokens * layout.bytes_per_token),
        )
        for engine in engines:
            self._join(engine)

    def _join(self, engine: Engine) -> Member:
        prices = Prices(engine.cost, f"engine {engine.index}", engine.limits.max_batch_tokens)
        member = Member(engine, prices)
        self._about.append(constant_fields(engine, self._model, self._tp, self._price_per_hour))
        self.members.append(member)
        return member

    # ------------------------------------------------------- the driver's side

    def attach(self, driver: Driver) -> None:
        """The run begins."""
        self._driver = driver
        if self._interval:
            self._report_all(0)
            driver.wake_cluster(self._interval)

    @property
    def busy(self) -> bool:
        """Whether a request is in no engine."""
        return bool(self.held)

    def arrived(self, spec: RequestSpec, now: int) -> None:
        """A request has arrived: it is dispatched, held or refused."""
        if any(one.id in self.held or self._driver.knows(one.id) for one in samples_of(spec)):
            raise WorkloadError(
                f"request id {spec.id!r} arrived twice",
                where=f"t={now} ns",
                why="the first is still live",
                do="give every request of a run its own id",
            )
        self._place(Waiting(spec, now, now, 0), "arrival", now)

    def cancelled(self, request_id: str, now: int) -> bool:
        """A client gives up; True if its request waited here."""
        one = self.held.pop(request_id, None)
        if one is not None:
            self._finish(one, "cancelled", "the client gave up", now)
        return one is not None

    def saw(self, record: Record) -> None:
        """Something happened to an instance."""
        if record.ev in _UNREPORTED:
            return
        member = self.members[record.engine]
        t_ns = record.t_ns
        if t_ns > member.reported_ns:
            member.reported_ns = t_ns
        if isinstance(record, StepDone):
            member.stepped(record, not self._interval)
        elif isinstance(record, RequestPreempted):
            member.preemptions += 1
        if not self._interval and t_ns > self._reports:
            self._reports = t_ns

    def woke(self, now: int) -> None:
        """A time has come that was asked for: a report, or the end of a step that may bring one."""
        if not self._interval:
            if self.held:
                for member in self.members:
                    self._driver.sync(member.id, now)
        elif not now % self._interval:
            self._report_all(now)
            self._driver.wake_cluster(now + self._interval)

    def settle(self, now: int) -> None:
        """Everything of this instant has happened, and nothing is planned yet."""
        for id, one in list(self.held.items()):
            if one.until_ns <= now or self._reports > one.asked:
                del self.held[id]  # goes to the end of the queue if it is held again
                self._place(one, "hold_end", now)

    def arrange(self, now: int) -> None:
        """Everything of this instant is planned: when must something be done next?"""
        if self.held and not self._interval:
            at = self._driver.next_step_end(now)
            if at is not None:
                self._driver.wake_cluster(at)

    def stop(self, now: int, reason: str) -> list[Record]:
        """The run is over: the terminal records of requests that wait here."""
        held, self.held = list(self.held.values()), {}
        return [record for one in held for record in self._last_records(one, "unfinished", reason, now)]

    def check_stall(self, now: int) -> None:
        """Nothing will ever happen again: no request may be held."""
        if self.held:
            raise StallError(
                f"{len(self.held)} requests wait at the router for ever",
                where=f"router {self.name!r}, t={now} ns",
                do="dispatch or reject them",
            )

    # ------------------------------------------------------------- answers

    def _place(self, one: Waiting, moment: Moment, now: int) -> None:
        spec, new = one.spec, moment == "arrival"
        answer = self._ask(spec, moment, now)
        if type(answer) is Dispatch:
            self._check_dispatch(answer, spec, now)
            self._dispatch(one, answer.prefill, new, now)
        elif type(answer) is Hold:
            until = answer.until_ns
            if type(until) is not int or until <= now:
                raise self._broken(f"holds request {spec.id} until {until!r}", now, "a time to come")
            if new:
                self._tell_arrival(one)
                self._driver.tell(RequestHeld(t_ns=now, engine=ROUTER, request=spec.id, until_ns=until))
            # what is reported at this instant, the router has seen or could have seen
            one.until_ns, one.asked = until, self._reports if self._interval else now
            self.held[spec.id] = one
            self._driver.wake_cluster(until)
        elif type(answer) is Reject:
            if new:
                self._tell_arrival(one)
            self._finish(one, "rejected", answer.reason, now)
        else:
            given = f"answered {answer!r:.60} for request {spec.id}"
            raise self._broken(given, now, "Dispatch, Hold or Reject")

    def _dispatch(self, one: Waiting, index: int, new: bool, now: int) -> None:
        spec, member = one.spec, self.members[index]
        member.dispatched += 1
        member.unpriced.append(spec.prompt_tokens)
        if spec.program is not None:
            if spec.is_last_turn:
                self.view.homes.pop(spec.program, None)
            else:
                self.view.homes[spec.program] = index
        if not new:
            for single in samples_of(spec):
                record = RequestRouted(t_ns=now, engine=index, request=single.id, source=ROUTER)
                self._driver.tell(record)
        self._driver.send(index, spec, now, None if new else one.arrival_ns)

    def _check_dispatch(self, answer: Dispatch, spec: RequestSpec, now: int) -> None:
        index = answer.prefill
        known = type(index) is int and 0 <= index < len(self.members)
        if not known or self.members[index].state != "active":
            what = f"sent request {spec.id} to instance {index!r}"
            state = f"it is {self.members[index].state}" if known else f"there are {len(self.members)}"
            raise self._broken(what, now, f"an id of view.instances(); {state}")
        for field, wanted in (
            ("decode", answer.decode is not None or answer.decide_decode_late),
            ("attention", answer.attention is not None),
            ("fetch_from", answer.fetch_from is not None),
            ("model", answer.model not in (None, self._model)),
        ):
            if wanted:
                raise CapabilityError(
                    f"router {self.name!r} asks for what the core does not carry out yet",
                    where=f"Dispatch.{field}, request {spec.id}, t={now} ns",
                    do="choose another router",
                )

    def _ask(self, spec: RequestSpec, moment: Moment, now: int) -> Any:
        return self._call(self._route, now, spec, moment, self.view)

    def _call(self, method: Callable[..., Any], now: int, *args: Any) -> Any:
        """Call the router; what it raises is reported with its name, what it was shown ends with the call."""
        self.view.begin(now)
        try:
            return self._driver._guard(f"router {self.name!r}", method, *args)
        finally:
            self.view.end()

    def _broken(self, what: str, now: int, wanted: str) -> PluginError:
        return PluginError(
            f"router {self.name!r} {what}",
            where=f"t={now} ns",
            why=f"expected: {wanted}",
            do="mend the router",
        )

    # ------------------------------------------------------ requests held here

    def _tell_arrival(self, one: Waiting) -> None:
        for k, spec in enumerate(samples_of(one.spec)):
            parent = one.spec.id if k else None
            self._driver.tell(arrival_record(spec, one.arrival_ns, ROUTER, parent))

    def _finish(self, one: Waiting, outcome: Ending, reason: str, now: int) -> None:
        for record in self._last_records(one, outcome, reason, now):
            self._driver.tell(record)

    def _last_records(self, one: Waiting, outcome: Ending, reason: str, now: int) -> list[Record]:
        return [
            RequestFinished(
                t_ns=now, engine=ROUTER, request=spec.id, outcome=outcome, reason=reason, output_tokens=0
            )
            for spec in samples_of(one.spec)
        ]

    # ------------------------------------------------------------- reports

    def _sync(self, index: int) -> None:
        self._driver.sync(index, self.view.now_ns)

    def _report_all(self, now: int) -> None:
        self.view.begin(now)
        for member in self.members:
            self._sync(member.id)
            member.row = settled(report(member, self._about[member.id], now))
            member.spans_ns = member.steps = member.preemptions = 0
        self._reports += 1

    def _transfer_ns(self, nbytes: int, source: int, target: int) -> int:
        raise CapabilityError("transfers between instances are not carried out yet", where="transfer_ns")


_UNREPORTED = frozenset({"planned", "tokens"})
"""Records that exist only if somebody listens: what a router sees must not depend on it."""
