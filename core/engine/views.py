"""What a scheduler sees: live, read-only windows on the engine. No copies are made per step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from servelab.core.engine.contexts import Context, Contexts
from servelab.core.engine.lane import position
from servelab.core.engine.ledger import Ledger
from servelab.core.engine.pages import place
from servelab.core.engine.state import Lease, Request
from servelab.core.errors import CapabilityError, ViewError
from servelab.core.events import Batch
from servelab.core.facts import HardwareFacts, Limits, ModelFacts
from servelab.core.plan import Tokens
from servelab.core.request import VIEW_FIELDS, Phase, RequestView

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine
    from servelab.core.engine.reuse import Reuse


_seen = attrgetter("seen")


class Queue:
    """Ordered requests of one phase; reads the engine's own mapping."""

    __slots__ = ("_requests",)

    def __init__(self, requests: Mapping[str, Request]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[RequestView]:
        return map(_seen, self._requests.values())

    def __reversed__(self) -> Iterator[RequestView]:
        return map(_seen, reversed(self._requests.values()))  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._requests)

    def first(self) -> RequestView | None:
        for r in islice(self._requests.values(), 1):
            return r.seen
        return None


class LaneQueue(Queue):
    """As ``Queue``, without requests in flight on another lane."""

    __slots__ = ("_step",)

    def __init__(self, requests: Mapping[str, Request], step: StepView) -> None:
        super().__init__(requests)
        self._step = step

    def _mine(self, requests: Iterator[Request]) -> Iterator[RequestView]:
        lane = self._step.lane
        return (r.seen for r in requests if not r.launches or r.lane == lane)

    def __iter__(self) -> Iterator[RequestView]:
        return self._mine(iter(self._requests.values()))

    def __reversed__(self) -> Iterator[RequestView]:
        return self._mine(reversed(self._requests.values()))  # type: ignore[call-overload]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def first(self) -> RequestView | None:
        return next(iter(self), None)


class ProbedQueue(Queue):
    """A queue whose requests show what the prefix store has for them; looked up when they are asked for."""

    __slots__ = ("_inner", "_reuse")

    def __init__(self, inner: Queue, reuse: Reuse) -> None:
        super().__init__(inner._requests)
        self._inner = inner
        self._reuse = reuse

    def _probed(self, view: RequestView) -> RequestView:
        self._reuse.probe(view._r)
        return view

    def __iter__(self) -> Iterator[RequestView]:
        return map(self._probed, self._inner)

    def __reversed__(self) -> Iterator[RequestView]:
        return map(self._probed, reversed(self._inner))

    def __len__(self) -> int:
        return len(self._inner)

    def first(self) -> RequestView | None:
        view = self._inner.first()
        return None if view is None else self._probed(view)


_OUTSIDE = (Phase.WAITING, Phase.SWAPPED)
"""Phases of requests that running a token admits."""


class KVBudget:
    """Scratch account of free pages; see ``families/scheduler.py``."""

    __slots__ = ("_busy", "_given", "_hits", "_keep", "_ledger", "_left", "_scratches", "_withdraw")

    def __init__(self, ledger: Ledger, busy: bool) -> None:
        self._ledger = ledger
        self._left = list(ledger.free())
        self._withdraw = ledger.withdrawing()
        self._keep = ledger.kept_free
        self._scratches = ledger.scratches()
        self._busy = busy
        """Somebody runs: the watermark holds. Else nothing would ever free the pages it waits for."""
        self._given: list[Lease] = []
        self._hits: list[Lease] = []
        """Requests taken that reuse pages of the prefix store: giving these back does not free them."""

    def take(self, request: RequestView, n: int) -> bool:
        r = request._r
        if n <= r.slack:
            return True
        left, need = self._left, self._ledger.missing(r, n)
        if r.lease.hit is not None and self._given:
            both = self._ledger.releasable(self._given), self._ledger.releasable(self._given, [r.lease])
            need = [pages + all_ - rest for pages, all_, rest in zip(need, *both, strict=True)]
        keep = self._keep if self._busy and r.phase in _OUTSIDE else None
        for i, pages in enumerate(need):
            if pages > (left[i] if keep is None else left[i] - keep[i]):
                return False
        if self._scratches is not None and not place(self._scratches, need, r.lease.tables):
            return False
        for i, pages in enumerate(need):
            left[i] -= pages
        self._busy = True
        if r.lease.hit is not None:
            self._hits.append(r.lease)
        return True

    def take_decodes(self, requests: Sequence[RequestView]) -> list[Tokens]:
        taken = []
        for request in requests:
            r = request._r
            if r.pending != 1 or not (r.slack or self.take(request, 1)):
                break
            taken.append(r.one)
        return taken

    def give_back(self, request: RequestView) -> None:
        lease = request._r.lease
        if self._scratches is not None and not lease.in_flight:
            for scratch, table in zip(self._scratches, lease.tables, strict=True):
                scratch.give_back(table)
        self._given.append(lease)
        for i, pages in enumerate(self._ledger.releasable([lease], self._hits)):
            gone = min(pages, self._withdraw[i])
            self._withdraw[i] -= gone
            self._left[i] += pages - gone

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(self._left)


