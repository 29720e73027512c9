"""Runs that can never go on end with an error that says who holds what, even where timers go on for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from servelab.core.engine import driver as drivers
from servelab.core.engine.driver import Driver
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import ServeLabError, StallError
from servelab.core.families.router import Dispatch, Hold
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Pin, StepPlan, Tokens
from servelab.core.records import Record, RequestFinished
from servelab.core.request import Arrival, Cancel, RequestView, Truth
from servelab.core.testing.cluster import ClusterRun
from servelab.core.testing.fakes import (
    ListWorkload,
    Script,
    ToyCost,
    ToyExecutor,
    arrival,
    find,
    make_engine,
    raises_in,
)

BOTH = pytest.mark.parametrize("driver", [VirtualDriver, WallDriver])
US = 1000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "MOST_IN_VAIN", 30)


def serve(
    driver: type[Driver],
    scheduler: Any,
    items: Iterable[Arrival | Cancel],
    *,
    real: bool = False,
    **kwargs: Any,
) -> tuple[ServeLabError | None, dict[str, str]]:
    """The error that ended the run, and how requests ended."""
    truths: dict[str, Truth] = {}
    executor, cost, records = ToyExecutor(truths), ToyCost(transfer_ns=1000 * US), list[Record]()
    executor.simulated = not real
    engine = make_engine(scheduler, horizon=lambda batch, steps: 1, cost=cost, **kwargs)
    run = driver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    )
    error: ServeLabError | None = None
    try:
        run.run()
    except ServeLabError as raised:
        error = raised
    return error, {x.request: x.outcome for x in records if isinstance(x, RequestFinished)}


def polls(*steps: Callable[[StepView], StepPlan], every: int = 100 * US) -> Script:
    """Plays the steps, then looks in for ever."""
    return Script(*steps, then=lambda view: StepPlan(wake_at=view.now_ns + every))


def admit(view: StepView) -> StepPlan:
    return StepPlan([Tokens(x, x.pending_tokens) for x in view.waiting], wake_at=view.now_ns + US)


def pause(view: StepView) -> StepPlan:
    plan = StepPlan(wake_at=view.now_ns + US)
    for request in view.running:
        plan.preempt(request, "pause", "why not")
    return plan


@BOTH
@pytest.mark.parametrize("real", [False, True])
def test_a_scheduler_that_looks_in_for_ever(driver: type[Driver], real: bool, few: None) -> None:
    error, ends = serve(driver, polls(admit, pause), [arrival("a", 9, 5)], real=real)
    assert type(error) is StallError and ends == {"a": "unfinished"}
    assert error.what == "engine 0 has requests that nothing will ever run"
    assert error.where is not None and error.where.startswith("scheduler 'toy', t=")
    assert error.why == (
        "0 waiting, 0 running, 1 paused, 0 swapped; request a (paused) has 1 tokens pending and needs "
        "(0,) pages, (13,) are free; most are held by a (paused): 3; 30 wake-ups in a row changed nothing"
    )
    assert error.do == "plan them, or reject them with a reason"


def test_who_looks_in_often_but_not_for_ever_may() -> None:
    """90,000 times: a policy may wait for a time, and need not know how to say so."""

    def plan(view: StepView) -> StepPlan:
        late = view.now_ns >= 90_000
        return admit(view) if late else StepPlan(wake_at=view.now_ns + 1)

    error, ends = serve(VirtualDriver, Script(then=plan), [arrival("a", 4, 1)])
    assert error is None and ends == {"a": "completed"}


@BOTH
def test_a_client_that_will_give_up_is_waited_for(driver: type[Driver], few: None) -> None:
    items = [arrival("a", 4, 5), Cancel(20_000 * US, "a")]
    error, ends = serve(driver, polls(), items)
    assert error is None and ends == {"a": "cancelled"}


@BOTH
def test_a_request_that_ends_is_progress(driver: type[Driver], few: None) -> None:
    """Every 20 wake-ups one is rejected: more than 30 in all, never 30 in vain."""
    calls = 0

    def plan(view: StepView) -> StepPlan:
        nonlocal calls
        calls += 1
        plan = StepPlan(wake_at=view.now_ns + 100 * US)
        if calls % 20 == 0:
            plan.reject(next(iter(view.waiting)), "late")
        return plan

    error, ends = serve(driver, Script(then=plan), [arrival(f"r{k}") for k in range(4)])
    assert error is None and set(ends.values()) == {"rejected"} and calls > 70


@BOTH
def test_a_swap_under_way_is_waited_for(driver: type[Driver], few: None) -> None:
    """It takes 1 ms, and the scheduler looks in every 10 us meanwhile."""

    def plan(view: StepView) -> StepPlan:
        out = StepPlan(wake_at=view.now_ns + 10 * US)
        if view.swapped:
            out.abort(find(view, "a"), "seen enough")
        for request in view.running:
            out.preempt(request, "swap", "x")
        return out if view.swapped or view.running or not view.waiting else admit(view)

    error, ends = serve(driver, Script(then=plan), [arrival("a", 4, 5)], host_pages=8)
    assert error is None and ends == {"a": "aborted"}


@pytest.mark.parametrize(("hours", "stalls"), [(1, False), (10**6, True)])
def test_a_pin_that_ends_is_waited_for(hours: int, stalls: bool, few: None) -> None:
    """The context of a finished turn has all the pages; b waits for them. One until doomsday is for ever."""

    class Pins(Script):
        def on_turn_end(self, request: RequestView) -> Pin:
            return Pin(hours * 3600 * 10**9)

    def plan(view: StepView) -> StepPlan:
        for request in view.waiting:
            if not view.kv.budget().take(request, request.pending_tokens):
                return StepPlan(wake_at=view.now_ns + 10**12)
        return admit(view)

    turn = arrival("a", 8, 1, program="p", is_last_turn=False)
    error, ends = serve(VirtualDriver, Pins(then=plan), [turn, arrival("b", 8, 1, at=5000)], pages=2)
    assert ends["b"] == ("unfinished" if stalls else "completed")
    assert isinstance(error, StallError) == stalls
    if error is not None:
        assert error.why is not None and "held by the kept context of program p: 2" in error.why


def test_an_open_run_may_be_looked_into_for_ever(few: None) -> None:
    """Somebody may still come."""
    looked = 0

    def plan(view: StepView) -> StepPlan:
        nonlocal looked
        looked += 1
        if looked == 100:
            run.close()
            return admit(view)
        return StepPlan(wake_at=view.now_ns + 10 * US)

    truths: dict[str, Truth] = {}
    run = WallDriver(
        engines=[make_engine(Script(then=plan))],
        executors=[ToyExecutor(truths)],
        costs=[ToyCost()],
        workload=ListWorkload([arrival("a", 4, 1)]),
        truths=truths,
        emit=lambda record: None,
        keep_open=True,
    )
    run.run()
    assert looked >= 100


def test_periodic_reports_do_not_keep_a_run_alive(few: None) -> None:
    """The scheduler plans nothing and sets no timer; the router hears of it every microsecond."""

    class First:
        def route(self, request: Any, moment: Any, view: Any) -> Dispatch:
            return Dispatch(prefill=0)

    run = ClusterRun([arrival("a")], First(), 1, report_ns=US, schedulers=[Script()])
    error = raises_in(run.driver.run)
    assert type(error) is StallError and error.what == "engine 0 has requests that nothing will ever run"
    assert error.why is not None and error.why.endswith("30 wake-ups in a row changed nothing")
    assert run.ends()["a"][1] == "unfinished"


def test_a_router_that_holds_for_the_sake_of_a_stuck_instance(few: None) -> None:
    """Both are stuck; the instance is the cause, and is named."""

    class OneAtATime:
        def route(self, request: Any, moment: Any, view: Any) -> Dispatch | Hold:
            return Dispatch(prefill=0) if request.id == "a" else Hold(view.now_ns + US)

    run = ClusterRun([arrival("a"), arrival("b", at=5)], OneAtATime(), 1, schedulers=[Script()])
    error = raises_in(run.driver.run)
    assert type(error) is StallError and error.what == "engine 0 has requests that nothing will ever run"
    assert {name: end[1] for name, end in run.ends().items()} == {"a": "unfinished", "b": "unfinished"}
