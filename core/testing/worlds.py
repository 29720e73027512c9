"""Small worlds that plugins are run in: traffic, memory and limits, and the real engine on the virtual clock.

Every world can be served: each request fits alone, and the clock ends. Times are nanoseconds; a step of
the toy cost model takes about a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from servelab.core.engine.engine import Engine
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.facts import Limits
from servelab.core.families.kvcache import KVCache
from servelab.core.families.prefix import PrefixStore
from servelab.core.families.scheduler import Scheduler
from servelab.core.records import (
    Planned,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    TokensEmitted,
)
from servelab.core.request import SLO, Arrival, Cancel, Truth, sample_id
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    make_engine,
    toy_layout,
    toy_limits,
)
from servelab.core.testing.toy_store import ToyStore

LEAST_TOKENS, LEAST_REQUESTS = 16, 4
"""Limits per launch of the smallest worlds."""

Items = tuple[Arrival | Cancel, ...]


@dataclass(frozen=True, kw_only=True)
class World:
    """What a plugin is run in."""

    name: str
    items: Items
    limits: Limits = field(default_factory=lambda: toy_limits(model_len=64))
    page_tokens: tuple[int, ...] = (4,)
    """Per pool."""
    windows: tuple[int | None, ...] = ()
    pages: int = 64
    host_pages: int = 0
    reuse: bool = False
    """There is a prefix store."""
    shares: bool = False
    """Samples of one prompt share pages."""
    turns: int = 1
    """Each request is followed by so many minus one further turns of its program."""

    def with_lengths(self, other: int) -> World:
        """The same world for anybody who cannot see true lengths: each is drawn again."""
        rng = Random(other)
        items = [
            replace(x, truth=Truth(rng.randint(1, 2 * x.truth.output_tokens + 2)))
            if isinstance(x, Arrival) and x.truth is not None
            else x
            for x in self.items
        ]
        return replace(self, items=tuple(items))

    def renamed(self) -> World:
        """The same world with other request ids in the same alphabetical order: hashes of them differ."""
        items: list[Arrival | Cancel] = []
        for x in self.items:
            if isinstance(x, Cancel):
                items.append(replace(x, request_id=other_id(x.request_id)))
            else:
                program = x.spec.program and other_id(x.spec.program)
                items.append(replace(x, spec=replace(x.spec, id=other_id(x.spec.id), program=program)))
        return replace(self, items=tuple(items))


def other_id(id: str) -> str:
    """An id that sorts as the given one does."""
    return f"other-{id}"


@dataclass
class Served:
    """What became of a world."""

    world: World
    engine: Engine
    records: list[Record]
    error: Exception | None = None
    """What ended the run early."""

    def of(self, kind: type[Any]) -> list[Any]:
        """Records of one type."""
        return [x for x in self.records if isinstance(x, kind)]

    @property
    def arrived(self) -> list[str]:
        return [x.request for x in self.of(RequestArrived)]

    @property
    def admitted_ns(self) -> dict[str, int]:
        """When each request was first admitted."""
        return {x.request: x.t_ns for x in self.of(RequestAdmitted) if not x.resumed}

    @property
    def ends(self) -> dict[str, list[RequestFinished]]:
        """Terminal records by request."""
        out: dict[str, list[RequestFinished]] = {}
        for x in self.of(RequestFinished):
            out.setdefault(x.request, []).append(x)
        return out

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Output tokens by request."""
        out: dict[str, list[int]] = {}
        for x in self.of(TokensEmitted):
            out.setdefault(x.request, []).extend(x.tokens)
        return out

    def plan_log(self, before_ns: int | None = None) -> list[tuple[Any, ...]]:
        """Every decision, as comparable data."""
        return [
            (
                *(x.t_ns, x.lane, x.step, tuple(x.work), tuple(x.preempted), tuple(x.swapped_in)),
                *map(tuple, (x.rejected, x.aborted, x.deferred, x.unpinned)),
                *(x.held, x.wake_at),
            )
            for x in self.of(Planned)
            if before_ns is None or x.t_ns < before_ns
        ]


