"""The wall clock: real threads, real time, short runs."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from time import monotonic, sleep
from typing import Any

import pytest

from servelab.core.engine.swap import Transfer
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import PluginCallError, PluginError, StallError
from servelab.core.events import Abort, Batch, Event, LaunchDone
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Outcome, StepPlan, Tokens
from servelab.core.records import Record, RequestArrived, RequestFinished, StepDone
from servelab.core.request import Arrival, Cancel, Truth
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    Script,
    ToyCost,
    ToyExecutor,
    arrival,
    find,
    make_engine,
    toy_limits,
)

MS = 1_000_000


class Run:
    def __init__(
        self,
        items: Iterable[Arrival | Cancel],
        scheduler: Any = None,
        *,
        executor: Any = None,
        cost: ToyCost | None = None,
        react: Any = None,
        on: Any = None,
        **kwargs: Any,
    ) -> None:
        self.truths: dict[str, Truth] = {}
        self.executor = (executor or ToyExecutor)(self.truths)
        cost = cost or ToyCost(step_ns=MS, token_ns=0, transfer_ns=MS)
        kwargs.setdefault("pages", 64)
        self.engine = make_engine(scheduler or Fcfs(), horizon=self.executor.horizon, cost=cost, **kwargs)
        self.records: list[Record] = []
        self.on = on

        def emit(record: Record) -> None:
            self.records.append(record)
            if on is not None:
                on(self, record)

        self.driver = WallDriver(
            engines=[self.engine],
            executors=[self.executor],
            costs=[cost],
            workload=ListWorkload(items, react),
            truths=self.truths,
            emit=emit,
        )

    def go(self) -> Run:
        self.driver.run()
        self.check()
        return self

    def check(self) -> None:
        arrived = [x.request for x in self.records if isinstance(x, RequestArrived)]
        ended = [x.request for x in self.records if isinstance(x, RequestFinished)]
        assert sorted(arrived) == sorted(ended), "one terminal record per request"
        times = [x.t_ns for x in self.records]
        assert times == sorted(times)
        threads = [t.name for t in threading.enumerate() if t.name.startswith("servelab engine")]
        assert not threads, "the workers have stopped"

    @property
    def ends(self) -> dict[str, str]:
        return {x.request: x.outcome for x in self.records if isinstance(x, RequestFinished)}


def test_a_paced_run_takes_the_time_it_says() -> None:
    began = monotonic()
    run = Run([arrival("a", 4, 20), arrival("b", 4, 10, at=5 * MS)], Fcfs(hold=100)).go()
    assert monotonic() - began >= 0.020
    assert run.ends == {"a": "completed", "b": "completed"}
    run.engine.check_integrity()
    assert run.engine.ledger.free() == (64,)


def test_an_arrival_interrupts_a_held_launch() -> None:
    """Without the interrupt b would wait until a's hold is over, and a with it."""
    cost = ToyCost(step_ns=5 * MS, token_ns=0)

    def on(run: Run, record: Record) -> None:
        if isinstance(record, RequestFinished) and record.request == "b":
            run.driver.post(Abort("a"))

    items = [arrival("a", 4, 2000, cap=2000), arrival("b", 4, 2, at=40 * MS)]
    limits = toy_limits(model_len=4000)
    run = Run(items, Fcfs(hold=4000), cost=cost, limits=limits, pages=1000, on=on).go()
    assert run.ends == {"a": "cancelled", "b": "completed"}
    steps = [x for x in run.records if isinstance(x, StepDone)]
    with_b = next(k for k, x in enumerate(steps) if "b" in x.requests)
    assert any(len(x.ends_ns) > 1 for x in steps[:with_b])
    assert steps[with_b].start_ns >= max(x.ends_ns[-1] for x in steps[:with_b]) > 40 * MS
    assert all(x.ends_ns == sorted(x.ends_ns) for x in steps)


