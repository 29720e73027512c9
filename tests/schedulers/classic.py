"""Runs of the classic schedulers on toy parts, by hand or over random traces with every plan looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from servelab.core.context import Context, seeded
from servelab.core.engine.engine import Engine
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.events import Arrive
from servelab.core.facts import Limits, ModelFacts
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import Planned, Record, RequestFinished, RequestPreempted, StepDone
from servelab.core.registry import Registry
from servelab.core.request import Arrival, RequestSpec, RequestView, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    ListWorkload,
    Rig,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    make_engine,
    toy_layout,
)
from servelab.core.testing.worlds import World, expected_output

REGISTRY = Registry.load()
PAGE = 4
"""Tokens of a page."""
CLASSICS = ("vllm_v0", "sarathi", "orca", "static_batch", "splitfuse")


def build(name: str, limits: Limits, model: ModelFacts = TOY_MODEL, **settings: Any) -> Any:
    """A registered scheduler; budgets that its settings have and that are not given are the device's."""
    config = REGISTRY.resolve("scheduler", name, "config")
    budgets = {
        "max_num_batched_tokens": limits.max_batch_tokens,
        "chunk_size": limits.max_batch_tokens,
        "max_num_seqs": min(limits.max_batch_requests, limits.max_batch_tokens),
        "max_ragged_batch_size": limits.max_batch_tokens,
        "max_ragged_sequence_count": min(limits.max_batch_requests, limits.max_batch_tokens),
    }
    given = {key: value for key, value in budgets.items() if key in config.model_fields} | settings
    ctx = Context(
        kind="scheduler",
        name=name,
        rng=seeded(0, "scheduler", name),
        model=model,
        hardware=None,
        limits=limits,
    )
    return REGISTRY.resolve("scheduler", name, "factory")(config(**given), ctx)


def rig_of(
    name: str, limits: Limits, pages: int, *, host_pages: int = 0, shares: bool = False, **settings: Any
) -> Rig:
    """By hand; holds are off unless asked for, so that every step is planned."""
    settings.setdefault("hold_steps", 1)
    scheduler = build(name, limits, **settings)
    return Rig(make_engine(scheduler, pages=pages, host_pages=host_pages, limits=limits, shares=shares))


def together(rig: Rig, **prompts: Any) -> None:
    """Requests that arrive before anything is planned: prompt tokens by id, or (prompt, output, cap)."""
    for id, given in prompts.items():
        prompt, output, cap = given if isinstance(given, tuple) else (given, 20, 50)
        rig.truths[id] = Truth(output)
        rig.send(Arrive(RequestSpec(id=id, prompt_tokens=prompt, max_new_tokens=cap)))
    rig.schedule()


def ran(rig: Rig) -> dict[str, int]:
    """Tokens by request of the launch in flight, or of the last one."""
    batch = rig.batches[-1]
    return {r.id: n for r, n in zip(batch.requests, batch.tokens, strict=True)}


def deferred(rig: Rig) -> dict[str, str]:
    """Who the last plan passed over, and why."""
    last = [x for x in rig.records if isinstance(x, Planned)][-1]
    return dict(last.deferred)


def trace(rng: Random, n: int, *, prompt: int = 40, output: int = 25, samples: bool = False) -> list[Arrival]:
    """Requests with caps that are sometimes below, mostly above their true lengths."""
    now, items = 0, []
    for k in range(n):
        now += rng.choice([1, 1, 300, 2500])
        cap = rng.randint(1, 2 * output)
        n_samples = rng.choice([1, 1, 2, 3]) if samples else 1
        items.append(
            arrival(f"r{k:03}", rng.randint(1, prompt), rng.randint(1, output), cap=cap, at=now, n=n_samples)
        )
    return items


Check = Callable[["Seen"], None]


@dataclass
class Seen:
    """A plan and what the view showed before it was made."""

    view: StepView
    policy: Any
    engine: Engine
    running: list[str]
    by_age: list[str]
    waiting: list[str]
    swapped: list[str]
    pending: dict[str, int]
    ran_before: list[bool]
    decoding: list[str]
    free: tuple[int, ...]
    plan: StepPlan = field(default_factory=StepPlan)

    @property
    def items(self) -> dict[str, int]:
        return {item.request.id: item.n for item in self.plan.work if isinstance(item, Tokens)}

    @property
    def victims(self) -> list[str]:
        return [p.request.id for p in self.plan.preemptions]

    @property
    def new(self) -> list[str]:
        return [id for id in self.items if id not in self.running]

    @property
    def prompts(self) -> list[str]:
        """Who runs tokens of a prompt."""
        return [id for id in self.items if id not in self.decoding]


