"""The first routers: whom they choose, and what the paper says comes of it."""

from __future__ import annotations

from collections import Counter
from heapq import heappop, heappush
from itertools import accumulate
from math import exp, factorial, log
from pathlib import Path
from random import Random
from statistics import mean
from typing import Any

import pytest
from tests.cluster.runs import served

from servelab.core.context import Context, seeded
from servelab.core.families.router import Dispatch, InstanceRow
from servelab.core.request import RequestSpec
from servelab.core.testing.cluster import ClusterRun
from servelab.core.testing.fakes import TOY_MODEL, ToyCost, arrival, toy_limits
from servelab.plugins.routers.least_loaded import LeastLoaded, LeastLoadedConfig
from servelab.plugins.routers.power_of_two import PowerOfTwo, PowerOfTwoConfig
from servelab.plugins.routers.round_robin import RoundRobin


def context(name: str, seed: int = 0) -> Context:
    limits = toy_limits()
    rng = seeded(seed, "router", name)
    return Context(kind="router", name=name, rng=rng, model=TOY_MODEL, hardware=None, limits=limits)


def round_robin() -> RoundRobin:
    return RoundRobin(None, context("round_robin"))


def least_loaded(**settings: Any) -> LeastLoaded:
    return LeastLoaded(LeastLoadedConfig(**settings), context("least_loaded"))


def power_of_two(seed: int = 0, **settings: Any) -> PowerOfTwo:
    return PowerOfTwo(PowerOfTwoConfig(**settings), context("power_of_two", seed))


class Rows:
    """A view of rows that a test wrote down; counts what is read."""

    def __init__(self, *rows: InstanceRow) -> None:
        self.rows = {row.id: row for row in rows}
        self.now_ns = 0
        self.read: list[int] = []

    def instances(self, role: Any = None, model: Any = None) -> tuple[int, ...]:
        return tuple(sorted(self.rows))

    def row(self, instance: int) -> InstanceRow:
        self.read.append(instance)
        return self.rows[instance]


class Bins:
    """A view of instances that never finish anything."""

    now_ns = 0

    def __init__(self, n: int, by: str = "requests") -> None:
        self.loads = [0] * n
        self.by = by

    def instances(self) -> range:
        return range(len(self.loads))

    def row(self, instance: int) -> InstanceRow:
        load = self.loads[instance]
        if self.by == "tokens":
            return row(instance, context_tokens=load)
        if self.by == "kv":
            return row(instance, free_pages=1000 - load, total_pages=1000)
        return row(instance, load)


def row(id: int, running: int = 0, **fields: Any) -> InstanceRow:
    return InstanceRow(id=id, reported_ns=0, running=running, **fields)


ASKED = RequestSpec(id="r", prompt_tokens=4, max_new_tokens=4)


def chosen(router: Any, view: Any) -> int:
    answer = router.route(ASKED, "arrival", view)
    assert isinstance(answer, Dispatch)
    return answer.prefill


@pytest.mark.parametrize(("n", "requests"), [(1, 5), (3, 10), (4, 40)])
def test_round_robin_counts_differ_by_at_most_one(n: int, requests: int) -> None:
    run = ClusterRun([arrival(f"r{i}", at=i * 700) for i in range(requests)], round_robin(), n).go()
    where = run.where()
    assert [where[f"r{i}"] for i in range(requests)] == [i % n for i in range(requests)]
    counts = Counter(where.values())
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == n


def test_round_robin_reads_no_row() -> None:
    view = Rows(row(0), row(3), row(7))
    router = round_robin()
    assert [chosen(router, view) for _ in range(4)] == [0, 3, 7, 0] and not view.read


