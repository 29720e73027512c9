"""A held run and a stepped run are the same run: equal logs once held launches are written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.context import Context, seeded
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.records import Planned, Record, RequestArrived, RequestFinished, StepDone
from servelab.core.request import Arrival, Cancel, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    ListWorkload,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    step_by_step,
    toy_limits,
)
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

LIMITS = toy_limits(tokens=12, requests=4, model_len=40)
PAGES = 12  # of 4 tokens: one request always fits, four seldom do


def fcfs(hold: int) -> Fcfs:
    return Fcfs(hold=hold)


def vllm(hold: int) -> VllmV1:
    ctx = Context(
        kind="scheduler",
        name="vllm_v1",
        rng=seeded(0, "scheduler", "vllm_v1"),
        model=TOY_MODEL,
        hardware=None,
        limits=LIMITS,
    )
    return VllmV1(VllmV1Config(max_num_batched_tokens=12, max_num_seqs=4, hold_steps=hold), ctx)


def run(
    items: list[Arrival | Cancel],
    make: Callable[[int], Any],
    hold: int,
    *,
    foresight: bool = True,
    checks: Any = "basic",
    cost: ToyCost | None = None,
) -> tuple[list[Record], int]:
    """Every record, and the launches it took."""
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths, foresight=foresight)
    cost = cost or ToyCost(step_ns=100, token_ns=7, context_ns=1)
    records: list[Record] = []
    engine = make_engine(
        make(hold), pages=PAGES, limits=LIMITS, cost=cost, horizon=executor.horizon, checks=checks
    )
    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    engine.check_integrity()
    assert engine.ledger.free() == engine.ledger.total()
    assert not truths, "truths of ended requests are forgotten"
    ends = [x.request for x in records if isinstance(x, RequestFinished)]
    assert sorted(ends) == sorted(x.request for x in records if isinstance(x, RequestArrived))
    return records, len(executor.launched)


@st.composite
def traffic(draw: st.DrawFn, cancels: bool) -> list[Arrival | Cancel]:
    items: list[Arrival | Cancel] = []
    now = 0
    for k in range(draw(st.integers(1, 7))):
        now += draw(st.sampled_from([0, 0, 1, 50, 107, 114, 600, 2500]))
        out = arrival(
            f"r{k}",
            draw(st.integers(1, 30)),
            draw(st.integers(1, 25)),
            cap=draw(st.integers(1, 25)),
            at=now,
        )
        items.append(out)
        if cancels and draw(st.integers(0, 2)) == 0:
            items.append(Cancel(now + draw(st.integers(0, 3000)), f"r{k}"))
    return sorted(items, key=lambda x: x.time_ns)


@pytest.mark.parametrize("make", [fcfs, vllm])
@settings(max_examples=60)
@given(items=traffic(cancels=False))
def test_held_runs_equal_stepped_runs(make: Callable[[int], Any], items: list[Arrival | Cancel]) -> None:
    _compare(make, items)


@pytest.mark.parametrize("make", [fcfs, vllm])
@settings(max_examples=60)
@given(items=traffic(cancels=True))
def test_held_runs_equal_stepped_runs_when_clients_give_up(
    make: Callable[[int], Any], items: list[Arrival | Cancel]
) -> None:
    _compare(make, items)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("make", [fcfs, vllm])
@settings(max_examples=3000)
@given(items=traffic(cancels=True))
def test_held_runs_equal_stepped_runs_long(make: Callable[[int], Any], items: list[Arrival | Cancel]) -> None:
    _compare(make, items)


def step_numbers(records: list[Record]) -> list[int]:
    return [x.step + k for x in records if isinstance(x, StepDone) for k in range(len(x.ends_ns))]


def _compare(make: Callable[[int], Any], items: list[Arrival | Cancel]) -> None:
    stepped, launches = run(items, make, 1)
    reference = step_by_step(stepped)
    numbers = step_numbers(stepped)
    assert numbers == list(range(len(numbers)))
    for hold in (3, 1000):
        for foresight in (True, False):
            held, fewer = run(items, make, hold, foresight=foresight)
            assert step_by_step(held) == reference
            assert step_numbers(held) == numbers
            assert fewer <= launches
    full, _ = run(items, make, 1000, checks="full")
    assert step_by_step(full) == reference


def test_holding_is_worth_it() -> None:
    """What the comparison compares is really held: one launch instead of ninety."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 20, cap=30)]
    assert run(items, vllm, 1)[1] == 20
    assert run(items, vllm, 1000)[1] == 2
    assert run(items, vllm, 1000, foresight=False)[1] == 20


@pytest.mark.parametrize(
    ("at", "second_starts"), [(520, 520), (519, 520), (521, 630), (629, 630), (630, 630)]
)
def test_an_arrival_interrupts_at_a_step_boundary(at: int, second_starts: int) -> None:
    """Steps end at 190 + 110 k: 520, 630."""
    cost = ToyCost(step_ns=100, token_ns=10)
    items: list[Arrival | Cancel] = [arrival("a", 9, 20, cap=30), arrival("b", 4, 1, at=at)]
    for hold, foresight in ((1, True), (1000, True), (1000, False)):
        records, _ = run(items, vllm, hold, foresight=foresight, cost=cost)
        (first,) = [x for x in records if isinstance(x, StepDone) and "b" in x.requests]
        assert first.start_ns == second_starts, (hold, foresight)


def test_a_hold_ends_at_its_time_exactly_on_a_boundary_or_after_the_step_in_progress() -> None:
    from servelab.core.families.scheduler import StepView
    from servelab.core.plan import Hold, StepPlan, Tokens
    from servelab.core.testing.fakes import Script

    def until(time_ns: int, foresight: bool) -> list[int]:
        asked: list[int] = []

        def plan(view: StepView) -> StepPlan:
            asked.append(view.now_ns)
            if view.waiting:
                return StepPlan([Tokens(x, x.pending_tokens) for x in view.waiting])
            out = StepPlan([x.next_token for x in view.running])
            if len(asked) == 2:
                out.hold = Hold(1000, until_ns=time_ns)
            return out

        run(
            [arrival("a", 4, 9)],
            lambda _: Script(then=plan),
            1,
            foresight=foresight,
            cost=ToyCost(step_ns=100, token_ns=0),
        )
        return asked

    for foresight in (True, False):
        assert until(400, foresight)[:4] == [0, 100, 400, 500]
        assert until(401, foresight)[:4] == [0, 100, 500, 600]
        assert until(399, foresight)[:4] == [0, 100, 400, 500]


def test_planned_records_of_a_held_run_are_fewer_but_in_step() -> None:
    items: list[Arrival | Cancel] = [arrival("a", 4, 20, cap=30), arrival("b", 4, 10, cap=30)]
    records, _ = run(items, vllm, 1000)
    planned = [x for x in records if isinstance(x, Planned)]
    assert [(x.step, x.held) for x in planned] == [(0, 1), (1, 9), (10, 10)]
    assert [x.step for x in records if isinstance(x, StepDone)] == [0, 1, 10]
