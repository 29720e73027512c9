"""What the engine does with events: lanes, planning ahead, aborts, holds, losses, plugins that raise."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.errors import PluginCallError, PluginError, ViewError, WorkloadError
from servelab.core.events import Abort, Arrive, LaunchDone, TransferDone
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Hold, Outcome, StepPlan, Tokens
from servelab.core.records import (
    Planned,
    Record,
    RequestArrived,
    StepDone,
    TransferEnded,
    TransferStarted,
)
from servelab.core.request import Phase, RequestSpec, RequestView, Truth
from servelab.core.testing.fakes import Fcfs, Rig, Script, find, make_engine, raises_in, toy_limits


def rig(scheduler: Any = None, *, truths: dict[str, Truth] | None = None, **kwargs: Any) -> Rig:
    """A rig whose executor sees the future, as the simulator's does."""
    box: list[Rig] = []
    kwargs.setdefault("horizon", lambda batch, steps: box[0].executor.horizon(batch, steps))
    box.append(Rig(make_engine(scheduler, **kwargs), truths=truths))
    return box[0]


def decode(view: StepView) -> StepPlan:
    """One token of everything that is running."""
    return StepPlan([x.next_token for x in view.running if x.pending_tokens == 1])


def admit(view: StepView) -> StepPlan:
    return StepPlan([Tokens(x, x.pending_tokens) for x in view.waiting])


# ---------------------------------------------------------------------- one request


def test_one_request_from_arrival_to_its_end() -> None:
    r = rig(Fcfs())
    a = r.arrive("a", prompt=6, output=3)
    assert (a.phase, a.admitted_ns, a.flying, a.pending) == (Phase.RUNNING, 1000, 6, 1)
    r.finish()
    assert (a.computed, a.generated, a.token_times) == (6, 1, [2000])
    r.finish()
    r.finish()
    (end,) = r.ends()
    assert (end.outcome, end.reason, end.output_tokens, end.t_ns) == ("completed", "stop", 3, 4000)
    assert a.output == [0, 1, 2]
    assert a.token_times == [2000, 3000, 4000]
    assert a.phase is Phase.FINISHED
    assert r.free() == (16,)
    assert [x.ev for x in r.records if not isinstance(x, Planned)] == [
        "arrived",
        "admitted",
        "step",
        "step",
        "step",
        "finished",
    ]
    r.engine.check_integrity()


def test_the_cap_ends_a_request_before_its_truth_and_says_so() -> None:
    r = rig(Fcfs(hold=50))
    r.arrive("a", 4, 9, cap=3)
    r.drain()
    (end,) = r.ends()
    assert (end.outcome, end.reason, end.output_tokens) == ("completed", "length", 3)


def test_the_model_length_is_a_cap_and_a_prompt_beyond_it_is_rejected() -> None:
    r = rig(Fcfs(), limits=toy_limits(tokens=64, model_len=8))
    r.arrive("a", 6, 50)
    r.drain()
    assert [(x.reason, x.output_tokens) for x in r.ends("a")] == [("length", 2)]
    r.arrive("b", 7, 50)
    r.drain()
    assert [(x.reason, x.output_tokens) for x in r.ends("b")] == [("length", 1)]
    r.arrive("c", 8, 50)
    (end,) = r.ends("c")
    assert (end.outcome, end.output_tokens) == ("rejected", 0)
    assert end.reason == "prompt of 8 tokens leaves no room for output: max_model_len is 8"
    r.engine.check_integrity()


def test_an_id_may_not_arrive_twice_while_live() -> None:
    r = rig(Script())
    r.arrive("a")
    error = raises_in(lambda: r.arrive("a"))
    assert type(error) is WorkloadError
    assert error.what == "request id 'a' arrived twice"
    assert (error.where, error.why) == ("t=2000 ns", "the first is still live")
    assert error.do == "give every request of a run its own id"
    assert len(r.engine.requests) == 1
    r.engine.check_integrity()


@pytest.mark.parametrize(("prompt", "cap"), [(0, 1), (1, 0), (-1, 5), (5, -1)])
def test_lengths_below_one_are_refused(prompt: int, cap: int) -> None:
    r = rig(Script())
    error = raises_in(lambda: r.arrive("a", prompt, cap=cap))
    assert type(error) is WorkloadError
    assert error.what == f"request 'a' has {prompt} prompt and {cap} new tokens"
    assert error.why == "both must be at least 1"
    assert not r.engine.requests
    r.engine.check_integrity()


