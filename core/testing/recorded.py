"""Logs of runs for observers: recorded from the real engine in small worlds, whole, cut short, mixed."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from heapq import merge
from random import Random
from typing import Any, Literal, cast

from servelab.core.families.router import (
    Action,
    ClusterView,
    Dispatch,
    Drain,
    Hold,
    Migrate,
    Moment,
    Route,
)
from servelab.core.families.scheduler import Scheduler, StepView
from servelab.core.plan import Pin, StepPlan
from servelab.core.records import (
    Planned,
    QualityBegan,
    QualityMeasured,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RunFinished,
    RunStarted,
    StepDone,
)
from servelab.core.request import Cancel, RequestSpec
from servelab.core.testing.cluster import ClusterRun
from servelab.core.testing.fakes import Fcfs, RandomPlans, arrival
from servelab.core.testing.worlds import World, serve, worlds

Status = Literal["ok", "interrupted", "failed"]


@dataclass(frozen=True)
class Log:
    """The records of one run, from the first to the last."""

    name: str
    records: tuple[Record, ...]


class Keeps(Fcfs):
    """Keeps the KV of every turn for the next one."""

    def on_turn_end(self, request: Any) -> Pin:
        return Pin(10**9, "for the next turn")


class Anything(RandomPlans):
    """Legal plans of every kind, without end."""

    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        if plan.wake_at is None:
            plan.wake_at = view.now_ns + 5000
        return plan


SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "fcfs": lambda: Fcfs(hold=64),
    "keeps": Keeps,
    "random": lambda: Anything(Random(3)),
}


def info(world: World) -> dict[str, Any]:
    """What a run says of itself in its first record, as far as observers are known to read it."""
    pools = [
        {"id": f"kv{i}", "pages": world.pages, "page_tokens": n, "bytes_per_page": 2 * n}
        for i, n in enumerate(world.page_tokens)
    ]
    return {
        "schema": 1,
        "seed": 0,
        "clock": "virtual",
        "model": "toy",
        "settings": {},
        "plugins": {},
        "stamps": [],
        "kv": {"addressing": "block_table", "pools": pools},
        "workload": {"requests": len(world.items)},
    }


def ended(
    records: Iterable[Record], status: Status = "ok", reason: str = "", *, about: dict[str, Any] | None = None
) -> tuple[Record, ...]:
    """Records between the first and the last of a run; live requests end as the drivers end them."""
    body = list(records)
    now = max((x.t_ns for x in body), default=0)
    live: dict[str, int] = {}
    for x in body:
        if isinstance(x, RequestArrived):
            live[x.request] = x.engine
        elif isinstance(x, RequestFinished):
            live.pop(x.request, None)
    for request, engine in live.items():
        body.append(
            RequestFinished(
                t_ns=now,
                engine=engine,
                request=request,
                outcome="unfinished",
                reason=reason or "the run is over",
                output_tokens=0,
            )
        )
    first = RunStarted(t_ns=0, info=about or {})
    return (first, *body, RunFinished(t_ns=now, status=status, reason=reason))


@cache
def recorded(world_name: str, scheduler: str = "fcfs", renamed: bool = False) -> tuple[Record, ...]:
    """What the engine emits in a world, tokens included."""
    world = _unordered(world_named(world_name))
    plugin = SCHEDULERS[scheduler]()
    served = serve(world.renamed() if renamed else world, scheduler=plugin, checks="basic")
    assert served.error is None, f"{world_name!r} ended early: {served.error}"
    return tuple(served.records)


def _unordered(world: World) -> World:
    """The same world with ids in reverse alphabetical order: who sorts a list of them changes it."""
    reverse = str.maketrans("0123456789", "9876543210")
    items = [
        replace(x, request_id=x.request_id.translate(reverse))
        if isinstance(x, Cancel)
        else replace(x, spec=replace(x.spec, id=x.spec.id.translate(reverse)))
        for x in world.items
    ]
    return replace(world, items=tuple(items))


@cache
def world_named(name: str) -> World:
    return next(world for world in worlds() if world.name == name)


def whole() -> tuple[Log, ...]:
    """Runs that came to their end. Together they have every sort of record. Each call gives copies."""
    return cast("tuple[Log, ...]", pickle.loads(_whole()))


def cut() -> tuple[Log, ...]:
    """Runs that were interrupted or failed, at every stage; also before anything happened. Copies, too."""
    return cast("tuple[Log, ...]", pickle.loads(_cut()))


@cache
def _whole() -> bytes:
    logs = [
        _log(name, scheduler)
        for name, scheduler in (
            ("one request", "fcfs"),
            ("little memory", "fcfs"),
            ("clients give up", "fcfs"),
            ("classes of service", "fcfs"),
            ("samples that share", "fcfs"),
            ("a pool with a window", "fcfs"),
            ("prefix store", "fcfs"),
            ("conversations", "keeps"),
            ("host tier", "random"),
        )
    ]
    return pickle.dumps((*logs, _two_engines(), _behind_a_router(), _with_quality(), _quality_alone()))


@cache
def _cut() -> bytes:
    logs = [
        Log("a run without requests", ended((), about=info(world_named("one request")))),
        Log("a run that failed at once", ended((), "failed", "the executor could not start")),
        Log("a run of which only the end was seen", (RunFinished(t_ns=0, status="failed", reason="x"),)),
    ]
    for name, status in (("little memory", "interrupted"), ("samples that share", "failed")):
        body = recorded(name)
        for n in (1, 2, 3, 5, len(body) // 2, len(body) - 1):
            records = ended(body[:n], status, "keyboard interrupt", about=info(world_named(name)))  # type: ignore[arg-type]
            logs.append(Log(f"{name!r}, {status} after {n} records", records))
    return pickle.dumps(tuple(logs))


def steps(requests: int) -> Iterator[Record]:
    """A run of so many requests, a few at a time, five records each, made as it is read."""
    yield RunStarted(t_ns=0, info={"workload": {"requests": requests}})
    for k in range(requests):
        now, id = 1000 * k, f"r{k}"
        yield RequestArrived(t_ns=now, request=id, prompt_tokens=4, max_new_tokens=9)
        yield RequestAdmitted(t_ns=now, request=id, resumed=False)
        yield Planned(
            t_ns=now,
            lane=0,
            step=k,
            requests=[id],
            tokens=[4],
            preempted=[],
            swapped_in=[],
            rejected=[],
            aborted=[],
            deferred=[],
            held=1,
        )
        yield StepDone(
            t_ns=now + 900,
            lane=0,
            step=k,
            start_ns=now,
            ends_ns=[now + 900],
            requests=[id],
            tokens=[4],
            emitted=[1],
            waiting=0,
            running=1,
            free_pages=(15,),
        )
        yield RequestFinished(t_ns=now + 900, request=id, outcome="completed", reason="stop", output_tokens=1)
    yield RunFinished(t_ns=1000 * requests, status="ok")


def _log(name: str, scheduler: str) -> Log:
    return Log(name, ended(recorded(name, scheduler), about=info(world_named(name))))


def _two_engines() -> Log:
    """Records of two instances in one log, in time order."""
    first = recorded("little memory")
    second = tuple(replace(x, engine=1) for x in recorded("clients give up", renamed=True))
    # within an engine the order is its own, which is not always that of time
    both = merge(_timed(first), _timed(second), key=lambda pair: pair[0])
    return Log("two instances", ended((x for _, x in both), about=info(world_named("little memory"))))


class _Busybody:
    """A router that keeps the first request for a while, moves it, moves nobody, and drains an instance."""

    def __init__(self) -> None:
        self._when = [6000, 8000, 9000]
        self._acts: list[Action] = [
            Migrate(request="r0", source=0, target=1, mode="blocking"),
            Migrate(request="nobody", source=0, target=1),
            Drain(1),
        ]

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        return Dispatch(prefill=0) if view.now_ns >= 2000 else Hold(2000)

    def rebalance(self, view: ClusterView) -> list[Action]:
        acts = []
        while self._when and self._when[0] <= view.now_ns:
            self._when.pop(0)
            acts.append(self._acts.pop(0))
        return acts

    def wake_at(self) -> int | None:
        return self._when[0] if self._when else None


def _behind_a_router() -> Log:
    run = ClusterRun([arrival("r0", 4, 20), arrival("r1", 6, 9, at=2500)], _Busybody()).go()
    return Log("behind a router", ended(run.records, about=info(world_named("one request"))))


def _timed(records: Iterable[Record]) -> Iterator[tuple[int, Record]]:
    now = 0
    for x in records:
        now = max(now, x.t_ns)
        yield now, x


def _quality(at_ns: int) -> Iterator[Record]:
    yield QualityBegan(t_ns=at_ns, labels=["w8", "w4"], total=200)
    for label, kl in (("w8", 0.001), ("w4", 0.05)):
        for windows in (1, 2):
            yield QualityMeasured(
                t_ns=at_ns,
                label=label,
                tokens=100 * windows,
                total=200,
                windows=windows,
                kl_mean=kl,
                kl_p99=10 * kl,
                kl_max=20 * kl,
                top1_agreement=1 - kl,
                perplexity=20 + kl,
                reference_perplexity=20.0,
                linear_bytes=1000,
                reference_linear_bytes=4000,
            )


def _with_quality() -> Log:
    body = recorded("one request")
    records = (*body, *_quality(max(x.t_ns for x in body)))
    return Log("a run whose quality is measured", ended(records, about=info(world_named("one request"))))


def _quality_alone() -> Log:
    return Log("quality without serving", ended(_quality(0)))
