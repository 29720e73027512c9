"""The engine: an event-driven state machine, ``handle(event, now_ns) -> [Command]``.

It never blocks and never reads a clock. ``handle`` reads: collect what happened; when the instant is
over, for each free lane plan, validate, apply and launch; on completion commit and emit.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

from servelab.core.engine.contexts import Contexts
from servelab.core.engine.lane import Lane
from servelab.core.engine.ledger import Ledger
from servelab.core.engine.moving import Moving
from servelab.core.engine.reuse import Reuse
from servelab.core.engine.samples import Samples
from servelab.core.engine.state import Request, arrival_record
from servelab.core.engine.swap import Transfer, finish_transfer, swap_in, swap_out
from servelab.core.engine.validate import PlanCheck
from servelab.core.engine.views import Expiring, ProgramView, StepView, renew_view, renew_views
from servelab.core.errors import LedgerError, PluginCallError, PluginError, ServeLabError, WorkloadError
from servelab.core.events import (
    Abort,
    Arrive,
    Batch,
    Command,
    Emit,
    Event,
    InstanceLost,
    Launch,
    LaunchDone,
    Schedule,
    SetTimer,
    StartTransfer,
    Timer,
    ToolDone,
    TransferDone,
)
from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.families.cost import CostModel
from servelab.core.families.kvcache import KVCache
from servelab.core.families.prefix import PrefixStore
from servelab.core.families.scheduler import Scheduler
from servelab.core.layout import Capacity, KVLayout
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import (
    Ending,
    Planned,
    Record,
    RequestAdmitted,
    RequestFinished,
    RequestPreempted,
    StepDone,
    TokensEmitted,
    TransferEnded,
    TransferStarted,
)
from servelab.core.request import Phase, RequestSpec, RequestView, sample_id, samples_of

T = TypeVar("T")


class Engine:
    """One instance: queues, KV ledger, lanes, one scheduler.

    Args:
        index: number of the instance, stamped on its records.
        horizon: the executor's ``horizon``: steps before some request of a batch finishes.
        checks: ``full`` adds epoch-checked views and an integrity check when all requests have ended.
        predictor: answers ``StepView.predict``; None: the run has none.
        prefix: the prefix store, attached to the layout; None: nothing is reused.
        shares: requests may share pages and copy them on write (``kvcache.fork``).
    """

    def __init__(
        self,
        *,
        index: int = 0,
        scheduler: Scheduler,
        scheduler_name: str,
        kvcache: KVCache,
        kvcache_name: str,
        layout: KVLayout,
        capacity: Capacity,
        limits: Limits,
        model: ModelFacts,
        cost: CostModel,
        horizon: Callable[[Batch, int], int],
        hardware: HardwareFacts | None = None,
        checks: Literal["basic", "full"] = "basic",
        predictor: Callable[[RequestView, float], int] | None = None,
        prefix: PrefixStore | None = None,
        prefix_name: str = "",
        shares: bool = False,
    ) -> None:
        self.index = index
        self.scheduler_name = scheduler_name
        self.layout = layout
        self.capacity = capacity
        self.limits = limits
        self.model = model
        self.hardware = hardware
        self.cost = cost
        self.predictor = predictor
        self.full_checks = checks == "full"
        self.plan_log = True
        """Emit ``Planned`` records; drivers turn it off when nobody listens."""
        self.token_log = False
        """Emit ``TokensEmitted`` records; drivers turn it on when an observer asks for them."""

        self.now_ns = 0
        self.step = 0
        self.epoch = 0
        """Changes after every call of the scheduler."""
        self.reuse = Reuse(self, prefix, prefix_name) if prefix is not None else None
        self.ledger = Ledger(
            kvcache, kvcache_name, layout, capacity, reuse=self.reuse, any_order=limits.lanes > 1
        )
        self.requests: dict[str, Request] = {}
        """Every live request."""
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: dict[str, Request] = {}
        self.paused: dict[str, Request] = {}
        self.swapped: dict[str, Request] = {}
        self.queues = (self.waiting, self.running, self.paused, self.swapped)
        self.programs: dict[str, ProgramView] = {}
        self.transfers: dict[int, Transfer] = {}
        self.contexts = Contexts(self, getattr(scheduler, "on_turn_end", None))
        self.moving = Moving(self)
        self.samples = Samples(self, shares=shares and (prefix is None or hasattr(prefix, "fork")))
        self.arrived = 0
        self.ended: dict[Ending, int] = dict.fromkeys(get_args(Ending), 0)
        """Terminal records given, by outcome."""

        self._plan = scheduler.plan
        self._learn: Callable[[Record], None] | None = getattr(scheduler, "on_event", None)
        self.horizon = horizon
        self._lanes = [Lane(self, i) for i in range(limits.lanes)]
        self.launches = 0
        self._plans = 0
        self._stirs, self._seen = 1, 0
        """Changes so far, and those that every idle lane has been asked about."""
        self._lost: str | None = None
        self._out: list[Command] = []
        self._view = StepView(self)
        self._handlers: dict[type, Callable[..., None]] = {
            Arrive: self._arrive,
            Abort: self._abort,
            LaunchDone: self._launch_done,
            TransferDone: self._transfer_done,
            Timer: self._tick,
            ToolDone: self._tick,
            InstanceLost: self._instance_lost,
            Schedule: self._schedule,
        }

    # ---------------------------------------------------------------- the loop

    def handle(self, event: Event, now_ns: int) -> list[Command]:
        """Take in one event; returns what the driver must do, in order.

        Raises:
            PlanError: the scheduler's plan cannot be executed; nothing of it was applied.
            PluginCallError: the scheduler raised; the state is as before the call.
            LedgerError: the kvcache plugin broke page accounting.
        """
        out: list[Command] = []
        self._out = out
        self.now_ns = now_ns
        self._handlers[type(event)](event)
        self._out = []
        return out

    def _schedule(self, _: Schedule) -> None:
        lanes = self._lanes
        if len(lanes) > 1:
            self._schedule_lanes()
            return
        (lane,) = lanes
        while lane.is_open and self._lost is None:
            batch = lane.repeat()
            if batch is not None:
                self._out.append(Launch(batch))
            elif not (self.requests or self.contexts.kept) or not self._plan_lane(lane):
                break

    def _schedule_lanes(self) -> None:
        """As for one. Who ran last is asked first, so that requests stay on their lane.

        After a step of a hold that goes on nobody is asked: there is nothing that the others have not seen.
        """
        lanes = sorted(self._lanes, key=_ran_last)
        launched, stirs = self.launches, self._stirs
        quiet = stirs == self._seen and lanes[0].holds and lanes[0].is_open
        for lane in lanes:
            while lane.is_open and self._lost is None:
                batch = lane.repeat()
                if batch is not None:
                    self._out.append(Launch(batch))
                    continue
                quiet = False
                if not (self.requests or self.contexts.kept) or not self._plan_lane(lane):
                    break
            if quiet:
                break
        self._seen = stirs
        busy = [lane for lane in self._lanes if lane.flights]
        if len(busy) == 1 and self._stirs == stirs:
            self._fast_forward(busy[0], launched)

    def _fast_forward(self, lane: Lane, launched: int) -> None:
        """It runs alone: what other lanes do comes after an event, which cuts a launch of several steps."""
        batch, _ = lane.flights[-1]
        if batch.launch <= launched:
            return
        lane.lengthen(batch)
        for command in self._out:  # of a plan made at this instant
            record = command.record if isinstance(command, Emit) else None
            if isinstance(record, Planned) and record.step == batch.first_step and record.requests:
                record.held = batch.steps

    def _plan_lane(self, lane: Lane) -> bool:
        """Ask, validate, apply, launch. False when there is nothing (more) to do now."""
        plan = self._decide(lane)
        changed = self._apply(plan)
        if changed or (plan.work and len(self._lanes) > 1):  # other lanes decided without knowing of this
            self.break_holds(keep=lane)
            self._stirs += changed
        if plan.wake_at is not None:
            self._out.append(SetTimer(plan.wake_at))
        if not plan.work:
            if changed or plan.deferred:
                self._log_plan(lane, plan, self.step, 0)
            # freed pages or an emptier queue may let it plan work now; if it still waits, so do we
            return changed and not any(x.flights for x in self._lanes) and not self.transfers
        if plan.hold is not None:
            lane.hold(plan.work, plan.hold)
            if plan.hold.until_ns is not None:
                self._out.append(SetTimer(plan.hold.until_ns))
        step = self.step
        batch = lane.launch(plan.work)
        self._log_plan(lane, plan, step, batch.steps)
        self._out.append(Launch(batch))
        return True

    def _decide(self, lane: Lane) -> StepPlan:
        """A plan that can be executed. Requests it admits hold what the prefix store has for them."""
        self._plans += 1
        if self.reuse is None:
            plan = self._ask(lane)
            PlanCheck(self, lane.index, self._plans).run(plan)
            return plan
        with self.reuse.planning() as taken:
            plan = self._ask(lane)
            PlanCheck(self, lane.index, self._plans).run(plan)
            taken += plan.work
        return plan

    def _ask(self, lane: Lane) -> StepPlan:
        self._view.lane = lane.index
        view: Any = self._view
        if self.full_checks:
            renew_views(self)
            view = Expiring(view, self)
        return self.call(self._plan, view, "plan(), step {}, lane {}", self.step, lane.index)

    def show(self, r: Request) -> RequestView:
        """The view a scheduler may be given of one request, for one call."""
        if self.full_checks:
            renew_view(self, r)
        return r.seen

    def call(self, method: Callable[[Any], T], argument: Any, where: str, *details: object) -> T:
        """Call the scheduler; views it is given expire when it returns. ``where`` is a format, for errors."""
        try:
            return method(argument)
        except ServeLabError:
            raise
        except Exception as exc:
            raise PluginCallError(
                f"scheduler {self.scheduler_name!r} raised {type(exc).__name__}: {exc}",
                where=f"{where.format(*details)}, t={self.now_ns} ns",
                why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                do="mend the plugin",
            ) from exc
        finally:
            self.epoch += 1

    # ------------------------------------------------------- applying a plan

    def _apply(self, plan: StepPlan) -> bool:
        """Everything but the work. True if anything changed."""
        if not (plan.preemptions or plan.rejections or plan.aborts or plan.swap_ins or plan.unpins):
            return False
        for unpin in plan.unpins:
            self.contexts.drop(unpin.program, unpin.reason)
        for verdict in plan.rejections:
            self._end(verdict.request._r, "rejected", verdict.reason)
        for verdict in plan.aborts:
            self._end(verdict.request._r, "aborted", verdict.reason)
        for p in plan.preemptions:
            self._preempt(p.request._r, p.mode, p.reason)
        for verdict in plan.swap_ins:
            r = verdict.request._r
            self._move(r, self.swapped, Phase.LOADING)
            self.start_transfer(swap_in(self.ledger, r))
        return True

    def _preempt(self, r: Request, mode: str, reason: str) -> None:
        lost = 0
        source = self.running if r.phase is Phase.RUNNING else self.paused
        if mode == "recompute":
            del source[r.id]
            self.samples.requeued(r)
            self.ledger.release(r.lease)
            lost = r.forget_progress(self.ledger.open(r.id))
            r.phase = Phase.WAITING
            self.waiting[r.id] = r
            self.waiting.move_to_end(r.id, last=False)
        elif mode == "swap":
            self._move(r, source, Phase.SWAPPING)
            self.start_transfer(swap_out(self.ledger, r))
        else:
            self._move(r, source, Phase.PAUSED)
            self.paused[r.id] = r
        r.preemptions += 1
        self.emit(
            RequestPreempted(
                t_ns=self.now_ns, engine=self.index, request=r.id, mode=mode, reason=reason, lost_tokens=lost
            )
        )

    def _move(self, r: Request, source: dict[str, Request], phase: Phase) -> None:
        del source[r.id]
        r.phase = phase

    def admit(self, r: Request) -> None:
        """A waiting or paused request is about to run (called by its lane)."""
        if r.phase is Phase.PAUSED:
            del self.paused[r.id]
        else:
            del self.waiting[r.id]
            self._admitted(r)
            if r.forks:
                self.samples.unqueued(r)
                self.samples.admitted(r)
        r.phase = Phase.RUNNING
        self.running[r.id] = r

    def _admitted(self, r: Request) -> None:
        resumed = r.admitted_ns is not None
        if not resumed:
            r.admitted_ns = self.now_ns
            self.contexts.forget_heir(r)
        self.emit(
            RequestAdmitted(
                t_ns=self.now_ns,
                engine=self.index,
                request=r.id,
                resumed=resumed,
                cached_tokens=r.cached,
            )
        )

    def break_holds(self, keep: Lane | None = None) -> None:
        """Something happened: lanes that repeat a plan must ask again."""
        if keep is None:
            self._stirs += 1
        for lane in self._lanes:
            if lane is not keep and (interrupt := lane.end_hold()) is not None:
                self._out.append(interrupt)

    # --------------------------------------------------------- what happened

    def _arrive(self, event: Arrive) -> None:
        spec = event.spec
        if any(sample_id(spec.id, k) in self.requests for k in range(spec.n)):
            raise WorkloadError(
                f"request id {spec.id!r} arrived twice",
                where=f"t={self.now_ns} ns",
                why="the first is still live",
                do="give every request of a run its own id",
            )
        if spec.prompt_tokens < 1 or spec.max_new_tokens < 1:
            raise WorkloadError(
                f"request {spec.id!r} has {spec.prompt_tokens} prompt and {spec.max_new_tokens} new tokens",
                why="both must be at least 1",
                do="mend the workload",
            )
        if spec.n < 1:
            raise WorkloadError(
                f"request {spec.id!r} asks for {spec.n} outputs",
                why="n must be at least 1",
                do="mend the workload",
            )
        self.break_holds()
        since_ns = event.since_ns
        r = self._welcome(spec, None, since_ns)
        self.waiting[r.id] = r
        if spec.program is not None:
            program = self.programs.setdefault(spec.program, ProgramView(spec.program, r.arrival_ns))
            program.turns += 1
            program.live += 1
            r.program_arrival_ns = program.arrival_ns
        if spec.n > 1:
            further = samples_of(spec)[1:]
            self.samples.arrived(r, [self._welcome(one, r.id, since_ns) for one in further])
        if self._lost is not None:
            self._end(r, "failed", self._lost)
        elif spec.prompt_tokens >= self.limits.max_model_len:
            self._end(
                r,
                "rejected",
                f"prompt of {spec.prompt_tokens} tokens leaves no room for output: max_model_len is "
                f"{self.limits.max_model_len}",
            )
        else:
            self.contexts.adopt(r)

    def _welcome(self, spec: RequestSpec, parent: str | None, since_ns: int | None) -> Request:
        """A live request, in no queue yet; its arrival is told."""
        room = self.limits.max_model_len - spec.prompt_tokens
        came_ns = self.now_ns if since_ns is None else since_ns
        r = Request(spec, came_ns, min(spec.max_new_tokens, max(room, 1)), self.ledger.open(spec.id))
        r.home = self
        self.requests[r.id] = r
        self.arrived += 1
        record = arrival_record(spec, r.arrival_ns, self.index, parent)
        if since_ns is None:
            self.emit(record)
        else:  # the router told it, when it came
            self.teach(record)
        return r

    def _abort(self, event: Abort) -> None:
        for r in self.samples.of(event.request_id):
            self.break_holds()
            if r.home is self:  # it did not end with another sample
                self._end(r, "cancelled", event.reason)

    def _tick(self, _: Timer | ToolDone) -> None:
        self.break_holds()
        self.contexts.expire()

    def _launch_done(self, event: LaunchDone) -> None:
        lane = self._lanes[event.lane]
        if not lane.flights or lane.flights[0][0].launch != event.launch:
            if self._lost is not None:
                return  # the instance was lost with this launch
            raise PluginError(
                f"launch {event.launch} of lane {event.lane} ended out of order",
                why="launches of a lane end in the order they were started",
                do="mend the driver or executor",
            )
        self.break_holds(keep=lane)  # they did not count with its pages, nor with what it brings
        batch, step, start_ns, emitted, done = lane.land(event)
        self.emit(
            StepDone(
                t_ns=event.ends_ns[-1],
                engine=self.index,
                lane=lane.index,
                step=step,
                start_ns=start_ns,
                ends_ns=list(event.ends_ns),
                requests=[r.id for r in batch.requests],
                tokens=batch.tokens,
                emitted=emitted,
                waiting=len(self.waiting),
                running=len(self.running),
                free_pages=self.ledger.free(),
                unusable_pages=self._unusable(),
            )
        )
        if self.token_log:
            self._log_tokens(event, batch, emitted)
        if batch.forks:
            self.break_holds()  # samples join those who run: this lane too asks again
            done += self.samples.landed(batch, event)
        for r, reason in done:
            self._end(r, "completed", reason)  # a hold it was part of ends here: see Lane.repeat

    def _unusable(self) -> tuple[int, ...]:
        for head in self.waiting.values():
            return self.ledger.unusable(head)
        return ()

    def _log_tokens(self, event: LaunchDone, batch: Batch, emitted: list[int]) -> None:
        for r, out, count in zip(batch.requests, event.outcomes, emitted, strict=True):
            if count:
                probabilities = list(out.logprobs[:count]) if out.logprobs is not None else None
                self.emit(
                    TokensEmitted(
                        t_ns=event.ends_ns[-1],
                        engine=self.index,
                        request=r.id,
                        tokens=list(out.tokens[:count]),
                        logprobs=probabilities,
                    )
                )

    def _transfer_done(self, event: TransferDone) -> None:
        transfer = self.transfers.pop(event.transfer, None)
        if transfer is None:
            return  # the instance was lost with it
        self.break_holds()
        live = self.requests.get(transfer.request_id)
        r = live if live is not None and live.lease is transfer.lease else None
        finish_transfer(self.ledger, transfer, r)
        self.emit(TransferEnded(t_ns=self.now_ns, engine=self.index, transfer=transfer.id))
        if r is None:
            return
        if transfer.direction == "out":
            r.phase = Phase.SWAPPED
            self.swapped[r.id] = r
        else:
            r.phase = Phase.RUNNING
            self.running[r.id] = r
            if r.admitted_ns is None:  # it adopted a context on the host
                self._admitted(r)
                self.samples.admitted(r)

    def start_transfer(self, transfer: Transfer) -> None:
        self.transfers[transfer.id] = transfer
        self.emit(
            TransferStarted(
                t_ns=self.now_ns,
                engine=self.index,
                transfer=transfer.id,
                request=transfer.request_id,
                direction=transfer.direction,
                pages=sum(map(len, transfer.source)),
                bytes=transfer.bytes,
            )
        )
        self._out.append(StartTransfer(transfer))

    def price_swap(self, r: Request) -> int:
        """Nanoseconds to move a request's pages to or from the host tier."""
        tables = r.lease.tables if any(r.lease.tables) else r.lease.host_tables
        size = sum(len(t) * p.bytes_per_page for t, p in zip(tables, self.layout.pools, strict=True))
        probe = Transfer(0, r.id, "out", r.lease, tables, tables, size, sum(1 for t in tables if t))
        return self.cost.transfer_time(probe)

    def _instance_lost(self, event: InstanceLost) -> None:
        self._lost = event.reason
        for lane in self._lanes:
            lane.end_hold()
            for batch, _ in lane.flights:
                self.ledger.settle(batch.launch)
                self.ledger.landed(batch.leases)
            lane.flights.clear()
        for transfer in self.transfers.values():
            self.ledger.landed([transfer.lease])
        self.transfers.clear()
        self._end_all("failed", event.reason)
        self.contexts.drop_all(event.reason)

    def shorten(self, lane: int) -> None:
        """The driver has cut the launch of a lane after the step that is running, its first."""
        self._lanes[lane].shorten()

    def program_over(self, id: str) -> None:
        """Its last turn has ended, here or in another engine: forget it, unless another turn is here."""
        if not self.programs[id].live:
            del self.programs[id]
            if id in self.contexts.kept:
                self.contexts.drop(id, "its program is over")

    def apart(self, now_ns: int, action: Callable[[], object]) -> list[Command]:
        """Do something between two events; returns what the driver must do."""
        out: list[Command] = []
        self._out, self.now_ns = out, now_ns
        action()
        self._out = []
        return out

    def stop(self, now_ns: int, reason: str) -> list[Command]:
        """The run is over before its requests: end them as ``unfinished``. In-flight work is forgotten.

        What the engine had to say when its last call raised comes first: no terminal record is lost.
        """
        out = self._out
        self._learn = None  # there is nothing left to decide
        self.now_ns = now_ns
        for lane in self._lanes:
            lane.end_hold()
        self._end_all("unfinished", reason)
        self.contexts.drop_all(reason)
        self._out = []
        return out

    # ------------------------------------------------------------- accounting

    def _end_all(self, outcome: Ending, reason: str) -> None:
        for r in list(self.requests.values()):
            if r.home is self:  # it did not end with another
                self._end(r, outcome, reason)

    def _end(self, r: Request, outcome: Ending, reason: str) -> None:
        """The one terminal event of a request; its pages return when nothing in flight names them."""
        spec = r.spec
        retain = self.contexts.ask(r) if outcome == "completed" else None
        for queue in self.queues:
            queue.pop(r.id, None)
        self.moving.stopped.pop(r.id, None)
        del self.requests[r.id]
        r.home, was = None, r.phase
        r.phase = Phase.FINISHED
        self.ended[outcome] += 1
        self.contexts.forget_heir(r)
        if spec.program is not None:
            self.programs[spec.program].live -= 1
        self.emit(
            RequestFinished(
                t_ns=self.now_ns,
                engine=self.index,
                request=r.id,
                outcome=outcome,
                reason=reason,
                output_tokens=r.generated,
                preemptions=r.preemptions,
                cached_tokens=r.cached,
            )
        )
        # pages go back only now: what a plugin raises must not take the record away
        if spec.program is not None and spec.is_last_turn:
            self.program_over(spec.program)
        if retain is None:
            self.ledger.release(r.lease)
        else:
            self.contexts.keep(r, retain)
        for orphan in self.samples.ended(r, was):
            self._end(orphan, outcome, reason)
        r.untie()

    def command(self, command: Command) -> None:
        """Send a command with the answer to the current event."""
        self._out.append(command)

    def emit(self, record: Record) -> None:
        """Report what happened, to the driver and to a scheduler that learns."""
        self._out.append(Emit(record))
        if self._learn is not None:
            self.teach(record)

    def teach(self, record: Record) -> None:
        if self._learn is not None:
            self.call(self._learn, record, "on_event(), record {!r}", record.ev)

    def _log_plan(self, lane: Lane, plan: StepPlan, step: int, held: int) -> None:
        if not self.plan_log:
            return
        work = [i for i in plan.work if type(i) is Tokens]
        self._out.append(
            Emit(
                Planned(
                    t_ns=self.now_ns,
                    engine=self.index,
                    lane=lane.index,
                    step=step,
                    requests=[i.request._r.id for i in work],
                    tokens=[i.n for i in work],
                    preempted=[(p.request.id, p.mode, p.reason) for p in plan.preemptions],
                    swapped_in=_verdicts(plan.swap_ins),
                    rejected=_verdicts(plan.rejections),
                    aborted=_verdicts(plan.aborts),
                    deferred=_verdicts(plan.deferred),
                    unpinned=[(u.program, u.reason) for u in plan.unpins],
                    held=held,
                    wake_at=plan.wake_at,
                )
            )
        )

    # ------------------------------------------------------------- inspection

    @property
    def somebody_waits(self) -> bool:
        """Whether a request is off the running queue that more KV memory could bring there."""
        return bool(self.waiting or self.paused or self.swapped)

    @property
    def in_flight(self) -> int:
        """Launches and transfers on their way."""
        return sum(len(lane.flights) for lane in self._lanes) + len(self.transfers)

    def stall_reason(self) -> str:
        """Why nothing will ever happen again, for ``StallError``."""
        head = next(iter(self.waiting.values()), None) or next(iter(self.requests.values()))
        need = self.ledger.missing(head, max(head.pending, 1))
        return (
            f"{len(self.waiting)} waiting, {len(self.running)} running, {len(self.paused)} paused, "
            f"{len(self.swapped)} swapped; request {head.id} ({head.phase}) has {head.pending} tokens "
            f"pending and needs {tuple(need)} pages, {self.ledger.free()} are free{self._holders()}"
        )

    def _holders(self) -> str:
        """Who holds most device pages, for ``stall_reason``."""
        held = [(sum(map(len, r.lease.tables)), f"{r.id} ({r.phase})") for r in self.requests.values()]
        kept = self.contexts.kept.values()
        held += [(sum(map(len, x.lease.tables)), f"the kept context of program {x.program}") for x in kept]
        most = sorted((x for x in held if x[0]), key=lambda x: -x[0])[:3]
        return "; most are held by " + ", ".join(f"{who}: {pages}" for pages, who in most) if most else ""

    def check_integrity(self) -> None:
        """Recount pages, queues and terminal events. Linear; for tests and the end of a checked run.

        Raises:
            LedgerError: pages do not add up.
            PluginError: a request is in no queue or in two, or ended twice.
        """
        self.ledger.check_integrity()
        moving = {t.request_id for t in self.transfers.values()}
        drafts: Counter[str] = Counter()
        for lane in self._lanes:
            for batch, _ in lane.flights:
                for i, item in batch.extras.items():
                    drafts[batch.requests[i].id] += item.draft
        phases = (Phase.WAITING, Phase.RUNNING, Phase.PAUSED, Phase.SWAPPED)
        for r in self.requests.values():
            homes = [p for q, p in zip(self.queues, phases, strict=True) if r.id in q]
            in_transit = r.phase in (Phase.SWAPPING, Phase.LOADING) and r.id in moving
            if homes != ([] if in_transit or r.phase in (Phase.FORKING, Phase.MOVING) else [r.phase]):
                raise PluginError(f"request {r.id} is {r.phase} but queued as {homes}")
            bound = r.prompt_tokens + r.generated + r.expected + drafts[r.id]
            if not 0 <= r.computed + r.flying <= bound or r.slack < 0:
                raise PluginError(f"request {r.id} counts do not add up", why=repr(r.view.freeze()))
            if r.slack and r.slack != (room := self.ledger.slack_of(r)):
                raise LedgerError(
                    f"request {r.id} believes in room for {r.slack} tokens", why=f"its pages have {room}"
                )
            if not self.ledger.sees_all(r.lease, r.computed):
                raise LedgerError(
                    f"request {r.id} has given up pages that its next token sees",
                    why=f"{r.computed} tokens are computed, its tables begin with pages {r.lease.first}",
                )
        self.samples.check_integrity()
        if self.arrived != len(self.requests) + sum(self.ended.values()) + self.moving.left:
            raise PluginError(
                f"{self.arrived} requests arrived, {len(self.requests)} are live, {self.moving.left} moved "
                f"on and {self.ended} ended",
                why="every request gets exactly one terminal event",
            )


def _ran_last(lane: Lane) -> tuple[int, int]:
    return -lane.last_end_ns, lane.index


def _verdicts(items: Sequence[object]) -> list[tuple[str, str]]:
    return [(v.request.id, v.reason) for v in items]  # type: ignore[attr-defined]