def test_an_abort_from_another_thread_ends_the_request() -> None:
    cost, limits = ToyCost(step_ns=2 * MS, token_ns=0), toy_limits(model_len=9000)
    items = [arrival("a", 4, 8000, cap=8000)]  # 16 seconds
    run = Run(items, Fcfs(hold=8000), cost=cost, limits=limits, pages=2500)
    timer = threading.Timer(0.05, lambda: run.driver.post(Abort("a", "gone")))
    timer.start()
    run.go()
    timer.join()
    assert run.ends == {"a": "cancelled"}
    assert sum(len(x.ends_ns) for x in run.records if isinstance(x, StepDone)) < 8000


def test_workloads_react_on_the_wall_clock_too() -> None:
    def react(end: RequestFinished) -> list[Arrival]:
        k = int(end.request[1:])
        return [arrival(f"t{k + 1}", 4, 2, at=end.t_ns + MS)] if k < 3 else []

    assert list(Run([arrival("t0", 4, 2)], react=react).go().ends) == ["t0", "t1", "t2", "t3"]


def test_swaps_run_beside_launches() -> None:
    def swap(view: StepView) -> StepPlan:
        out = StepPlan([x.next_token for x in view.running if x.id == "b"])
        out.preempt(find(view, "a"), "swap", "x")
        return out

    def back(view: StepView) -> StepPlan:
        if not view.swapped:
            return StepPlan(wake_at=view.now_ns + MS)
        out = StepPlan()
        out.swap_in(find(view, "a"), "x")
        return out

    both = [arrival("a", 4, 3), arrival("b", 4, 2)]
    script = Script(Fcfs().plan, swap, then=lambda v: back(v) if v.swapped else Fcfs().plan(v))
    run = Run(both, script, host_pages=8).go()
    assert run.ends == {"a": "completed", "b": "completed"}
    assert run.executor.transferred == [1, 2]
    assert run.engine.ledger.free("host") == (8,)


class Real(ToyExecutor):
    """Takes its own time, in the thread of the run or in one per lane."""

    simulated = False

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        self.threads = {*getattr(self, "threads", ()), threading.current_thread()}
        return super().launch(batch, steps)

    def horizon(self, batch: Batch, max_steps: int) -> int:
        return 1


def test_an_executor_that_takes_real_time_is_not_paced() -> None:
    hour = 3600 * 10**9
    run = Run([arrival("a", 4, 30)], Fcfs(hold=100), executor=Real, cost=ToyCost(step_ns=hour)).go()
    assert run.records[-1].t_ns < hour
    assert run.ends == {"a": "completed"}
    assert len(run.executor.launched) == 30
    assert run.executor.threads == {threading.main_thread()}  # handing over every step would cost more


@pytest.mark.parametrize("limits", [{"lanes": 2}, {"in_flight": 2}])
def test_launches_side_by_side_have_threads_of_their_own(limits: dict[str, int]) -> None:
    run = Run([arrival("a", 4, 30)], executor=Real, limits=toy_limits(**limits)).go()
    assert run.ends == {"a": "completed"}
    assert threading.main_thread() not in run.executor.threads


def test_what_comes_during_a_launch_happened_then() -> None:
    """An abort posted while a launch runs is known after it, at the time it was posted."""

    class Slow(Real):
        def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
            out = super().launch(batch, steps)
            if len(self.launched) == 3:
                sleep(0.02)
                run.driver.post(Abort("a"))
                self.posted = run.driver.clock()
                sleep(0.05)
            return out

    run = Run([arrival("a", 4, 30), arrival("b", 4, 6)], executor=Slow)
    run.go()
    assert run.ends == {"a": "cancelled", "b": "completed"}
    end = next(r for r in run.records if isinstance(r, RequestFinished) and r.request == "a")
    assert end.t_ns <= run.executor.posted
    assert len(run.executor.launched) >= 6


@pytest.mark.parametrize("lanes", [1, 2])
def test_an_executor_that_raises_ends_the_run_with_its_error(lanes: int) -> None:
    class Breaks(Real):
        def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
            raise RuntimeError("out of memory")

    run = Run([arrival("a"), arrival("b")], executor=Breaks, limits=toy_limits(lanes=lanes))
    with pytest.raises(PluginCallError, match="the executor raised RuntimeError: out of memory") as info:
        run.driver.run()
    assert isinstance(info.value.__cause__, RuntimeError)
    run.check()
    assert run.ends == {"a": "unfinished", "b": "unfinished"}


