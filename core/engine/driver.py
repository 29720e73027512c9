"""What both drivers share: one heap of what is due, arrivals, truths, timed launches, a clean end.

At one instant events run in the order of their class (``core/events.py``), then in the order they were
posted; when none is left, each engine that was touched gets ``Schedule``, in order of its index.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import accumulate
from math import ceil
from typing import TYPE_CHECKING, Any, TypeVar

from servelab.core.engine.engine import Engine
from servelab.core.engine.links import Links
from servelab.core.engine.sharing import ALONE, Pace, Use, pace
from servelab.core.errors import PluginCallError, PluginError, ServeLabError, StallError, WorkloadError
from servelab.core.events import (
    Abort,
    Arrive,
    Batch,
    Command,
    Emit,
    Event,
    InstanceLost,
    Interrupt,
    Launch,
    LaunchDone,
    Schedule,
    StartTransfer,
    Timer,
    TransferDone,
)
from servelab.core.families.cost import CostModel, LaneModel, lane_model_of, meter_of
from servelab.core.families.executor import Executor
from servelab.core.families.workload import Workload
from servelab.core.records import Record, RequestFinished
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth, sample_id

if TYPE_CHECKING:
    from servelab.core.cluster.cluster import Cluster

CLUSTER, LINKS = -1, -2
"""In place of an engine's index: entries that are the cluster's, and those of transfers."""
MOST_IN_VAIN = 100_000
"""Times in a row that somebody may ask to be woken for live requests without anything coming of it (ours)."""
_FOR_EVER_NS = 24 * 3600 * 10**9  # a pin that lasts longer is not waited for; a day is ours
_UNPLANNED = "plan them, reject them with a reason, or set wake_at"
_SCHEDULE = Schedule()
_TIMER = Timer()
T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Flying:
    """A launch whose time is known beforehand. It executes when it ends, so that it can be cut short."""

    batch: Batch
    began_ns: int
    ends_ns: list[int]
    joules: Sequence[float] = ()
    """Of each step, beyond an idle device's; empty: the cost model knows no energy."""
    cut: bool = False
    """Replaced by another one: its entry on the heap means nothing any more."""
    use: Use | None = None
    """What it takes of the devices; known once it runs beside another lane's, and then it has one step."""
    pace: Pace = ALONE
    """At which it runs since the launches in flight last changed."""

    def paced(self, pace: Pace, now: int) -> Flying:
        """It goes on at another pace."""
        assert len(self.ends_ns) == 1, "a launch of several steps is cut before another begins"
        alone_ns = (self.ends_ns[-1] - now) / self.pace.slower
        end_ns = now + ceil(alone_ns * pace.slower)
        joules = self.joules
        if self.use is not None and joules:
            joules = [sum(joules) - self.use.watts * alone_ns * 1e-9 * (self.pace.power - pace.power)]
        return Flying(self.batch, self.began_ns, [end_ns], joules, use=self.use, pace=pace)

    def moved(self, ns: int) -> Flying:
        """It begins later, or earlier."""
        return Flying(self.batch, self.began_ns + ns, [end + ns for end in self.ends_ns], self.joules)