def test_programs_count_their_turns() -> None:
    seen = []

    def look(view: StepView) -> StepPlan:
        program = view.program("chat")
        seen.append((program.turns, program.live, program.arrival_ns))
        return StepPlan()

    r = rig(Script(look, look))
    a = r.arrive("a", program="chat", turn=0, is_last_turn=False)
    b = r.arrive("b", program="chat", turn=1)
    assert seen == [(1, 1, 1000), (2, 2, 1000)]
    assert (a.program_arrival_ns, b.program_arrival_ns) == (1000, 1000)
    r.abort("a")
    assert r.engine.programs["chat"].live == 1
    r.abort("b")
    assert not r.engine.programs


# ---------------------------------------------------------------------- two lanes


def test_requests_in_flight_on_one_lane_are_hidden_from_the_other() -> None:
    seen: list[tuple[int, list[str], int, RequestView | None]] = []

    def plan(view: StepView) -> StepPlan:
        ids = [x.id for x in view.running]
        assert [x.id for x in reversed(list(view.running))] == [x.id for x in reversed(view.running)]
        seen.append((view.lane, ids, len(view.running), view.running.first()))
        return StepPlan([Tokens(x, x.pending_tokens) for x in view.waiting] or [])

    r = rig(Script(then=plan), limits=toy_limits(lanes=2))
    r.arrive("a")
    assert [(lane, ids) for lane, ids, *_ in seen] == [(0, []), (1, [])]
    r.arrive("b")
    assert [x.id for x in r.flights[1][0].requests] == ["b"]
    seen.clear()
    r.finish(1)
    assert seen[0][:3] == (1, ["b"], 1), "a is in flight on lane 0"
    r.finish(0)
    assert seen[-2][:3] == (0, ["a", "b"], 2)
    r.engine.check_integrity()


def test_a_request_moves_between_lanes_only_when_nothing_is_in_flight() -> None:
    script = Script(lambda v: StepPlan([Tokens(find(v, "a"), 2)]))
    r = rig(script, limits=toy_limits(lanes=2, in_flight=2))
    r.arrive("a", 4)
    held = r.request("a").view
    script.steps.extend([lambda v: StepPlan(), lambda v: StepPlan([Tokens(held, 1)])])
    error = raises_in(r.schedule)
    assert error.what == "work names request a, in flight on lane 0"
    r.finish(0)
    script.steps.clear()
    script.steps.extend([lambda v: StepPlan(), lambda v: StepPlan([Tokens(find(v, "a"), 2)])])
    r.schedule()
    assert [b.lane for b in r.batches] == [0, 1]
    r.finish(1)
    assert r.request("a").output == [0]


def test_an_event_on_one_lane_ends_the_hold_of_the_other() -> None:
    def plan(view: StepView) -> StepPlan:
        out = admit(view)
        if not out.work:
            out = decode(view)
            out.hold = Hold(50) if out.work else None
        return out

    scheduler = Script(then=plan)
    r = rig(scheduler, limits=toy_limits(lanes=2), pages=64)
    r.arrive("a", 4, 90)
    r.finish(0)
    assert r.flights[0][0].steps == 50
    r.arrive("b", 4, 90)
    assert [(x.lane, x.launch) for x in r.interrupts] == [(0, 2)]
    assert r.flights[1][0].tokens == [4]
    r.finish(0, steps=3)
    assert r.flights[0][0].steps == 1, "it does not run alone"
    asked = scheduler.calls
    r.finish(0)
    assert scheduler.calls == asked, "its own step does not end its hold"
    r.finish(1)
    r.finish(0)
    assert scheduler.calls == asked + 2, "that of the other does: both lanes were asked"
    assert [(x.lane, x.launch) for x in r.interrupts] == [(0, 2)]


# ------------------------------------------------------------------- planning ahead


def test_one_step_ahead_keeps_two_launches_in_flight() -> None:
    r = rig(Fcfs(), limits=toy_limits(in_flight=2))
    a = r.arrive("a", 4, 5)
    assert [b.tokens for b in r.flights[0]] == [[4], [1]]
    assert [b.starts for b in r.flights[0]] == [[0], [4]]
    assert (a.flying, a.expected) == (5, 2)
    r.finish()
    assert (a.computed, a.generated, a.expected) == (4, 1, 2)
    r.drain()
    assert a.output == [0, 1, 2, 3, 4]
    assert len(r.ends("a")) == 1


