"""A plan is executed exactly as given, or refused with the exact reason and nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from servelab.core.errors import PlanError
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Background, Hold, Outcome, Preemption, StepPlan, Tokens
from servelab.core.records import Planned, RequestAdmitted, RequestPreempted, StepDone
from servelab.core.request import Phase
from servelab.core.testing.fakes import (
    Fcfs,
    Rig,
    Script,
    ToyKV,
    find,
    make_engine,
    raises_in,
    toy_layout,
    toy_limits,
)

Plan = Callable[[StepView], StepPlan]


def run(*items: tuple[str, int]) -> Plan:
    return lambda view: StepPlan([Tokens(find(view, id), n) for id, n in items])


def work(id: str, n: int, **how: Any) -> Plan:
    return lambda view: StepPlan([Tokens(find(view, id), n, **how)])


def verdict(kind: str, id: str, *args: Any) -> Plan:
    def plan(view: StepView) -> StepPlan:
        out = StepPlan()
        getattr(out, kind)(find(view, id), *args)
        return out

    return plan


def both(*plans: Plan) -> Plan:
    def plan(view: StepView) -> StepPlan:
        out = StepPlan()
        for part in plans:
            x = part(view)
            for name in ("work", "preemptions", "swap_ins", "rejections", "aborts", "deferred"):
                getattr(out, name).extend(getattr(x, name))
            out.hold, out.wake_at = x.hold or out.hold, x.wake_at or out.wake_at
        return out

    return plan


def held(plan: Plan, steps: int, until: int | None = None) -> Plan:
    def inner(view: StepView) -> StepPlan:
        out = plan(view)
        out.hold = Hold(steps, until)
        return out

    return inner


def state(rig: Rig) -> object:
    engine = rig.engine
    ledger = engine.ledger
    return (
        {id: (r.view.freeze(), r.launches, r.expected, r.layer_chunk) for id, r in engine.requests.items()},
        [list(queue) for queue in engine.queues],
        [[list(t) for t in lease.tables] for lease in ledger._leases.values()],
        [[list(t) for t in lease.host_tables] for lease in ledger._leases.values()],
        ledger.free(),
        ledger.free("host"),
        engine.step,
        engine.in_flight,
        dict(engine.ended),
        len(rig.records),
    )


def refused(rig: Rig, plan: Plan) -> PlanError:
    """The refusal of the next plan, with nothing of it applied."""
    script: Any = rig.script  # type: ignore[attr-defined]
    script.steps.append(plan)
    before = state(rig)
    error = raises_in(rig.schedule)
    assert type(error) is PlanError
    assert state(rig) == before, "a refused plan changed something"
    rig.engine.check_integrity()
    return error


@pytest.fixture
def rig() -> Rig:
    """Request a is running with 6 prompt tokens computed and 1 generated; w waits with 8. Step 1 is next."""
    return build()


def build(**kwargs: Any) -> Rig:
    script = Script()
    kwargs.setdefault("pages", 6)
    kwargs.setdefault("limits", toy_limits(tokens=20, requests=3))
    out = Rig(make_engine(script, **kwargs), auto=False)
    out.script = script  # type: ignore[attr-defined]
    out.arrive("a", 6, 50, cap=60)
    play(out, run(("a", 6)))
    out.finish()
    out.arrive("w", 8, 50, cap=60)
    return out


def play(rig: Rig, *plans: Plan) -> None:
    """One Schedule per plan."""
    for plan in plans:
        rig.script.steps.append(plan)  # type: ignore[attr-defined]
        rig.schedule()


WHERE = "scheduler 'toy', step 1, lane 0"

REFUSALS: dict[str, tuple[Any, str, str, str, str | None]] = {
    "not a plan": (
        lambda view: [Tokens(find(view, "a"), 1)],
        "plan() returned list",
        "a StepPlan is expected",
        "return StepPlan()",
        None,
    ),
    "named twice": (
        run(("a", 1), ("a", 1)),
        "request a is named twice in one plan",
        "second time as work",
        "one decision per request and lane",
        "a",
    ),
    "run and preempted": (
        both(verdict("preempt", "a", "recompute", "x"), run(("a", 1))),
        "request a is named twice in one plan",
        "second time as work",
        "one decision per request and lane",
        "a",
    ),
    "aborted and preempted": (
        both(verdict("abort", "a", "x"), verdict("preempt", "a", "pause", "x")),
        "request a is named twice in one plan",
        "second time as preemption",
        "one decision per request and lane",
        "a",
    ),
    "rejecting a running request": (
        verdict("reject", "a", "x"),
        "request a cannot be rejected",
        "its phase is running",
        "abort admitted requests",
        "a",
    ),
    "preempting a waiting request": (
        verdict("preempt", "w", "recompute", "x"),
        "request w cannot be preempted (recompute)",
        "its phase is waiting",
        "preempt running requests (or paused ones, by recompute or swap)",
        "w",
    ),
    "swapping without a host tier": (
        verdict("preempt", "a", "swap", "x"),
        "request a cannot be swapped out",
        "this run has no host tier",
        "preempt by recompute, or give the executor host pages",
        "a",
    ),
    "unknown mode": (
        lambda view: StepPlan(preemptions=[Preemption(find(view, "a"), "drop", "x")]),  # type: ignore[arg-type]
        "unknown preemption mode 'drop'",
        "known: recompute, swap, pause",
        "use one of them",
        "a",
    ),
    "swapping in what is not swapped": (
        verdict("swap_in", "a", "x"),
        "request a cannot be swapped in",
        "its phase is running",
        "use view.swapped",
        "a",
    ),
    "no token": (
        run(("w", 0)),
        "request w is to run 0 tokens",
        "it has 8 pending",
        "plan between 1 and pending_tokens",
        "w",
    ),
    "more than pending": (
        run(("w", 9)),
        "request w is to run 9 tokens",
        "it has 8 pending",
        "plan between 1 and pending_tokens",
        "w",
    ),
    "two decodes at once": (
        run(("a", 2)),
        "request a is to run 2 tokens",
        "it has 1 pending",
        "plan between 1 and pending_tokens",
        "a",
    ),
    "rewriting what is not computed": (
        work("a", 7, advance="rewrite"),
        "request a cannot rewrite 7 tokens",
        "6 are computed; layers and drafts need advance='append'",
        "rewrite at most computed_tokens",
        "a",
    ),
    "drafts without advance": (
        work("a", 1, advance="none", draft=1),
        "request a cannot none 1 tokens",
        "6 are computed; layers and drafts need advance='append'",
        "rewrite at most computed_tokens",
        "a",
    ),
    "drafts before the last pending token": (
        work("w", 7, draft=2),
        "request w cannot verify 2 drafts after 7 tokens",
        "drafts follow the last pending token (8) of a request that is not in flight",
        "draft only when n equals pending_tokens, without layer ranges",
        "w",
    ),
    "negative drafts": (
        work("a", 1, draft=-1),
        "request a cannot verify -1 drafts after 1 tokens",
        "drafts follow the last pending token (1) of a request that is not in flight",
        "draft only when n equals pending_tokens, without layer ranges",
        "a",
    ),
    "drafts in a layer range": (
        work("w", 8, draft=1, layers=(0, 2)),
        "request w cannot verify 1 drafts after 8 tokens",
        "drafts follow the last pending token (8) of a request that is not in flight",
        "draft only when n equals pending_tokens, without layer ranges",
        "w",
    ),
    "a layer range from the middle": (
        work("w", 8, layers=(1, 4)),
        "request w is to run 8 tokens in layers 1 to 4",
        "its chunk of 8 tokens is at layer 0 of 4",
        "continue a chunk at its layer cursor with the same n",
        "w",
    ),
    "more layers than there are": (
        work("w", 8, layers=(0, 5)),
        "request w is to run 8 tokens in layers 0 to 5",
        "its chunk of 8 tokens is at layer 0 of 4",
        "continue a chunk at its layer cursor with the same n",
        "w",
    ),
    "no layer": (
        work("w", 8, layers=(0, 0)),
        "request w is to run 8 tokens in layers 0 to 0",
        "its chunk of 8 tokens is at layer 0 of 4",
        "continue a chunk at its layer cursor with the same n",
        "w",
    ),
    "more than pending in a layer range": (
        work("w", 9, layers=(0, 2)),
        "request w is to run 9 tokens",
        "it has 8 pending",
        "plan between 1 and pending_tokens",
        "w",
    ),
    "a barrier group of unequal counts": (
        both(work("a", 1, barrier_group="g"), work("w", 2, barrier_group="g")),
        "request w runs 2 tokens in barrier group 'g'",
        "others of the group run 1",
        "give all items of a group the same n",
        "w",
    ),
    "more KV than is free": (
        lambda view: StepPlan([Tokens(find(view, "w"), 8), Tokens(find(view, "a"), 1, draft=11)]),
        "the plan needs 5 KV pages up to request a",
        "4 are free in pool 'kv0' after its preemptions",
        "preempt more, or use view.kv.budget() while planning",
        "a",
    ),
    "more tokens than a launch takes": (
        both(run(("w", 8)), work("a", 1, draft=12)),
        "the plan runs 21 tokens",
        "max_batch_tokens is 20",
        "plan fewer tokens, or raise engine.max_batch_tokens",
        None,
    ),
    "not a work item": (
        lambda view: StepPlan(["a"]),  # type: ignore[list-item]
        "work item 'a'",
        "Tokens or Background is expected",
        "use plan.run(request, n)",
        None,
    ),
    "waking in the past": (
        lambda view: StepPlan(wake_at=view.now_ns),
        "wake_at 3000 is not in the future",
        "now is 3000",
        "ask for a later time, or plan the work now",
        None,
    ),
    "a hold of no step": (
        held(run(("a", 1)), 0),
        "hold of 0 steps until None",
        "at least 1 step and a time after now (3000) are needed",
        "leave hold=None instead",
        None,
    ),
    "a hold until now": (
        held(run(("a", 1)), 5, 3000),
        "hold of 5 steps until 3000",
        "at least 1 step and a time after now (3000) are needed",
        "leave hold=None instead",
        None,
    ),
    "a hold of a prompt": (
        held(run(("w", 8)), 5),
        "a hold repeats decodes only, not Tokens(w, 8)",
        "a held item runs one token per step and brings one",
        "hold plans in which every item is Tokens(request, 1) with pending_tokens == 1",
        None,
    ),
    "a hold of a prompt's first token": (
        held(run(("w", 1)), 5),
        "a hold repeats decodes only, not Tokens(w, 1)",
        "a held item runs one token per step and brings one",
        "hold plans in which every item is Tokens(request, 1) with pending_tokens == 1",
        None,
    ),
    "a hold with drafts": (
        held(work("a", 1, draft=1), 5),
        "a hold repeats decodes only, not Tokens(a, 1, layers=None, advance='append', draft=1)",
        "a held item runs one token per step and brings one",
        "hold plans in which every item is Tokens(request, 1) with pending_tokens == 1",
        None,
    ),
    "a hold of background work": (
        held(lambda view: StepPlan([find(view, "a").next_token, Background("train", 1)]), 5),
        "a hold repeats decodes only, not Background(kind='train', flops=1)",
        "a held item runs one token per step and brings one",
        "hold plans in which every item is Tokens(request, 1) with pending_tokens == 1",
        None,
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusal(rig: Rig, name: str) -> None:
    plan, what, why, do, request = REFUSALS[name]
    error = refused(rig, plan)
    where = WHERE + (f", request {request}" if request else "")
    assert (error.what, error.where, error.why, error.do) == (what, where, why, do)


def test_refused_with_everything_else_valid_changes_nothing() -> None:
    """The one bad item comes last; rejections, aborts, preemptions and timers before it are not applied."""
    rig = build(host_pages=8)
    rig.arrive("x", 4)
    rig.arrive("y", 4)
    refused(
        rig,
        both(
            verdict("reject", "x", "no"),
            verdict("abort", "y", "no"),
            verdict("preempt", "a", "swap", "no"),
            run(("w", 9)),
            lambda view: StepPlan(wake_at=view.now_ns + 5),
        ),
    )
    assert not rig.timers
    assert not rig.transfers


def test_too_many_requests(rig: Rig) -> None:
    rig.arrive("x", 1)
    rig.arrive("y", 1)
    error = refused(rig, run(("a", 1), ("w", 1), ("x", 1), ("y", 1)))
    assert error.what == "the plan names 4 requests"
    assert error.why == "max_batch_requests is 3"
    assert error.do == "plan fewer requests, or raise engine.max_batch_requests"
    assert error.where == WHERE


def test_a_request_that_has_ended_is_not_live(rig: Rig) -> None:
    kept = rig.request("a").view
    rig.abort("a")
    for plan in (
        lambda view: StepPlan([Tokens(kept, 1)]),
        lambda view: StepPlan(preemptions=[Preemption(kept, "recompute", "x")]),
    ):
        error = refused(rig, plan)
        assert error.what.endswith("names request a, which is not live here")
        assert error.why == "its phase is finished"
        assert error.do == "plan only requests found in this call's queues"
        assert error.where == WHERE + ", request a"


def test_a_request_of_another_engine_is_not_live(rig: Rig) -> None:
    other = build()
    error = refused(rig, lambda view: StepPlan([Tokens(other.request("a").view, 1)]))
    assert error.what == "work names request a, which is not live here"


def test_a_verdict_on_something_else_than_a_view(rig: Rig) -> None:
    error = refused(rig, lambda view: StepPlan(preemptions=[Preemption("a", "pause", "x")]))  # type: ignore[arg-type]
    assert error.what == "preemption names 'a'"
    assert error.why == "a request view of this engine is expected"
    assert error.do == "use view.running"


def test_nothing_to_run_while_the_cap_is_in_flight() -> None:
    rig = build(limits=toy_limits(in_flight=2))
    rig.arrive("c", 2, 50, cap=1)
    play(rig, run(("c", 2)))
    error = refused(rig, run(("c", 1)))
    assert error.what == "request c has nothing to run"
    assert error.why == "its last tokens are in flight, or its output cap is reached in flight"
    assert error.do == "skip requests whose pending_tokens is 0"


def test_swapping_in_flight_is_refused() -> None:
    rig = build(limits=toy_limits(in_flight=2), host_pages=8)
    play(rig, run(("a", 1)))
    error = refused(rig, verdict("preempt", "a", "swap", "x"))
    assert error.what == "request a cannot be swapped out while it is in flight"
    assert error.why == "1 launches or transfers name its pages"
    assert error.do == "swap it when they have ended"


def test_host_room_is_that_of_all_swaps_together() -> None:
    rig = build(host_pages=2)
    play(rig, run(("w", 1)))
    rig.finish()
    error = refused(rig, both(verdict("preempt", "a", "swap", "x"), verdict("preempt", "w", "swap", "x")))
    assert error.what == "swapping out needs 3 host pages"
    assert error.why == "2 are free in pool 'kv0'"
    assert error.do == "preempt fewer requests by swap"


def test_device_room_is_that_of_all_swap_ins_and_work() -> None:
    rig = build(host_pages=8, pages=3)
    play(rig, verdict("preempt", "a", "swap", "x"))
    rig.finish_transfer()
    play(rig, run(("w", 8)))
    rig.finish()
    error = refused(rig, verdict("swap_in", "a", "x"))
    assert error.what == "swapping in needs 2 KV pages"
    assert error.why == "1 are free in pool 'kv0'"
    assert error.do == "swap in fewer requests"
    error = refused(rig, both(verdict("swap_in", "a", "x"), run(("w", 1))))
    assert error.what == "the plan needs 3 KV pages up to request w"


def test_a_swapped_request_cannot_run() -> None:
    rig = build(host_pages=8)
    play(rig, verdict("preempt", "a", "swap", "x"))
    error = refused(rig, lambda view: StepPlan([Tokens(rig.request("a").view, 1)]))
    assert (error.why, error.do) == ("its phase is swapping", "wait")
    rig.finish_transfer()
    error = refused(rig, run(("a", 1)))
    assert error.what == "request a cannot run"
    assert error.why == "its phase is swapped"
    assert error.do == "swap it in first and wait for the transfer"


def test_pausing_twice_is_refused(rig: Rig) -> None:
    play(rig, verdict("preempt", "a", "pause", "x"))
    error = refused(rig, verdict("preempt", "a", "pause", "x"))
    assert error.what == "request a cannot be preempted (pause)"
    assert error.why == "its phase is paused"


def test_a_request_in_flight_on_another_lane_is_refused() -> None:
    rig = build(limits=toy_limits(lanes=2))
    play(rig, run(("a", 1)))
    view = rig.request("a").view
    for plan, role in (
        (lambda _: StepPlan([Tokens(view, 1)]), "work"),
        (lambda _: StepPlan(preemptions=[Preemption(view, "recompute", "x")]), "preemption"),
    ):
        error = refused(rig, plan)
        assert error.what == f"{role} names request a, in flight on lane 0"
        assert error.why == "this plan is for lane 1"
        assert error.do == "take requests from this call's queues"
        assert error.where == "scheduler 'toy', step 2, lane 1, request a"


def test_in_the_middle_of_a_chunk_nothing_else_runs(rig: Rig) -> None:
    play(rig, work("w", 8, layers=(0, 2)))
    rig.finish()
    error = refused(rig, run(("w", 1)))
    # nothing of w is pending: its whole prompt is in the chunk
    assert error.what == "request w has nothing to run"
    rig = build()
    play(rig, work("w", 6, layers=(0, 2)))
    rig.finish()
    error = refused(rig, run(("w", 1)))
    assert error.what == "request w is at layer 2 of a chunk"
    assert error.why == "the chunk must pass all layers before other tokens run"
    assert error.do == "continue it with Tokens(request, 6, layers=(2, ...))"
    error = refused(rig, work("w", 5, layers=(2, 4)))
    assert error.why == "its chunk of 6 tokens is at layer 2 of 4"


# -------------------------------------------------------------------- what is valid


def test_exactly_at_every_limit() -> None:
    rig = build(limits=toy_limits(tokens=9, requests=2), pages=4)
    play(rig, run(("a", 1), ("w", 8)))
    assert rig.free() == (0,)
    assert rig.batches[-1].tokens == [1, 8]


def test_pages_freed_by_the_plan_count_for_its_work() -> None:
    rig = build(pages=3)
    play(rig, both(verdict("preempt", "a", "recompute", "x"), run(("w", 8))))
    assert [r.id for r in rig.batches[-1].requests] == ["w"]
    assert rig.free() == (1,)


def test_pages_in_flight_do_not_count_as_freed() -> None:
    rig = build(pages=3, limits=toy_limits(in_flight=2))
    play(rig, run(("a", 1)))
    error = refused(rig, both(verdict("preempt", "a", "recompute", "x"), run(("w", 8))))
    assert error.what == "the plan needs 2 KV pages up to request w"
    assert error.why == "1 are free in pool 'kv0' after its preemptions"


def test_layers_over_three_launches_sample_once(rig: Rig) -> None:
    r = rig.request("w")
    play(rig, work("w", 8, layers=(0, 1)))
    assert (r.flying, r.pending, r.layer_cursor, r.computed) == (8, 0, 1, 0)
    assert (rig.batches[-1].starts, rig.batches[-1].samples) == ([0], [False])
    rig.finish()
    assert (r.flying, r.computed, r.generated) == (8, 0, 0)
    play(rig, work("w", 8, layers=(1, 3)))
    assert (rig.batches[-1].starts, rig.batches[-1].samples) == ([0], [False])
    rig.finish()
    play(rig, work("w", 8, layers=(3, 4)))
    assert (rig.batches[-1].starts, rig.batches[-1].samples) == ([0], [True])
    assert r.layer_cursor == 0
    rig.finish()
    assert (r.flying, r.pending, r.computed, r.generated, r.output) == (0, 1, 8, 1, [0])
    assert len(r.lease.tables[0]) == 2
    rig.engine.check_integrity()


def test_a_partial_chunk_in_layers_samples_nothing(rig: Rig) -> None:
    r = rig.request("w")
    play(rig, work("w", 5, layers=(0, 2)))
    rig.finish()
    play(rig, work("w", 5, layers=(2, 4)))
    rig.finish()
    assert (r.computed, r.pending, r.generated) == (5, 3, 0)
    play(rig, run(("w", 3)))
    assert rig.batches[-1].starts == [5]
    rig.finish()
    assert (r.computed, r.pending, r.generated) == (8, 1, 1)


@pytest.mark.parametrize("accepted", [0, 1, 3])
def test_drafts_count_what_was_accepted(rig: Rig, accepted: int) -> None:
    r = rig.request("a")
    play(rig, work("a", 1, draft=3))
    batch = rig.batches[-1]
    assert batch.num_tokens() == 4
    assert (batch.starts, batch.samples, r.flying, r.pending) == ([6], [True], 4, 0)
    assert len(r.lease.tables[0]) == 3
    rig.finish(outcomes=[rig.executor.outcome(batch, 0, 1, accepted)])
    assert (r.computed, r.flying, r.generated) == (7 + accepted, 0, 2 + accepted)
    assert (r.pending, r.slack) == (1, 12 - r.computed)
    assert (r.drafted, r.accepted) == (3, accepted)
    assert r.output == list(range(2 + accepted))
    assert len(r.token_times) == 2 + accepted
    assert [x for x in rig.records if isinstance(x, StepDone)][-1].emitted == [1 + accepted]
    rig.engine.check_integrity()


def test_drafts_follow_a_prompt(rig: Rig) -> None:
    r = rig.request("w")
    play(rig, work("w", 8, draft=2))
    rig.finish()
    assert (r.computed, r.generated, r.pending) == (10, 3, 1)


def test_drafts_beyond_the_cap_are_cut(rig: Rig) -> None:
    rig.arrive("c", 4, 50, cap=2)
    play(rig, work("c", 4, draft=5))
    rig.finish()
    (end,) = rig.ends("c")
    assert (end.outcome, end.reason, end.output_tokens) == ("completed", "length", 2)
    assert [x for x in rig.records if isinstance(x, StepDone)][-1].emitted == [2]


@pytest.mark.parametrize("advance", ["rewrite", "none"])
def test_rewriting_changes_no_count(rig: Rig, advance: str) -> None:
    r = rig.request("a")
    before = (r.computed, r.generated, r.pending, r.slack, rig.free())
    play(rig, work("a", 4, advance=advance))
    batch = rig.batches[-1]
    assert batch.samples == [False]
    assert batch.starts == [2 if advance == "rewrite" else 6]
    assert r.lease.in_flight == 1
    rig.finish()
    assert (r.computed, r.generated, r.pending, r.slack, rig.free()) == before
    assert r.lease.in_flight == 0


def test_background_work_travels_with_the_batch_or_alone(rig: Rig) -> None:
    index = Background("index", 7)
    play(rig, lambda view: StepPlan([find(view, "a").next_token, index]))
    assert rig.batches[-1].background == (index,)
    rig.finish()
    play(rig, lambda view: StepPlan([index]))
    assert (rig.batches[-1].requests, rig.batches[-1].background) == ([], (index,))
    rig.finish()
    rig.engine.check_integrity()


def test_barrier_groups_of_equal_counts_run(rig: Rig) -> None:
    play(rig, both(work("a", 1, barrier_group="g"), work("w", 1, barrier_group="g")))
    assert {i: x.barrier_group for i, x in rig.batches[-1].extras.items()} == {0: "g", 1: "g"}
    rig.finish()
    assert (rig.request("a").generated, rig.request("w").computed) == (2, 1)


def test_pause_keeps_pages_and_resume_goes_on(rig: Rig) -> None:
    play(rig, verdict("preempt", "a", "pause", "makes room"))
    r = rig.request("a")
    assert (r.phase, r.computed, r.preemptions, rig.free()) == (Phase.PAUSED, 6, 1, (4,))
    assert list(rig.engine.paused) == ["a"]
    play(rig, run(("a", 1)))
    assert r.phase is Phase.RUNNING
    rig.finish()
    assert (r.computed, r.generated, r.output) == (7, 2, [0, 1])
    assert sum(isinstance(x, RequestAdmitted) for x in rig.records) == 1, "resuming is not another admission"


def test_a_paused_request_may_be_recomputed(rig: Rig) -> None:
    play(rig, verdict("preempt", "a", "pause", "x"), verdict("preempt", "a", "recompute", "x"))
    assert rig.free() == (6,)
    assert list(rig.engine.waiting) == ["a", "w"]


def test_reject_ends_a_waiting_request_with_the_reason(rig: Rig) -> None:
    play(rig, verdict("reject", "w", "queue too long"))
    (end,) = rig.ends()
    assert (end.request, end.outcome, end.reason) == ("w", "rejected", "queue too long")
    rig.engine.check_integrity()


def test_abort_ends_a_running_request_and_frees_its_pages(rig: Rig) -> None:
    play(rig, verdict("abort", "a", "deadline missed"))
    (end,) = rig.ends()
    assert (end.outcome, end.reason, end.output_tokens) == ("aborted", "deadline missed", 1)
    assert rig.free() == (6,)


def test_swap_out_and_in_keep_everything(rig: Rig) -> None:
    rig = build(host_pages=4)
    r: Any = rig.request("a")
    play(rig, verdict("preempt", "a", "swap", "makes room"))
    assert r.phase is Phase.SWAPPING
    assert rig.free() == (4,)
    rig.finish_transfer()
    assert (r.phase, rig.free(), list(rig.engine.swapped)) == (Phase.SWAPPED, (6,), ["a"])
    play(rig, verdict("swap_in", "a", "room again"))
    assert rig.request("a").phase is Phase.LOADING
    rig.finish_transfer()
    assert (r.phase, r.computed, r.generated, r.slack) == (Phase.RUNNING, 6, 1, 2)
    assert rig.free("host") == (4,)
    play(rig, run(("a", 1)))
    rig.finish()
    assert r.output == [0, 1]
    (preempted,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
    assert (preempted.mode, preempted.reason, preempted.lost_tokens) == ("swap", "makes room", 0)


def test_recompute_keeps_output_and_goes_to_the_front(rig: Rig) -> None:
    r = rig.request("a")
    play(rig, run(("a", 1)))
    rig.finish()
    play(rig, verdict("preempt", "a", "recompute", "x"))
    assert list(rig.engine.waiting) == ["a", "w"]
    assert (r.computed, r.generated, r.pending, r.slack) == (0, 2, 8, 0)
    (preempted,) = [x for x in rig.records if isinstance(x, RequestPreempted)]
    assert preempted.lost_tokens == 7
    play(rig, run(("a", 8)))
    rig.finish()
    assert (r.computed, r.output) == (8, [0, 1, 2])
    assert [x.resumed for x in rig.records if isinstance(x, RequestAdmitted)] == [False, True]


def test_wake_at_asks_again(rig: Rig) -> None:
    play(rig, lambda view: StepPlan(wake_at=view.now_ns + 70))
    assert rig.timers == [rig.now_ns + 70]


def test_the_plan_log_says_what_was_decided(rig: Rig) -> None:
    play(
        rig,
        both(
            held(run(("a", 1)), 4),
            lambda view: StepPlan(wake_at=view.now_ns + 9),
            lambda view: StepPlan(deferred=[_defer(view, "w")]),
        ),
    )
    planned = [x for x in rig.records if isinstance(x, Planned)][-1]
    assert planned.work == [("a", 1)]
    assert planned.deferred == [("w", "later")]
    assert (planned.step, planned.lane, planned.held, planned.wake_at) == (1, 0, 4, rig.now_ns + 9)


def _defer(view: StepView, id: str) -> Any:
    plan = StepPlan()
    plan.defer(find(view, id), "later")
    return plan.deferred[0]


def test_pools_are_checked_one_by_one() -> None:
    rig = build(kvcache=ToyKV(toy_layout(4, 2)), pages=(6, 4))
    error = refused(rig, run(("w", 3)))
    assert error.what == "the plan needs 2 KV pages up to request w"
    assert error.why == "1 are free in pool 'kv1' after its preemptions"
    play(rig, run(("w", 2)))


# ------------------------------------------------------------- what executors report


@pytest.mark.parametrize(
    ("plan", "outcomes", "what", "why"),
    [
        (run(("w", 8)), [Outcome()], "0 output tokens for request w", "expected 1, one per step"),
        (run(("w", 8)), [Outcome((0, 1))], "2 output tokens for request w", "expected 1, one per step"),
        (
            run(("w", 4)),
            [Outcome((0,))],
            "1 output tokens for request w",
            "expected none: its prompt is not finished",
        ),
        (
            work("a", 1, draft=2),
            [Outcome((0,), accepted=1)],
            "1 output tokens for request a",
            "expected 2 with 1 of 2 drafts",
        ),
        (
            work("a", 1, draft=2),
            [Outcome((0, 1, 2, 3), accepted=3)],
            "4 output tokens for request a",
            "expected 4 with 3 of 2 drafts",
        ),
        (
            work("a", 1, advance="none"),
            [Outcome((0,))],
            "1 output tokens for request a",
            "expected none: rewritten tokens bring no output",
        ),
    ],
)
def test_wrong_outcomes_name_the_request(
    rig: Rig, plan: Plan, outcomes: list[Outcome], what: str, why: str
) -> None:
    play(rig, plan)
    error = raises_in(lambda: rig.finish(outcomes=outcomes))
    assert error.what == f"the executor reported {what}"
    assert error.where == "launch 2, lane 0"
    assert error.why == why
    assert error.do == "mend the executor's launch()"


def test_a_missing_outcome_or_too_many_steps(rig: Rig) -> None:
    play(rig, run(("a", 1)))
    error = raises_in(lambda: rig.finish(outcomes=[]))
    assert error.what == "launch 2 came back with 0 outcomes and 1 steps"
    assert error.why == "it had 1 requests and at most 1 steps"


def test_decodes_are_taken_up_to_the_first_that_cannot_be() -> None:
    engine = make_engine(Fcfs(), pages=6)
    page = engine.layout.pools[0].page_tokens
    r = Rig(engine, auto=False)
    a, b, c, _ = (r.arrive(name, prompt=page, output=9) for name in "abcd")
    r.schedule()
    r.finish()  # now each has a token to run and no room for it, and two pages are free
    e = r.arrive("e", prompt=2)
    running = list(engine._view.running)
    pages = engine._view.kv.budget()
    assert pages.take_decodes(running) == [a.one, b.one]
    assert pages.free == (0,) and pages.take_decodes([c.view]) == []
    pages = engine._view.kv.budget()
    assert pages.take_decodes([c.view, e.view, a.view]) == [c.one]
    assert pages.free == (1,)
    c.pending = 0  # its last token is in flight
    assert pages.take_decodes([c.view, a.view]) == []
    assert r.free() == (2,)
