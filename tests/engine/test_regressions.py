"""Faults found by looking for them: the smallest case of each; the name says what is right."""

from __future__ import annotations

import threading
from time import sleep
from typing import Any

import pytest
from tests.draws import seeds

from servelab.core.engine.ledger import Ledger
from servelab.core.engine.state import Request
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import LedgerError, PlanError, PluginCallError
from servelab.core.events import InstanceLost
from servelab.core.families.scheduler import StepView
from servelab.core.layout import Capacity
from servelab.core.plan import Hold, StepPlan, Tokens
from servelab.core.records import Record, RequestFinished, StepDone
from servelab.core.request import Arrival, Cancel, RequestSpec, RequestView, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    ListWorkload,
    RandomPlans,
    Rig,
    Script,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    find,
    make_engine,
    raises_in,
    step_by_step,
    toy_limits,
)

MS = 1_000_000


def play(rig: Rig, *plans: Any) -> None:
    for plan in plans:
        ask(rig, plan)
        rig.schedule()


def ask(rig: Rig, plan: Any) -> None:
    script: Any = rig.script  # type: ignore[attr-defined]
    script.steps.append(plan)


def scripted(**kwargs: Any) -> Rig:
    script = Script()
    rig = Rig(make_engine(script, **kwargs), auto=False)
    rig.script = script  # type: ignore[attr-defined]
    return rig


def work(id: str, n: int, **how: Any) -> Any:
    return lambda view: StepPlan([Tokens(find(view, id), n, **how)])


def hold(steps: int, *ids: str) -> Any:
    return lambda view: StepPlan([find(view, id).next_token for id in ids], hold=Hold(steps))


def virtual(
    items: list[Arrival | Cancel],
    scheduler: Any,
    *,
    foresight: bool = True,
    post: tuple[int, Any] | None = None,
    error: type[BaseException] | None = None,
    executor: type[ToyExecutor] = ToyExecutor,
    **kwargs: Any,
) -> tuple[list[Record], VirtualDriver]:
    truths: dict[str, Truth] = {}
    runner, cost = executor(truths, foresight=foresight), ToyCost(step_ns=100, token_ns=0)
    records: list[Record] = []
    engine = make_engine(scheduler, horizon=runner.horizon, cost=cost, **kwargs)
    driver = VirtualDriver(
        engines=[engine],
        executors=[runner],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    )
    if post is not None:
        driver.post(*post)
    if error is None:
        driver.run()
    else:
        with pytest.raises(error):
            driver.run()
    return records, driver


# ---------------------------------------------------------------------- holds


@pytest.mark.parametrize("at", [450, 500], ids=["inside a step", "on a boundary"])
def test_a_client_that_gives_up_during_a_hold_keeps_the_tokens_of_the_steps_before(at: int) -> None:
    """Step k ends at 100 k: at 450 four tokens have been sent, at 500 five."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 50), Cancel(at, "a")]
    stepped, _ = virtual(items, Fcfs(), pages=64)
    held, _ = virtual(items, Fcfs(hold=100), pages=64)
    (end,) = [x for x in held if isinstance(x, RequestFinished)]
    assert end.output_tokens == at // 100
    assert step_by_step(held) == step_by_step(stepped)


@pytest.mark.parametrize("at", [450, 500], ids=["inside a step", "on a boundary"])
def test_an_instance_lost_during_a_hold_keeps_the_tokens_of_the_steps_before(at: int) -> None:
    """A step that ends at the very instant of the loss is lost: see the order of events."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 50)]
    lost = (at, InstanceLost())
    stepped, _ = virtual(items, Fcfs(), pages=64, post=lost)
    held, _ = virtual(items, Fcfs(hold=100), pages=64, post=lost)
    assert step_by_step(held) == step_by_step(stepped)


def test_planning_ahead_a_hold_runs_one_step_per_launch_and_promises_nothing() -> None:
    """The next step is queued before the one in flight has ended: there is nothing to look ahead to."""
    rig = scripted(pages=8, limits=toy_limits(in_flight=2))
    rig.arrive("a", 4, 50)
    play(rig, work("a", 4), hold(20, "a"))
    assert ([b.steps for b in rig.flights[0]], rig.free()) == ([1, 1], (6,))
    rig.finish()
    rig.schedule()
    assert rig.script.calls == 3, "two plans and an empty one; not asked again while it holds"  # type: ignore[attr-defined]
    rig.engine.check_integrity()