def test_an_end_seen_one_step_late_drops_the_extra_row_and_frees_pages_after_it() -> None:
    r = rig(Fcfs(), limits=toy_limits(in_flight=2), pages=2)
    a = r.arrive("a", 4, 1)
    assert len(r.flights[0]) == 2
    r.finish()
    (end,) = r.ends("a")
    assert end.output_tokens == 1
    assert r.free() == (0,), "its second page is written to by the launch still in flight"
    b = r.arrive("b", 4, 1)
    assert list(r.engine.waiting) == ["b"]
    r.finish(outcomes=[Outcome((7,))])
    assert a.output == [0]
    assert [x for x in r.records if isinstance(x, StepDone)][-1].emitted == [0]
    assert b.phase is Phase.RUNNING
    r.drain()
    assert r.free() == (2,)
    assert len(r.ends()) == 2


def test_a_cap_is_not_planned_beyond() -> None:
    r = rig(Fcfs(), limits=toy_limits(in_flight=2))
    a = r.arrive("a", 4, 50, cap=2)
    assert (a.pending, len(r.flights[0])) == (0, 2)
    r.finish()
    assert len(r.flights[0]) == 1, "nothing more may be planned"
    r.drain()
    assert (a.output, r.ends("a")[0].reason) == ([0, 1], "length")


def test_preempted_while_in_flight_loses_nothing_that_was_committed() -> None:
    def drop(view: StepView) -> StepPlan:
        out = StepPlan()
        out.preempt(find(view, "a"), "recompute", "x")
        return out

    script = Script(admit, decode, drop, then=lambda v: StepPlan())
    r = rig(script, limits=toy_limits(in_flight=2))
    a = r.arrive("a", 4, 5)
    r.finish()
    assert (a.phase, a.generated, a.computed, a.expected, a.flying) == (Phase.WAITING, 1, 0, 0, 0)
    assert r.free() == (14,), "fenced until the second launch ends"
    r.finish()
    assert (a.generated, r.free()) == (1, (16,))
    script.then = Fcfs().plan
    r.schedule()
    r.drain()
    assert a.output == [0, 1, 2, 3, 4]
    r.engine.check_integrity()


# ------------------------------------------------------------------------- aborts


def test_an_abort_in_flight_ends_the_request_now_and_its_pages_later() -> None:
    r = rig(Fcfs())
    a = r.arrive("a", 6)
    r.abort("a")
    (end,) = r.ends("a")
    assert (end.outcome, end.reason, end.output_tokens) == ("cancelled", "the client gave up", 0)
    assert r.free() == (14,)
    r.engine.check_integrity()
    r.finish()
    assert r.free() == (16,)
    assert (a.output, len(r.ends())) == ([], 1)
    r.engine.check_integrity()


def test_aborting_what_is_gone_or_unknown_is_ignored() -> None:
    r = rig(Fcfs())
    r.arrive("a", 4, 1)
    r.drain()
    before = len(r.records)
    r.send(Abort("a"))
    r.send(Abort("nobody"))
    assert len(r.records) == before


@pytest.mark.parametrize("direction", ["out", "in"])
def test_a_transfer_that_outlives_its_request(direction: str) -> None:
    def swap(view: StepView) -> StepPlan:
        out = StepPlan()
        out.preempt(find(view, "a"), "swap", "x")
        return out

    def back(view: StepView) -> StepPlan:
        out = StepPlan()
        out.swap_in(find(view, "a"), "x")
        return out

    script = Script(admit, swap)
    r = rig(script, host_pages=4)
    a = r.arrive("a", 6, 9)
    r.finish()
    if direction == "in":
        script.steps.append(back)
        r.finish_transfer()
    assert a.phase is (Phase.LOADING if direction == "in" else Phase.SWAPPING)
    r.abort("a")
    assert len(r.ends("a")) == 1
    assert (r.free(), r.free("host")) == ((14,), (2,))
    r.engine.check_integrity()
    r.finish_transfer()
    assert (r.free(), r.free("host")) == ((16,), (4,))
    r.engine.check_integrity()
    started = [x.transfer for x in r.records if isinstance(x, TransferStarted)]
    assert started == [x.transfer for x in r.records if isinstance(x, TransferEnded)]