class KVView:
    """KV memory; see ``families/scheduler.py``."""

    __slots__ = ("_contexts", "_ledger", "_running")

    def __init__(self, ledger: Ledger, contexts: Contexts, running: Mapping[str, Request]) -> None:
        self._ledger = ledger
        self._contexts = contexts
        self._running = running

    @property
    def free_pages(self) -> tuple[int, ...]:
        return self._ledger.free()

    @property
    def total_pages(self) -> tuple[int, ...]:
        return self._ledger.total()

    @property
    def free_host_pages(self) -> tuple[int, ...]:
        return self._ledger.free("host")

    @property
    def total_host_pages(self) -> tuple[int, ...]:
        return self._ledger.total("host")

    @property
    def page_tokens(self) -> tuple[int, ...]:
        return tuple(p.page_tokens for p in self._ledger.pools)

    @property
    def window_tokens(self) -> tuple[int | None, ...]:
        return tuple(p.window_tokens for p in self._ledger.pools)

    @property
    def watermark_pages(self) -> tuple[int, ...]:
        return self._ledger.watermark

    @property
    def pinned_pages(self) -> tuple[int, ...]:
        kept = [c.pages for c in self._contexts.kept.values() if c.tier == "device"]
        return tuple(map(sum, zip(*kept, strict=True))) if kept else (0,) * len(self._ledger.pools)

    def pages_needed(self, request: RequestView, n: int) -> tuple[int, ...]:
        return tuple(self._ledger.missing(request._r, n))

    def budget(self) -> KVBudget:
        return KVBudget(self._ledger, bool(self._running))


class CostView:
    """What-if prices; see ``families/scheduler.py``."""

    __slots__ = ("_engine",)

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def step_ns(self, work: list[Tokens]) -> int:
        layers = self._engine.model.layers
        at = [position(item, item.request._r, layers) for item in work]
        return self._price(
            [item.request._r for item in work],
            [item.n for item in work],
            [start for start, _ in at],
            [sample for _, sample in at],
            {i: item for i, item in enumerate(work) if not item.plain},
        )

    def recompute_ns(self, request: RequestView) -> int:
        r = request._r
        return self._price([r], [max(r.computed, 1)], [0], [False], {})

    def swap_ns(self, request: RequestView) -> int:
        return self._engine.price_swap(request._r)

    def _price(
        self,
        requests: list[Request],
        tokens: list[int],
        starts: list[int],
        samples: list[bool],
        extras: dict[int, Tokens],
    ) -> int:
        leases = [r.lease for r in requests]
        batch = Batch(0, -1, self._engine.step, 1, requests, leases, tokens, starts, samples, extras)
        return self._engine.cost.price(batch, 1)[0]


class ProgramView:
    """A program's public facts; see ``families/scheduler.py``."""

    __slots__ = ("arrival_ns", "id", "live", "turns")

    def __init__(self, id: str, arrival_ns: int) -> None:
        self.id = id
        self.arrival_ns = arrival_ns
        self.turns = 0
        self.live = 0