def test_a_run_ends_when_its_last_event_does() -> None:
    """A hold that an abort cut short, and a timer nobody waits for, must not move the clock."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 50), Cancel(450, "a")]
    _, stepped = virtual(items, Fcfs(), pages=64)
    _, held = virtual(items, Fcfs(hold=100), pages=64)
    assert held.now_ns == stepped.now_ns == 500

    def wakes(view: StepView) -> StepPlan:
        out = Fcfs().plan(view)
        out.wake_at = 1_000_000
        return out

    _, woken = virtual([arrival("a", 4, 2)], Script(then=wakes))
    assert woken.now_ns == 200


def test_work_lists_may_be_reused_by_their_scheduler() -> None:
    """The core repeats what the plan was, not what its list became."""
    kept = StepPlan()

    def plan(view: StepView) -> StepPlan:
        kept.work.clear()
        kept.hold = None
        if view.waiting:
            kept.work += [Tokens(x, x.pending_tokens) for x in view.waiting]
        elif view.running and view.lane == 0:
            kept.work += [x.next_token for x in view.running]
            kept.hold = Hold(9)
        return kept

    rig = Rig(make_engine(Script(then=plan), horizon=lambda b, s: 1, limits=toy_limits(lanes=2)))
    rig.arrive("a", 4, 50)
    rig.finish(0)
    rig.schedule()
    rig.finish(0)
    assert [r.id for r in rig.batches[-1].requests] == ["a"]


# ---------------------------------------------------------------------- validation


def test_preempted_pages_that_will_be_withdrawn_are_not_free() -> None:
    """Found by the machine: the pool shrinks under a; preempting a gives nothing to w."""
    rig = scripted(pages=2)
    rig.arrive("a", 8, 50)
    rig.arrive("w", 8, 50)
    play(rig, work("a", 8))
    rig.finish()
    rig.engine.ledger.device[0].resize(-2)

    def plan(view: StepView) -> StepPlan:
        out = StepPlan([Tokens(find(view, "w"), 8)])
        out.preempt(find(view, "a"), "recompute", "x")
        return out

    ask(rig, plan)
    error = raises_in(rig.schedule)
    assert type(error) is PlanError, error
    rig.engine.check_integrity()
    assert list(rig.engine.running) == ["a"], "nothing of a refused plan is applied"


def test_the_budget_view_does_not_count_pages_that_will_be_withdrawn() -> None:
    seen = []

    def look(view: StepView) -> StepPlan:
        pages = view.kv.budget()
        for x in view.running:
            pages.give_back(x)
        seen.append(pages.free)
        return StepPlan()

    rig = scripted(pages=2)
    rig.arrive("a", 4, 50)
    rig.arrive("b", 4, 50)
    play(rig, lambda v: StepPlan([Tokens(find(v, "a"), 4), Tokens(find(v, "b"), 4)]))
    rig.finish()
    rig.engine.ledger.device[0].resize(-1)
    play(rig, look)
    assert seen == [(1,)]


def test_a_token_mask_reaches_the_executor() -> None:
    rig = scripted()
    rig.arrive("a", 4)
    play(rig, work("a", 4, token_mask="0110"))
    assert [x.token_mask for x in rig.batches[0].extras.values()] == ["0110"]


def test_a_barrier_group_does_not_jump_a_chunk_between_layers() -> None:
    rig = scripted()
    rig.arrive("a", 4)
    play(rig, work("a", 2, layers=(0, 2)))
    rig.finish()
    ask(rig, work("a", 2, barrier_group="g"))
    error = raises_in(rig.schedule)
    assert error.what == "request a is at layer 2 of a chunk"


MALFORMED: dict[str, Any] = {
    "an id instead of a view": lambda v: StepPlan([Tokens("a", 1)]),  # type: ignore[arg-type]
    "None instead of a view": lambda v: StepPlan([Tokens(None, 1)]),  # type: ignore[arg-type]
    "half a token": lambda v: StepPlan([Tokens(find(v, "a"), 1.5)]),  # type: ignore[arg-type]
    "a count as text": lambda v: StepPlan([Tokens(find(v, "a"), "2")]),  # type: ignore[arg-type]
    "an unknown advance": lambda v: StepPlan([Tokens(find(v, "a"), 1, advance="back")]),  # type: ignore[arg-type]
    "half a draft": lambda v: StepPlan([Tokens(find(v, "a"), 4, draft=1.5)]),  # type: ignore[arg-type]
    "one layer number": lambda v: StepPlan([Tokens(find(v, "a"), 4, layers=2)]),  # type: ignore[arg-type]
    "a view instead of a verdict": lambda v: StepPlan(rejections=[find(v, "a")]),  # type: ignore[list-item]
    "a view instead of a preemption": lambda v: StepPlan(preemptions=[find(v, "a")]),  # type: ignore[list-item]
    "no work list": lambda v: StepPlan(work=None),  # type: ignore[arg-type]
    "a float time": lambda v: StepPlan(wake_at=v.now_ns + 0.5),
    "half a step held": lambda v: StepPlan([Tokens(find(v, "d"), 1)], hold=Hold(2.5)),  # type: ignore[arg-type]
    "a hold until half a nanosecond": lambda v: StepPlan(
        [Tokens(find(v, "d"), 1)],
        hold=Hold(2, until_ns=v.now_ns + 7.5),
    ),
    "a hold that is a number": lambda v: StepPlan([Tokens(find(v, "a"), 4)], hold=5),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_plan_is_a_plan_error(name: str) -> None:
    rig = scripted()
    rig.arrive("a", 4)
    rig.arrive("d", 1)
    ask(rig, MALFORMED[name])
    with pytest.raises(PlanError) as info:
        rig.schedule()
    assert info.value.where.startswith("scheduler 'toy', step 0, lane 0")
    assert not rig.batches
    rig.engine.check_integrity()


# ---------------------------------------------------------------------- integrity


def test_drafts_in_flight_are_no_corruption() -> None:
    """Found by the machine: integrity was checked against drafts verified, not drafts in flight."""
    rig = scripted()
    rig.arrive("a", 4, 50)
    play(rig, work("a", 4, draft=2))
    rig.engine.check_integrity()


@pytest.mark.parametrize(
    "plant",
    [
        lambda book, r: setattr(book.device[0], "promised", 1),
        lambda book, r: setattr(r.lease, "in_flight", -1),
        lambda book, r: setattr(book.device[0], "withdraw", 99),
        lambda book, r: setattr(r.lease, "released", True),
    ],
    ids=[
        "a promise nobody made",
        "a fence below zero",
        "more to withdraw than is held",
        "an idle released lease",
    ],
)
def test_integrity_also_checks(plant: Any) -> None:
    rig = scripted(pages=8)
    rig.arrive("a", 4, 50)
    play(rig, work("a", 4))
    rig.finish()
    rig.engine.check_integrity()
    plant(rig.engine.ledger, rig.request("a"))
    with pytest.raises(LedgerError):
        rig.engine.check_integrity()


def test_the_source_of_a_copy_is_fenced_like_any_page_a_launch_reads() -> None:
    """A forked child's launch copies its parent's page; the parent ends: the page is not handed out."""
    book = Ledger(ToyKV(), "toykv", ToyKV().layout(TOY_MODEL), Capacity(device_pages=(2,)))

    def request(id: str) -> Request:
        return Request(RequestSpec(id=id, prompt_tokens=9, max_new_tokens=9), 0, 9, book.open(id))

    parent, child = request("p"), request("c")
    book.reserve(parent, 2)
    parent.computed = child.computed = 2
    book.fork(parent, child)
    book.reserve(child, 1)  # queues the copy of page 0 to page 1
    child.lease.in_flight += 1
    assert book.take_copies() == ((0, 0, 1),)
    book.release(parent.lease)
    assert book.free() == (0,), "page 0 is still to be read by the child's launch"
    book.landed([child.lease])
    assert book.free() == (1,)


# ------------------------------------------------------- plugins that raise, terminal records


def ends(records: list[Record]) -> list[tuple[str, str]]:
    return [(x.request, x.outcome) for x in records if isinstance(x, RequestFinished)]


def test_terminal_records_given_before_a_plugin_raises_in_the_same_call_are_not_lost() -> None:
    """The scheduler rejects a in a plan without work, is asked again at once, and raises."""

    def reject(view: StepView) -> StepPlan:
        out = StepPlan()
        out.reject(find(view, "a"), "no")
        return out

    def boom(view: StepView) -> StepPlan:
        raise ValueError("boom")

    records, _ = virtual([arrival("a"), arrival("b")], Script(reject, boom), error=PluginCallError)
    assert ends(records) == [("a", "rejected"), ("b", "unfinished")]


class Deaf(Fcfs):
    def on_event(self, record: Record) -> None:
        raise ValueError("cannot hear")


def test_a_scheduler_that_raises_in_on_event_is_named() -> None:
    rig = Rig(make_engine(Deaf()))
    with pytest.raises(PluginCallError, match="scheduler 'toy' raised ValueError: cannot hear"):
        rig.arrive("a")


def test_a_scheduler_that_raises_in_on_event_does_not_keep_requests_from_ending() -> None:
    class DeafToSteps(Deaf):
        def on_event(self, record: Record) -> None:
            if isinstance(record, StepDone | RequestFinished):
                super().on_event(record)

    records, _ = virtual([arrival("a"), arrival("b", at=5)], DeafToSteps(), error=Exception)
    assert ends(records) == [("a", "unfinished"), ("b", "unfinished")]


def test_a_kvcache_that_raises_is_named() -> None:
    class Broken(ToyKV):
        def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> list[int]:
            raise IndexError("pop from empty list")

    records, _ = virtual([arrival("a")], Fcfs(), error=PluginCallError, kvcache=Broken())
    assert ends(records) == [("a", "unfinished")]


def test_an_executor_that_raises_is_named_on_the_virtual_clock_too() -> None:
    class Breaks(ToyExecutor):
        def launch(self, batch: Any, steps: int) -> Any:
            raise RuntimeError("out of memory")

    records, _ = virtual([arrival("a")], Fcfs(), error=PluginCallError, executor=Breaks)
    assert ends(records) == [("a", "unfinished")]


# ---------------------------------------------------------------------- views


def test_token_times_cannot_be_changed_through_a_view() -> None:
    rig = scripted()
    rig.arrive("a", 4, 50)
    play(rig, work("a", 4))
    rig.finish()
    times: Any = rig.request("a").view.token_times_ns
    with pytest.raises((AttributeError, TypeError, PluginCallError)):
        times.append(1)
    assert len(rig.request("a").token_times) == 1


def test_what_if_prices_of_special_work_are_those_that_are_charged() -> None:
    asked: list[int] = []

    def priced(plan: Any) -> Any:
        def inner(view: StepView) -> StepPlan:
            out: StepPlan = plan(view)
            asked.append(view.cost.step_ns([x for x in out.work if isinstance(x, Tokens)]))
            return out

        return inner

    cost = ToyCost(context_ns=3)
    rig = scripted(cost=cost)
    rig.arrive("a", 8, 50)
    for plan in (
        work("a", 5, layers=(0, 2)),
        work("a", 5, layers=(2, 4)),
        work("a", 2, advance="rewrite"),
        work("a", 3, draft=2),
        work("a", 1, advance="none"),
    ):
        play(rig, priced(plan))
        rig.finish()
    assert asked == [cost.price(b, 1)[0] for b in rig.batches]


# ---------------------------------------------------------------------- lanes


def test_vllm_v1_keeps_to_the_device_when_it_has_two_lanes(vllm: Any) -> None:
    """Found by the machine: two lanes run four requests; when both are free one plan names all four."""
    limits = toy_limits(requests=2, lanes=2)
    rig = Rig(make_engine(vllm(limits), limits=limits, pages=64), auto=False)
    for id in "abcd":
        rig.arrive(id, 4, 50)
    rig.schedule()
    rig.finish(0)
    rig.finish(1)
    rig.schedule()
    assert all(len(b.requests) <= 2 for b in rig.batches)


def test_planning_ahead_a_held_run_equals_a_stepped_one() -> None:
    """With ``max_in_flight=2`` the step after an end is queued before the end is known, held or not."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 4), arrival("b", 4, 9)]
    limits = toy_limits(in_flight=2)
    stepped, _ = virtual(items, Fcfs(), pages=64, limits=limits)
    single, _ = virtual(items, Fcfs(hold=100), pages=64, limits=limits, foresight=False)
    held, _ = virtual(items, Fcfs(hold=100), pages=64, limits=limits)
    assert step_by_step(single) == step_by_step(stepped)
    assert step_by_step(held) == step_by_step(stepped)