# -------------------------------------------------------------------------- holds


def test_a_hold_runs_until_the_first_finish() -> None:
    r = rig(Fcfs(hold=100), pages=64)
    r.arrive("a", 4, 9)
    r.arrive("b", 4, 5)
    r.finish()
    r.finish()
    assert r.flights[0][0].steps == 4
    r.finish()
    assert [x.request for x in r.ends()] == ["b"]
    assert r.flights[0][0].steps == 3  # a has had 1 + 1 + 4 of its 9 tokens
    r.finish()
    assert [x.request for x in r.ends()] == ["b", "a"]


def test_a_hold_never_runs_beyond_a_cap() -> None:
    r = rig(Fcfs(hold=100), pages=64)
    r.arrive("a", 4, 50, cap=6)
    r.finish()
    assert r.flights[0][0].steps == 5


def test_an_allocation_failure_ends_the_hold_and_asks_again() -> None:
    asked = []

    def plan(view: StepView) -> StepPlan:
        asked.append(view.step)
        return fcfs.plan(view)

    fcfs = Fcfs(hold=100)
    r = rig(Script(then=plan), pages=3)
    a, b = r.arrive("a", 4, 50), r.arrive("b", 2, 50)
    r.finish()
    r.finish()
    assert asked == [0, 1, 2]
    # 3 pages: a holds two (5 of 8), b one (3 of 4): two steps fit at once, in which b needs no page
    assert r.flights[0][0].steps == 2
    assert r.free() == (0,)
    r.finish()
    assert asked == [0, 1, 2, 4]
    assert b.phase is Phase.WAITING, "b was preempted for a"
    assert (a.generated, b.generated) == (4, 3)
    r.engine.check_integrity()


def test_without_foresight_a_hold_repeats_single_steps_without_asking() -> None:
    asked = []

    def plan(view: StepView) -> StepPlan:
        asked.append(view.step)
        return fcfs.plan(view)

    fcfs = Fcfs(hold=4)
    r = rig(Script(then=plan), horizon=lambda batch, steps: 1)
    r.arrive("a", 4, 50)
    for _ in range(6):
        r.finish()
        assert r.flights[0][0].steps == 1
    assert asked == [0, 1, 5]
    r.arrive("b", 4, 50)
    r.finish()
    assert asked == [0, 1, 5, 7], "an arrival ends it"


def test_pages_for_held_steps_are_promised_and_only_used_ones_are_taken() -> None:
    r = rig(Fcfs(hold=20), pages=8)
    a = r.arrive("a", 4, 50)
    r.finish()
    assert r.flights[0][0].steps == 20
    assert r.free() == (2,)
    assert len(a.lease.tables[0]) == 2
    r.send(Arrive(RequestSpec(id="b", prompt_tokens=1, max_new_tokens=1)))
    r.finish(steps=5)
    assert len(a.lease.tables[0]) == 3
    assert (a.computed, a.generated) == (9, 6)
    r.engine.check_integrity()


def test_a_held_launch_cut_short_commits_its_steps_and_goes_on_with_one() -> None:
    r = rig(Fcfs(hold=20), pages=8)
    a, b = r.arrive("a", 4, 50), r.arrive("b", 3, 50)
    r.finish()
    r.finish()
    batch = r.flights[0][0]
    assert (batch.steps, batch.first_step, batch.starts) == (11, 2, [5, 3])
    r.finish(steps=4, more=True)
    assert r.flights[0][0] is batch
    assert (batch.steps, batch.first_step, batch.starts) == (1, 6, [9, 7])
    assert (a.computed, a.flying, a.expected, a.generated, a.launches) == (9, 1, 1, 6, 1)
    assert (b.computed, b.flying, b.expected, b.generated, b.launches) == (7, 1, 1, 5, 1)
    assert r.free() == (8 - 3 - 2,)
    assert r.engine.step == 7
    r.engine.check_integrity()
    r.abort("b")
    assert r.free() == (3,), "b's pages are still written to"
    r.finish()
    assert r.free()[0] >= 0
    assert (a.computed, a.generated, a.launches) == (10, 7, 1)
    steps = [(x.step, len(x.ends_ns), x.emitted) for x in r.records if isinstance(x, StepDone)]
    assert steps == [(0, 1, [1]), (1, 1, [1, 1]), (2, 4, [4, 4]), (6, 1, [1, 0])]
    assert [x.step for x in r.records if isinstance(x, Planned)] == [0, 1, 2, 7]
    r.engine.check_integrity()


