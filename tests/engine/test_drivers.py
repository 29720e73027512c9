"""Drivers under load and under failure: several held lanes, real executors, late dispatch, lost instances."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from time import sleep
from typing import Any

import pytest

from servelab.core.engine.state import Request
from servelab.core.engine.swap import Transfer
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import PluginCallError, PluginError, WorkloadError
from servelab.core.events import Abort, Arrive, Batch, InstanceLost
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Outcome, StepPlan
from servelab.core.records import Record, RequestArrived, RequestFinished, StepDone
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    toy_limits,
)

MS = 1_000_000


def virtual(
    items: list[Any],
    scheduler: Any = None,
    *,
    engines: int = 1,
    react: Any = None,
    emit: Any = None,
    dispatch: Any = None,
    cost: Any = None,
    executor: Any = ToyExecutor,
    post: Any = (),
    **kwargs: Any,
) -> tuple[VirtualDriver, list[Record]]:
    truths: dict[str, Truth] = {}
    runners = [executor(truths) for _ in range(engines)]
    cost = cost or ToyCost(step_ns=100, token_ns=0)
    records: list[Record] = []

    def keep(record: Record) -> None:
        if emit is not None:
            emit(record)
        records.append(record)

    kwargs.setdefault("pages", 256)
    driver = VirtualDriver(
        engines=[
            make_engine(scheduler or Fcfs(hold=1000), horizon=x.horizon, cost=cost, index=i, **kwargs)
            for i, x in enumerate(runners)
        ],
        executors=runners,
        costs=[cost] * engines,
        workload=ListWorkload(items, react),
        truths=truths,
        emit=keep,
        dispatch=dispatch,
    )
    for event in post:
        driver.post(*event)
    return driver, records


def ends(records: list[Record]) -> dict[str, str]:
    found = [x for x in records if isinstance(x, RequestFinished)]
    assert all(n == 1 for n in Counter(x.request for x in found).values()), "one terminal record each"
    return {x.request: x.outcome for x in found}


class LaneCost(ToyCost):
    """Lanes run at different speeds."""

    def price(self, batch: Batch, steps: int) -> list[int]:
        return [100 + 30 * batch.lane] * steps


@pytest.mark.parametrize("lanes", [2, 3, 4])
@pytest.mark.parametrize("disturb", ["arrivals", "cancels", "timers"])
@pytest.mark.parametrize("cost", [LaneCost(), ToyCost(step_ns=100, token_ns=0)], ids=["unequal", "equal"])
def test_several_held_lanes_survive(lanes: int, disturb: str, cost: ToyCost) -> None:
    items: list[Any] = [arrival(f"a{k}", 4, 20 + 7 * k) for k in range(2 * lanes)]
    if disturb == "arrivals":
        items += [arrival(f"b{k}", 3, 5, at=333 * (k + 1)) for k in range(9)]
    elif disturb == "cancels":
        items += [Cancel(450 + 100 * k, f"a{k}") for k in range(lanes)]

    def wakes(view: StepView) -> StepPlan:
        plan = Fcfs(hold=1000).plan(view)
        plan.wake_at = view.now_ns + 270
        return plan

    class Waking(Fcfs):
        def plan(self, view: StepView) -> StepPlan:
            return wakes(view)

    scheduler = Waking() if disturb == "timers" else Fcfs(hold=1000)
    limits = toy_limits(lanes=lanes, requests=2)
    driver, records = virtual(items, scheduler, cost=cost, limits=limits, checks="full")
    driver.run()
    found = ends(records)
    assert len(found) == len([x for x in items if isinstance(x, Arrival)])
    outputs = {x.request: x.output_tokens for x in records if isinstance(x, RequestFinished)}
    emitted: Counter[str] = Counter()
    for step in (x for x in records if isinstance(x, StepDone)):
        emitted.update(dict(zip(step.requests, step.emitted, strict=True)))
    assert {id: n for id, n in outputs.items() if n} == dict(emitted.items())


@pytest.mark.parametrize("what", ["react", "observer"])
def test_no_terminal_record_is_lost_when_this_fails(what: str) -> None:
    """a, b and c end in one launch; the failure comes with the record of a."""

    def react(record: RequestFinished) -> list[Arrival]:
        if what == "react":
            raise ValueError("boom")
        return []

    def emit(record: Record) -> None:
        if what == "observer" and isinstance(record, RequestFinished) and record.request == "a":
            raise ValueError("boom")

    items = [arrival(id, 4, 3) for id in "abc"] + [arrival("late", 4, 3, at=250)]
    driver, records = virtual(items, react=react, emit=emit)
    with pytest.raises((PluginCallError, ValueError)):
        driver.run()
    seen = ends(records)
    assert seen == {id: seen[id] for id in ("bc" if what == "observer" else "abc")} | {"late": "unfinished"}


@pytest.mark.parametrize("answer", [0, -1, 10**6, None, 1.5])
def test_a_horizon_that_cannot_be_is_the_executors_fault(answer: Any) -> None:
    class Blind(ToyExecutor):
        def horizon(self, batch: Batch, max_steps: int) -> int:
            return answer  # type: ignore[no-any-return]

    driver, records = virtual([arrival("a", 4, 9)], executor=Blind)
    with pytest.raises(PluginError, match="horizon"):
        driver.run()
    assert ends(records) == {"a": "unfinished"}


def test_nothing_runs_on_an_instance_that_was_lost() -> None:
    ran: list[int] = []

    class Watched(ToyExecutor):
        def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
            ran.append(batch.launch)
            assert all(lease.tables[0] for lease in batch.leases), "its pages are gone"
            return super().launch(batch, steps)

        def transfer(self, transfer: Transfer) -> None:
            raise AssertionError("transfers of a lost instance do not happen")

    class Swapper(Fcfs):
        def plan(self, view: StepView) -> StepPlan:
            plan = super().plan(view)
            if view.now_ns > 300 and len(view.running) > 1:
                plan = StepPlan()
                plan.preempt(next(iter(view.running)), "swap", "x")
            return plan

    driver, records = virtual(
        [arrival("a", 4, 90), arrival("b", 4, 90)],
        Swapper(),
        executor=Watched,
        host_pages=64,
        cost=ToyCost(step_ns=100, token_ns=0, transfer_ns=10_000),
        post=[(950, InstanceLost())],
    )
    driver.run()
    assert ends(records) == {"a": "failed", "b": "failed"}
    before = len(ran)
    assert before and driver.now_ns == 950


def test_dispatch_sees_the_state_at_the_time_of_arrival() -> None:
    seen: list[tuple[str, int]] = []

    def dispatch(spec: RequestSpec) -> int:
        seen.append((spec.id, driver.engines[0].ended["completed"]))
        return len(seen) % 2

    items = [arrival("a", 4, 2), arrival("b", 4, 2, at=200), arrival("c", 4, 2, at=1000)]
    driver, records = virtual(items, engines=2, dispatch=lambda spec: dispatch(spec) * 0)
    driver.run()
    # a ends at 200: completions come before arrivals
    assert seen == [("a", 0), ("b", 1), ("c", 2)]
    assert set(ends(records).values()) == {"completed"}


def test_late_cancellations_do_not_keep_a_run_alive() -> None:
    hour = 3600 * 10**9
    driver, records = virtual([arrival("a", 4, 2), Cancel(hour, "a"), Cancel(2 * hour, "a")])
    driver.run()
    assert driver.now_ns == 200
    assert ends(records) == {"a": "completed"}


@pytest.mark.parametrize(
    ("items", "part"),
    [
        ([None], "the workload yielded None"),
        ([Arrival(1.5, RequestSpec(id="a", prompt_tokens=1, max_new_tokens=1))], "the workload yielded"),  # type: ignore[arg-type]
        ([Arrival(1, RequestSpec(id="a", prompt_tokens=1.5, max_new_tokens=1))], "the workload yielded"),  # type: ignore[arg-type]
        ([arrival("a", at=5), arrival("b", at=4)], "the workload went back in time"),
    ],
)
def test_what_a_workload_must_not_yield(items: list[Any], part: str) -> None:
    driver, records = virtual(items)
    with pytest.raises(WorkloadError, match=part):
        driver.run()
    assert set(ends(records).values()) <= {"unfinished"}


def test_a_workload_that_raises_is_named() -> None:
    class Broken(ListWorkload):
        def arrivals(self) -> Any:
            yield arrival("a", 4, 50)
            raise OSError("trace gone")

    driver, _ = virtual([])
    driver.workload = Broken([])
    with pytest.raises(PluginCallError, match="the workload raised OSError: trace gone"):
        driver.run()


# ------------------------------------------------------------------- wall clock, real executors


class Real(ToyExecutor):
    """Does real work in worker threads: sleeps. Counts tokens itself: the launch before may not be booked."""

    simulated = False

    def __init__(self, truths: Any, seconds: float = 0.002) -> None:
        super().__init__(truths, foresight=False)
        self.seconds = seconds
        self.running = 0
        self.count = 0
        self.made: Counter[str] = Counter()

    def generated(self, r: Request) -> int:
        return self.made[r.id]

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        outcome = super().outcome(batch, i, steps, accept)
        self.made[batch.requests[i].id] += len(outcome.tokens)
        return outcome

    def horizon(self, batch: Batch, max_steps: int) -> int:
        return 1

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        self.running += 1
        self.count += 1
        sleep(self.seconds)
        try:
            return super().launch(batch, steps)
        finally:
            self.running -= 1


def wall(items: list[Any], executor: Any, scheduler: Any = None, *, emit: Any = None, **kwargs: Any) -> Any:
    records: list[Record] = []

    def keep(record: Record) -> None:
        records.append(record)
        if emit is not None:
            emit(record)

    keep_open = kwargs.pop("keep_open", False)
    cost = ToyCost(step_ns=MS, token_ns=0)
    kwargs.setdefault("pages", 256)
    driver = WallDriver(
        engines=[make_engine(scheduler or Fcfs(), horizon=executor.horizon, cost=cost, **kwargs)],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=executor.truths,
        emit=keep,
        keep_open=keep_open,
    )
    return driver, records


def test_a_real_executor_serves_on_two_lanes_and_ahead() -> None:
    for limits in (toy_limits(), toy_limits(lanes=2, requests=2), toy_limits(in_flight=2)):
        executor = Real({})
        driver, records = wall([arrival(f"r{k}", 4, 6, at=k * MS) for k in range(6)], executor, limits=limits)
        driver.run()
        assert set(ends(records).values()) == {"completed"}
        assert all(x.output_tokens == 6 for x in records if isinstance(x, RequestFinished))
        driver.engines[0].check_integrity()


def test_completions_are_read_while_arrivals_pour_in() -> None:
    """Faster than they are handled, until a completion has been."""
    driver, records = wall([], Real({}, 0.001))

    def pour() -> Iterator[Arrival]:
        for k in range(20_000):
            if any(isinstance(x, StepDone) for x in records):
                return
            yield arrival(f"r{k}", 2, 1, at=k * 10_000)
        raise AssertionError("the first completion waits for the last arrival")

    driver.workload.arrivals = pour
    driver.run()
    assert set(ends(records).values()) == {"completed"}


def test_a_polling_scheduler_does_not_starve_completions() -> None:
    class Polls(Fcfs):
        asked = 0

        def plan(self, view: StepView) -> StepPlan:
            Polls.asked += 1
            plan = super().plan(view)
            plan.wake_at = view.now_ns + 1000
            return plan

    driver, records = wall([arrival("a", 4, 5)], Real({}, 0.01), Polls(), limits=toy_limits(lanes=2))
    driver.run()
    assert ends(records) == {"a": "completed"}


def test_an_error_waits_for_the_launch_in_progress_and_runs_no_other() -> None:
    executor = Real({}, 0.15)

    def emit(record: Record) -> None:
        if isinstance(record, RequestArrived) and record.request == "b":
            raise ValueError("full")

    driver, _ = wall(
        [arrival("a", 4, 50), arrival("b", at=30 * MS)], executor, emit=emit, limits=toy_limits(in_flight=8)
    )
    with pytest.raises(ValueError, match="full"):
        driver.run()
    assert executor.running == 0, "launch() has returned before the run is over"
    assert executor.count == 1
    assert not [t for t in threading.enumerate() if t.name.startswith("servelab engine")]


def test_an_open_driver_serves_what_is_posted_until_it_is_closed() -> None:
    executor = Real({})
    driver, records = wall([], executor, keep_open=True)
    thread = threading.Thread(target=driver.run)
    thread.start()
    for k in range(3):
        executor.truths[f"p{k}"] = Truth(3)
        driver.post(Arrive(RequestSpec(id=f"p{k}", prompt_tokens=4, max_new_tokens=9)))
        sleep(0.03)
    driver.post(Abort("nobody"))
    driver.close()
    thread.join()
    assert ends(records) == {f"p{k}": "completed" for k in range(3)}