class Watched:
    """Looks at every plan. ``tally`` counts what happened, so that a test can ask for it."""

    def __init__(self, inner: Any, checks: list[Check]) -> None:
        self.inner, self.checks = inner, checks
        self.engine: Any = None
        self.tally: dict[str, int] = {}
        if hasattr(inner, "on_event"):
            self.on_event = inner.on_event

    def plan(self, view: StepView) -> StepPlan:
        running, waiting = list(view.running), list(view.waiting)
        age = sorted(running, key=_arrival)
        seen = Seen(
            view,
            self.inner,
            self.engine,
            [r.id for r in running],
            [r.id for r in age],
            [r.id for r in waiting],
            [r.id for r in sorted(view.swapped, key=_arrival)],
            {r.id: r.pending_tokens for r in [*running, *waiting]},
            [r.admitted_ns is not None for r in waiting],
            [r.id for r in running if r.pending_tokens == 1 and r.generated_tokens],
            view.kv.free_pages,
        )
        seen.plan = self.inner.plan(view)
        assert not set(seen.victims) & set(seen.items)
        for what, count in (
            ("plans", 1),
            ("preempted", bool(seen.victims)),
            ("swapped in", len(seen.plan.swap_ins)),
            ("mixed", bool(seen.prompts) and bool(set(seen.items) & set(seen.decoding))),
            ("cut", sum(n < seen.pending[id] for id, n in seen.items.items())),
            ("held", seen.plan.hold is not None),
            ("rejected", len(seen.plan.rejections)),
        ):
            self.tally[what] = self.tally.get(what, 0) + count
        conserved(seen)
        for check in self.checks:
            check(seen)
        return seen.plan


def _arrival(request: RequestView) -> int:
    return request.arrival_ns


def conserved(seen: Seen) -> None:
    """Every page is free or held, on both tiers."""
    ledger = seen.engine.ledger
    for tier, tables in (("device", "tables"), ("host", "host_tables")):
        held = {page for lease in ledger._leases.values() for page in getattr(lease, tables)[0]}
        assert ledger.free(tier)[0] + len(held) == ledger.total(tier)[0]


@dataclass
class Served:
    watched: Watched
    records: list[Record]
    outputs: dict[str, list[int]]
    items: list[Arrival]

    def of(self, kind: type[Any]) -> list[Any]:
        return [x for x in self.records if isinstance(x, kind)]

    @property
    def tally(self) -> dict[str, int]:
        return self.watched.tally

    @property
    def steps(self) -> int:
        return sum(len(x.ends_ns) for x in self.of(StepDone))

    def preemptions(self, mode: str) -> int:
        return sum(x.mode == mode for x in self.of(RequestPreempted))


def serve(
    name: str,
    items: list[Arrival],
    *,
    pages: int,
    limits: Limits,
    checks: tuple[Check, ...] = (),
    host_pages: int = 0,
    page_tokens: int = PAGE,
    windows: tuple[int | None, ...] = (),
    shares: bool = False,
    transfer_ns: int = 500,
    **settings: Any,
) -> Served:
    """A trace to its end; everybody got all of their tokens, in order, unless rejected."""
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths)
    cost = ToyCost(step_ns=100, token_ns=5, context_ns=1, transfer_ns=transfer_ns)
    watched = Watched(build(name, limits, **settings), list(checks))
    sizes = (page_tokens,) * max(1, len(windows))
    engine = make_engine(
        watched,
        kvcache=ToyKV(toy_layout(*sizes, windows=windows)),
        pages=pages,
        host_pages=host_pages,
        limits=limits,
        cost=cost,
        horizon=executor.horizon,
        shares=shares,
    )
    watched.engine = engine
    engine.token_log = True
    records: list[Record] = []
    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    engine.check_integrity()
    assert engine.ledger.free() == engine.ledger.total()
    assert engine.ledger.free("host") == engine.ledger.total("host")
    outputs: dict[str, list[int]] = {}
    for x in records:
        if x.ev == "tokens":
            outputs.setdefault(x.request, []).extend(x.tokens)  # type: ignore[attr-defined]
    expected = expected_output(World(name="trace", items=tuple(items), limits=limits))
    ends = {x.request: x for x in records if isinstance(x, RequestFinished)}
    assert ends.keys() == expected.keys()
    for id, end in ends.items():
        if end.outcome == "completed":
            got = [token % 1000 for token in outputs[id]]
            assert got == list(range(expected[id])), id
        else:
            assert end.outcome == "rejected" and end.reason
    return Served(watched, records, outputs, items)


# ---------------------------------------------------------------- what several of them share


def first_come_first_served(seen: Seen) -> None:
    refused = [verdict.request.id for verdict in seen.plan.rejections]
    queue = [id for id in seen.waiting if id not in refused]
    assert seen.new == queue[: len(seen.new)], "nobody overtakes the head"


def preempted_first(seen: Seen) -> None:
    assert seen.ran_before == sorted(seen.ran_before, reverse=True), "a preempted request goes first"


def youngest_first(seen: Seen) -> None:
    assert seen.victims == seen.by_age[::-1][: len(seen.victims)], "victims are the youngest, youngest first"


def none_in_who_preempts(seen: Seen) -> None:
    assert not (seen.victims and seen.new), "nobody is admitted in a step that preempted"


def seats(seen: Seen) -> None:
    most = seen.policy.config.max_num_seqs
    # a preempted sample does not count; more samples than seats are let in only alone
    assert not seen.new or len(seen.running) + len(seen.new) <= most or not seen.running