def test_a_launch_cut_short_must_have_a_step_left() -> None:
    r = rig(Fcfs(hold=20), pages=8)
    r.arrive("a", 4, 50)
    r.finish()
    steps = r.flights[0][0].steps
    error = raises_in(lambda: r.finish(steps=steps, more=True))
    assert error.what == f"launch 2 came back with 1 outcomes and {steps} steps"


def test_promised_pages_that_were_not_used_leave_a_shrinking_pool_when_the_launch_ends() -> None:
    r = rig(Fcfs(hold=20), pages=8)
    r.arrive("a", 4, 50)
    r.finish()
    assert r.free() == (2,)
    r.engine.ledger.device[0].resize(-5)
    assert (r.free(), r.engine.ledger.total()) == ((0,), (6,))
    r.send(Abort("a"))
    r.finish(steps=2)
    assert (r.free(), r.engine.ledger.total()) == ((3,), (3,))
    r.engine.check_integrity()


def test_what_one_lane_decides_ends_the_holds_of_the_others() -> None:
    """Lane 1, asked first since it has just run, holds b; then lane 0 rejects w. Lane 1 is asked again."""
    asked: list[int] = []

    def plan(view: StepView) -> StepPlan:
        asked.append(view.lane)
        out = StepPlan()
        if view.lane == 0:
            for x in view.waiting:
                if asked[-2:-1] == [1] and view.now_ns >= 3000:
                    out.reject(x, "no")
        elif view.running:
            out = decode(view)
            out.hold = Hold(9)
        elif view.waiting:
            out.work = [Tokens(find(view, "b"), 4)]
        return out

    r = rig(Script(then=plan), limits=toy_limits(lanes=2), horizon=lambda batch, steps: 1)
    r.arrive("b", 4, 50)
    r.arrive("w", 4, 50)
    r.finish(1)
    assert [x.request for x in r.ends()] == ["w"]
    asked.clear()
    r.finish(1)
    assert asked == [1, 0]
    asked.clear()
    r.finish(1)
    assert asked == [], "this time the hold goes on"


def test_until_sets_a_timer_and_a_step_that_ends_then_is_the_last() -> None:
    def plan(view: StepView) -> StepPlan:
        out = decode(view)
        out.hold = Hold(50, until_ns=view.now_ns + 3000)
        return out

    script = Script(admit, plan, then=decode)
    r = rig(script, pages=64)
    r.arrive("a", 4, 90)
    r.finish()
    assert r.timers == [r.now_ns + 3000]
    assert r.flights[0][0].steps == 50
    r.now_ns = r.timers[0] - r.tick_ns
    r.tick()
    assert [x.launch for x in r.interrupts] == [2]


def test_a_timer_before_the_hold_has_begun_its_next_launch_ends_it() -> None:
    def plan(view: StepView) -> StepPlan:
        out = decode(view)
        out.hold = Hold(100, until_ns=view.now_ns + 2500)
        return out

    script = Script(admit, plan, then=decode)
    r = rig(script, pages=64, horizon=lambda batch, steps: 1)
    r.arrive("a", 4, 90)
    calls = []
    for _ in range(5):
        r.finish()
        calls.append(script.calls)
    assert calls == [2, 2, 2, 3, 4]


def test_every_event_ends_a_hold() -> None:
    def end_by(what: str) -> int:
        script = Script(then=Fcfs(hold=50).plan)
        r = rig(script, pages=64)
        r.arrive("a", 4, 90)
        r.arrive("z", 4, 90)
        r.finish()
        r.finish()
        assert r.flights[0][0].steps == 50
        getattr(r, what)(*{"arrive": ("b",), "abort": ("z",), "tick": ()}[what])
        return len(r.interrupts)

    assert [end_by(x) for x in ("arrive", "abort", "tick")] == [1, 1, 1]


# -------------------------------------------------------------------------- losses


