"""Builders for tests: the smallest honest part of every family, and a rig that plays the driver by hand.

Nothing here is a technique. ``Rig`` drives ``Engine.handle`` directly, so that a test decides what ends when;
to test a whole run, give the same parts to a driver. The k-th output token of a request has the id ``k``
(from 0), which makes a lost, repeated or reordered token visible.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from random import Random
from typing import Any, Literal

from servelab.core.engine.engine import Engine
from servelab.core.engine.state import Request
from servelab.core.engine.swap import Transfer
from servelab.core.errors import ServeLabError
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
    SetTimer,
    StartTransfer,
    Timer,
    TransferDone,
)
from servelab.core.facts import Limits, ModelFacts
from servelab.core.families.cost import CostModel
from servelab.core.families.kvcache import KVCache
from servelab.core.families.prefix import PrefixStore
from servelab.core.families.scheduler import KVBudget, Scheduler, StepView
from servelab.core.layout import Capacity, KVLayout, Pool
from servelab.core.plan import Background, Hold, Outcome, StepPlan, Tokens
from servelab.core.records import Record, RequestFinished, RequestPreempted, StepDone
from servelab.core.request import Arrival, Cancel, Phase, RequestSpec, RequestView, Truth, sample_id

TOY_MODEL = ModelFacts(
    name="toy", layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=256, max_position=4096
)
"""A model small enough to write worked examples by hand; four layers."""


def toy_limits(
    *, tokens: int = 64, requests: int = 16, model_len: int = 256, lanes: int = 1, in_flight: int = 1
) -> Limits:
    """Limits of a device on which every bound is easy to reach."""
    return Limits(
        max_batch_tokens=tokens,
        max_batch_requests=requests,
        max_model_len=model_len,
        lanes=lanes,
        max_in_flight=in_flight,
    )


def toy_layout(*page_tokens: int, windows: Sequence[int | None] = ()) -> KVLayout:
    """One pool of all layers per page size given (default: one pool, pages of 4 tokens, 8 bytes each).

    ``windows`` says for the first of them how many recent tokens they keep.
    """
    limits = dict(enumerate(windows))
    return KVLayout(
        addressing="block_table",
        pools=tuple(
            Pool(
                id=f"kv{i}",
                layers=tuple(range(TOY_MODEL.layers)),
                page_tokens=n,
                bytes_per_page=2 * n,
                retention="full" if limits.get(i) is None else "window",
                window_tokens=limits.get(i),
            )
            for i, n in enumerate(page_tokens or (4,))
        ),
    )


class ToyKV:
    """Fixed pages; always chooses the lowest free ones, so that page numbers can be written down."""

    def __init__(self, layout: KVLayout | None = None) -> None:
        self._layout = layout or toy_layout()
        self.free: dict[tuple[int, str], set[int]] = {}

    def layout(self, model: ModelFacts) -> KVLayout:
        return self._layout

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        self.free[pool, tier] = set(range(num_pages))

    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        return -(-tokens // pool.page_tokens)

    def tokens_in(self, pool: Pool, pages: int) -> int:
        return pages * pool.page_tokens

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        pages = sorted(self.free[pool, tier])[:n]
        self.free[pool, tier].difference_update(pages)
        return pages

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        self.free[pool, tier].update(pages)


class ToyCost:
    """A step costs ``step_ns`` plus ``token_ns`` per token plus ``context_ns`` per token of context."""

    def __init__(
        self, step_ns: int = 1000, token_ns: int = 10, context_ns: int = 0, transfer_ns: int = 500
    ) -> None:
        self.step_ns = step_ns
        self.token_ns = token_ns
        self.context_ns = context_ns
        self.transfer_ns = transfer_ns

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        rows, first, context = len(batch.requests), batch.num_tokens(), sum(batch.starts)
        return [
            self.step_ns
            + self.token_ns * (first if k == 0 else rows)
            + self.context_ns * (context + (first + (k - 1) * rows if k else 0))
            for k in range(steps)
        ]

    def transfer_time(self, transfer: Transfer) -> int:
        return self.transfer_ns


class ToyExecutor:
    """Ends each request at its true length; accepts ``accept`` draft tokens of each draft.

    Output tokens are 0, 1, 2, ...; those of sample k of a prompt 1000 k higher.
    """

    simulated = True

    def __init__(self, truths: Mapping[str, Truth], *, foresight: bool = True, accept: int = 1 << 30) -> None:
        self.truths = truths
        self.foresight = foresight
        self.accept = accept
        self.launched: list[tuple[int, int]] = []
        """(launch, steps) of every call, in order."""
        self.transferred: list[int] = []
        self.closed = False

    def _truth(self, r: Request) -> int:
        truth = self.truths.get(r.id)
        return 1 << 30 if truth is None else truth.output_tokens

    def generated(self, r: Request) -> int:
        """Output tokens of ``r`` before this launch. Overridden where those before may lag."""
        return r.generated

    def capacity(self, layout: KVLayout) -> Capacity:
        return Capacity(device_pages=(16,) * len(layout.pools))

    def horizon(self, batch: Batch, max_steps: int) -> int:
        if not self.foresight:
            return 1
        ends = [
            self._truth(r) - (r.generated + r.expected - 1)
            for r, sampled in zip(batch.requests, batch.samples, strict=True)
            if sampled
        ]
        return max(1, min([max_steps, *ends]))

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        self.launched.append((batch.launch, steps))
        return [self.outcome(batch, i, steps) for i in range(len(batch.requests))]

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        """What happens to request ``i`` of the batch."""
        if not batch.samples[i]:
            return Outcome()
        r, truth = batch.requests[i], self._truth(batch.requests[i])
        generated = self.generated(r)
        accepted, count = 0, steps
        if i in batch.extras and batch.extras[i].draft:
            wish = self.accept if accept is None else accept
            accepted = max(0, min(wish, batch.extras[i].draft, truth - generated - 1))
            count = 1 + accepted
        first = 1000 * r.spec.sample + generated
        ids = tuple(range(first, first + count))
        forks = tuple(
            Outcome((1000 * other.spec.sample,), finish="stop" if self._truth(other) <= 1 else None)
            for other in batch.forks.get(i, ())
        )
        end = "stop" if generated + count >= truth else None
        return Outcome(ids, accepted=accepted, finish=end, forks=forks)

    def transfer(self, transfer: Transfer) -> None:
        self.transferred.append(transfer.id)

    def close(self) -> None:
        self.closed = True


class ListWorkload:
    """Arrivals and cancellations from a list; ``react`` may add to them."""

    def __init__(
        self,
        items: Iterable[Arrival | Cancel],
        react: Callable[[RequestFinished], Iterable[Arrival | Cancel]] | None = None,
    ) -> None:
        self.items = list(items)
        self._react = react

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        return iter(self.items)

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        return self._react(finished) if self._react is not None else ()

    def describe(self) -> dict[str, Any]:
        return {"requests": len(self.items)}


def arrival(
    id: str, prompt: int = 4, output: int = 3, *, cap: int = 100, at: int = 0, **spec: Any
) -> Arrival:
    """An arrival with its truth, in one line."""
    return Arrival(
        at, RequestSpec(id=id, prompt_tokens=prompt, max_new_tokens=cap, **spec), Truth(output_tokens=output)
    )


class Fcfs:
    """First come first served, youngest running request recomputed when pages run out. No technique.

    Made for one lane and one launch in flight: otherwise two lanes may take pages from each other for ever.
    """

    def __init__(self, *, hold: int = 1, chunk: int = 1 << 30) -> None:
        self.hold = hold
        self.chunk = chunk

    def plan(self, view: StepView) -> StepPlan:
        plan, pages, left = StepPlan(), view.kv.budget(), view.limits.max_batch_tokens
        running = list(view.running)
        decoding = True
        while running:
            request = running.pop(0)
            n = min(request.pending_tokens, left, self.chunk)
            if n < 1 or len(plan.work) == view.limits.max_batch_requests:  # the rest is for other lanes
                decoding = False
                continue
            fits = pages.take(request, n)
            while not fits and running:
                victim = running.pop()
                plan.preempt(victim, "recompute", "out of pages")
                pages.give_back(victim)
                fits = pages.take(request, n)
            if not fits:
                plan.preempt(request, "recompute", "out of pages")
                break
            plan.run(request, n)
            left -= n
            decoding = decoding and n == request.pending_tokens == 1
        if not plan.preemptions:
            room = view.limits.max_batch_requests - len(view.running)
            for request in view.waiting:
                n = min(request.pending_tokens, left, self.chunk)
                if n < 1 or room < 1 or not pages.take(request, n):
                    plan.defer(request, "no room")
                    break
                plan.run(request, n)
                left, room, decoding = left - n, room - 1, False
        if decoding and plan.work and not plan.preemptions and self.hold > 1:
            plan.hold = Hold(self.hold)
        return plan


class Script:
    """Plays one function per call of ``plan``, then ``then`` for ever (default: an empty plan)."""

    def __init__(
        self,
        *steps: Callable[[StepView], StepPlan],
        then: Callable[[StepView], StepPlan] = lambda view: StepPlan(),
    ) -> None:
        self.steps = deque(steps)
        self.then = then
        self.calls = 0

    def plan(self, view: StepView) -> StepPlan:
        self.calls += 1
        return (self.steps.popleft() if self.steps else self.then)(view)


class RandomPlans:
    """Draws legal plans of every kind: chunks, layers, drafts, rewrites, preemptions, swaps, holds, timers.

    It keeps to the contract as a careful author would, from the view alone, so a plan of its that is refused
    shows a fault in the core (or in the contract).

    Args:
        rng: where decisions come from; may be replaced between calls.
        kinds: which special things it may do; default all of ``KINDS``.
    """

    KINDS = frozenset(
        [
            "recompute",
            "swap",
            "pause",
            "resume",
            "swap_in",
            "abort",
            "reject",
            "layers",
            "draft",
            "rewrite",
            "barrier",
            "background",
            "hold",
            "wake",
        ]
    )

    def __init__(self, rng: Random, kinds: Iterable[str] = KINDS) -> None:
        self.rng = rng
        self.kinds = frozenset(kinds)
        self._windows: list[int] = []
        self._chunks: dict[str, int] = {}
        """Tokens of chunks that have not passed all layers; the view shows only how far they are."""

    def _may(self, kind: str, one_in: int) -> bool:
        return kind in self.kinds and self.rng.randrange(one_in) == 0

    def plan(self, view: StepView) -> StepPlan:
        plan, pages, rng = StepPlan(), view.kv.budget(), self.rng
        self._windows = [w for w in view.kv.window_tokens if w is not None]
        host = list(view.kv.free_host_pages)
        busy: set[str] = set()
        for request in [*view.running, *view.paused]:
            running = request.phase is Phase.RUNNING
            if self._may("recompute", 10):
                plan.preempt(request, "recompute", "drawn")
                pages.give_back(request)
            elif running and self._may("pause", 10):
                plan.preempt(request, "pause", "drawn")
            elif (
                any(view.kv.total_host_pages)
                and not request.in_flight
                and all(n <= left for n, left in zip(request.pages, host, strict=True))
                and self._may("swap", 8)
            ):
                plan.preempt(request, "swap", "drawn")
                host = [left - n for n, left in zip(request.pages, host, strict=True)]
            elif self._may("abort", 25):
                plan.abort(request, "drawn")
                pages.give_back(request)
            else:
                continue
            busy.add(request.id)
        for request in view.waiting:
            if self._may("reject", 25):
                (plan.reject if request.admitted_ns is None else plan.abort)(request, "drawn")
                busy.add(request.id)
        for request in view.swapped:
            if self._may("swap_in", 2) and pages.take(request, 1):
                plan.swap_in(request, "drawn")
                busy.add(request.id)
        left, room = view.limits.max_batch_tokens, view.limits.max_batch_requests
        candidates = [*view.running, *view.waiting]
        if self._may("resume", 2):
            candidates += view.paused
        for request in candidates:
            if request.id in busy or not left or not room or rng.randrange(6) == 0:
                continue
            item = self._item(request, left, view.model.layers, pages)
            if item is not None:
                plan.work.append(item)
                left -= item.n + item.draft
                room -= 1
        plain = all(
            type(x) is Tokens and x.plain and x.n == 1 and x.request.pending_tokens == 1 for x in plan.work
        )
        if self._may("background", 10) and left:
            plan.work.append(Background("drawn", 1))
        elif plan.work and plain and self._may("hold", 2):
            until = view.now_ns + rng.randrange(1, 5000) if rng.randrange(3) == 0 else None
            plan.hold = Hold(rng.randrange(1, 9), until)
        if self._may("wake", 8):
            plan.wake_at = view.now_ns + rng.randrange(1, 5000)
        return plan

    def _item(self, request: RequestView, left: int, layers: int, pages: KVBudget) -> Tokens | None:
        rng, pending = self.rng, request.pending_tokens
        cursor = request.layer_cursor
        if cursor:  # nothing but the same chunk, from the layer it has reached
            n = self._chunks[request.id]
            end = rng.randrange(cursor + 1, layers + 1)
            return Tokens(request, n, layers=(cursor, end)) if n <= left else None
        if request.computed_tokens and self._may("rewrite", 10):
            stored = not self._windows or (
                request.computed_tokens < min(self._windows) and not request.in_flight_tokens
            )
            advance: Literal["rewrite", "none"] = "rewrite" if rng.randrange(2) and stored else "none"
            return Tokens(request, rng.randrange(1, min(request.computed_tokens, left) + 1), advance=advance)
        if not pending:
            return None
        n = min(left, pending if rng.randrange(2) else rng.randrange(1, pending + 1))
        if n == pending and n < left and not request.in_flight_tokens and self._may("draft", 3):
            draft = rng.randrange(1, min(4, left - n) + 1)
            return Tokens(request, n, draft=draft) if pages.take(request, n + draft) else None
        if not pages.take(request, n):
            return None
        if self._may("layers", 4):
            self._chunks[request.id] = n
            return Tokens(request, n, layers=(0, rng.randrange(1, layers + 1)))
        if self._may("barrier", 10):
            return Tokens(request, n, barrier_group=f"of {n}")
        return request.next_token if n == 1 else Tokens(request, n)


def find(view: StepView, id: str) -> RequestView:
    """The view of one request, from whatever queue it is in."""
    for queue in (view.waiting, view.running, view.paused, view.swapped):
        for request in queue:
            if request.id == id:
                return request
    raise KeyError(id)


def make_engine(
    scheduler: Scheduler | None = None,
    *,
    kvcache: KVCache | None = None,
    pages: int | Sequence[int] = 16,
    host_pages: int | Sequence[int] = 0,
    limits: Limits | None = None,
    cost: CostModel | None = None,
    horizon: Callable[[Batch, int], int] = lambda batch, steps: steps,
    checks: Literal["basic", "full"] = "basic",
    index: int = 0,
    predictor: Callable[[RequestView, float], int] | None = None,
    prefix: PrefixStore | None = None,
    shares: bool = False,
    model: ModelFacts = TOY_MODEL,
) -> Engine:
    """An engine of toy parts; an ``int`` of pages means that many in every pool."""
    kvcache = kvcache or ToyKV()
    layout = kvcache.layout(model)
    pools = len(layout.pools)
    device = (pages,) * pools if isinstance(pages, int) else tuple(pages)
    if prefix is not None:
        prefix.attach(layout)
    host = ((host_pages,) * pools if host_pages else ()) if isinstance(host_pages, int) else tuple(host_pages)
    return Engine(
        index=index,
        scheduler=scheduler or Fcfs(),
        scheduler_name="toy",
        kvcache=kvcache,
        kvcache_name="toykv",
        layout=layout,
        capacity=Capacity(device_pages=device, host_pages=host),
        limits=limits or toy_limits(),
        model=model,
        cost=cost or ToyCost(),
        horizon=horizon,
        checks=checks,
        predictor=predictor,
        prefix=prefix,
        prefix_name="toystore",
        shares=shares,
    )


class Rig:
    """Plays the driver: keeps what is in flight and lets a test say what happens next.

    Every method moves the clock by ``tick_ns``, hands one event to the engine and, unless ``auto`` is off,
    ``Schedule`` after it. ``records`` has everything emitted, ``flights`` the batches in flight per lane.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        truths: dict[str, Truth] | None = None,
        auto: bool = True,
        tick_ns: int = 1000,
    ) -> None:
        self.engine = engine
        self.truths: dict[str, Truth] = {} if truths is None else truths
        self.executor = ToyExecutor(self.truths)
        self.auto = auto
        self.tick_ns = tick_ns
        self.now_ns = 0
        self.records: list[Record] = []
        self.flights: dict[int, deque[Batch]] = {i: deque() for i in range(engine.limits.lanes)}
        self.transfers: dict[int, Transfer] = {}
        self.timers: list[int] = []
        self.interrupts: list[Interrupt] = []
        self.batches: list[Batch] = []
        """Every batch ever launched."""

    # ---------------------------------------------------------------- events

    def send(self, event: Event, *, at: int | None = None) -> list[Command]:
        """One event, and nothing else, at ``at`` (default: the next tick)."""
        self.now_ns = self.now_ns + self.tick_ns if at is None else at
        commands = self.engine.handle(event, self.now_ns)
        self._take(commands)
        return commands

    def schedule(self) -> list[Command]:
        """Let the engine plan, without moving the clock."""
        return self.send(Schedule(), at=self.now_ns)

    def _then(self) -> None:
        if self.auto:
            self.schedule()

    def arrive(self, id: str, prompt: int = 4, output: int = 3, *, cap: int = 100, **spec: Any) -> Request:
        """A request arrives; returns the engine's own record of it."""
        for k in range(spec.get("n", 1)):
            self.truths[sample_id(id, k)] = Truth(output)
        self.send(Arrive(RequestSpec(id=id, prompt_tokens=prompt, max_new_tokens=cap, **spec)))
        r = self.engine.requests.get(id)
        self._then()
        return r if r is not None else _GONE

    def finish(
        self,
        lane: int = 0,
        *,
        steps: int | None = None,
        outcomes: Sequence[Outcome] | None = None,
        more: bool = False,
    ) -> LaunchDone:
        """The oldest launch of a lane ends, after ``steps`` steps (default: all it may run).

        With ``more`` it has been cut short, and its next step is still running.
        """
        batch = self.flights[lane][0] if more else self.flights[lane].popleft()
        steps = batch.steps if steps is None else steps
        if outcomes is None:
            outcomes = self.executor.launch(batch, steps)
        start = self.now_ns
        ends = [start + self.tick_ns * (k + 1) for k in range(steps)]
        done = LaunchDone(lane, batch.launch, ends, outcomes, more)
        self.send(done, at=ends[-1])
        self._then()
        return done

    def finish_late(self, lane: int, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """A completion that the engine may no longer expect."""
        self.send(LaunchDone(lane, batch.launch, [self.now_ns + self.tick_ns], outcomes))
        self._then()

    def finish_transfer(self, id: int | None = None) -> None:
        """A transfer ends (default: the oldest)."""
        id = next(iter(self.transfers)) if id is None else id
        del self.transfers[id]
        self.send(TransferDone(id))
        self._then()

    def abort(self, id: str) -> None:
        self.send(Abort(id))
        self._then()

    def tick(self) -> None:
        self.send(Timer())
        self._then()

    def lose(self) -> None:
        self.send(InstanceLost("lost"))
        self._then()

    def drain(self, limit: int = 10_000) -> None:
        """End everything in flight, again and again, until nothing is."""
        for _ in range(limit):
            lanes = [lane for lane, flights in self.flights.items() if flights]
            if lanes:
                self.finish(lanes[0])
            elif self.transfers:
                self.finish_transfer()
            else:
                return
        raise AssertionError(f"still busy after {limit} events")

    def _take(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Emit):
                self.records.append(command.record)
            elif isinstance(command, Launch):
                self.flights[command.batch.lane].append(command.batch)
                self.batches.append(command.batch)
            elif isinstance(command, Interrupt):
                self.interrupts.append(command)
            elif isinstance(command, StartTransfer):
                self.transfers[command.transfer.id] = command.transfer
            elif isinstance(command, SetTimer):
                self.timers.append(command.at_ns)

    # --------------------------------------------------------------- reading

    def ends(self, id: str | None = None) -> list[RequestFinished]:
        """Terminal records, of one request or all."""
        return [x for x in self.records if isinstance(x, RequestFinished) and id in (None, x.request)]

    def request(self, id: str) -> Request:
        return self.engine.requests[id]

    def free(self, tier: str = "device") -> tuple[int, ...]:
        return self.engine.ledger.free(tier)


_GONE: Any = None


def step_by_step(records: Iterable[Record]) -> list[tuple[Any, ...]]:
    """What happened, with every held launch written out as single steps: equal however a run was held."""
    out: list[tuple[Any, ...]] = []
    for record in records:
        if isinstance(record, StepDone):
            steps, lane = len(record.ends_ns), record.lane
            start = record.start_ns
            for k, end in enumerate(record.ends_ns):
                tokens = tuple(record.tokens) if k == 0 else (1,) * len(record.tokens)
                emitted = tuple(n // steps for n in record.emitted)
                out.append(("step", lane, start, end, tuple(record.requests), tokens, emitted))
                start = end
        elif isinstance(record, RequestPreempted):
            out.append(("preempted", record.t_ns, record.request, record.mode, record.lost_tokens))
        elif isinstance(record, RequestFinished):
            out.append(
                ("finished", record.t_ns, record.request, record.outcome, record.reason, record.output_tokens)
            )
    return out


def raises_in(call: Callable[[], object]) -> ServeLabError:
    """The ServeLab error a call raises; fails if it raises none."""
    try:
        call()
    except ServeLabError as error:
        return error
    raise AssertionError("no error was raised")