def test_a_transfer_that_raises_ends_the_run_with_its_error() -> None:
    class Breaks(ToyExecutor):
        def transfer(self, transfer: Transfer) -> None:
            raise OSError("link down")

    def swap(view: StepView) -> StepPlan:
        out = StepPlan()
        out.preempt(find(view, "a"), "swap", "x")
        return out

    run = Run([arrival("a", 4, 9)], Script(Fcfs().plan, swap), executor=Breaks, host_pages=8)
    with pytest.raises(PluginCallError, match="link down"):
        run.driver.run()
    run.check()


@pytest.mark.parametrize("lanes", [1, 2])
def test_errors_of_ours_pass_the_worker_unchanged(lanes: int) -> None:
    class Holds(Real):
        def horizon(self, batch: Batch, max_steps: int) -> int:
            return max_steps

    run = Run([arrival("a", 4, 9)], Fcfs(hold=4), executor=Holds, limits=toy_limits(lanes=lanes))
    with pytest.raises(PluginError, match="launch 2 has 4 steps"):
        run.driver.run()
    run.check()


def test_a_scheduler_that_raises_in_the_middle_of_a_long_launch_does_not_wait_for_it() -> None:
    def plan(view: StepView) -> StepPlan:
        if view.lane == 1 and view.waiting:
            raise ValueError("no")
        return Fcfs(hold=500).plan(view) if view.lane == 0 else StepPlan()

    items = [arrival("a", 4, 200, cap=200), arrival("b", at=30 * MS)]
    hour = 3600 * 10**9
    run = Run(items, Script(then=plan), cost=ToyCost(step_ns=hour), limits=toy_limits(lanes=2))
    with pytest.raises(PluginCallError):
        run.driver.run()
    assert run.records[-1].t_ns < hour
    run.check()
    assert run.ends == {"a": "unfinished", "b": "unfinished"}


def test_control_c_ends_the_requests_and_the_threads() -> None:
    def on(run: Run, record: Record) -> None:
        if isinstance(record, StepDone):
            raise KeyboardInterrupt

    run = Run([arrival("a", 4, 50), arrival("b", 4, 50)], on=on)
    with pytest.raises(KeyboardInterrupt):
        run.driver.run()
    run.check()
    assert set(run.ends.values()) == {"unfinished"}
    assert {x.reason for x in run.records if isinstance(x, RequestFinished)} == {"interrupted"}


def test_a_completion_that_is_told_late_does_not_turn_time_back() -> None:
    """A worker reads the clock, and is stopped before it can say so; meanwhile requests arrive."""

    class Late(WallDriver):
        def post(self, event: Event, engine: int = 0) -> None:
            if isinstance(event, LaunchDone):
                sleep(0.003)
            super().post(event, engine)

    class Real(ToyExecutor):
        simulated = False

    items = [arrival(f"r{k}", 4, 3, at=k * MS) for k in range(12)]
    run = Run(items, executor=lambda truths: Real(truths, foresight=False), limits=toy_limits(lanes=2))
    run.driver.__class__ = Late
    run.go()
    assert set(run.ends.values()) == {"completed"}


def test_a_stall_is_named() -> None:
    run = Run([arrival("a")], Script())
    with pytest.raises(StallError, match="nothing will ever run"):
        run.driver.run()
    run.check()


def test_waking_on_the_wall_clock() -> None:
    def plan(view: StepView) -> StepPlan:
        if view.now_ns < 20 * MS:
            return StepPlan(wake_at=20 * MS)
        return StepPlan([Tokens(x, x.pending_tokens) for x in view.waiting])

    run = Run([arrival("a", 4, 1)], Script(then=plan)).go()
    (step,) = [x for x in run.records if isinstance(x, StepDone)]
    assert step.start_ns >= 20 * MS


def test_an_open_run_in_which_nothing_will_happen_is_a_stall() -> None:
    """A scheduler that plans nothing and sets no timer would leave its clients waiting for ever."""
    run = Run([arrival("a", 4, 9)], Script(then=lambda view: StepPlan()))
    run.driver._open = True
    with pytest.raises(StallError, match="requests that nothing will ever run"):
        run.driver.run()
    run.check()
