"""Lanes that overlap share the device: launches of given lengths and loads, run by the real driver."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise, permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.engine.sharing import ALONE, Use, pace
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import PluginCallError, PluginError
from servelab.core.events import Batch, InstanceLost
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Hold, StepPlan, Tokens
from servelab.core.records import Record, RequestFinished, StepDone
from servelab.core.request import Truth
from servelab.core.testing.fakes import (
    ListWorkload,
    Script,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    toy_limits,
)

NAMES = ("compute", "memory", "network")


@dataclass(frozen=True)
class Job:
    """A request of one launch."""

    start: int
    price: int
    busy: tuple[int, ...]
    """Nanoseconds of each of ``NAMES``."""
    joules: float = 0.0
    steps: int = 1
    """Of each price; all but the first in a hold."""

    @property
    def loads(self) -> list[Fraction]:
        return [Fraction(ns, self.price) for ns in self.busy]


def job(start: int, price: int, *busy: int, **more: Any) -> Job:
    return Job(start, price, busy, **more)


@dataclass
class Jobs(ToyCost):
    """Prices by request; each batch has one."""

    jobs: Mapping[str, Job]
    idle_watts: float | None = None
    peak_watts: float | None = None
    asked: list[str] = field(default_factory=list)

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        return [self._of(batch).price] * steps

    def busy(self, batch: Batch) -> Mapping[str, int]:
        self.asked.append(batch.requests[0].id)
        return dict(zip(NAMES, self._of(batch).busy, strict=False))

    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        return [self._of(batch).joules] * steps

    def _of(self, batch: Batch) -> Job:
        return self.jobs[batch.requests[0].id]


def one_each(view: StepView) -> StepPlan:
    for request in view.running:
        if request.pending_tokens:
            return StepPlan([request.next_token], hold=Hold(50))
    for request in view.waiting:
        return StepPlan([Tokens(request, request.pending_tokens)])
    return StepPlan()


@dataclass
class Ran:
    ends: dict[str, list[int]]
    """Of each request, the ends of its steps."""
    order: list[str]
    """Requests whose steps have ended, as the engine was told."""
    driver: VirtualDriver
    cost: Jobs


def serve(
    jobs: Sequence[Job],
    *,
    lanes: int = 0,
    in_flight: int = 1,
    foresight: bool = True,
    watts: tuple[float, float] | None = None,
    engines: int = 1,
    home: Any = None,
    lose: tuple[int, int] | None = None,
    driver: type[VirtualDriver] | type[WallDriver] = VirtualDriver,
    before: Callable[[Any], None] = lambda driver: None,
) -> Ran:
    """All of them, each on a lane of its own; ``watts``: idle and at most; ``lose``: when which engine."""
    names = {f"r{k}": one for k, one in enumerate(jobs)}
    idle, peak = watts or (None, None)
    cost = Jobs(names, idle, peak)
    truths: dict[str, Truth] = {}
    limits = toy_limits(lanes=lanes or max(2, len(jobs)), in_flight=in_flight)
    executors = [ToyExecutor(truths, foresight=foresight) for _ in range(engines)]
    made = [
        make_engine(
            Script(then=one_each), pages=500, limits=limits, cost=cost, index=k, horizon=executors[k].horizon
        )
        for k in range(engines)
    ]
    records: list[Record] = []
    items = [arrival(name, 4, one.steps, cap=one.steps, at=one.start) for name, one in names.items()]
    clock = driver(
        engines=made,
        executors=executors,
        costs=[cost] * engines,
        workload=ListWorkload(sorted(items, key=lambda item: item.time_ns)),
        truths=truths,
        emit=records.append,
        **({"dispatch": lambda spec: home[spec.id]} if home else {}),
    )
    before(clock)
    if lose is not None:
        clock.post(lose[0], InstanceLost(), lose[1])  # type: ignore[arg-type]
    clock.run()
    ends: dict[str, list[int]] = {name: [] for name in names}
    steps = [one for one in records if isinstance(one, StepDone)]
    for one in steps:
        ends[one.requests[0]] += one.ends_ns
    assert sum(isinstance(x, RequestFinished) for x in records) == len(jobs)
    assert not clock._events, "entries on the heap are counted wrongly"
    return Ran(ends, [one.requests[0] for one in steps], clock, cost)  # type: ignore[arg-type]


def last(ran: Ran) -> list[int]:
    return [ends[-1] for ends in ran.ends.values()]


# ------------------------------------------------------------------- by hand


def test_alone_a_launch_takes_its_price_and_nobody_asks_for_more() -> None:
    ran = serve([job(0, 1000, 700, 900), job(1000, 500, 500, 0), job(5000, 77, 0, 0, 77)])
    assert last(ran) == [1000, 1500, 5077] and not ran.cost.asked


def test_two_bound_by_one_resource_gain_nothing() -> None:
    """A has 600 left when B joins: at half speed until 1600. B has 400 left then."""
    assert last(serve([job(0, 1000, 0, 1000), job(400, 1000, 0, 1000)])) == [1600, 2000]


def test_two_bound_by_different_resources_run_as_if_alone() -> None:
    assert last(serve([job(0, 1000, 900, 100), job(0, 1000, 100, 900)])) == [1000, 1000]


def test_the_fullest_resource_sets_the_pace() -> None:
    """Compute 1.0, memory 0.5 + 0.75 = 1.25. The prompt alone again from 500 on, when it has 1600 left."""
    ran = serve([job(0, 2000, 1500, 1000), job(0, 400, 100, 300)])
    assert last(ran) == [2100, 500]


def test_time_in_which_nothing_is_busy_is_free_for_others() -> None:
    """Half of each step is overhead, that others fill; a third lane is one too many: 1.5 times as long."""
    half = job(0, 1000, 0, 500)
    assert last(serve([half, half])) == [1000, 1000]
    assert last(serve([half] * 3)) == [1500] * 3


def test_three_that_come_and_go() -> None:
    """All are bound by compute. A alone to 100: 900 left. With B at half speed to 300: 800 left, B 200 of
    300. With C at a third: B, the shortest, ends 600 later, at 900, A has 600 left and C 200 of 400. At half
    speed C ends at 1300, then A has 400 left.
    """
    ran = serve([job(0, 1000, 1000), job(100, 300, 300), job(300, 400, 400)])
    assert last(ran) == [1700, 900, 1300]


@pytest.mark.parametrize("foresight", [True, False])
def test_a_held_launch_shares_its_step_in_progress(foresight: bool) -> None:
    """B comes at 250, when A's step from 200 on has 50 left: to 350. Then A's next: with B's 50 left at half
    speed to 450, when it has 50 left itself, to 500. Alone from then on.
    """
    ran = serve([job(0, 100, 0, 100, steps=8), job(250, 100, 0, 100)], lanes=2, foresight=foresight)
    assert ran.ends["r0"] == [100, 200, 350, 500, 600, 700, 800, 900]
    assert ran.ends["r1"] == [450]
    assert ran.cost.asked == ["r0", "r1", "r0"], "once for each step that overlaps"


def test_what_is_planned_ahead_waits_for_its_lane() -> None:
    """Steps of 100, bound by memory, and one of 150 beside: at half speed to 300, when A has run one and a
    half of its steps. Its third, planned ahead at the end of the first, comes at 350.
    """
    ran = serve([job(0, 100, 0, 100, steps=4), job(0, 150, 0, 150)], lanes=2, in_flight=2)
    assert ran.ends == {"r0": [200, 350, 450, 550], "r1": [300]}


def test_instances_share_nothing() -> None:
    both = [job(0, 1000, 1000)] * 2
    assert last(serve(both, engines=2, home={"r0": 0, "r1": 1})) == [1000, 1000]
    assert last(serve(both, engines=2, home={"r0": 1, "r1": 1})) == [2000, 2000]


def test_an_instance_that_joins_shares_its_lanes() -> None:
    def join(clock: VirtualDriver) -> None:
        one = clock.engines[0]
        more = make_engine(
            Script(then=one_each), pages=500, limits=one.limits, cost=one.cost, index=1, horizon=one.horizon
        )
        clock.join(more, clock.executors[0], clock.costs[0])

    ran = serve([job(0, 1000, 1000)] * 2, home={"r0": 1, "r1": 1}, before=join)
    assert last(ran) == [2000, 2000]


def test_a_lost_instance_leaves_nothing_behind() -> None:
    jobs = [job(0, 1000, 1000), job(0, 1000, 1000), job(0, 1000, 1000), job(3000, 10, 10)]
    ran = serve(jobs, engines=2, home={"r0": 0, "r1": 0, "r2": 1, "r3": 1}, lose=(500, 0), watts=(0.0, 9.0))
    assert ran.ends == {"r0": [], "r1": [], "r2": [1000], "r3": [3010]}
    assert ran.driver.energy_j == 0.0


def test_launches_that_end_together_are_taken_as_they_were_sent() -> None:
    """At 600 B ends, C begins, and A, which has 700 left as C has, is put on the clock anew."""
    assert serve([job(0, 900, 0, 900)] * 3).order == ["r0", "r1", "r2"]
    ran = serve([job(0, 1000, 0, 1000), job(0, 300, 0, 300), job(600, 700, 0, 0)])
    assert last(ran) == [1300, 600, 1300] and ran.order == ["r1", "r0", "r2"]


def test_on_the_wall_clock_simulated_launches_share_too() -> None:
    millisecond = 10**6
    ran = serve([job(0, millisecond, 0, millisecond)] * 2, driver=WallDriver)
    first, second = last(ran)
    assert first == second >= 2 * millisecond


# ------------------------------------------------------------------- energy


def test_energy_is_that_of_each_once() -> None:
    """5 J and 3 J, in 2 s instead of 1 s each; idle devices take 10 W."""
    second = 10**9
    jobs = [job(0, second, 0, second, joules=5.0), job(0, second, 0, second, joules=3.0)]
    assert serve(jobs, watts=(10.0, 100.0)).driver.energy_j == pytest.approx(2 * 10 + 5 + 3)


def test_devices_draw_no_more_than_they_can() -> None:
    """A takes 80 W for 2 s, B 60 W for 1 s beside it, in its second one; there is power for 100 W."""
    second = 10**9
    jobs = [job(0, 2 * second, second, 0, joules=160.0), job(second // 2, second, 0, second, joules=60.0)]
    ran = serve(jobs, watts=(10.0, 110.0))
    assert last(ran) == [2 * second, 3 * second // 2]
    assert ran.driver.energy_j == pytest.approx(2 * 10 + 80 * 0.5 + 100 * 1 + 80 * 0.5)


# -------------------------------------------------------------- broken models


@pytest.mark.parametrize("busy", [1001, -1, float("nan")])
def test_a_resource_cannot_be_busy_for_longer_than_the_step(busy: Any) -> None:
    with pytest.raises(PluginError) as error:
        serve([job(0, 1000, 0, 500), job(0, 1000, busy, 0)])
    assert error.value.what.startswith("cost model of engine 0 keeps resources busy for {'compute': ")
    assert error.value.what.endswith("ns in a step of 1000")
    assert error.value.where == "launch 2, step 1"


def test_a_model_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(self: Jobs, batch: Batch) -> Mapping[str, int]:
        raise ValueError("no idea")

    monkeypatch.setattr(Jobs, "busy", busy)
    with pytest.raises(PluginCallError, match="cost model of engine 0 raised ValueError: no idea") as error:
        serve([job(0, 1000, 10), job(0, 1000, 10)])
    assert error.value.where == "busy()"


# ----------------------------------------------------------------- properties


@st.composite
def drawn(draw: st.DrawFn) -> Job:
    price = draw(st.integers(1, 2000))
    busy = draw(st.tuples(*[st.one_of(st.just(0), st.just(price), st.integers(0, price))] * 3))
    return job(draw(st.integers(0, 3000)), price, *busy, joules=draw(st.integers(0, 100)))


several = st.lists(drawn(), min_size=1, max_size=5)
quick = settings(max_examples=100)


def exact(jobs: Sequence[Job]) -> list[Fraction]:
    """The rule itself, in fractions: time goes from event to event."""
    left = {k: Fraction(one.price) for k, one in enumerate(jobs)}
    ends, now = [Fraction(0)] * len(jobs), Fraction(0)
    while left:
        here = [k for k in left if jobs[k].start <= now]
        loads = [sum((jobs[k].loads[r] for k in here), Fraction(0)) for r in range(len(NAMES))]
        slower = max(Fraction(1), *loads)
        events = [now + left[k] * slower for k in here] + [
            Fraction(jobs[k].start) for k in left if k not in here
        ]
        later = min(events)
        for k in here:
            left[k] -= (later - now) / slower
            if not left[k]:
                ends[k] = later
                del left[k]
        now = later
    return ends


@quick
@given(several)
def test_ends_are_those_of_the_rule(jobs: list[Job]) -> None:
    """But for whole nanoseconds: each time that launches come or go, what is left is rounded up."""
    for end, true in zip(last(serve(jobs)), exact(jobs), strict=True):
        assert -1e-6 <= end - true <= 4 * len(jobs) ** 2


@quick
@given(several)
def test_no_resource_does_more_than_it_can(jobs: list[Job]) -> None:
    """In no window is more of it used than there is; and together they take no longer than in turn."""
    ends = last(serve(jobs))
    for since in {one.start for one in jobs}:
        for until in ends:
            inside = [one for one, end in zip(jobs, ends, strict=True) if one.start >= since and end <= until]
            for resource in range(len(NAMES)):
                assert sum(one.busy[resource] for one in inside) <= max(0, until - since)
    assert all(end >= one.start + one.price for one, end in zip(jobs, ends, strict=True))
    slack = 4 * len(jobs) ** 2
    assert max(ends) <= max(one.start for one in jobs) + sum(one.price for one in jobs) + slack


@quick
@given(several, drawn())
def test_one_more_never_lets_another_end_earlier(jobs: list[Job], more: Job) -> None:
    without, beside = last(serve(jobs)), last(serve([*jobs, more]))
    assert all(b >= a - 4 * len(jobs) ** 2 for a, b in zip(without, beside, strict=False))


@quick
@given(several, st.randoms(use_true_random=False))
def test_order_of_lanes_does_not_matter(jobs: list[Job], rng: Any) -> None:
    order = list(range(len(jobs)))
    rng.shuffle(order)
    again = last(serve([jobs[k] for k in order]))
    assert last(serve(jobs)) == [again[order.index(k)] for k in range(len(jobs))]


@quick
@given(several, st.integers(0, 200))
def test_energy_is_at_most_the_sum_and_at_most_the_power_of_the_devices(jobs: list[Job], most: int) -> None:
    most += max(round(1e9 * one.joules / one.price) + 1 for one in jobs)  # each alone is within it
    ran = serve(jobs, watts=(0.0, float(most)))
    drawn_j = ran.driver.energy_j
    alone = sum(one.joules for one in jobs)
    assert drawn_j is not None and drawn_j <= alone * (1 + 1e-9)
    spans = [(one.start, end) for one, end in zip(jobs, last(ran), strict=True)]
    points = sorted({point for span in spans for point in span})
    working = sum(b - a for a, b in pairwise(points) if any(s <= a and b <= e for s, e in spans))
    assert drawn_j <= most * working * 1e-9 * (1 + 1e-9)
    if sum(1e9 * one.joules / one.price for one in jobs) <= most:
        assert drawn_j == pytest.approx(alone)


def test_pace_does_not_depend_on_order_in_the_last_digit() -> None:
    """0.1 + 0.2 is not 0.3 in floats, so that sums of three may differ by their order."""
    uses = [Use({"memory": 1.0 + share}, 90.0 + share) for share in (0.1, 0.2, 0.3)]
    assert len({sum(use.loads["memory"] for use in order) for order in permutations(uses)}) > 1
    assert len({pace(order, 100.0) for order in permutations(uses)}) == 1


def test_pace_of_one_is_that_of_one_alone() -> None:
    full = Use({"memory": 1.0}, 90.0)
    assert pace([], None) == pace([full], 50.0) == ALONE
    assert pace([full, full], None) == (2.0, 1.0)
    assert pace([full, Use({"compute": 1.0}, 30.0)], 100.0) == (1.0, pytest.approx(100 / 120))
