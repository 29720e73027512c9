"""Toy instances behind a router, run to their end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from servelab.core.cluster.cluster import Cluster
from servelab.core.engine.engine import Engine
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.families.kvcache import KVCache
from servelab.core.families.prefix import PrefixStore
from servelab.core.families.router import ClusterView, Dispatch, Moment, Route, Router
from servelab.core.records import (
    ActionDropped,
    Record,
    RequestArrived,
    RequestFinished,
    RequestMigrated,
    StepDone,
)
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth
from servelab.core.testing.fakes import Fcfs, ListWorkload, ToyCost, ToyExecutor, make_engine


class To:
    """A router that sends each request where a function says, or does what it answers."""

    def __init__(self, choose: Callable[[RequestSpec, ClusterView], int | Route]) -> None:
        self.choose = choose
        self.asked: list[tuple[str, Moment, int]] = []
        """(request, moment, time) of every question."""

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        self.asked.append((request.id, moment, view.now_ns))
        answer = self.choose(request, view)
        return Dispatch(prefill=answer) if isinstance(answer, int) else answer


class ClusterRun:
    """So many toy engines behind a router.

    Args:
        items: the traffic.
        router: the router.
        instances: how many there are.
        hold: steps a scheduler holds its plan for.
        report_ns: time between reports; 0: at once.
        costs: cost models; default: all alike.
        foresight: executors know when requests end, so that holds run in one launch.
        schedulers: one per instance, or what makes one, also for instances that are started later;
            default: first come first served.
        kvcaches: likewise; default: pages of 4 tokens.
        stores: prefix stores, likewise; default: none.
        cluster: settings of ``Cluster``.
        kwargs: of ``make_engine``.
    """

    def __init__(
        self,
        items: Iterable[Arrival | Cancel],
        router: Router,
        instances: int = 2,
        *,
        hold: int = 1,
        report_ns: int = 0,
        costs: Sequence[ToyCost] | None = None,
        foresight: bool = True,
        react: Any = None,
        schedulers: Sequence[Any] | Callable[[], Any] | None = None,
        kvcaches: Sequence[KVCache | None] | Callable[[], KVCache] | None = None,
        stores: Sequence[PrefixStore | None] | Callable[[], PrefixStore] | None = None,
        cluster: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.truths: dict[str, Truth] = {}
        self.records: list[Record] = []
        self.executors = [ToyExecutor(self.truths, foresight=foresight) for _ in range(instances)]
        costs = costs or [ToyCost() for _ in range(instances)]
        kwargs.setdefault("checks", "full")
        self._kwargs = kwargs
        self._makers: list[Any] = [x if callable(x) else None for x in (schedulers, kvcaches, stores)]
        schedulers = _each(schedulers or (lambda: Fcfs(hold=hold)), instances)
        kvcaches, stores = _each(kvcaches, instances), _each(stores, instances)
        self.engines = [
            make_engine(
                scheduler,
                index=i,
                horizon=executor.horizon,
                cost=cost,
                kvcache=kvcache,
                prefix=store,
                **kwargs,
            )
            for i, (scheduler, executor, cost, kvcache, store) in enumerate(
                zip(schedulers, self.executors, costs, kvcaches, stores, strict=True)
            )
        ]
        self.cluster = Cluster(
            router,
            "toy",
            self.engines,
            report_interval_ns=report_ns,
            model="toy",
            another=self._another,
            **{"network_bytes_per_s": 1e9, "network_latency_ns": 100, "start_ns": 5000, **(cluster or {})},
        )
        self.driver = VirtualDriver(
            engines=self.engines,
            executors=self.executors,
            costs=costs,
            workload=ListWorkload(items, react),
            truths=self.truths,
            emit=self._keep,
            cluster=self.cluster,
        )

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        if isinstance(record, RequestMigrated | ActionDropped):
            for engine in self.engines:
                engine.check_integrity()

    def _another(self, index: int) -> tuple[Engine, ToyExecutor, ToyCost]:
        executor, cost = ToyExecutor(self.truths), ToyCost()
        scheduler, kvcache, store = (make and make() for make in self._makers)
        engine = make_engine(
            scheduler or Fcfs(),
            index=index,
            horizon=executor.horizon,
            cost=cost,
            kvcache=kvcache,
            prefix=store,
            **self._kwargs,
        )
        self.engines.append(engine)
        self.executors.append(executor)
        return engine, executor, cost

    def go(self) -> ClusterRun:
        """Serve everything; one arrival and one end per request, no page lost."""
        self.driver.run()
        self.check()
        return self

    def check(self) -> None:
        arrived = Counter(x.request for x in self.records if isinstance(x, RequestArrived))
        ended = Counter(x.request for x in self.records if isinstance(x, RequestFinished))
        assert arrived == ended, "one arrival and one terminal record per request"
        assert not arrived or max(arrived.values()) == 1
        for engine in self.engines:
            engine.check_integrity()
            assert engine.ledger.free() == engine.ledger.total(), f"engine {engine.index} keeps pages"
            assert not engine.moving.stopped and not engine.moving.guests, (
                f"engine {engine.index} keeps moves"
            )
            assert None not in engine.programs, f"engine {engine.index} has a program without a name"
        assert not self.cluster.moves.live and not len(self.driver.links), "requests are still on their way"

    def of(self, kind: type[Record]) -> list[Any]:
        """Records of one type."""
        return [x for x in self.records if isinstance(x, kind)]

    def ends(self) -> dict[str, tuple[int, str, int]]:
        """By request: where it ended, how, and when."""
        return {x.request: (x.engine, x.outcome, x.t_ns) for x in self.of(RequestFinished)}

    def where(self) -> dict[str, int]:
        """By request, the engine it ended on."""
        return {name: end[0] for name, end in self.ends().items()}

    def steps(self) -> list[StepDone]:
        return self.of(StepDone)


def _each(given: Sequence[Any] | Callable[[], Any] | None, instances: int) -> Sequence[Any]:
    """One for each instance."""
    if given is None:
        return [None] * instances
    return [given() for _ in range(instances)] if callable(given) else given
