"""The simulator against queues whose waiting times are known: M/M/1, M/D/1, M/M/n.

A request is a customer, ``max_num_seqs`` is the number of servers, every step takes the same time whatever
runs in it, and a request's output length is its service time in steps. Nothing else of the engine is switched
off. Waiting times converge slowly, so the argument has two halves that are fast: the simulator's are those of
a recursion for each single customer, and the recursion's mean over half a million is the textbook's. The slow
test has the simulator itself serve enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heapify, heapreplace
from math import factorial, log
from random import Random
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


@pytest.mark.parametrize("queue", QUEUES)
def test_every_customer_waits_as_in_the_recursion(queue: Queue) -> None:
    """To the nanosecond with one server; with more, at most a step longer, for they all step together."""
    of = customers(queue, 1500, seed=0)
    ours, theirs = waits_in_the_simulator(of, queue.servers), waits_by_recursion(of, queue.servers)
    longer = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert min(longer) >= 0
    assert max(longer) < (1 if queue.servers == 1 else STEP_NS)
    assert sum(wait > 0 for wait in ours) > 250


@pytest.mark.parametrize("queue", QUEUES)
def test_the_recursion_waits_as_the_textbook_says(queue: Queue) -> None:
    waits = waits_by_recursion(customers(queue, 500_000, seed=0), queue.servers)
    assert mean(waits) == pytest.approx(queue.wait(), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("queue", QUEUES)
def test_the_simulator_waits_as_the_textbook_says(queue: Queue) -> None:
    waits = waits_in_the_simulator(customers(queue, 300_000, seed=0), queue.servers)
    print(f"{queue}: {mean(waits):.4f}, textbook {queue.wait():.4f}, {mean(waits) / queue.wait() - 1:+.2%}")
    assert mean(waits) == pytest.approx(queue.wait(), rel=0.02)


def test_the_textbook_by_hand() -> None:
    """M/M/1 at a half: one service; M/D/1 half of it; M/M/2 at 0.6: 0.36 / 0.64 = 0.5625."""
    assert Queue(1, 0.5).wait() == pytest.approx(1)
    assert Queue(1, 0.5, constant=True).wait() == pytest.approx(0.5)
    assert Queue(2, 0.6).wait() == pytest.approx(0.5625)
