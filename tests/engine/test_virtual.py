"""The virtual clock: one order of events, bit-repeatable, every request ends exactly once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from hashlib import sha256
from random import Random
from typing import Any

import pytest
from tests.draws import seeds

from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import PlanError, PluginCallError, PluginError, StallError, WorkloadError
from servelab.core.events import InstanceLost
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import Record, RequestArrived, RequestFinished, StepDone, to_dict
from servelab.core.request import Arrival, Cancel, Truth
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    RandomPlans,
    Script,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    raises_in,
    toy_limits,
)


class Run:
    """One or more engines on one heap; ``records`` is filled as it goes."""

    def __init__(
        self,
        items: Iterable[Arrival | Cancel],
        *schedulers: Any,
        costs: list[ToyCost] | None = None,
        dispatch: Any = None,
        react: Any = None,
        foresight: bool = True,
        **kwargs: Any,
    ) -> None:
        schedulers = schedulers or (Fcfs(),)
        self.truths: dict[str, Truth] = {}
        self.executors = [ToyExecutor(self.truths, foresight=foresight) for _ in schedulers]
        self.costs = costs or [ToyCost() for _ in schedulers]
        self.engines = [
            make_engine(s, index=i, horizon=x.horizon, cost=c, **kwargs)
            for i, (s, x, c) in enumerate(zip(schedulers, self.executors, self.costs, strict=True))
        ]
        self.records: list[Record] = []
        self.driver = VirtualDriver(
            engines=self.engines,
            executors=self.executors,
            costs=self.costs,
            workload=ListWorkload(items, react),
            truths=self.truths,
            emit=self.records.append,
            dispatch=dispatch,
        )

    def go(self) -> Run:
        self.driver.run()
        self.check()
        return self

    def check(self) -> None:
        arrived = [x.request for x in self.records if isinstance(x, RequestArrived)]
        ended = [x.request for x in self.records if isinstance(x, RequestFinished)]
        assert sorted(arrived) == sorted(ended), "one terminal record per request"

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [(x.request, x.outcome) for x in self.records if isinstance(x, RequestFinished)]


def test_times_are_the_cost_models() -> None:
    run = Run([arrival("a", 6, 3, at=50)], costs=[ToyCost(step_ns=100, token_ns=10)]).go()
    steps = [(x.start_ns, x.ends_ns) for x in run.records if isinstance(x, StepDone)]
    assert steps == [(50, [210]), (210, [320]), (320, [430])]


def test_at_one_instant_completions_come_before_arrivals_and_one_schedule_after_all() -> None:
    """Step 1 ends at 1040; b and c arrive then, and are admitted together in one plan."""
    asked: list[tuple[int, list[str], int]] = []

    def plan(view: StepView) -> StepPlan:
        running = [x.generated_tokens for x in view.running]
        asked.append((view.now_ns, [x.id for x in view.waiting], sum(running)))
        return Fcfs().plan(view)

    Run([arrival("a", 4, 2), arrival("b", at=1040), arrival("c", at=1040)], Script(then=plan)).go()
    assert asked[:2] == [(0, ["a"], 0), (1040, ["b", "c"], 1)]


def test_a_request_may_arrive_and_be_cancelled_at_one_instant() -> None:
    run = Run([arrival("a", at=5), Cancel(5, "a")]).go()
    assert run.ends == [("a", "cancelled")]
    assert not run.executors[0].launched


def test_cancelling_the_unknown_is_harmless() -> None:
    assert Run([Cancel(3, "x"), arrival("a", at=5)]).go().ends == [("a", "completed")]


def test_two_engines_on_one_heap_interleave_in_time() -> None:
    """Engine 0 steps in 100 ns, engine 1 in 70 ns; records come in time order, ties by posting."""
    costs = [ToyCost(step_ns=100, token_ns=0), ToyCost(step_ns=70, token_ns=0)]
    items = [arrival("a", 4, 4), arrival("b", 4, 5)]
    run = Run(items, Fcfs(), Fcfs(), costs=costs, dispatch=lambda s: int(s.id == "b")).go()
    steps = [(x.t_ns, x.engine) for x in run.records if isinstance(x, StepDone)]
    assert steps == [(70, 1), (100, 0), (140, 1), (200, 0), (210, 1), (280, 1), (300, 0), (350, 1), (400, 0)]
    assert [e.arrived for e in run.engines] == [1, 1]


def test_ties_between_engines_go_by_class_then_by_the_order_posted() -> None:
    costs = [ToyCost(step_ns=100, token_ns=0), ToyCost(step_ns=50, token_ns=0)]
    items = [arrival("a", 4, 2), arrival("b", 4, 4), arrival("c", 4, 1, at=100)]
    run = Run(items, Fcfs(), Fcfs(), costs=costs, dispatch=lambda s: int(s.id != "a")).go()
    at_100 = [(x.ev, x.engine) for x in run.records if x.t_ns == 100 and x.ev in ("step", "arrived")]
    assert at_100 == [("step", 0), ("step", 1), ("arrived", 1)]


def test_cancellations_find_the_engine_of_their_request() -> None:
    items: list[Arrival | Cancel] = [arrival("a", 4, 50), arrival("b", 4, 50), Cancel(2500, "b")]
    run = Run(items, Fcfs(), Fcfs(), dispatch=lambda s: int(s.id == "b")).go()
    assert ("b", "cancelled") in run.ends
    (end,) = [x for x in run.records if isinstance(x, RequestFinished) and x.request == "b"]
    assert (end.engine, end.t_ns) == (1, 2500)


def test_dispatch_to_nowhere_is_refused() -> None:
    run = Run([arrival("a")], dispatch=lambda s: 3)
    error = raises_in(run.driver.run)
    assert (error.what, error.why) == ("dispatch sent request a to engine 3", "there are 1 engines")


def test_a_lost_engine_does_not_touch_the_other() -> None:
    items = [arrival("a", 4, 9), arrival("b", 4, 9), arrival("c", 4, 9, at=5000)]
    run = Run(items, Fcfs(hold=50), Fcfs(hold=50), dispatch=lambda s: int(s.id == "b"), pages=64)
    run.driver.post(3000, InstanceLost("power"), 0)
    run.go()
    assert sorted(run.ends) == [("a", "failed"), ("b", "completed"), ("c", "failed")]


def test_workloads_react_to_what_has_ended() -> None:
    def react(end: RequestFinished) -> list[Arrival]:
        k = int(end.request[1:])
        return [arrival(f"t{k + 1}", 4, 2, at=end.t_ns + 100)] if k < 3 else []

    run = Run([arrival("t0", 4, 2)], react=react).go()
    assert [id for id, _ in run.ends] == ["t0", "t1", "t2", "t3"]
    arrived = {x.request: x.t_ns for x in run.records if isinstance(x, RequestArrived)}
    ended = {x.request: x.t_ns for x in run.records if isinstance(x, RequestFinished)}
    assert all(arrived[f"t{k + 1}"] == ended[f"t{k}"] + 100 for k in range(3))


def test_reacting_into_the_past_is_refused() -> None:
    run = Run([arrival("a", 4, 1)], react=lambda end: [arrival("b", at=end.t_ns - 1)])
    error = raises_in(run.driver.run)
    assert type(error) is WorkloadError
    assert error.why == "the request ended at 1040 ns"


def test_arrivals_out_of_order_are_refused_and_live_requests_end() -> None:
    run = Run([arrival("a", at=100), arrival("b", at=200), arrival("c", at=150)])
    error = raises_in(run.driver.run)
    assert type(error) is WorkloadError
    assert error.what == "the workload went back in time, to 150 ns"
    assert error.where == "after an item at 200 ns"
    run.check()


# ---------------------------------------------------------------- runs that go wrong


def test_a_scheduler_that_raises_ends_the_run_with_one_record_each() -> None:
    def boom(view: StepView) -> StepPlan:
        if view.step == 2:
            raise RuntimeError("no idea")
        return Fcfs().plan(view)

    run = Run([arrival("a", 4, 9), arrival("b", 4, 1)], Script(then=boom))
    error = raises_in(run.driver.run)
    assert type(error) is PluginCallError
    assert run.ends == [("b", "completed"), ("a", "unfinished")]
    (end,) = [x for x in run.records if isinstance(x, RequestFinished) and x.request == "a"]
    assert "scheduler 'toy' raised RuntimeError: no idea" in end.reason
    assert end.output_tokens == 2


def test_a_refused_plan_ends_the_run_with_one_record_each() -> None:
    def bad(view: StepView) -> StepPlan:
        return StepPlan([Tokens(x, 99) for x in view.waiting])

    run = Run([arrival("a"), arrival("b")], Script(then=bad))
    assert type(raises_in(run.driver.run)) is PlanError
    assert run.ends == [("a", "unfinished"), ("b", "unfinished")]


def test_an_interrupted_run_says_so() -> None:
    def stop(view: StepView) -> StepPlan:
        raise KeyboardInterrupt

    run = Run([arrival("a"), arrival("b")], Script(then=stop))
    with pytest.raises(KeyboardInterrupt):
        run.driver.run()
    assert run.ends == [("a", "unfinished"), ("b", "unfinished")]
    assert {x.reason for x in run.records if isinstance(x, RequestFinished)} == {"interrupted"}


def test_a_duplicate_id_ends_the_run() -> None:
    run = Run([arrival("a", 4, 50), arrival("a", 4, 50, at=10)])
    assert type(raises_in(run.driver.run)) is WorkloadError
    assert run.ends == [("a", "unfinished")]


def test_nothing_left_to_happen_is_a_stall_with_the_numbers() -> None:
    run = Run([arrival("a", 20, 5), arrival("b", 4, 5)], pages=3)
    error = raises_in(run.driver.run)
    assert type(error) is StallError
    assert error.what == "engine 0 has requests that nothing will ever run"
    assert error.where == "scheduler 'toy', t=0 ns"
    assert error.why == (
        "2 waiting, 0 running, 0 paused, 0 swapped; request a (waiting) has 20 tokens pending and "
        "needs (5,) pages, (3,) are free"
    )
    assert error.do == "plan them, reject them with a reason, or set wake_at"
    assert run.ends == [("a", "unfinished"), ("b", "unfinished")]


def test_waking_prevents_a_stall() -> None:
    def later(view: StepView) -> StepPlan:
        return Fcfs().plan(view) if view.now_ns >= 700 else StepPlan(wake_at=700)

    run = Run([arrival("a", 4, 1)], Script(then=later)).go()
    assert [x.start_ns for x in run.records if isinstance(x, StepDone)] == [700]


@pytest.mark.parametrize(("prices", "shown"), [([], "[]"), ([0], "[0]"), ([5, 5], "[5, 5]")])
def test_a_cost_model_that_misprices_is_named(prices: list[int], shown: str) -> None:
    cost = ToyCost()
    cost.price = lambda batch, steps: prices  # type: ignore[method-assign]
    run = Run([arrival("a")], costs=[cost])
    error = raises_in(run.driver.run)
    assert type(error) is PluginError
    assert error.what == f"cost model of engine 0 priced 1 steps as {shown}"
    assert error.where == "launch 1, step 0"
    assert run.ends == [("a", "unfinished")]


# ----------------------------------------------------------------------- repeatable


def digest(seed: int) -> str:
    """A hash of every record of a run in which everything happens."""
    rng = Random(seed)
    items: list[Arrival | Cancel] = []
    for k in range(60):
        at = k * 700
        items.append(arrival(f"r{k}", rng.randint(1, 14), rng.randint(1, 9), cap=rng.randint(1, 9), at=at))
        if rng.randrange(5) == 0:
            items.append(Cancel(at + rng.randrange(600), f"r{k}"))
    schedulers = [RandomPlans(Random(seed + 1)), RandomPlans(Random(seed + 2))]
    for scheduler in schedulers:
        scheduler.kinds -= {"pause"}
    run = Run(
        items,
        *(Script(then=_awake(s)) for s in schedulers),
        dispatch=lambda spec: int(spec.id[1:]) % 2,
        pages=12,
        host_pages=8,
        limits=toy_limits(tokens=24, requests=6, lanes=2, in_flight=2),
    ).go()
    for engine in run.engines:
        engine.check_integrity()
        assert engine.ledger.free() == engine.ledger.total()
        assert engine.ledger.free("host") == engine.ledger.total("host")
    return sha256(repr([to_dict(x) for x in run.records]).encode()).hexdigest()


def _awake(scheduler: RandomPlans) -> Any:
    def plan(view: StepView) -> StepPlan:
        out = scheduler.plan(view)
        if out.wake_at is None:
            out.wake_at = view.now_ns + 900
        return out

    return plan


@pytest.mark.parametrize("seed", seeds(6))
def test_one_seed_gives_one_log(seed: int) -> None:
    assert digest(seed) == digest(seed)


def test_one_seed_gives_one_log_in_every_process() -> None:
    code = (
        "import sys, importlib.util as u;"
        f"s = u.spec_from_file_location('t', {__file__!r});"
        "m = u.module_from_spec(s); sys.modules['t'] = m; s.loader.exec_module(m); print(m.digest(3))"
    )
    path = [p for p in sys.path if p]
    out = {
        subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("0", "1")
    }
    assert out == {digest(3)}


def test_another_seed_gives_another_log() -> None:
    assert digest(1) != digest(2)
