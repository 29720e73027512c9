"""Faults that the machine over everything registered has found: the smallest case of each, written out."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.engine.test_reuse import ids, store

from servelab.core.api import KeepHost, StepPlan, StepView, TurnEnd
from servelab.core.context import Context
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import PlanError, PluginCallError
from servelab.core.plan import Tokens
from servelab.core.records import Record, RequestAdmitted, RequestFinished
from servelab.core.request import RequestView, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    ListWorkload,
    Rig,
    Script,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    find,
    make_engine,
    raises_in,
    toy_layout,
    toy_limits,
)
from servelab.core.testing.faulty import Faulty
from servelab.plugins.kvcache.contiguous import ContiguousConfig, TrueLengths


class Host(Fcfs):
    """Keeps every turn on the host, and brings back what the next one adopted."""

    unpins = False

    def on_turn_end(self, request: RequestView) -> TurnEnd:
        return KeepHost()

    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        for request in view.swapped:
            if self.unpins:
                plan.unpin("chat", "the test says so")
            else:
                plan.swap_in(request, "its turn")
        return plan


@pytest.mark.parametrize("unpins", [False, True])
def test_samples_of_a_turn_whose_context_lies_on_the_host(unpins: bool) -> None:
    """They wait for a first one that is swapped, and so not in the queue; or that is sent back to it."""
    host = Host()
    r = Rig(make_engine(host, host_pages=16, shares=True, checks="full"))
    r.arrive("a", 6, 3, program="chat", is_last_turn=False)
    r.drain()
    host.unpins = unpins
    r.arrive("b", 8, 3, program="chat", context_tokens=6, n=2)
    r.engine.check_integrity()
    r.drain()
    r.engine.check_integrity()
    assert [x.request for x in r.records if isinstance(x, RequestAdmitted)] == ["a", "b", "b#1"]
    assert {x.outcome for x in r.ends()} == {"completed"} and len(r.ends()) == 3


def test_giving_up_such_a_turn() -> None:
    r = Rig(make_engine(Host(), host_pages=16, shares=True), auto=True)
    r.arrive("a", 6, 3, program="chat", is_last_turn=False)
    r.drain()
    r.arrive("b", 8, 3, program="chat", context_tokens=6, n=2)
    r.abort("b")
    r.drain()
    r.engine.check_integrity()
    assert r.free() == (16,)


def test_a_range_that_is_full_is_not_said_to_grow() -> None:
    """Drafts beyond the true length: there are free pages, but none beside the range."""
    truths = {"a": Truth(2)}
    context = Context(
        kind="kvcache",
        name="contiguous_oracle",
        rng=Random(0),
        model=TOY_MODEL,
        hardware=None,
        limits=toy_limits(),
        oracle=truths.__getitem__,
    )
    kvcache = TrueLengths(ContiguousConfig(page_tokens=1), context)
    said: list[bool] = []

    def draft(view: StepView) -> StepPlan:
        request = find(view, "a")
        said.append(view.kv.budget().take(request, 1 + 4))
        return StepPlan([Tokens(request, 1, draft=4)])

    prompt = Script(lambda view: StepPlan([Tokens(find(view, "a"), 4)]), draft)
    r = Rig(make_engine(prompt, kvcache=kvcache), truths=truths)
    r.arrive("a", 4, 2)
    error = raises_in(r.finish)
    assert isinstance(error, PlanError) and "adjacent KV pages for request a" in str(error)
    assert said == [False]


@pytest.mark.parametrize("method", ["pages_for", "tokens_in", "choose", "released"])
@pytest.mark.parametrize("calls", range(4))
def test_a_kvcache_that_raises_is_named_wherever_it_is_called(method: str, calls: int) -> None:
    """And every request gets its terminal record, though pages are not given back any more."""
    left = calls

    def raising(kvcache: Any) -> Any:
        inner = getattr(kvcache, method)

        def call(*args: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise ZeroDivisionError("planted")
            return inner(*args)

        setattr(kvcache, method, call)
        return kvcache

    truths: dict[str, Truth] = {}
    executor, records = ToyExecutor(truths), list[Record]()
    engine = make_engine(
        Fcfs(hold=8), kvcache=raising(ToyKV()), horizon=executor.horizon, shares=True, pages=9
    )
    driver = VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[ToyCost()],
        workload=ListWorkload([arrival(f"r{k}", 9, 12, at=100 * k, n=1 + k % 2) for k in range(4)]),
        truths=truths,
        emit=records.append,
    )
    with pytest.raises(PluginCallError, match="kvcache 'toykv' raised ZeroDivisionError: planted"):
        driver.run()
    ends = [x.request for x in records if isinstance(x, RequestFinished)]
    assert len(ends) == len(set(ends)) == engine.arrived


def test_a_store_that_raises_while_it_counts_is_not_taken_for_the_scheduler() -> None:
    faulty: Any = Faulty(store())
    r = Rig(make_engine(Fcfs(), prefix=faulty), auto=False)
    r.arrive("a", 8, 3, prompt_ids=ids(8))
    faulty.armed = True
    error = raises_in(r.schedule)
    assert isinstance(error, PluginCallError)
    assert "prefix store 'toystore' raised ZeroDivisionError: planted" in str(error)


def test_on_two_lanes_a_sample_copies_the_page_that_another_lane_is_copying() -> None:
    """Its token would go where the first one's accepted draft is still to be copied from."""

    def lanes(view: StepView) -> StepPlan:
        id = "a" if view.lane == 0 else "a#1"
        return StepPlan([find(view, id).next_token])

    script = Script(
        lambda view: StepPlan([Tokens(find(view, "a"), 6)]), lambda view: StepPlan(), lanes, lanes
    )
    r = Rig(make_engine(script, shares=True, limits=toy_limits(lanes=2)))
    r.arrive("a", 6, 5, n=2)
    (shared,) = r.request("a").lease.tables[0][1:]
    r.finish()
    assert [len(b.copies) for b in r.batches] == [0, 1, 1]
    targets = [b.copies[0] for b in r.batches[1:]]
    assert [source for _, source, _ in targets] == [shared, shared]
    assert len({target for _, _, target in targets}) == 2
    r.finish(0)
    r.finish(1)
    r.engine.check_integrity()


def test_a_long_prompt_runs_where_only_its_chunks_fit_a_window() -> None:
    """Pools with a window hold the window and a step, as ``compose`` asks; no prompt need fit whole."""
    from servelab.plugins.schedulers.aggressive import Aggressive, AggressiveConfig

    limits = toy_limits(tokens=8, requests=4)
    context = Context(
        kind="scheduler", name="aggressive", rng=Random(0), model=TOY_MODEL, hardware=None, limits=limits
    )
    scheduler = Aggressive(AggressiveConfig(max_num_batched_tokens=8, max_num_seqs=4), context)
    for layout in (toy_layout(4, windows=(4,)), toy_layout(4, 4, windows=(None, 4))):
        pages = [(layout.pools[0].window_tokens and 3) or 8, 3][: len(layout.pools)]
        r = Rig(make_engine(scheduler, kvcache=ToyKV(layout), pages=pages, limits=limits, checks="full"))
        r.arrive("a", 20, 4)
        r.arrive("b", 9, 4)
        r.drain()
        assert [x.outcome for x in r.ends()] == ["completed", "completed"]