def test_holding_does_not_reorder_what_ends_together_on_two_lanes() -> None:
    """a steps every 50 ns on lane 0; b's prompt runs on lane 1 from 60 to 150, when a step of a ends too."""

    class Lanes(ToyCost):
        def price(self, batch: Any, steps: int) -> list[int]:
            return [50 if batch.lane == 0 else 90] * steps

    def run(hold: int) -> list[Any]:
        truths: dict[str, Truth] = {}
        executor, cost, records = ToyExecutor(truths), Lanes(), list[Record]()
        VirtualDriver(
            engines=[
                make_engine(Fcfs(hold=hold), horizon=executor.horizon, cost=cost, limits=toy_limits(lanes=2))
            ],
            executors=[executor],
            costs=[cost],
            workload=ListWorkload([arrival("a", 4, 9), arrival("b", 4, 2, at=60)]),
            truths=truths,
            emit=records.append,
        ).run()
        return step_by_step(records)

    assert run(100) == run(1)


# ------------------------------------------------------------------ the driver fails


@pytest.mark.parametrize("what", ["the cost model", "the workload", "an observer"])
def test_terminal_records_are_not_lost_when_this_fails_between_the_commands_of_one_call(what: str) -> None:
    """The engine has ended a request; something else fails before its record has been passed on."""

    def plan(view: StepView) -> StepPlan:
        out = StepPlan()
        if what == "the cost model" and view.lane == 1:
            out.reject(find(view, "b"), "no")
        else:
            out.work = [Tokens(x, x.pending_tokens) for x in view.waiting if x.id == "a" or what[4] != "c"]
        return out

    def fail(*args: Any) -> Any:
        raise OSError("disk full")

    truths: dict[str, Truth] = {}
    executor, cost = ToyExecutor(truths), ToyCost()
    if what == "the cost model":
        setattr(cost, "price", fail)  # noqa: B010 - a method
    records: list[Record] = []

    def emit(record: Record) -> None:
        if what == "an observer" and isinstance(record, StepDone):
            fail()
        records.append(record)

    engine = make_engine(Script(then=plan), cost=cost, limits=toy_limits(lanes=2), horizon=executor.horizon)
    driver = VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(
            [arrival("a", 4, 1), arrival("b", 4, 1)], fail if what == "the workload" else None
        ),
        truths=truths,
        emit=emit,
    )
    with pytest.raises((OSError, PluginCallError)):
        driver.run()
    assert sorted(id for id, _ in ends(records)) == ["a", "b"]