def test_least_loaded_takes_the_least_loaded() -> None:
    """By hand, each measure another winner: 2 requests, 15 tokens, a fifth of the pages."""
    view = Rows(
        row(0, 1, waiting=1, context_tokens=50, free_pages=1, total_pages=10),
        row(1, 2, waiting=1, context_tokens=10, prefill_tokens=5, free_pages=6, total_pages=10),
        row(2, 3, context_tokens=20, free_pages=9, total_pages=12),
        row(3, 3, context_tokens=20, free_pages=12, total_pages=12, waiting_pages=(2, 2)),
        row(4, 3, context_tokens=20, free_pages=80, total_pages=100),
    )
    assert [chosen(least_loaded(by=by), view) for by in ("requests", "tokens", "kv")] == [0, 1, 4]


def test_least_loaded_ties_go_to_the_lowest_id() -> None:
    assert chosen(least_loaded(), Rows(row(2, 1), row(5, 1), row(7, 2))) == 2


def test_least_loaded_never_takes_one_that_has_more_at_that_time() -> None:
    """Every decision of a run is compared with what the engines really hold then."""
    router = least_loaded()
    decided: list[tuple[int, list[int]]] = []

    class Watched:
        def route(self, request: RequestSpec, moment: Any, view: Any) -> Any:
            answer = router.route(request, moment, view)
            decided.append((answer.prefill, [len(engine.requests) for engine in run.engines]))
            return answer

    rng = Random(1)
    items = [arrival(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 30), at=i * 900) for i in range(120)]
    run = ClusterRun(items, Watched(), 4, hold=16, pages=64)
    run.go()
    assert all(counts[index] == min(counts) for index, counts in decided)
    assert len(set(run.where().values())) == 4


def test_a_stale_report_is_believed() -> None:
    """Reports of 0 and 10,000 ns: all that arrive between them go to the instance that looked empty."""
    items = [arrival(f"r{i}", 4, 20, at=100 * i) for i in range(6)] + [arrival("late", at=10_500)]
    run = ClusterRun(items, least_loaded(), 2, report_ns=10_000, pages=64).go()
    assert [run.where()[f"r{i}"] for i in range(6)] == [0] * 6
    assert run.where()["late"] == 1


def test_two_choices_level_the_load() -> None:
    """n balls in n bins: ln n / ln ln n grows with one choice, ln ln n / ln d with more.

    With one choice bins are Poisson(1), nearly independent: the mean of the largest is 5.9.
    """
    n = 2048
    below = list(accumulate(exp(-1) / factorial(k) for k in range(30)))
    random = sum(1 - p**n for p in below)
    assert random == pytest.approx(5.9, abs=0.1)
    worst = {}
    for choices in (1, 2, 3):
        most = []
        for seed in range(3):
            router, bins = power_of_two(seed, choices=choices), Bins(n)
            for _ in range(n):
                bins.loads[chosen(router, bins)] += 1
            most.append(max(bins.loads))
        worst[choices] = mean(most)
    assert abs(worst[1] - random) < 1 and 3 <= worst[2] <= 4 and worst[3] <= 3, worst
    assert worst[2] <= log(log(n)) / log(2) + 1 + 1e-9


@pytest.mark.parametrize("by", ["requests", "tokens", "kv"])
def test_least_loaded_fills_every_bin_alike(by: str) -> None:
    """After k rounds of n balls, and j more, j bins have k + 1 and the rest k."""
    router, bins = least_loaded(by=by), Bins(40, by)
    for balls in range(1, 101):
        bins.loads[chosen(router, bins)] += 1
        assert sorted(bins.loads) == sorted(balls // 40 + (i < balls % 40) for i in range(40))


def test_it_reads_as_many_rows_as_it_has_choices() -> None:
    for choices in (1, 2, 5):
        view = Rows(*(row(i, i) for i in range(5)))
        for _ in range(10):
            chosen(power_of_two(choices=choices), view)
        assert len(view.read) == 10 * choices


def test_every_pair_is_drawn_equally_often() -> None:
    router, view = power_of_two(), Rows(*(row(i) for i in range(4)))
    for _ in range(6000):
        chosen(router, view)
    pairs = Counter(zip(view.read[::2], view.read[1::2], strict=True))
    assert len(pairs) == 6 and all(abs(count - 1000) < 150 for count in pairs.values())


def test_two_of_two_is_least_loaded() -> None:
    rng = Random(3)
    items = [arrival(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 30), at=i * 700) for i in range(100)]
    for by in ("requests", "tokens", "kv"):
        both = [
            ClusterRun(items, r, 2, pages=64).go().records for r in (power_of_two(by=by), least_loaded(by=by))
        ]
        assert both[0] == both[1]