class Driver:
    """Owns time and the outside of one or many engines. Use ``VirtualDriver`` or ``WallDriver``.

    Args:
        engines: instances, in order of their index.
        executors: one per engine.
        costs: one per engine; they say how long launches and transfers take on the virtual clock, and those
            of simulated executors on the wall clock.
        workload: the traffic.
        truths: filled with the true outcome of each live request; executors and oracles read it.
        emit: takes every record.
        dispatch: engine index for an arriving request; default: the first.
        cluster: the router's side of several engines, in place of ``dispatch``.
    """

    def __init__(
        self,
        *,
        engines: Sequence[Engine],
        executors: Sequence[Executor],
        costs: Sequence[CostModel],
        workload: Workload,
        truths: dict[str, Truth],
        emit: Callable[[Record], None],
        dispatch: Callable[[RequestSpec], int] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        if not len(engines) == len(executors) == len(costs) or not engines:
            raise ValueError("one executor and one cost model per engine, and at least one engine")
        self.engines = list(engines)
        self.executors = list(executors)
        self.costs = list(costs)
        self.workload = workload
        self.truths = truths
        self.now_ns = 0
        self._emit = emit
        self._dispatch = dispatch or (lambda spec: 0)
        self._cluster = cluster
        self._home: dict[str, int] = {}
        self._arrivals: Iterator[Arrival | Cancel] = iter(())
        self._upcoming: Arrival | Cancel | None = None
        self._heap: list[tuple[int, int, int, int, Any]] = []
        """(time, class, sequence, engine, what): what is an event or a ``Flying``."""
        self._sequence = 0
        self._events = 0
        """Entries of the heap that make something happen by themselves: not timers, not cancellations."""
        self._handed_ns = 0
        """Latest time given to an engine; times never go back."""
        self._unsaid: list[Record] = []
        """Records that an error kept from being emitted."""
        self.links = Links()
        """What moves KV, on this clock."""
        self._swaps: dict[int, set[int]] = {}
        """Per engine, its transfers in flight by their number on the links."""
        self._timers: set[tuple[int, int]] = set()
        self._flying: list[dict[int, Flying]] = [{} for _ in engines]
        """Per engine, timed launches in flight by their number."""
        self._sharing = [_sharing(*pair) for pair in zip(engines, costs, strict=True)]
        """Per engine, the cost model, if it prices several lanes of that engine together."""
        self._lane_end: dict[tuple[int, int], int] = {}
        self._touched: set[int] = set()
        self._in_vain = 0
        self._joules = 0.0
        """Of steps that ended, beyond an idle device's."""

    @property
    def energy_j(self) -> float | None:
        """Of all devices until now; None: a cost model knows no energy, or time is real."""
        idle = [meter.idle_watts for cost in self.costs if (meter := meter_of(cost)) is not None]
        if len(idle) < len(self.costs):
            return None
        return sum(idle) * self.now_ns / 1e9 + self._joules

    def run(self) -> None:
        """Serve the workload to its end.

        Raises:
            ServeLabError: whatever stopped the run. Every live request has had its terminal record first.
        """
        try:
            self._arrivals = iter(self._guard("workload", self.workload.arrivals))
            self._upcoming = self._next_item(0)
            if self._cluster is not None:
                self._cluster.attach(self)
            self._loop()
            for engine in self.engines:  # contexts still kept between turns are let go
                self._do(engine.index, engine.stop(self.now_ns, "the run is over"), self.now_ns)
                if engine.full_checks:
                    engine.check_integrity()
        except BaseException as exc:
            self._abandon(exc)
            raise

    def _loop(self) -> None:
        raise NotImplementedError  # abstract

    def _abandon(self, exc: BaseException) -> None:
        """Give every live request its terminal record; the error that ended the run stays the one raised."""
        reason = "interrupted" if isinstance(exc, KeyboardInterrupt) else _first_line(exc)
        records, self._unsaid = self._unsaid, []
        now = max(self.now_ns, self._handed_ns)
        for engine in self.engines:
            records += [c.record for c in engine.stop(now, reason) if isinstance(c, Emit)]
        if self._cluster is not None:
            records += self._cluster.stop(now, reason)
        noted = False
        for record in records:
            try:
                self._emit(record)
            except Exception as second:
                if not noted:
                    exc.add_note(f"while ending the live requests: {type(second).__name__}: {second}")
                noted = True

    @property
    def _over(self) -> bool:
        """Nothing is left but timers, and they have nobody to wake."""
        return not (self.going_on or (self._cluster is not None and self._cluster.busy))

    @property
    def going_on(self) -> bool:
        """Whether an engine has something to do, or a request is to come."""
        if self._upcoming is not None or self._events:
            return True
        return any(engine.requests or engine.in_flight for engine in self.engines)

    def _check_stall(self, woken: int = 0) -> None:
        """Nothing will ever happen again: every request must have ended.

        Args:
            woken: how often in a row somebody was woken, and nothing came of it.
        """
        for engine in self.engines:
            if engine.requests:
                raise StallError(
                    f"engine {engine.index} has requests that nothing will ever run",
                    where=f"scheduler {engine.scheduler_name!r}, t={self.now_ns} ns",
                    why=engine.stall_reason() + f"; {woken} wake-ups in a row changed nothing" * (woken > 0),
                    do="plan them, or reject them with a reason" if woken else _UNPLANNED,
                )
        if self._cluster is not None:
            self._cluster.check_stall(self.now_ns)

    def _check_progress(self) -> None:
        """Nothing but timers is left, and they may go on for ever: a scheduler's that waits for nothing, a
        router's for reports.
        """
        if any(engine.in_flight for engine in self.engines):
            self._in_vain = 0
            return
        self._in_vain += 1
        if self._in_vain < MOST_IN_VAIN:
            return
        self._in_vain = 0
        pins = (x.until_ns for engine in self.engines for x in engine.contexts.kept.values())
        if any(until is not None and until < self.now_ns + _FOR_EVER_NS for until in pins):
            return  # when it is dropped, a request may find room
        if any(isinstance(entry[4], Cancel) for entry in self._heap):
            return  # the client will give up
        if self._cluster is None or not self._cluster.changing:
            self._check_stall(woken=MOST_IN_VAIN)

    # ------------------------------------------------------------ one instant

    def _push(self, time_ns: int, order: int, engine: int, what: Any) -> None:
        self._sequence += 1
        self._events += not _weak(what)
        heappush(self._heap, (time_ns, order, self._sequence, engine, what))

    def _refill(self, now: int | None = None) -> None:
        """Put the workload's items on the heap: those due by ``now``, or the next one if none is earlier."""
        heap = self._heap
        while (item := self._upcoming) is not None:
            limit = now if now is not None else (heap[0][0] if heap else item.time_ns)
            if item.time_ns > limit and not isinstance(item, Cancel):
                return  # cancellations may lie ahead: nobody waits for one whose request has ended
            self._accept(item)
            self._upcoming = self._next_item(item.time_ns)

    def _run_due(self, until_ns: int) -> None:
        """Handle everything due until a time, each entry at its own time."""
        heap = self._heap
        while heap and heap[0][0] <= until_ns:
            due, _, _, index, what = heappop(heap)
            if what is _TIMER:
                self._timers.discard((index, due))
            self._events -= not _weak(what)
            self._handed_ns = max(due, self._handed_ns)
            self._fire(index, what, self._handed_ns)
            self._skip_void()

    def _skip_void(self) -> None:
        """Drop entries that mean nothing any more: no time need pass for them."""
        heap = self._heap
        while heap and self._is_void(heap[0][3], heap[0][4]):
            heappop(heap)

    def _is_void(self, index: int, what: Any) -> bool:
        """A launch that was cut short."""
        return isinstance(what, Flying) and what.cut

    def _schedule_touched(self, now: int) -> None:
        now = self._handed_ns = max(now, self._handed_ns)
        more = True
        while more:
            if self._cluster is not None:
                self._cluster.settle(now)
            touched = sorted(self._touched)
            self._touched.clear()
            for index in touched:
                self._do(index, self.engines[index].handle(_SCHEDULE, now), now)
                if (cost := self._sharing[index]) is not None:
                    self._share(index, cost, now)
            more = self._cluster is not None and self._cluster.arrange(now)
        self._skip_void()

    def _fire(self, index: int, what: Any, now: int) -> None:
        if isinstance(what, Flying):
            del self._flying[index][what.batch.launch]
            self._joules += sum(what.joules)
            self._deliver(index, self._ended(index, what.batch, what.ends_ns), now)
        elif isinstance(what, Arrival):
            self._arrive(what, now)
        elif index == CLUSTER:
            assert self._cluster is not None
            self._cluster.woke(now)
        elif isinstance(what, Cancel):
            if self._cluster is not None and self._cluster.cancelled(what.request_id, now):
                return
            home = self._home.get(what.request_id)
            # that sample has ended, others of its prompt may live: engines ignore ids they do not know
            for index in range(len(self.engines)) if home is None else (home,):
                self._deliver(index, Abort(what.request_id), now)
        elif index == LINKS:
            for done in self.links.due(now):
                done(now)
            self.watch_links()
        else:
            self._deliver(index, what, now)

    def _deliver(self, index: int, event: Event, now: int) -> None:
        """Hand an event to an engine, after the steps of held launches that came before it."""
        self._cut(index, now, before=event.ORDER <= LaunchDone.ORDER)
        self._touched.add(index)
        self._do(index, self.engines[index].handle(event, now), now)
        if isinstance(event, InstanceLost):
            self._forget_work(index)
            if self._cluster is not None:
                self._cluster.lost(index, now)

    def _forget_work(self, index: int) -> None:
        """The instance is lost: its launches and transfers will not happen."""
        self._events -= len(self._flying[index])
        for flying in self._flying[index].values():
            flying.cut = True
        self._flying[index].clear()
        for number in self._swaps.pop(index, ()):
            self.links.cancel(number, self._handed_ns)
        self._skip_void()

    # ---------------------------------------------------------------- launches

    def _launch(self, index: int, batch: Batch, now: int) -> None:
        """Put a launch on the clock: its end is known from its price."""
        start = max(now, self._lane_end.get((index, batch.lane), 0))
        prices = self._guard(f"cost model of engine {index}", self.costs[index].price, batch, batch.steps)
        if len(prices) != batch.steps or min(prices) < 1:
            raise PluginError(
                f"cost model of engine {index} priced {batch.steps} steps as {list(prices)[:5]}",
                where=f"launch {batch.launch}, step {batch.first_step}",
                why="it must give one price of at least 1 ns per step",
                do="mend the cost model's price()",
            )
        flying = Flying(batch, start, list(accumulate(prices, initial=start))[1:])
        if (meter := meter_of(self.costs[index])) is not None:
            flying.joules = self._guard(f"cost model of engine {index}", meter.energy, batch, batch.steps)
        self._fly(index, flying)

    def _fly(self, index: int, flying: Flying) -> None:
        self._flying[index][flying.batch.launch] = flying
        self._lane_end[index, flying.batch.lane] = flying.ends_ns[-1]
        self._push(flying.ends_ns[-1], LaunchDone.ORDER, index, flying)

    def _share(self, index: int, cost: LaneModel, now: int) -> None:
        """Launches have come or gone: those of several lanes go on at the pace that they have together."""
        flying = self._flying[index]
        if len(flying) == 1 and all(one.pace is ALONE for one in flying.values()):
            return
        sent = list(flying.values())  # in that order
        first: dict[int, Flying] = {}
        for one in sent:  # what is planned ahead waits for its lane
            first.setdefault(one.batch.lane, one)
        together = ALONE
        if len(first) > 1:
            meter = meter_of(cost)
            most_watts = meter.peak_watts - meter.idle_watts if meter is not None else None
            together = pace([self._use(index, cost, one) for one in first.values()], most_watts)
        if all(one.pace == together for one in first.values()):
            return
        later: dict[int, int] = {}
        for one in sent:  # all of them, so that those that end together are taken as they were sent
            one.cut = True
            self._events -= 1
            lane = one.batch.lane
            again = one.paced(together, now) if one is first[lane] else one.moved(later[lane])
            later[lane] = again.ends_ns[-1] - one.ends_ns[-1]
            self._fly(index, again)

    def _use(self, index: int, cost: LaneModel, flying: Flying) -> Use:
        """What the one step that a launch has left takes of the devices."""
        if flying.use is not None:
            return flying.use
        price = flying.ends_ns[-1] - flying.began_ns
        busy = self._guard(f"cost model of engine {index}", cost.busy, flying.batch)
        if any(not 0 <= ns <= price for ns in busy.values()):
            raise PluginError(
                f"cost model of engine {index} keeps resources busy for {dict(busy)} ns in a step of {price}",
                where=f"launch {flying.batch.launch}, step {flying.batch.first_step}",
                why="none is busy for longer than the step takes alone",
                do="mend the cost model's busy() or price()",
            )
        loads = {name: ns / price for name, ns in busy.items()}
        flying.use = Use(loads, sum(flying.joules) / price * 1e9)
        return flying.use

    def _ended(self, index: int, batch: Batch, ends_ns: list[int], more: bool = False) -> LaunchDone:
        """Steps of a launch are over: execute them."""
        launch, steps = self.executors[index].launch, len(ends_ns)
        outcomes = self._guard(f"executor of engine {index}", launch, batch, steps)
        return LaunchDone(batch.lane, batch.launch, ends_ns, outcomes, more)

    @staticmethod
    def _guard(who: str, method: Callable[..., T], *args: Any) -> T:
        """Call a plugin; what it raises is reported with its name."""
        try:
            return method(*args)
        except ServeLabError:
            raise
        except Exception as exc:
            raise PluginCallError(
                f"the {who} raised {type(exc).__name__}: {exc}",
                where=f"{getattr(method, '__name__', method)}()",
                why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                do="mend the plugin",
            ) from exc

    def _cut(self, index: int, now: int, before: bool = False) -> None:
        """Something is about to happen: held launches stop after the step in progress.

        Steps that have ended (by now, or ``before`` now, for what comes no later than a completion) are
        committed first, so that the engine is up to date. If one ends right now no further step has begun,
        and the launch is over.
        """
        bisect = bisect_left if before else bisect_right
        held = [(bisect(f.ends_ns, now), f) for f in self._flying[index].values() if len(f.ends_ns) > 1]
        held.sort(key=lambda entry: entry[1].ends_ns[entry[0] - 1] if entry[0] else 0)
        for done, flying in held:
            batch, ends = flying.batch, flying.ends_ns
            if flying.cut or done == len(ends):
                continue  # cut while another was, or its own entry is due at this instant
            flying.cut = True
            self._events -= 1
            del self._flying[index][batch.launch]
            self._joules += sum(flying.joules[:done])
            more = not done or ends[done - 1] < now
            if more:
                began = ends[done - 1] if done else flying.began_ns
                self._fly(index, Flying(batch, began, ends[done : done + 1], flying.joules[done : done + 1]))
            else:
                self._lane_end[index, batch.lane] = now
                self._touched.add(index)
            if done:
                event = self._ended(index, batch, ends[:done], more)
                self._do(index, self.engines[index].handle(event, now), now)
            else:
                self.engines[index].shorten(batch.lane)

    # ---------------------------------------------------------------- commands

    def _do(self, index: int, commands: list[Command], now: int) -> None:
        for k, command in enumerate(commands):
            try:
                self._obey(index, command, now)
            except BaseException:  # what the engine said after it is not lost: see _abandon
                self._unsaid += [c.record for c in commands[k + 1 :] if isinstance(c, Emit)]
                raise

    def _obey(self, index: int, command: Command, now: int) -> None:
        if isinstance(command, Emit):
            self._emit(command.record)
            if isinstance(command.record, RequestFinished):
                self._finished(command.record)
            if self._cluster is not None:
                self._cluster.saw(command.record)
        elif isinstance(command, Launch):
            self._launch(index, command.batch, now)
        elif isinstance(command, Interrupt):
            self._cut(index, now)
        elif isinstance(command, StartTransfer):
            self._transfer(index, command, now)
        elif (index, command.at_ns) not in self._timers:
            self._timers.add((index, command.at_ns))
            self._push(command.at_ns, Timer.ORDER, index, _TIMER)

    def _transfer(self, index: int, command: StartTransfer, now: int) -> None:
        """Pages move between device and host: each way a link of its own, shared by those at once."""
        transfer, who = command.transfer, f"cost model of engine {index}"
        price = self.costs[index].transfer_time
        took = max(1, self._guard(who, price, transfer))
        latency = min(took, self._guard(who, price, replace(transfer, bytes=0)))

        def done(now: int) -> None:
            self._swaps[index].discard(number)
            self._guard(f"executor of engine {index}", self.executors[index].transfer, transfer)
            self._deliver(index, TransferDone(transfer.id), now)

        path = ((transfer.direction, index),)
        number = self.links.start(now, path, latency, took - latency, done)
        self._swaps.setdefault(index, set()).add(number)
        self.watch_links()

    def watch_links(self) -> None:
        """See to transfers when the next of them ends, or joins others."""
        at = self.links.next_ns()
        if at is not None and (LINKS, at) not in self._timers:
            self._timers.add((LINKS, at))
            self._push(at, TransferDone.ORDER, LINKS, _TIMER)

    # ---------------------------------------------------------------- arrivals

    def _next_item(self, last_ns: int) -> Arrival | Cancel | None:
        item = self._guard("workload", lambda: next(self._arrivals, _END))
        if item is _END:
            return None
        checked = _checked(item, "arrivals()")
        if checked.time_ns < last_ns:
            raise WorkloadError(
                f"the workload went back in time, to {checked.time_ns} ns",
                where=f"after an item at {last_ns} ns",
                why="arrivals() must be in time order",
                do="sort the trace, or mend the generator",
            )
        return checked

    def _accept(self, item: Arrival | Cancel) -> None:
        """Put an item on the clock; where it goes is decided when its time has come."""
        order = Abort.ORDER if isinstance(item, Cancel) else Arrive.ORDER
        self._push(item.time_ns, order, 0, item)

    def _arrive(self, item: Arrival, now: int) -> None:
        """Dispatch an arrival; books its truth, and its home so that a cancellation finds it."""
        spec = item.spec
        if item.truth is not None:
            for k in range(spec.n):
                self.truths[sample_id(spec.id, k)] = item.truth.of(k)
        if self._cluster is not None:
            self._cluster.arrived(spec, now)
            return
        index = self._guard("dispatch", self._dispatch, spec)
        if type(index) is not int or not 0 <= index < len(self.engines):
            raise PluginError(
                f"dispatch sent request {spec.id} to engine {index!r}",
                why=f"there are {len(self.engines)} engines",
                do="answer with an index of the engines given to the driver",
            )
        self.send(index, spec, now)

    def send(self, index: int, spec: RequestSpec, now: int, since_ns: int | None = None) -> None:
        """Hand a request to an engine; ``since_ns``: when it arrived, if that was before."""
        if len(self.engines) > 1:
            self._home |= dict.fromkeys((sample_id(spec.id, k) for k in range(spec.n)), index)
        self._deliver(index, Arrive(spec, since_ns), now)

    def _finished(self, record: RequestFinished) -> None:
        """Forget a request and accept what follows from its end."""
        self._in_vain = 0
        self.truths.pop(record.request, None)
        self._home.pop(record.request, None)
        follow = self._guard("workload", lambda: tuple(self.workload.react(record)))
        for item in follow:
            if _checked(item, "react()").time_ns < record.t_ns:
                raise WorkloadError(
                    f"the workload reacted to request {record.request} with an item at {item.time_ns} ns",
                    why=f"the request ended at {record.t_ns} ns",
                    do="react with items at or after the record's time",
                )
            self._accept(item)

    # ---------------------------------------------------------- for a cluster

    def sync(self, index: int, now: int) -> None:
        """Bring an engine up to date: what its held launches have done by now."""
        if self._flying[index]:
            self._cut(index, now)

    def knows(self, request_id: str) -> bool:
        """Whether a request is live in one of several engines."""
        return request_id in self._home

    def apart(self, index: int, now: int, action: Callable[[], object]) -> None:
        """Do something to an engine between two events."""
        self.sync(index, now)
        self._touched.add(index)
        self._do(index, self.engines[index].apart(now, action), now)

    def move_home(self, request_id: str, index: int) -> None:
        """A request lives in another engine now."""
        self._home[request_id] = index

    def join(self, engine: Engine, executor: Executor, cost: CostModel) -> None:
        """One engine more."""
        engine.plan_log, engine.token_log = self.engines[0].plan_log, self.engines[0].token_log
        self.engines.append(engine)
        self.executors.append(executor)
        self.costs.append(cost)
        self._flying.append({})
        self._sharing.append(_sharing(engine, cost))

    def next_step_end(self, now: int, engines: Iterable[int]) -> int | None:
        """When a step of any launch in flight of these engines ends next, if that is known."""
        ends = [
            flying.ends_ns[bisect_right(flying.ends_ns, now)]
            for index in engines
            for flying in self._flying[index].values()
            if flying.ends_ns[-1] > now
        ]
        return min(ends, default=None)

    def wake_cluster(self, at_ns: int) -> None:
        """Call the cluster's ``woke`` then, if the run still lasts."""
        if (CLUSTER, at_ns) not in self._timers:
            self._timers.add((CLUSTER, at_ns))
            self._push(at_ns, Timer.ORDER, CLUSTER, _TIMER)

    def tell(self, record: Record) -> None:
        """A record of something that happened in no engine."""
        self._emit(record)
        if isinstance(record, RequestFinished):
            self._finished(record)


_END: Any = object()


def _sharing(engine: Engine, cost: CostModel) -> LaneModel | None:
    return lane_model_of(cost) if engine.limits.lanes > 1 else None


def _weak(what: Any) -> bool:
    """Entries that wake nobody once every request has ended."""
    return what is _TIMER or type(what) is Cancel


def _checked(item: Any, where: str) -> Arrival | Cancel:
    """An item of a workload, if it is one, with whole numbers where counts and times are."""
    numbers: tuple[Any, ...] = ()
    if isinstance(item, Arrival):
        numbers = (item.time_ns, item.spec.prompt_tokens, item.spec.max_new_tokens)
    elif isinstance(item, Cancel):
        numbers = (item.time_ns,)
    if not numbers or any(type(n) is not int for n in numbers):
        raise WorkloadError(
            f"the workload yielded {item!r}",
            where=where,
            why="an Arrival or a Cancel is expected, with whole numbers of nanoseconds and tokens",
            do="mend the workload",
        )
    return item  # type: ignore[no-any-return]


def _first_line(exc: BaseException) -> str:
    text = exc.what if isinstance(exc, ServeLabError) else f"{type(exc).__name__}: {exc}"
    return text.splitlines()[0] if text else type(exc).__name__