# ---------------------------------------------------------------------- wall


def test_records_stay_in_time_order_when_the_wall_driver_is_late() -> None:
    """While an observer sleeps, an arrival (due at 5 ms) and the end of a step (10 ms) both become due."""
    truths: dict[str, Truth] = {}
    executor, cost = ToyExecutor(truths), ToyCost(step_ns=10 * MS, token_ns=0)
    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        if len(records) == 2:
            sleep(0.05)

    WallDriver(
        engines=[make_engine(Fcfs(), horizon=executor.horizon, cost=cost)],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload([arrival("a", 4, 2), arrival("b", 4, 1, at=5 * MS)]),
        truths=truths,
        emit=emit,
    ).run()
    times = [x.t_ns for x in records]
    assert times == sorted(times)


def swapped_out(view: StepView) -> StepPlan:
    out = StepPlan()
    out.preempt(find(view, "a"), "swap", "x")
    return out


@pytest.mark.parametrize("what", ["a transfer", "two launches in flight"])
def test_stopping_a_wall_run_does_not_wait_for(what: str) -> None:
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths)
    slow = 3600 * 10**9
    cost = ToyCost(step_ns=slow if what != "a transfer" else MS, token_ns=0, transfer_ns=slow)
    scheduler: Any = Script(Fcfs().plan, swapped_out) if what == "a transfer" else Fcfs()
    engine = make_engine(
        scheduler, cost=cost, host_pages=8, limits=toy_limits(in_flight=1 if what == "a transfer" else 2)
    )
    driver = WallDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload([arrival("a", 4, 50)]),
        truths=truths,
        emit=lambda record: None,
    )
    threading.Timer(0.1, lambda: driver._mail.put(KeyboardInterrupt())).start()
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    assert not [t for t in threading.enumerate() if t.name.startswith("servelab engine")]