class StepView:
    """One per engine, reused for every plan; see ``families/scheduler.py``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.lane = 0
        many = engine.limits.lanes > 1
        queues = [LaneQueue(q, self) if many else Queue(q) for q in engine.queues]
        self.waiting, self.running, self.paused, self.swapped = queues
        if engine.reuse is not None:
            self.waiting = ProbedQueue(self.waiting, engine.reuse)
        self.kv = KVView(engine.ledger, engine.contexts, engine.running)
        self.contexts: Mapping[str, Context] = MappingProxyType(engine.contexts.kept)
        self.cost = CostView(engine)

    @property
    def now_ns(self) -> int:
        return self._engine.now_ns

    @property
    def step(self) -> int:
        return self._engine.step

    @property
    def forking(self) -> int:
        return self._engine.samples.forking

    @property
    def limits(self) -> Limits:
        return self._engine.limits

    @property
    def model(self) -> ModelFacts:
        return self._engine.model

    @property
    def hardware(self) -> HardwareFacts | None:
        return self._engine.hardware

    def predict(self, request: RequestView, quantile: float) -> int:
        predictor = self._engine.predictor
        if predictor is None:
            raise CapabilityError(
                "no length predictor in this run",
                where=f"StepView.predict for request {request.id}",
                why="true lengths are hidden from policies",
                do="select a predictor, or learn lengths from RequestFinished records in on_event",
            )
        return predictor(request, quantile)

    def program(self, id: str) -> ProgramView:
        try:
            return self._engine.programs[id]
        except KeyError:
            raise ViewError(
                f"program {id!r} is not known", why="no live request belongs to it", where="StepView.program"
            ) from None


class Expiring:
    """With ``checks=full``: a step view, or a part of one, that fails outside the call it was given to."""

    __slots__ = ("_engine", "_epoch", "_inner")

    def __init__(self, inner: Any, engine: Engine) -> None:
        self._inner = inner
        self._engine = engine
        self._epoch = engine.epoch

    def _alive(self) -> Any:
        if self._engine.epoch != self._epoch:
            raise ViewError(
                f"a {type(self._inner).__name__} was read outside the call it was given to",
                where=f"scheduler {self._engine.scheduler_name!r}",
                why=f"it belongs to call {self._epoch}, the engine is at {self._engine.epoch}",
                do="use the view of the current call, and keep copies of what must be remembered",
            )
        return self._inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._alive(), name)
        return Expiring(value, self._engine) if isinstance(value, _PARTS) else value

    def __bool__(self) -> bool:
        return bool(self._alive())

    def __iter__(self) -> Iterator[Any]:
        yield from self._alive()

    def __reversed__(self) -> Iterator[Any]:
        yield from reversed(self._alive())

    def __len__(self) -> int:
        return len(self._alive())

    def __getitem__(self, key: Any) -> Any:
        return self._alive()[key]

    def __contains__(self, key: object) -> bool:
        return key in self._alive()


_PARTS = (Queue, KVView, CostView, MappingProxyType)


class CheckedRequestView(RequestView):
    """With ``checks=full``: every read fails outside the call the view was given to."""

    __slots__ = ("_engine", "_epoch")

    if TYPE_CHECKING:
        _engine: Engine
        _epoch: int

    def __init__(self, request: Request, engine: Engine) -> None:
        super().__init__(request)
        object.__setattr__(self, "_engine", engine)
        object.__setattr__(self, "_epoch", engine.epoch)

    def _check(self, name: str) -> None:
        if self._engine.epoch != self._epoch:
            raise ViewError(
                f"a request view was read ({name}) outside the call it was given to",
                where=f"scheduler {self._engine.scheduler_name!r}, request {self._r.id}",
                why=f"it belongs to call {self._epoch}, the engine is at {self._engine.epoch}",
                do="keep request.id or request.freeze(), and look the request up in the next view",
            )


def _checked(name: str, inner: property) -> property:
    assert inner.fget is not None
    read = inner.fget

    def get(self: CheckedRequestView) -> Any:
        if name != "id":  # an id may always be read: it is how a stale view is replaced
            self._check(name)
        return read(self)

    return property(get, doc=inner.__doc__)


for _name in VIEW_FIELDS:
    setattr(CheckedRequestView, _name, _checked(_name, vars(RequestView)[_name]))


def renew_view(engine: Engine, r: Request) -> None:
    """Give a request a view of the current epoch (``checks=full``)."""
    r.seen = CheckedRequestView(r, engine)
    r.one = Tokens(r.seen, 1)


def renew_views(engine: Engine) -> None:
    """Give every request a view of the current epoch (``checks=full``; linear in live requests)."""
    for r in engine.requests.values():
        if r.phase is not Phase.FINISHED:
            renew_view(engine, r)