class Chat(ListWorkload):
    """Each request of a program that completes is followed by the next turn, which repeats it."""

    def __init__(self, items: Iterable[Arrival | Cancel], turns: int) -> None:
        super().__init__(items)
        self._last = {x.spec.id: x for x in self.items if isinstance(x, Arrival)}
        self._turns = turns

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        before = self._last.get(finished.request)
        if before is None or finished.outcome != "completed" or before.spec.is_last_turn:
            return ()
        spec, turn = before.spec, before.spec.turn + 1
        known = spec.prompt_tokens + finished.output_tokens
        follow = replace(
            spec,
            id=f"{spec.program}.{turn}",
            turn=turn,
            is_last_turn=turn == self._turns - 1,
            context_tokens=known - 1,
            prompt_tokens=known + 3,
        )
        item = Arrival(finished.t_ns + 3000, follow, before.truth)
        self._last[follow.id] = item
        return (item,)


def serve(
    world: World,
    *,
    scheduler: Scheduler | None = None,
    kvcache: KVCache | None = None,
    prefix: PrefixStore | None = None,
    truths: dict[str, Truth] | None = None,
    cost: Any = None,
    executor: Any = None,
    foresight: bool = True,
    checks: Any = "full",
    emit: Callable[[Record], None] = lambda record: None,
    started: Callable[[Engine], object] = lambda engine: None,
) -> Served:
    """Run a world to its end, or to the error that ends it, which is kept.

    Args:
        world: what happens.
        scheduler, kvcache, prefix, cost, executor: parts to use instead of toy ones.
        truths: filled with true lengths of live requests, for parts that may read them.
        foresight: the toy executor runs held steps in one launch.
        checks: as ``engine.checks``.
        emit: takes every record too.
        started: given the engine before anything happens.
    """
    truths = {} if truths is None else truths
    executor = executor or ToyExecutor(truths, foresight=foresight)
    cost = cost or ToyCost(context_ns=1)
    if prefix is None and world.reuse:
        prefix = ToyStore()
    engine = make_engine(
        scheduler or Fcfs(hold=64),
        kvcache=kvcache or ToyKV(toy_layout(*world.page_tokens, windows=world.windows)),
        pages=world.pages,
        host_pages=world.host_pages,
        limits=world.limits,
        cost=cost,
        horizon=executor.horizon,
        checks=checks,
        prefix=prefix,
        shares=world.shares,
    )
    engine.token_log = True
    started(engine)
    records: list[Record] = []
    served = Served(world, engine, records)

    def take(record: Record) -> None:
        records.append(record)
        emit(record)

    driver = VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=Chat(world.items, world.turns),
        truths=truths,
        emit=take,
    )
    try:
        driver.run()
    except Exception as exc:
        served.error = exc
    return served


def expected_output(world: World) -> Mapping[str, int]:
    """Output tokens of each request of ``items`` that completes."""
    longest, out = world.limits.max_model_len, {}
    for x in world.items:
        if isinstance(x, Arrival) and x.truth is not None:
            room = min(x.spec.max_new_tokens, longest - x.spec.prompt_tokens)
            for k in range(x.spec.n):
                out[sample_id(x.spec.id, k)] = min(x.truth.of(k).output_tokens, room)
    return out


# ------------------------------------------------------------------ traffic


def traffic(
    seed: int,
    n: int,
    *,
    prompt: int = 24,
    output: int = 20,
    gaps: Sequence[int] = (0, 1, 700, 4000),
    more: Callable[[int, Random], dict[str, Any]] = lambda k, rng: {},
) -> Items:
    """Requests with lengths up to the given ones and caps unrelated to true lengths."""
    rng, now, items = Random(seed), 0, []
    for k in range(n):
        now += rng.choice(gaps)
        cap = rng.choice([2 * output, 2 * output, rng.randint(1, output)])
        items.append(
            arrival(
                f"r{k:03}", rng.randint(1, prompt), rng.randint(1, output), cap=cap, at=now, **more(k, rng)
            )
        )
    return tuple(items)


def _cancelled(items: Items, seed: int) -> Items:
    """Some clients give up, some at once, some after the end."""
    rng, out = Random(seed), list(items)
    for x in items:
        if isinstance(x, Arrival) and rng.randrange(3) == 0:
            out.append(Cancel(x.time_ns + rng.choice([0, 500, 3000, 9000, 10**6]), x.spec.id))
    return tuple(sorted(out, key=lambda x: x.time_ns))


def _service(k: int, rng: Random) -> dict[str, Any]:
    kind = rng.choice(["online", "offline", "latency", "deadline"])
    slo = SLO(ttft_ns=rng.choice([2000, 50_000]), tpot_ns=3000) if rng.randrange(2) else None
    return {"request_class": kind, "priority": rng.randrange(-1, 3), "slo": slo, "tenant": f"t{k % 3}"}