# ---------------------------------------------------------------------- random plans


def test_the_budget_view_knows_what_a_swap_in_takes() -> None:
    """Room for drafts that were refused goes out and comes back with the request: 3 pages for 5 tokens."""
    rig = scripted(pages=6, host_pages=6)
    rig.arrive("a", 4, 50)
    rig.arrive("w", 12, 50)
    play(rig, work("a", 4, draft=6))
    rig.finish(outcomes=[rig.executor.outcome(rig.batches[-1], 0, 1, 0)])
    out = StepPlan()
    out.preempt(rig.request("a").view, "swap", "x")
    play(rig, lambda view: out)
    rig.finish_transfer()
    assert rig.request("a").view.host_pages == (3,)
    seen: list[Any] = []

    def swap_in_and_run(view: StepView) -> StepPlan:
        plan, pages = StepPlan(), view.kv.budget()
        assert pages.take(find(view, "a"), 1)
        plan.swap_in(find(view, "a"), "x")
        seen.append(pages.free)
        return plan

    play(rig, swap_in_and_run)
    assert seen == [(3,)]
    assert rig.free() == (3,)


def test_the_random_scheduler_can_account_for_swap_ins_exactly() -> None:
    """``KVBudget.take`` counts the pages a swapped request brings back with its next token."""
    from random import Random

    for seed in seeds(30):
        rig = Rig(make_engine(RandomPlans(Random(seed)), pages=6, host_pages=6))
        for k in range(5):
            rig.arrive(f"r{k}", 1 + k, 4)
        for _ in range(60):
            lanes = [lane for lane, flights in rig.flights.items() if flights]
            if lanes:
                rig.finish()
            elif rig.transfers:
                rig.finish_transfer()
            else:
                rig.tick()
        rig.engine.ledger.check_integrity()


