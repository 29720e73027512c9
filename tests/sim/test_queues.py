"""The simulator against queues whose waiting times are known: M/M/1, M/D/1, M/M/n.

A request is a customer, ``max_num_seqs`` is the number of servers, every step takes the same time whatever
runs in it, and a request's output length is its service time in steps. Nothing else of the engine is switched
off. Mean waits converge slowly, so they are estimated with common random numbers: what the simulator's
customers wait longer than the same customers in a recursion of three lines, which hardly varies, plus the
recursion's mean over very many others, which costs little.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from math import factorial, log, sqrt
from random import Random
from statistics import fmean, stdev
from typing import Any, NamedTuple

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.hookspecs import hookimpl
from servelab.core.records import Record, RequestArrived, RequestFinished
from servelab.core.registry import Registry
from servelab.core.request import Arrival, RequestSpec, Truth
from servelab.core.spec import PluginSpec

STEP_NS = 1_000_000
MEAN_STEPS = 1000
"""Of a service: a step, within which nobody can begin, is a thousandth of it."""


class Queue(NamedTuple):
    """Kendall's M/G/n: Poisson arrivals at ``load * servers`` per mean service."""

    servers: int
    load: float
    constant: bool = False

    def __str__(self) -> str:
        return f"M/{'D' if self.constant else 'M'}/{self.servers} at {self.load}"

    def wait(self) -> float:
        """Mean time in the queue, in mean services: Pollaczek-Khinchine for one server, Erlang C for more."""
        if self.servers == 1:
            squared_variation = 0.0 if self.constant else 1.0
            return self.load * (1 + squared_variation) / (2 * (1 - self.load))
        offered = self.servers * self.load
        full = offered**self.servers / factorial(self.servers) / (1 - self.load)
        busy = full / (sum(offered**k / factorial(k) for k in range(self.servers)) + full)
        return busy / (self.servers * (1 - self.load))


class Customers(NamedTuple):
    arrivals_ns: list[int]
    steps: list[int]


def customers(queue: Queue, count: int, seed: int) -> Customers:
    rng = Random(seed)
    gap = MEAN_STEPS * STEP_NS / (queue.load * queue.servers)
    now, arrivals, steps = 0.0, [], []
    for _ in range(count):
        now += -log(1 - rng.random()) * gap
        arrivals.append(round(now))
        drawn = 1.0 if queue.constant else -log(1 - rng.random())
        steps.append(max(1, round(drawn * MEAN_STEPS)))
    return Customers(arrivals, steps)


def waits_by_recursion(of: Customers, servers: int) -> list[int]:
    """First come, first served: each begins when it is there and a server is free."""
    free, waits = [0] * servers, []
    heapify(free)
    for arrival, steps in zip(of.arrivals_ns, of.steps, strict=True):
        begins = max(arrival, free[0])
        waits.append(begins - arrival)
        heapreplace(free, begins + steps * STEP_NS)
    return waits


