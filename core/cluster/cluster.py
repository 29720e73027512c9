"""Instances behind a router: asks it where requests go, and carries its answers out.

The driver owns time and hands over what concerns several instances: arrivals, the records of all engines,
and the end of every instant. A request that waits at the router is in no engine; records of what happens to
it there have ``engine=-1``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from servelab.core.cluster.moves import Moves
from servelab.core.cluster.pricing import Prices
from servelab.core.cluster.rows import Member, State, constant_fields, report, settled
from servelab.core.cluster.view import View
from servelab.core.engine.state import arrival_record
from servelab.core.errors import CapabilityError, PluginError, StallError, WorkloadError
from servelab.core.families.router import (
    Action,
    Dispatch,
    Drain,
    Hold,
    LendKV,
    Migrate,
    Moment,
    PlaceExperts,
    Reject,
    ReplicateKV,
    Resize,
    Role,
    Router,
    ScaleUp,
    SetRole,
    SetShare,
)
from servelab.core.records import (
    ROUTER,
    ActionDropped,
    Ending,
    InstanceChanged,
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
    from servelab.core.engine.state import Request
    from servelab.core.facts import HardwareFacts
    from servelab.core.families.cost import CostModel
    from servelab.core.families.executor import Executor


MOST_IN_VAIN = 1000
"""Answers ``Hold`` about one request while nothing but the router could change anything."""


@dataclass(slots=True, eq=False)
class Waiting:
    """A request held at the router."""

    spec: RequestSpec
    arrival_ns: int
    until_ns: int
    asked: int
    """How many reports there had been, or what time it was, when the router was asked last."""
    in_vain: int = 0
    """How often it was asked in a row while nothing else could happen."""


class Cluster:
    """One router over the engines of a driver.

    Args:
        router: the plugin.
        name: its name, for messages.
        engines: instances, in order of their index.
        report_interval_ns: time between the reports of an instance; 0: it reports whatever happens to it.
        model: name of the model they run.
        hardware: what they run on.
        network_bytes_per_s: bandwidth of an instance's network link, one way; None: not stated.
        network_latency_ns: of a transfer between instances.
        max_instances: how many there may be at a time; None: as many as at the start.
        start_ns: time until a new instance is ready; None: the cost model says it (``load_time``).
        another: makes one instance more, given its index.
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
        network_bytes_per_s: float | None = None,
        network_latency_ns: int = 0,
        max_instances: int | None = None,
        start_ns: int | None = None,
        another: Callable[[int], tuple[Engine, Executor, CostModel]] | None = None,
    ) -> None:
        self.name = name
        self._route = router.route
        self._rebalance = getattr(router, "rebalance", None)
        self._wake_at = getattr(router, "wake_at", None)
        self._hear = getattr(router, "observe", None)
        self._heard: list[Record] = []
        """Records that the router is told of with the next report."""
        self._restless = False
        """Whether an instance starts or is drained."""
        self._rebalanced = -1
        """Reports there had been, or what time it was, when it could act last."""
        self._timer: int | None = None
        """When it wants to act, if no report comes before."""
        self._hardware = hardware.name if hardware else ""
        self._most = max_instances or len(engines)
        self._start_ns, self._another = start_ns, another
        self._interval = report_interval_ns
        self._tp = hardware.tp if hardware else 1
        self._price_per_hour = (hardware.price_per_hour if hardware else None) or 0.0
        self._model = model
        self.members: list[Member] = []
        self._about: list[Any] = []
        self.held: dict[str, Waiting] = {}
        """Requests that wait at the router, in order of arrival."""
        self.moves = Moves(self.members, network_bytes_per_s, network_latency_ns, self._moved)
        self._pairs: dict[str, Dispatch] = {}
        """Requests whose decode instance is another, until their first token."""
        self._prefilled: list[tuple[str, int]] = []
        """Those that have it, since this instant began."""
        self._last_turns: dict[str, str] = {}
        """Requests in an engine that are the last of their program."""
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
        self._driver = self.moves.driver = driver
        if self._interval:
            self._report_all(0)
            driver.wake_cluster(self._interval)

    @property
    def busy(self) -> bool:
        """Whether a request is in no engine, or on its way to another."""
        return bool(self.held or self.moves.live)

    @property
    def changing(self) -> bool:
        """Whether an instance starts or is drained, or a request is on its way to another."""
        return self._restless or bool(self.moves.live)

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
            if self._pairs:
                emitted = zip(record.requests, record.emitted, strict=True)
                self._prefilled += [(name, record.engine) for name, n in emitted if n and name in self._pairs]
        elif isinstance(record, RequestPreempted):
            member.preemptions += 1
        elif isinstance(record, RequestFinished):
            self._pairs.pop(record.request, None)
            self.moves.ended(record.request, t_ns)
            program = self._last_turns.pop(record.request, None)
            if program is not None:
                self._program_over(program, t_ns)
        if self._hear is not None:
            self._heard.append(record)
        if not self._interval and t_ns > self._reports:
            self._reports = t_ns

    def woke(self, now: int) -> None:
        """A time has come that was asked for: a report, or the end of a step that may bring one."""
        if self._interval and not now % self._interval:
            self._report_all(now)
            self._driver.wake_cluster(now + self._interval)
        for index in self._watched:
            self._driver.sync(index, now)

    def settle(self, now: int) -> None:
        """Everything of this instant has happened, and nothing is planned yet."""
        if self._restless:
            self._start_due(now)
        if self._heard and not self._interval:
            self._tell_router(now)
        prefilled, self._prefilled = self._prefilled, []
        for request, index in prefilled:
            self._hand_over(request, index, now)
        self.moves.settle(now)
        for one in list(self.held.values()):
            if one.until_ns <= now or self._reports > one.asked:
                self._place(one, "hold_end", now)
        if self._rebalance is not None:
            self._act(now)
        if self._restless:
            self._stop_drained(now)

    def _start_due(self, now: int) -> None:
        for member in self.members:
            if member.state == "starting" and member.ready_ns is not None and member.ready_ns <= now:
                self._change(member, now, state="active")

    def _stop_drained(self, now: int) -> None:
        for member in self.members:
            engine = member.engine
            if member.state == "draining" and not engine.requests and not engine.moving.guests:
                self._driver.apart(member.id, now, partial(engine.contexts.drop_all, "drained"))
                self._change(member, now, state="stopped")

    @property
    def _watched(self) -> Iterable[int]:
        """Instances of which the end of every step matters, also within held launches."""
        if not self._interval and (self.held or self._rebalance):
            return range(len(self.members))
        return sorted(self.moves.watched)

    def lost(self, index: int, now: int) -> None:
        """The device of an instance is gone."""
        self.moves.lost(index, now)
        self._change(self.members[index], now, state="stopped")

    def arrange(self, now: int) -> bool:
        """Everything of this instant is planned: when must something be done next?

        Returns: whether the plans let a request move on, so that its engines are to be planned again.
        """
        begun = self.moves.settle_pulls(now)
        at = self._driver.next_step_end(now, self._watched)
        if at is not None:
            self._driver.wake_cluster(at)
        return begun

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
                why=f"it holds {', '.join(list(self.held)[:3])}{', ...' * (len(self.held) > 3)}",
                do="dispatch or reject them",
            )

    # ------------------------------------------------------------- answers

    def _place(self, one: Waiting, moment: Moment, now: int) -> None:
        spec, new = one.spec, moment == "arrival"
        answer = self._ask(spec, moment, now)
        if type(answer) is Dispatch:
            self._check_dispatch(answer, spec, now)
            self.held.pop(spec.id, None)
            if answer.decide_decode_late or answer.decode not in (None, answer.prefill):
                self._pairs[spec.id] = answer
            self._dispatch(one, answer.prefill, new, now)
        elif type(answer) is Hold:
            until = answer.until_ns
            if type(until) is not int or until <= now:
                raise self._broken(f"holds request {spec.id} until {until!r}", now, "a time to come")
            if new:
                self._tell_arrival(one)
                self._driver.tell(RequestHeld(t_ns=now, engine=ROUTER, request=spec.id, until_ns=until))
            one.in_vain = one.in_vain + 1 if not (new or self._restless or self._driver.going_on) else 0
            if one.in_vain > MOST_IN_VAIN:
                raise StallError(
                    f"request {spec.id} is held at the router for ever",
                    where=f"router {self.name!r}, t={now} ns",
                    why=f"all instances are idle, nothing is to come, and it said Hold {MOST_IN_VAIN} times",
                    do="dispatch or reject it",
                )
            # what is reported at this instant, the router has seen or could have seen
            one.until_ns, one.asked = until, self._reports if self._interval else now
            self.held.pop(spec.id, None)  # held again, it is the last in the queue
            self.held[spec.id] = one
            self._driver.wake_cluster(until)
        elif type(answer) is Reject:
            if new:
                self._tell_arrival(one)
            self.held.pop(spec.id, None)
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
                self._last_turns[spec.id] = spec.program
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
        member, elsewhere = self.members[index], answer.decide_decode_late
        if member.role not in ("mixed", "prefill"):
            raise self._broken(f"sent request {spec.id} to instance {index}", now, f"none for {member.role}")
        if answer.decode is not None:
            elsewhere = answer.decode != index
            self._check_decode(answer.decode, spec, now)
        if member.role == "prefill" and not elsewhere:
            what = f"sent request {spec.id} to instance {index}, which only prefills"
            raise self._broken(what, now, "decode, or decide_decode_late")
        if elsewhere and spec.n > 1:
            what = f"splits request {spec.id} of {spec.n} samples"
            raise self._broken(what, now, "one instance for the samples of a prompt")
        if elsewhere:
            self._check_network("Dispatch.decode", now)
        for field, wanted in (
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

    def _check_decode(self, index: int, spec: RequestSpec, now: int) -> None:
        known = type(index) is int and 0 <= index < len(self.members)
        good = known and self.members[index].state == "active"
        if not good or self.members[index].role not in ("mixed", "decode"):
            what = f"sends request {spec.id} to instance {index!r} to decode"
            state = f"it is {self.members[index].state}, {self.members[index].role}" if known else "no such"
            raise self._broken(what, now, f"an active instance that decodes; {state}")

    def _check_network(self, what: str, now: int) -> None:
        if not self.moves.has_network:
            raise CapabilityError(
                f"router {self.name!r} moves KV between instances, and nothing says how fast",
                where=f"{what}, t={now} ns",
                why="neither cluster.network_gb_per_s nor hardware.network_bytes_per_s is stated",
                do="set cluster.network_gb_per_s",
            )

    # ------------------------------------------------- beyond the first dispatch

    def _hand_over(self, request: str, index: int, now: int) -> None:
        """A prompt is computed, and another instance decodes."""
        answer = self._pairs.pop(request, None)
        r = self.members[index].engine.requests.get(request)
        if answer is None or r is None:
            return
        target = answer.decode
        if target is None:
            late = self._ask(r.spec, "prefill_end", now)
            if type(late) is not Dispatch:
                raise self._broken(f"answered {late!r:.60} for request {request}", now, "Dispatch")
            target = late.decode
            if target is None or target == index:
                return
            self._check_decode(target, r.spec, now)
        self.moves.begin(request, index, target, "pull", now, stop=True)

    def _moved(self, r: Request, target: int) -> None:
        self._driver.move_home(r.id, target)
        self.members[target].dispatched += 1
        if r.spec.program is not None and r.spec.program in self.view.homes:
            self.view.homes[r.spec.program] = target

    def _act(self, now: int) -> None:
        """Let the router rebalance, after reports and when it asked to be called."""
        due = self._timer is not None and self._timer <= now
        if not due and self._reports <= self._rebalanced:
            return
        assert self._rebalance is not None
        self._rebalanced = self._reports if self._interval else max(now, self._reports)
        wanted = self._call(self._rebalance, now, self.view)
        if not isinstance(wanted, list | tuple):
            raise self._broken(f"answered {wanted!r:.60} to rebalance()", now, "a list of actions")
        for action in wanted:
            self._carry_out(action, now)
        self._timer = None if self._wake_at is None else self._driver._guard(self._who, self._wake_at)
        if self._timer is not None:
            if type(self._timer) is not int or self._timer <= now:
                raise self._broken(f"wants to be woken at {self._timer!r}", now, "a time to come, or None")
            self._driver.wake_cluster(self._timer)

    def _carry_out(self, action: Action, now: int) -> None:
        if type(action) is Migrate:
            if action.mode != "recompute":
                self._check_network("Migrate", now)
            self.moves.begin(action.request, action.source, action.target, action.mode, now)
        elif type(action) is SetRole:
            member = self._existing(action, action.instance, now)
            if member is not None and member.role != action.role:
                self._change(member, now, role=action.role)
        elif type(action) is Drain:
            member = self._existing(action, action.instance, now)
            if member is not None and all(m is member or m.state != "active" for m in self.members):
                self._drop(action, "no other instance is active", now)
            elif member is not None:
                self._change(member, now, state="draining")
        elif type(action) is ScaleUp:
            for _ in range(action.n):
                self._start(action, now)
        elif isinstance(action, SetShare | LendKV | ReplicateKV | PlaceExperts | Resize):
            raise CapabilityError(
                f"router {self.name!r} asks for what the core does not carry out yet",
                where=f"{type(action).__name__}, t={now} ns",
                why=_MISSING[type(action)],
                do="choose another router",
            )
        else:
            raise self._broken(f"wants {action!r:.60}", now, "actions of servelab.core.families.router")

    def _existing(self, action: Action, index: int, now: int) -> Member | None:
        """The instance an action is about; without one the action is dropped."""
        if type(index) is int and 0 <= index < len(self.members):
            member = self.members[index]
            alive = ("active", "starting", "draining") if type(action) is SetRole else ("active", "starting")
            if member.state in alive:
                return member
            self._drop(action, f"instance {index} is {member.state}", now)
        else:
            self._drop(action, "there is no such instance", now)
        return None

    def _start(self, action: ScaleUp, now: int) -> None:
        """One instance more."""
        alive = sum(member.state != "stopped" for member in self.members)
        if action.profile not in ("", self._hardware):
            self._drop(action, f"this cluster is made of {self._hardware or 'one kind of device'}", now)
        elif alive >= self._most or self._another is None:
            self._drop(action, f"there may be {self._most} instances (cluster.max_instances)", now)
        else:
            engine, executor, cost = self._another(len(self.members))
            self._driver.join(engine, executor, cost)
            member = self._join(engine)
            member.reported_ns, member.role = now, action.role
            member.ready_ns = now + self._load_ns(cost, now)
            self._change(member, now, state="starting")
            if self._interval:
                member.row = settled(report(member, self._about[member.id], now))
            self._driver.wake_cluster(member.ready_ns)

    def _load_ns(self, cost: CostModel, now: int) -> int:
        if self._start_ns is not None:
            return self._start_ns
        load_time = getattr(cost, "load_time", None)
        if load_time is None:
            raise CapabilityError(
                f"router {self.name!r} starts an instance, and nothing says how long that takes",
                where=f"ScaleUp, t={now} ns",
                why="cluster.start_s is not stated, and the cost model has no load_time()",
                do="set cluster.start_s",
            )
        taken: int = self._driver._guard("cost model", load_time)
        return taken

    def _change(
        self, member: Member, now: int, *, state: State | None = None, role: Role | None = None
    ) -> None:
        """An instance has another state or role."""
        if state is not None and member.state == "stopped":
            return
        member.state, member.role = state or member.state, role or member.role
        if member.state != "starting":
            member.ready_ns = None
        self.view.changed()
        if member.row is not None:  # the router's own doing: it need not wait for a report to see it
            member.row = replace(member.row, state=member.state, role=member.role, ready_ns=member.ready_ns)
        self._restless = any(one.state in ("starting", "draining") for one in self.members)
        self._driver.tell(
            InstanceChanged(
                t_ns=now, engine=member.id, state=member.state, role=member.role, ready_ns=member.ready_ns
            )
        )
        if not self._interval:
            self._reports = max(self._reports, now)

    def _drop(self, action: Action, reason: str, now: int) -> None:
        self._driver.tell(ActionDropped(t_ns=now, engine=ROUTER, action=str(action), reason=reason))

    @property
    def _who(self) -> str:
        return f"router {self.name!r}"

    def _ask(self, spec: RequestSpec, moment: Moment, now: int) -> Any:
        return self._call(self._route, now, spec, moment, self.view)

    def _call(self, method: Callable[..., Any], now: int, *args: Any) -> Any:
        """Call the router; what it raises is reported with its name, what it was shown ends with the call."""
        self.view.begin(now)
        try:
            return self._driver._guard(self._who, method, *args)
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
        if one.spec.program is not None and one.spec.is_last_turn:
            self.view.homes.pop(one.spec.program, None)
            self._program_over(one.spec.program, now)

    def _program_over(self, program: str, now: int) -> None:
        """Instances that served earlier turns keep nothing of it."""
        for member in self.members:
            if program in member.engine.programs:
                self._driver.apart(member.id, now, partial(member.engine.program_over, program))

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
        self._tell_router(now)

    def _tell_router(self, now: int) -> None:
        """What has happened, to a router that learns."""
        heard, self._heard = self._heard, []
        for record in heard:
            assert self._hear is not None
            self._call(self._hear, now, record.engine, record)

    def _transfer_ns(self, nbytes: int, source: int, target: int) -> int:
        self._check_network("transfer_ns", self.view.now_ns)
        return self.moves.predict_ns(nbytes, source, target, self.view.now_ns)


_MISSING: dict[type, str] = {
    SetShare: "an instance has one lane for both phases, which cannot be divided",
    LendKV: "the KV of a request lies on one instance",
    ReplicateKV: "prefix stores take in nothing that was computed elsewhere",
    PlaceExperts: "experts have no places",
    Resize: "an instance keeps its devices",
}
"""What would be needed."""
_UNREPORTED = frozenset({"planned", "tokens"})
"""Records that exist only if somebody listens: what a router sees must not depend on it."""