def _unlike(items: Items, seed: int) -> Items:
    """Samples of one prompt have lengths of their own; some are one token long."""
    rng = Random(seed)
    return tuple(
        replace(x, truth=replace(x.truth, further=tuple(rng.choice([1, 6, 18]) for _ in range(x.spec.n - 1))))
        if isinstance(x, Arrival) and x.truth is not None
        else x
        for x in items
    )


def stem(k: int, tokens: int) -> list[int]:
    """Token ids that begin as those of other texts of the same ``k % 3`` do."""
    return [*[k % 3 + 1] * 9, *range(20 + k, 20 + k + tokens)][:tokens]


def _with_ids(items: Items) -> Items:
    return tuple(
        replace(x, spec=replace(x.spec, prompt_ids=stem(k, x.spec.prompt_tokens)))
        if isinstance(x, Arrival)
        else x
        for k, x in enumerate(items)
    )


def worlds(seed: int = 0) -> list[World]:
    """The worlds of the suites, the plainest first, so that the first failure is the easiest to read."""
    small = toy_limits(tokens=LEAST_TOKENS, requests=LEAST_REQUESTS, model_len=64)
    normal = toy_limits(model_len=64)
    samples = _unlike(traffic(seed + 7, 9, more=lambda k, rng: {"n": rng.choice([1, 2, 3, 3])}), seed)
    programs = traffic(
        seed + 9, 4, prompt=8, output=5, more=lambda k, rng: {"program": f"p{k}", "is_last_turn": False}
    )
    return [
        World(name="one request", items=(arrival("r000", 5, 4),), limits=normal),
        World(
            name="one request that fills memory", items=(arrival("r000", 40, 24),), limits=normal, pages=16
        ),
        World(name="plenty of memory", items=traffic(seed + 1, 12), limits=normal, pages=256),
        World(name="trickle", items=traffic(seed + 2, 6, gaps=(60_000,)), limits=normal),
        World(name="little memory", items=traffic(seed + 3, 14), limits=normal, pages=17),
        World(name="small batches", items=traffic(seed + 4, 14, prompt=40), limits=small, pages=40),
        World(name="burst", items=traffic(seed + 5, 24, gaps=(0,)), limits=small, pages=20),
        World(
            name="burst of long prompts",
            items=traffic(seed + 15, 12, prompt=40, gaps=(0,)),
            limits=normal,
            pages=100,
        ),
        World(
            name="clients give up",
            items=_cancelled(traffic(seed + 6, 14), seed),
            limits=normal,
            pages=24,
        ),
        World(name="classes of service", items=traffic(seed + 8, 14, more=_service), limits=normal, pages=24),
        World(name="samples that share", items=samples, limits=normal, pages=48, shares=True),
        World(name="samples that cannot share", items=samples, limits=normal, pages=48),
        World(name="two pools", items=traffic(seed + 10, 12), limits=normal, page_tokens=(4, 8), pages=18),
        World(
            name="a pool with a window",
            items=traffic(seed + 11, 12),
            limits=toy_limits(tokens=LEAST_TOKENS, model_len=64),
            page_tokens=(4, 4),
            windows=(None, 8),
            pages=20,
        ),
        World(
            name="prefix store",
            items=_with_ids(traffic(seed + 12, 16)),
            limits=normal,
            pages=24,
            reuse=True,
        ),
        World(name="host tier", items=traffic(seed + 13, 14), limits=normal, pages=17, host_pages=40),
        World(name="conversations", items=programs, limits=normal, pages=24, host_pages=24, turns=3),
        World(
            name="adjacent pages of one token",
            items=traffic(seed + 14, 12),
            limits=normal,
            page_tokens=(1,),
            pages=70,
        ),
    ]


def long_answer(seed: int = 0) -> World:
    """One request decodes for long while others come, and there is room for all."""
    first = arrival("a", 8, 200, cap=240)
    rest = traffic(seed + 21, 6, gaps=(9000,))
    return World(name="long answer", items=(first, *rest), limits=toy_limits(), pages=256)


def stream(seed: int = 0, n: int = 100) -> World:
    """More requests than can be served at once, for a long time: whoever is passed over stays so."""
    items = traffic(seed + 20, n, prompt=20, output=10, gaps=(300, 900))
    return World(name="stream", items=items, limits=toy_limits(requests=4, model_len=64), pages=18)