def test_a_lost_instance_fails_every_request_once_and_late_completions_are_ignored() -> None:
    def plan(view: StepView) -> StepPlan:
        if view.waiting:
            return admit(view)
        out = StepPlan()
        for x in view.running:
            out.preempt(x, "swap", "x")
        return out

    r = rig(Script(then=plan), host_pages=8)
    r.arrive("a", 4)
    r.finish()  # a is on its way out
    r.arrive("b", 4)  # b is in flight
    r.arrive("c", 4)  # c waits
    (launch,), (transfer,) = r.flights[0], r.transfers
    r.lose()
    assert [(x.request, x.outcome, x.reason) for x in r.ends()] == [
        ("a", "failed", "lost"),
        ("b", "failed", "lost"),
        ("c", "failed", "lost"),
    ]
    assert (r.free(), r.free("host")) == ((16,), (8,))
    assert r.engine.in_flight == 0
    before = len(r.records)
    r.send(LaunchDone(0, launch.launch, [r.now_ns + 1], [Outcome((0,))]))
    r.send(TransferDone(transfer))
    r.schedule()
    assert len(r.records) == before
    r.arrive("d")
    assert [(x.outcome, x.reason) for x in r.ends("d")] == [("failed", "lost")]
    assert len(r.batches) == 2
    r.engine.check_integrity()


def test_a_launch_that_was_never_made_is_an_error() -> None:
    r = rig(Fcfs())
    r.arrive("a")
    error = raises_in(lambda: r.send(LaunchDone(0, 9, [r.now_ns + 1], [Outcome((0,))])))
    assert type(error) is PluginError
    assert error.what == "launch 9 of lane 0 ended out of order"


# ------------------------------------------------------------------ plugins that raise


def test_a_scheduler_that_raises_leaves_the_state_as_it_was() -> None:
    def boom(view: StepView) -> StepPlan:
        raise ValueError("what now?")

    script = Script(admit, boom)
    r = rig(script)
    a = r.arrive("a")
    r.send(LaunchDone(0, 1, [r.now_ns + 1000], [Outcome((0,))]))
    r.flights[0].clear()
    before = (a.view.freeze(), r.free(), list(r.engine.running), r.engine.step)
    error = raises_in(r.schedule)
    assert type(error) is PluginCallError
    assert error.what == "scheduler 'toy' raised ValueError: what now?"
    assert error.where == f"plan(), step 1, lane 0, t={r.now_ns} ns"
    assert isinstance(error.__cause__, ValueError)
    assert (a.view.freeze(), r.free(), list(r.engine.running), r.engine.step) == before
    r.engine.check_integrity()
    script.steps.append(decode)
    r.schedule()
    assert len(r.batches) == 2, "the engine goes on if the driver does"


def test_errors_of_ours_pass_a_scheduler_unchanged() -> None:
    def predict(view: StepView) -> StepPlan:
        view.predict(find(view, "a"), 0.5)
        return StepPlan()

    r = rig(Script(predict))
    error = raises_in(lambda: r.arrive("a"))
    assert error.what == "no length predictor in this run"


def test_a_predictor_answers() -> None:
    seen = []

    def plan(view: StepView) -> StepPlan:
        seen.append(view.predict(find(view, "a"), 0.9))
        return StepPlan()

    r = Rig(make_engine(Script(plan), predictor=lambda x, q: int(100 * q) + x.prompt_tokens))
    r.arrive("a", 4)
    assert seen == [94]


# --------------------------------------------------------------------------- views


@pytest.mark.parametrize("checks", ["basic", "full"])
def test_a_view_cannot_be_written(checks: Any) -> None:
    def write(view: StepView) -> StepPlan:
        find(view, "a").computed_tokens = 3
        return StepPlan()

    r = Rig(make_engine(Script(write), checks=checks))
    error = raises_in(lambda: r.arrive("a"))
    assert type(error) is ViewError
    assert error.what == "request views are read-only, 'computed_tokens' cannot be set"
    assert error.where == "request a"
    assert error.do == "keep your own state in a dict keyed by request.id"