def waits_in_the_simulator(of: Customers, servers: int) -> list[int]:
    arrived: dict[str, int] = {}
    ended: dict[str, int] = {}

    class Keep:
        @hookimpl
        def servelab_on_record(self, record: Record) -> None:
            if isinstance(record, RequestArrived):
                arrived[record.request] = record.t_ns
            elif isinstance(record, RequestFinished):
                assert record.outcome == "completed"
                ended[record.request] = record.t_ns

    class Traffic:
        def arrivals(self) -> Iterator[Arrival]:
            for k, (time_ns, steps) in enumerate(zip(of.arrivals_ns, of.steps, strict=True)):
                spec = RequestSpec(id=f"c{k}", prompt_tokens=1, max_new_tokens=100 * MEAN_STEPS)
                yield Arrival(time_ns, spec, Truth(output_tokens=steps))

        def react(self, finished: RequestFinished) -> Sequence[Arrival]:
            return ()

        def describe(self) -> dict[str, Any]:
            return {}

    registry = Registry.load()
    registry.add("observer", PluginSpec(name="keep", factory="t:Keep"), factory=lambda config, ctx: Keep())
    registry.add(
        "workload",
        PluginSpec(name="customers", factory="t:T", provides=frozenset({"workload.truth"})),
        factory=lambda config, ctx: Traffic(),
    )
    raw: dict[str, Any] = {
        "scheduler": {"name": "vllm_v1", "max_num_seqs": servers},
        "kvcache": "paged",
        "cost": {"name": "scripted", "step_ns": STEP_NS, "token_ns": 0, "context_ns": 0},
        "workload": "customers",
        "executor": {"name": "sim", "num_kv_pages": 10_000 * servers},
        "task": "bench",
        "observers": ["keep"],
        "model": {"name": "any", "layers": 1, "hidden": 8, "heads": 1, "kv_heads": 1, "head_dim": 8}
        | {"ffn": 8, "vocab": 8, "max_position": 101 * MEAN_STEPS},
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    names = [f"c{k}" for k in range(len(of.steps))]
    return [
        ended[name] - arrived[name] - steps * STEP_NS for name, steps in zip(names, of.steps, strict=True)
    ]


QUEUES = [Queue(1, 0.5), Queue(1, 0.7, constant=True), Queue(2, 0.6), Queue(4, 0.7)]


def mean(waits: Sequence[int]) -> float:
    """In mean services."""
    return sum(waits) / len(waits) / (MEAN_STEPS * STEP_NS)


class Estimate(NamedTuple):
    """A mean in mean services, and half the width of its 95 % confidence interval."""

    mean: float
    within: float

    @classmethod
    def of(cls, runs: Sequence[float]) -> Estimate:
        """From independent runs; Student's t is near enough to 1.96 + 2.5 / n for ten runs and more."""
        n, middle = len(runs), fmean(runs)
        return cls(middle, (1.96 + 2.5 / n) * stdev(runs) / sqrt(n))

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.within:.4f}"


def longer(queue: Queue, count: int, seed: int) -> tuple[list[int], list[int]]:
    """What each customer waits in the simulator, and how much longer than in the recursion."""
    of = customers(queue, count, seed)
    ours, theirs = waits_in_the_simulator(of, queue.servers), waits_by_recursion(of, queue.servers)
    return ours, [a - b for a, b in zip(ours, theirs, strict=True)]


def by_recursion(queue: Queue, runs: int, count: int = 100_000) -> Estimate:
    """Over customers whom the simulator does not see."""
    seeds = range(1000, 1000 + runs)
    return Estimate.of([mean(waits_by_recursion(customers(queue, count, k), queue.servers)) for k in seeds])


@pytest.mark.parametrize("queue", QUEUES, ids=str)
def test_customers_wait_as_in_the_recursion_and_so_as_the_textbook_says(queue: Queue) -> None:
    """To the nanosecond with one server; with more, at most a step longer, for they all step together."""
    ours, more = longer(queue, 1500, seed=0)
    assert min(more) >= 0
    assert max(more) < (1 if queue.servers == 1 else STEP_NS)
    assert sum(wait > 0 for wait in ours) > 250
    estimate = mean(more) + by_recursion(queue, runs=10).mean
    assert estimate == pytest.approx(queue.wait(), rel=0.02)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("queue", QUEUES, ids=str)
def test_the_simulator_waits_as_the_textbook_says(queue: Queue) -> None:
    """100,000 customers in ten runs; four million others in the recursion. With ``-s``, rows for the docs."""
    runs = [longer(queue, 10_000, seed) for seed in range(10)]
    engine, more = Estimate.of([mean(w) for w, _ in runs]), Estimate.of([mean(m) for _, m in runs])
    known = by_recursion(queue, runs=40)
    estimate = Estimate(more.mean + known.mean, sqrt(more.within**2 + known.within**2))
    off, theory = estimate.mean / queue.wait() - 1, queue.wait()
    print(
        f"\n{queue} | {theory:.4f} | {engine} | {more.mean:.1e} ± {more.within:.0e} | {estimate} | {off:+.2%}"
    )
    assert abs(engine.mean - theory) < 1.5 * engine.within
    assert abs(off) + estimate.within / theory < 0.02


def test_the_textbook_by_hand() -> None:
    """M/M/1 at a half: one service; M/D/1 half of it; M/M/2 at 0.6: 0.36 / 0.64 = 0.5625."""
    assert Queue(1, 0.5).wait() == pytest.approx(1)
    assert Queue(1, 0.5, constant=True).wait() == pytest.approx(0.5)
    assert Queue(2, 0.6).wait() == pytest.approx(0.5625)