def test_one_seed_one_run() -> None:
    items = [arrival(f"r{i}", at=i * 300) for i in range(60)]
    runs = [ClusterRun(items, power_of_two(seed), 5).go().records for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(("choices", "rho", "known"), [(1, 0.7, 3.333), (2, 0.9, 2.614)])
def test_mean_sojourn_is_mitzenmachers(choices: int, rho: float, known: float) -> None:
    """M/M/1 queues, n = 100: 1 + rho^2 + rho^6 + rho^14 + ... service times; at random 1 / (1 - rho)."""
    n, jobs, rng = 100, 60_000, Random(11)
    router, queues, free_at = power_of_two(choices=choices), Bins(n), [0.0] * n
    ends: list[tuple[float, int]] = []
    now, sojourns = 0.0, []
    for _ in range(jobs):
        now += rng.expovariate(n * rho)
        while ends and ends[0][0] <= now:
            queues.loads[heappop(ends)[1]] -= 1
        one = chosen(router, queues)
        queues.loads[one] += 1
        free_at[one] = max(now, free_at[one]) + rng.expovariate(1)
        heappush(ends, (free_at[one], one))
        sojourns.append(free_at[one] - now)
    theory = 1 / (1 - rho) if choices == 1 else sum(rho ** (2**i - 2) for i in range(1, 12))
    assert theory == pytest.approx(known, abs=1e-3)
    assert mean(sojourns[jobs // 5 :]) == pytest.approx(theory, rel=0.05)


def test_in_engines_two_choices_beat_one_and_least_loaded_beats_both() -> None:
    """An instance serves one request at a time; 16 of them at 0.9 of what they can."""
    n, rho, requests, rng = 16, 0.9, 1500, Random(5)
    items, at = [], 0.0
    for i in range(requests):
        at += rng.expovariate(n * rho / 20_000)
        items.append(arrival(f"r{i}", max(1, round(rng.expovariate(1 / 20))), 1, at=round(at)))
    limits = toy_limits(tokens=1000, requests=1, model_len=1000)
    costs = [ToyCost(step_ns=1, token_ns=1000) for _ in range(n)]
    waited = []
    for router in (power_of_two(choices=1), power_of_two(), least_loaded()):
        run = ClusterRun(items, router, n, limits=limits, pages=256, checks="basic", costs=costs).go()
        ends = run.ends()
        waited.append(mean(ends[x.spec.id][2] - x.time_ns for x in items))
    assert waited[0] > 1.5 * waited[1] and waited[1] > waited[2]


def lines(folder: Path) -> list[str]:
    """Of both logs of a run, but for what identifies it."""
    found = [x for name in ("events.jsonl", "plan.jsonl") for x in (folder / name).read_text().splitlines()]
    return [x for x in found if '"ev":"run_' not in x]


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "power_of_two"])
def test_one_instance_behind_a_router_is_the_run_without(router: str, tmp_path: Path) -> None:
    """Byte for byte, plans included."""
    served(tmp_path / "a")
    served(tmp_path / "b", router=router)
    assert len(lines(tmp_path / "a")) > 200 and lines(tmp_path / "b") == lines(tmp_path / "a")


def test_settings_are_checked() -> None:
    for wrong in ({"by": "luck"}, {"choices": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PowerOfTwoConfig(**wrong)  # type: ignore[arg-type]