def test_with_full_checks_a_view_expires_with_its_call() -> None:
    kept: list[RequestView] = []

    def keep(view: StepView) -> StepPlan:
        kept.append(find(view, "a"))
        return StepPlan()

    def use(view: StepView) -> StepPlan:
        return StepPlan([Tokens(kept[0], kept[0].pending_tokens)])

    r = Rig(make_engine(Script(keep, use), checks="full"))
    r.arrive("a")
    error = raises_in(r.schedule)
    assert type(error) is ViewError
    assert error.what == "a request view was read (pending_tokens) outside the call it was given to"
    assert error.where == "scheduler 'toy', request a"
    assert error.do == "keep request.id or request.freeze(), and look the request up in the next view"
    assert kept[0].id == "a", "an id may always be read"
    with pytest.raises(ViewError):
        kept[0].freeze()


def test_with_full_checks_views_are_not_for_on_event() -> None:
    class Peeks(Fcfs):
        kept: RequestView | None = None

        def plan(self, view: StepView) -> StepPlan:
            self.kept = view.waiting.first() or view.running.first()
            return super().plan(view)

        def on_event(self, record: Record) -> None:
            if isinstance(record, StepDone) and self.kept is not None:
                _ = self.kept.computed_tokens

    r = Rig(make_engine(Peeks(), checks="full"))
    r.arrive("a")
    assert isinstance(raises_in(r.finish), ViewError)


def test_every_field_of_a_view_can_be_read_and_frozen() -> None:
    frozen: list[dict[str, Any]] = []

    def plan(view: StepView) -> StepPlan:
        frozen.extend(x.freeze() for x in view.running)
        return Fcfs().plan(view)

    levels: list[Any] = ["basic", "full"]
    for checks in levels:
        frozen.clear()
        r = Rig(make_engine(Script(admit, plan), checks=checks))
        r.arrive("a", 6, 9)
        r.finish()
        (x,) = frozen
        assert (x["prompt_tokens"], x["computed_tokens"], x["generated_tokens"]) == (6, 6, 1)
        assert (x["pending_tokens"], x["slack_tokens"], x["known_tokens"]) == (1, 2, 7)
        assert (x["pages"], x["host_pages"], x["in_flight"]) == ((2,), (0,), False)
        assert x["first_token_ns"] == x["last_token_ns"] == r.now_ns
        assert x["is_prefilling"] is False


def test_records_are_told_to_a_scheduler_that_listens_in_order() -> None:
    class Listens(Fcfs):
        def __init__(self) -> None:
            super().__init__()
            self.heard: list[Record] = []

        def on_event(self, record: Record) -> None:
            self.heard.append(record)

    scheduler = Listens()
    r = rig(scheduler)
    r.arrive("a", 4, 3)
    r.drain()
    assert scheduler.heard == [x for x in r.records if not isinstance(x, Planned)]
    assert isinstance(scheduler.heard[0], RequestArrived)


def test_what_if_prices_are_those_that_are_charged() -> None:
    asked = []

    def plan(view: StepView) -> StepPlan:
        out = Fcfs().plan(view)
        asked.append(view.cost.step_ns([x for x in out.work if isinstance(x, Tokens)]))
        return out

    r = rig(Script(then=plan), pages=64)
    r.arrive("a", 6, 4)
    r.arrive("b", 3, 4)
    r.drain()
    cost = r.engine.cost
    assert asked[: len(r.batches)] == [cost.price(b, 1)[0] for b in r.batches]


# ------------------------------------------------------------------------ integrity


def corrupt(name: str, r: Rig) -> None:
    engine, a = r.engine, r.request("a")
    match name:
        case "in no queue":
            del engine.running["a"]
        case "in two queues":
            engine.waiting["a"] = a
        case "phase and queue differ":
            a.phase = Phase.PAUSED
        case "swapping without a transfer":
            del engine.running["a"]
            a.phase = Phase.SWAPPING
        case "negative slack":
            a.slack = -1
        case "more in flight than it has":
            a.flying += 50
        case "a terminal record too many":
            engine.ended["completed"] += 1
        case "a request forgotten":
            del engine.requests["a"]
        case "a page lost":
            a.lease.tables[0].pop()
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "in no queue",
        "in two queues",
        "phase and queue differ",
        "swapping without a transfer",
        "negative slack",
        "more in flight than it has",
        "a terminal record too many",
        "a request forgotten",
        "a page lost",
    ],
)
def test_planted_corruption_is_found(name: str) -> None:
    r = rig(Fcfs())
    r.arrive("a", 6)
    r.engine.check_integrity()
    corrupt(name, r)
    with pytest.raises(PluginError):
        r.engine.check_integrity()