def test_steps_of_a_cancelled_request_in_a_hold_show_what_it_was_sent() -> None:
    records, _ = virtual([arrival("a", 4, 50), Cancel(450, "a")], Fcfs(hold=100), pages=64)
    (end,) = [x for x in records if isinstance(x, RequestFinished)]
    emitted = sum(n for x in records if isinstance(x, StepDone) for n in x.emitted)
    assert emitted == end.output_tokens == 4


@pytest.mark.parametrize(
    "keep",
    [
        lambda view: view,
        lambda view: view.running,
        lambda view: view.waiting,
        lambda view: view.kv,
        lambda view: view.cost,
        lambda view: view.contexts,
    ],
    ids=["the view", "a queue", "another queue", "kv", "cost", "contexts"],
)
def test_with_full_checks_no_part_of_a_step_view_outlives_its_call(keep: Any) -> None:
    kept: list[Any] = []

    def plan(view: StepView) -> StepPlan:
        part = keep(view)
        kept.append(part)
        assert bool(part) in (True, False), "usable during the call"
        return StepPlan()

    for checks, fails in (("full", True), ("basic", False)):
        kept.clear()
        rig = scripted(checks=checks)
        ask(rig, plan)
        rig.arrive("a", 4)
        rig.schedule()
        (part,) = kept
        if fails:
            assert "outside the call it was given to" in str(raises_in(lambda part=part: part.anything))
        else:
            assert not hasattr(part, "anything")
