"""What a move leaves on both sides: pages, holds, programs, and what the request keeps."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from tests.engine.test_reuse import store

from servelab.core.context import Context
from servelab.core.events import InstanceLost
from servelab.core.families.router import Action, ClusterView, Dispatch, Drain, Hold, Migrate, Reject
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Pin, StepPlan, Tokens
from servelab.core.records import (
    ActionDropped,
    ContextEnded,
    PagesEvicted,
    RequestAdmitted,
    RequestMigrated,
    RequestPreempted,
)
from servelab.core.request import Cancel, Phase, RequestSpec, RequestView
from servelab.core.testing.cluster import ClusterRun, To
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    Script,
    ToyCost,
    ToyKV,
    arrival,
    toy_layout,
    toy_limits,
)
from servelab.plugins.kvcache.contiguous import ContiguousConfig, TrueLengths

# a step of the toys takes 1000 ns and 10 per token; the network 100 ns and 1 per byte, 8 bytes per page of 4


class Acts:
    """Requests named a... to instance 0, b... to 1; moves at a time, and looks when ``look`` arrives."""

    def __init__(self, at: int, moves: Sequence[Action], look: Any = None) -> None:
        self.at: int | None = at
        self.moves, self.look = moves, look

    def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Dispatch:
        if request.id.startswith("look"):
            self.look(view)
            return Dispatch(prefill=max(view.instances()))
        return Dispatch(prefill=ord(request.id[0]) - ord("a"))

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        if self.at is None or view.now_ns < self.at:
            return ()
        self.at = None
        return self.moves

    def wake_at(self) -> int | None:
        return self.at


def move(request: str, source: int, target: int, mode: Any = "blocking") -> Migrate:
    return Migrate(request=request, source=source, target=target, mode=mode)


def copying(run: ClusterRun) -> dict[str, int]:
    """By request, how long it stood still."""
    return {x.request: x.t_ns - x.stopped_ns for x in run.of(RequestMigrated)}


# ------------------------------------------------------------------ the network


def test_each_way_of_an_instances_link_is_its_own() -> None:
    """Two pages each way at once take as long as alone: 100 + 16."""
    router = Acts(3500, [move("a", 0, 1), move("b", 1, 0)])
    run = ClusterRun([arrival("a", 4, 10), arrival("b", 4, 10)], router).go()
    assert copying(run) == {"a": 116, "b": 116} and run.where() == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("names", "targets"), [(("a", "a2"), (1, 2)), (("a", "b"), (2, 2))], ids=["out of one", "into one"]
)
def test_copies_out_of_or_into_one_instance_share_its_link(
    names: tuple[str, str], targets: tuple[int, int]
) -> None:
    moves = [move(name, ord(name[0]) - ord("a"), to) for name, to in zip(names, targets, strict=True)]
    run = ClusterRun([arrival(name, 4, 10) for name in names], Acts(3500, moves), 3).go()
    assert copying(run) == dict.fromkeys(names, 100 + 32)


def test_what_the_way_out_holds_back_another_copy_uses_on_the_way_in() -> None:
    """Three leave 0 at a third each; one of them and e arrive at 1, where e has two thirds."""
    moves = [move("a", 0, 1), move("a2", 0, 2), move("a3", 0, 3), move("e", 4, 1)]
    names = ("a", "a2", "a3", "e", "e2", "e3")
    run = ClusterRun([arrival(name, 4, 10) for name in names], Acts(3500, moves), 5).go()
    assert copying(run) == {"a": 148, "a2": 148, "a3": 148, "e": 124}


def test_a_predicted_copy_shares_with_those_in_flight() -> None:
    """By hand: from 4070 + 100 alone, from 4200 two share; the first ends at 7340, the new one at 7370."""
    seen: list[int] = []

    def look(view: ClusterView) -> None:
        seen.extend(view.transfer_ns(16, source, 1 - source) for source in (0, 1))

    items = [arrival("a", 4, 10), arrival("look", at=4100)]
    router = Acts(3500, [move("a", 0, 1)], look)
    run = ClusterRun(items, router, cluster={"network_bytes_per_s": 1e7}).go()
    assert seen == [7370 - 4100, 1700]
    assert copying(run) == {"a": 1700}, "a prediction moves nothing"


# ------------------------------------------------------------------------ pages


def test_pages_are_held_on_both_sides_until_the_request_is_there() -> None:
    """7 tokens: 2 of 16 pages here and 2 there while they are copied, then none here."""
    seen: list[tuple[int, int]] = []
    items = [arrival("a", 4, 10), arrival("look", at=4100), arrival("look2", at=4190)]
    look = lambda view: seen.append((view.row(0).free_pages, view.row(1).free_pages))  # noqa: E731
    ClusterRun(items, Acts(3500, [move("a", 0, 1)], look)).go()
    assert seen[0] == (14, 14) and seen[1][0] == 16


@pytest.mark.parametrize("mode", ["blocking", "pull"])
def test_the_last_page_of_the_target_may_be_taken(mode: str) -> None:
    """15 tokens: 4 pages, which is all there are."""
    run = ClusterRun([arrival("a", 12, 5, cap=5)], Acts(3500, [move("a", 0, 1, mode)]), pages=4).go()
    assert run.where() == {"a": 1} and not run.of(ActionDropped)


def test_every_pool_must_have_room() -> None:
    """12 pages of 4 tokens, 5 of 8: beside b one pool has room for a and the other has not."""
    items = [arrival("a", 20, 9, cap=9), arrival("b", 19, 7, cap=7)]
    for mode in ("blocking", "pull"):
        kvcaches = [ToyKV(toy_layout(4, 8)) for _ in range(2)]
        run = ClusterRun(
            items,
            Acts(3500, [move("a", 0, 1, mode)]),
            kvcaches=kvcaches,
            pages=(12, 5),  # type: ignore[arg-type]
        ).go()
        if mode == "blocking":
            assert [x.reason for x in run.of(ActionDropped)] == ["instance 1 has no room for 23 tokens"]
        else:
            (moved,) = run.of(RequestMigrated)
            assert moved.t_ns > run.ends()["b"][2] and run.where()["a"] == 1 and moved.tokens < 28


def test_room_for_refused_drafts_is_given_back_at_the_target() -> None:
    """Stopped in a step with 8 drafts it needs 4 pages for 4 + 9 tokens; all are refused: 2 pages for 5."""

    class Drafts(Fcfs):
        def plan(self, view: StepView) -> StepPlan:
            plan = StepPlan([Tokens(x, 1, draft=8) for x in view.running])
            return plan if view.running else super().plan(view)

    seen: list[Any] = []
    items = [arrival("a", 4, 10, cap=20), *(arrival(f"look{at}", at=at) for at in (2050, 2300))]

    def look(view: ClusterView) -> None:
        here = run.engines[1]
        r = here.moving.guests.get("a") or here.running["a"]
        seen.append((r.computed, view.row(1).free_pages, r.slack))

    router = Acts(1500, [move("a", 0, 1)], look)
    run = ClusterRun(items, router, schedulers=[Drafts(), Fcfs()])
    run.executors[0].accept = 0
    run.go()
    (moved,) = run.of(RequestMigrated)
    assert (moved.tokens, moved.bytes) == (5, 16) and 2050 < moved.t_ns < 2300
    assert seen == [(0, 12, 16), (5, 13, 3)], "2 pages, and one of who looked first"


def test_without_its_kv_a_request_needs_pages_for_all_of_its_prompt() -> None:
    """Of 30 tokens those in a window of 8 lie on 2 or 3 pages; computed again, 9 for 34."""
    seen: list[tuple[int, ...]] = []
    items = [arrival("a", 30, 20), arrival("look", at=5500)]
    kvcaches = [ToyKV(toy_layout(4, windows=[8])) for _ in range(2)]
    look = lambda view: seen.append((view.row(0).free_pages, view.row(1).free_pages))  # noqa: E731
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1, "recompute")], look), kvcaches=kvcaches).go()
    (moved,) = run.of(RequestMigrated)
    first = next(x for x in run.steps() if x.engine == 1)
    assert moved.t_ns < 5500 < first.t_ns and first.tokens == [34]
    assert seen == [(16, 16 - 9)]


@pytest.mark.parametrize("hold", [1, 16])
def test_a_first_token_is_known_at_once_also_in_a_hold(hold: int) -> None:
    """The last chunk of 6 tokens is one, beside a decode: both are held, and a goes on elsewhere."""
    items = [arrival("b", 4, 30), arrival("a", 6, 5, at=1500)]
    route = To(lambda r, v: Dispatch(prefill=0, decode=int(r.id == "a")))
    run = ClusterRun(items, route, schedulers=[Fcfs(hold=hold, chunk=5), Fcfs()]).go()
    (moved,) = run.of(RequestMigrated)
    assert (moved.tokens, moved.stopped_ns) == (6, 4130) and run.where()["a"] == 1


def test_pages_evicted_for_a_guest_are_told_by_its_new_instance() -> None:
    """Of 8 pages the prefix store of the target holds 5 unused ones; a guest of 19 tokens needs 5 pages."""
    items = [
        arrival("b", 21, 1, prompt_ids=[9] * 21),
        arrival("a", 16, 9, at=3000, prompt_ids=list(range(16))),
    ]
    run = ClusterRun(items, Acts(5500, [move("a", 0, 1)]), pages=8, stores=[store(), store()]).go()
    (moved,) = run.of(RequestMigrated)
    first = run.of(PagesEvicted)[0]
    assert (first.engine, first.pages, first.t_ns) == (1, 2, moved.started_ns)


def test_a_pull_needs_no_room_for_what_left_the_window() -> None:
    """Of 48 tokens 3 pages are in the window of 8, and 13 of 16 pages are free beside b."""
    items = [arrival("a", 44, 20), arrival("b", 45, 20)]
    kvcaches = [ToyKV(toy_layout(4, windows=(8,))) for _ in range(2)]
    run = ClusterRun(items, Acts(4400, [move("a", 0, 1, "pull")]), kvcaches=kvcaches, pages=16).go()
    assert run.where()["a"] == 1 and not run.of(ActionDropped)


# ---------------------------------------------------------- what it takes along


@pytest.mark.parametrize("mode", ["blocking", "recompute"])
def test_a_moved_request_keeps_what_it_has(mode: str) -> None:
    """Output, times of its tokens, when it was admitted first and how often it was preempted."""
    seen: list[Any] = []
    items = [
        arrival("a old", 20, 8, program="p", turn=0, is_last_turn=False),
        arrival("a", 4, 20, at=5, priority=3, program="p", turn=1),
        arrival("look", at=16_500),
        arrival("look2", at=19_700),
    ]

    def look(view: ClusterView) -> None:
        r = next(e.requests["a"] for e in run.engines if "a" in e.requests)
        if not seen:
            r.accepted, r.drafted, r.cached = 5, 6, 2
        seen.append(
            (
                r.output[:3],
                len(r.output) == len(r.token_times) == r.generated,
                r.token_times[:3],
                r.admitted_ns,
                r.preemptions,
                (r.arrival_ns, r.program_arrival_ns),
                r.spec.priority,
                2 if mode == "recompute" and seen else r.cached,  # counted anew when it is admitted again
                (r.accepted, r.drafted),
                r.computed + r.pending == r.prompt_tokens + r.generated,
            )
        )
        seen.append(run.engines.index(r.home))

    run = ClusterRun(items, Acts(17_000, [move("a", 0, 1, mode)], look), pages=8)
    run.go()
    assert len(run.of(RequestPreempted)) == 1 and len(run.of(RequestMigrated)) == 1
    assert seen[0] == seen[2] and seen[0][:2] == ([0, 1, 2], True) and seen[0][4] == 1
    assert seen[0][5:] == ((5, 0), 3, 2, (5, 6), True)
    assert (seen[1], seen[3]) == (0, 1)
    first, *more = [x for x in run.of(RequestAdmitted) if x.request == "a"]
    assert not first.resumed and all(x.resumed for x in more)


@pytest.mark.parametrize("mode", ["blocking", "recompute"])
def test_programs_end_where_their_last_turn_ends(mode: str) -> None:
    turns = [arrival(f"a{k}", 4, 10, at=20_000 * k, program="p", turn=k, is_last_turn=k == 1) for k in (0, 1)]
    for at in (3500, 23_500):
        name = f"a{at // 20_000}"
        run = ClusterRun(turns, Acts(at, [move(name, 0, 1, mode)])).go()
        assert run.where()[name] == 1 and len(run.of(RequestMigrated)) == 1
        assert not run.engines[1 if at > 20_000 else 0].programs


# ------------------------------------------------------------- a move that fails


def test_a_request_whose_move_fails_runs_on_at_once() -> None:
    """It is among those that run, is not admitted again, and is not asked for anything it had."""
    stopped: list[Any] = []
    items = [arrival("a", 4, 9), arrival("look", at=21_000)]

    def look(view: ClusterView) -> None:
        run.engines[0].check_integrity()
        stopped.append(dict(run.engines[0].moving.stopped))

    slow = {"network_latency_ns": 50_000}
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1)], look), 3, cluster=slow)
    run.driver.post(20_000, InstanceLost("gone"), 1)
    run.go()
    assert [x.request for x in run.of(RequestAdmitted)] == ["a", "look"] and stopped == [{}]
    assert run.ends()["a"] == (0, "completed", 20_000 + 5 * 1010)


def test_a_prompt_in_flight_whose_move_fails_is_not_computed_twice() -> None:
    """Its first chunk is in flight when it is stopped, and when the target is gone. Nobody overtakes it."""
    queue: list[str] = []
    items = [arrival("a", 50, 4), arrival("a2", 4, 1, at=100), arrival("look", at=900)]
    look = lambda view: queue.extend(run.engines[0].waiting)  # noqa: E731
    run = ClusterRun(items, Acts(500, [move("a", 0, 1, "recompute")], look), 3)
    run.driver.post(800, InstanceLost("gone"), 1)
    run.go()
    assert queue == ["a", "a2"] and run.ends()["a"][:2] == (0, "completed")
    assert next(n for x in run.steps() for r, n in zip(x.requests, x.tokens, strict=True) if r == "a") == 50
    assert sum(n for x in run.steps() for r, n in zip(x.requests, x.tokens, strict=True) if r == "a") == 53


def test_a_chunk_between_layers_stays() -> None:
    """Of a prompt whose first two layers are computed there is nothing that could be copied."""
    calls: list[int] = []

    def half(view: Any) -> StepPlan:
        (r,) = [*view.waiting, *view.running]
        calls.append(view.step)
        plan = StepPlan()
        plan.work.append(Tokens(r, 8, layers=(2 * (len(calls) - 1), 2 * len(calls))))
        return plan

    schedulers = [Script(half, half, then=Fcfs().plan), Fcfs()]
    run = ClusterRun([arrival("a", 8, 4)], Acts(500, [move("a", 0, 1)]), schedulers=schedulers).go()
    assert [(x.reason, x.t_ns) for x in run.of(ActionDropped)] == [("its chunk is between layers", 500)]
    assert run.ends()["a"][:2] == (0, "completed") and not run.of(RequestMigrated)


# ------------------------------------------------------------------------ holds


def test_whoever_waits_for_pages_gets_those_of_one_that_left() -> None:
    """A plan that is held for 30 steps ends when pages come back."""
    items = [arrival("a run", 4, 50), arrival("a", 24, 20), arrival("a waits", 28, 3, at=10)]
    run = ClusterRun(
        items, Acts(3500, [move("a", 0, 1)]), hold=30, pages=15, cluster={"network_latency_ns": 4000}
    ).go()
    (moved,) = run.of(RequestMigrated)
    (admitted,) = [x for x in run.of(RequestAdmitted) if x.request == "a waits"]
    assert 0 <= admitted.t_ns - moved.t_ns <= 1100


def test_whoever_waits_for_pages_gets_those_of_one_that_does_not_come() -> None:
    """Its client gives up while its KV is copied."""
    items = [arrival("a", 24, 40), arrival("b run", 4, 40), arrival("b waits", 28, 3, at=4500)]
    slow = {"network_latency_ns": 50_000}
    run = ClusterRun(
        [*items, Cancel(9200, "a")], Acts(3500, [move("a", 0, 1)]), hold=30, pages=16, cluster=slow
    ).go()
    (admitted,) = [x for x in run.of(RequestAdmitted) if x.request == "b waits"]
    assert 9200 <= admitted.t_ns <= 9200 + 1100


def test_pages_kept_for_one_that_comes_are_not_given_to_a_plan_that_is_repeated() -> None:
    """Of 9 pages one that runs there could have all but for the 4 that are kept."""
    items = [arrival("a", 12, 30), arrival("b", 4, 30)]
    slow = {"network_latency_ns": 40_000}
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1)]), hold=30, pages=11, cluster=slow).go()
    assert {name: end[1] for name, end in run.ends().items()} == {"a": "completed", "b": "completed"}
    assert len(run.of(RequestMigrated)) == 1
    (preempted, *_) = run.of(RequestPreempted)
    assert preempted.request == "b" and preempted.engine == 1


def test_a_request_that_came_runs_in_the_next_step() -> None:
    """Its new instance repeats a plan that does not know it."""
    run = ClusterRun([arrival("a", 4, 20), arrival("b", 4, 60)], Acts(3500, [move("a", 0, 1)]), hold=30).go()
    (moved,) = run.of(RequestMigrated)
    first = next(x for x in run.steps() if x.engine == 1 and "a" in x.requests)
    assert first.start_ns - moved.t_ns <= 1020


# ----------------------------------------------------------- parts that look on


def test_both_schedulers_hear_of_a_move() -> None:
    """One that counts its requests must know who left and who came."""
    heard: list[tuple[int, str]] = []

    class Hears(Fcfs):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def on_event(self, record: Any) -> None:
            if record.ev == "migrated":
                heard.append((self.index, record.request))

    ClusterRun([arrival("a", 4, 9)], Acts(3500, [move("a", 0, 1)]), schedulers=[Hears(0), Hears(1)]).go()
    assert heard == [(0, "a"), (1, "a")]


def test_pages_that_left_the_window_stay_behind() -> None:
    """A window of 8 tokens: of 47 only the last pages are held there, and the others are not copied."""
    pages: list[int] = []
    items = [arrival("a", 44, 20), arrival("look", at=4_400)]
    look = lambda view: pages.append(view.row(1).total_pages - view.row(1).free_pages)  # noqa: E731
    kvcaches = [ToyKV(toy_layout(4, windows=(8,))) for _ in range(2)]
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1)], look), kvcaches=kvcaches).go()
    (moved,) = run.of(RequestMigrated)
    assert moved.bytes <= 3 * 8 and moved.tokens > 40 and pages[0] <= 3, (moved, pages)


# -------------------------------------------------------- stages, to the token


@pytest.mark.parametrize(("prompt", "stages"), [(59, 1), (60, 2)])
def test_a_live_move_stops_at_once_with_fewer_than_sixteen_pages_to_copy(prompt: int, stages: int) -> None:
    """Of 61 tokens, one of them new, the last is in the 16th page; of 60 there are 15. Asked for at 2000."""
    at = 1000 + 10 * prompt + 1010  # the second token is out, and the third in flight
    limits = toy_limits(tokens=512, model_len=1000)
    run = ClusterRun(
        [arrival("a", prompt, 30)], Acts(at, [move("a", 0, 1, "live")]), pages=64, limits=limits
    ).go()
    (moved,) = run.of(RequestMigrated)
    assert moved.stages == stages and moved.bytes == 8 * -(-moved.tokens // 4), moved


def test_room_is_needed_for_what_is_there_and_in_flight_and_no_more() -> None:
    """A prompt of 40 in chunks of 16, the second in flight: 32 tokens are 8 pages, and 8 are free."""
    items = [arrival("a", 40, 4, cap=4), arrival("b", 31, 9, cap=9)]
    limits = toy_limits(tokens=16, model_len=64)
    router = Acts(2000, [move("a", 0, 1)])
    run = ClusterRun(items, router, pages=16, limits=limits).go()
    (moved,) = run.of(RequestMigrated)
    assert moved.tokens == 32 and not run.of(ActionDropped) and run.where()["a"] == 1


def test_a_chunk_that_is_between_layers_when_the_copy_ends_stays() -> None:
    """It runs on beside its live copy, a token in two halves, and should stop between two."""
    calls: list[int] = []

    def halves(view: Any) -> StepPlan:
        rs = [*view.waiting, *view.running]
        plan = StepPlan()
        if rs and rs[0].computed_tokens < 84:
            return Fcfs().plan(view)
        if rs:
            calls.append(view.step)
            plan.work.append(Tokens(rs[0], 1, layers=(2 * (len(calls) - 1) % 4, 2 * len(calls) % 4 or 4)))
        return plan

    cluster = {"network_bytes_per_s": 3.6e7}  # the copy ends in the first half of a token
    run = ClusterRun(
        [arrival("a", 80, 9)],
        Acts(1850, [move("a", 0, 1, "live")]),
        schedulers=[Script(then=halves), Fcfs()],
        pages=64,
        limits=toy_limits(tokens=512, model_len=1000),
        cluster=cluster,
    ).go()
    (dropped,) = run.of(ActionDropped)
    assert dropped.reason == "its chunk is between layers" and dropped.t_ns > 6000
    assert run.ends()["a"][:2] == (0, "completed") and len(calls) == 8


def test_recompute_copies_nothing() -> None:
    """Nothing is on the links when the request is there."""
    seen: list[tuple[int, int]] = []
    items = [arrival("a", 4, 10), arrival("look", at=4071)]
    look = lambda view: seen.append((len(run.driver.links), view.row(1).waiting + view.row(1).running))  # noqa: E731
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1, "recompute")], look))
    run.go()
    assert seen == [(0, 1)]


def test_a_request_that_waits_stands_still_from_the_moment_it_is_asked_to() -> None:
    items = [arrival("a", 50, 12), arrival("a2", 30, 3, at=10)]
    (moved,) = ClusterRun(items, Acts(1500, [move("a2", 0, 1)])).go().of(RequestMigrated)
    assert (moved.started_ns, moved.stopped_ns, moved.t_ns) == (1500, 1500, 1500)


# ----------------------------------------------------------------- who cannot go


def swapper(view: Any) -> StepPlan:
    """``a`` is swapped out at its fourth token, and in again as soon as it is out."""
    plan = StepPlan()
    for request in view.running:
        if request.id == "a" and request.generated_tokens == 4 and not request.preemptions:
            plan.preempt(request, "swap", "the test says so")
            return plan
    for request in view.swapped:
        plan.swap_in(request, "back")
    return plan if view.swapped else Fcfs().plan(view)


@pytest.mark.parametrize(
    ("at", "mode", "reason"),
    [(9_000, "blocking", "it is swap"), (4_000, "live", "it was taken off the device")],
)
def test_a_request_that_is_swapped_out_stays(at: int, mode: str, reason: str) -> None:
    """Before its move began, or while its pages were copied."""
    costs = [SlowSwap(), SlowSwap()]
    run = ClusterRun(
        [arrival("a", 80, 9)],
        Acts(at, [move("a", 0, 1, mode)]),
        schedulers=[Script(then=swapper), Fcfs()],
        costs=costs,
        pages=64,
        host_pages=64,
        limits=toy_limits(tokens=512, model_len=1000),
        cluster={"network_bytes_per_s": 2e7},
    ).go()
    assert [x.reason[: len(reason)] for x in run.of(ActionDropped)] == [reason]
    assert run.ends()["a"][:2] == (0, "completed") and len(run.of(RequestPreempted)) == 1


class SlowSwap(ToyCost):
    def transfer_time(self, transfer: Any) -> int:
        return 5000


def test_a_turn_that_waits_with_kept_kv_stays() -> None:
    class Keeps(Fcfs):
        def on_turn_end(self, request: Any) -> Pin:
            return Pin(10**9, "tool call")

        def plan(self, view: Any) -> StepPlan:
            if view.now_ns > 20_000 and view.now_ns < 22_000:
                return StepPlan(wake_at=22_000)
            return super().plan(view)

    turns = [
        arrival("a0", 8, 3, program="p", turn=0, is_last_turn=False),
        arrival("a1", 16, 3, at=20_100, program="p", turn=1, context_tokens=10),
    ]
    run = ClusterRun(turns, Acts(20_500, [move("a1", 0, 1)]), schedulers=[Keeps(), Keeps()]).go()
    assert [x.reason for x in run.of(ActionDropped)] == ["it waits with KV that its program kept"]
    assert run.where() == {"a0": 0, "a1": 0}


# -------------------------------------------------------- what becomes of others


def test_a_target_that_stops_before_anybody_is_there_is_no_target() -> None:
    """The request waits for its step to end; meanwhile its target is drained, and has nothing to do."""
    router = Acts(3500, [move("a", 0, 1, "recompute"), Drain(1)])
    run = ClusterRun([arrival("a", 4, 9)], router).go()
    assert [x.reason for x in run.of(ActionDropped)] == ["instance 1 is stopped"]
    assert run.ends()["a"] == (0, "completed", 1040 + 8 * 1010)


def test_the_loss_of_a_third_instance_concerns_nobody() -> None:
    slow = {"network_latency_ns": 50_000}
    run = ClusterRun([arrival("a", 4, 9)], Acts(3500, [move("a", 0, 1)]), 3, cluster=slow)
    run.driver.post(20_000, InstanceLost("gone"), 2)
    run.go()
    assert run.where() == {"a": 1} and not run.of(ActionDropped)


def test_whoever_waits_where_nothing_runs_is_admitted_when_the_pages_come_back() -> None:
    """At the source when the other has gone; at the target when it does not come. Not a nanosecond later."""
    slow = {"network_latency_ns": 50_000}
    items = [arrival("a", 24, 20), arrival("a waits", 40, 3, at=10)]
    run = ClusterRun(items, Acts(3500, [move("a", 0, 1)]), cluster=slow).go()
    (moved,) = run.of(RequestMigrated)
    assert [x.t_ns for x in run.of(RequestAdmitted) if x.request == "a waits"] == [moved.t_ns]
    items = [arrival("a", 24, 20), arrival("b waits", 60, 3, at=4500)]
    run = ClusterRun([*items, Cancel(9200, "a")], Acts(3500, [move("a", 0, 1)]), cluster=slow).go()
    assert [x.t_ns for x in run.of(RequestAdmitted) if x.request == "b waits"] == [9200]


def test_a_copy_goes_faster_when_another_is_given_up() -> None:
    """24,000 ns and 4000 ns at half speed; the long one, which was first, is given up at 7000."""
    moves = [move("a", 0, 1), move("a2", 0, 2)]
    items = [arrival("a", 44, 10), arrival("a2", 4, 10), Cancel(7000, "a")]
    run = ClusterRun(items, Acts(3500, moves), 3, cluster={"network_bytes_per_s": 4e6}).go()
    (moved,) = run.of(RequestMigrated)
    began = moved.stopped_ns + 100
    assert began < 7000 and moved.t_ns == 7000 + 4000 - (7000 - began) // 2


# ------------------------------------------------------------ what is left behind


def test_what_has_left_is_dead_and_what_came_is_alive() -> None:
    kept: list[Any] = []
    phases: list[Phase] = []
    items = [arrival("a", 4, 10), *(arrival(f"look{at}", at=at) for at in (1500, 4100, 6000))]

    def look(view: ClusterView) -> None:
        kept.append(next(e.requests["a"] for e in run.engines if "a" in e.requests))
        phases.append(kept[-1].phase)

    run = ClusterRun(items, Acts(3500, [move("a", 0, 1)], look))
    run.go()
    assert phases == [Phase.RUNNING, Phase.MOVING, Phase.RUNNING]
    assert kept[0] is not kept[2] and (kept[0].phase, kept[0].home) == (Phase.FINISHED, None)


@pytest.mark.parametrize("mode", ["blocking", "recompute"])
def test_a_program_is_over_everywhere_when_its_last_turn_ends(mode: str) -> None:
    """Its turns count where they are served, and then its old instance forgets it too."""
    seen: list[Any] = []
    turns = [arrival(f"a{k}", 4, 10, at=20_000 * k, program="p", turn=k, is_last_turn=k == 1) for k in (0, 1)]
    look = lambda view: seen.extend([(p.turns, p.live) for p in e.programs.values()] for e in run.engines)  # noqa: E731
    run = ClusterRun([*turns, arrival("look", at=28_000)], Acts(23_500, [move("a1", 0, 1, mode)], look))
    run.go()
    assert seen == [[(2, 0)], [(1, 1)]]
    assert not any(e.programs for e in run.engines)


@pytest.mark.parametrize(("name", "left"), [("a1", (2, 1)), ("a0", (1, 0))])
def test_a_program_stays_where_a_turn_of_it_is_left_or_is_to_come(name: str, left: tuple[int, int]) -> None:
    """Its last turn goes while the one before still runs; and one goes that is not the last."""
    seen: list[Any] = []
    turns = [arrival(f"a{k}", 4, 10, at=5 * k, program="p", turn=k, is_last_turn=k == 1) for k in (0, 1)]
    items = [x for x in turns if x.spec.id <= name]
    look = lambda view: seen.extend([(p.turns, p.live) for p in e.programs.values()] for e in run.engines)  # noqa: E731
    run = ClusterRun([*items, arrival("look", at=6000)], Acts(3500, [move(name, 0, 1)], look))
    run.go()
    assert seen == [[left], [(1, 1)]]


def test_a_turn_may_outlive_the_last_one_elsewhere() -> None:
    seen: list[Any] = []
    items = [
        arrival("a", 4, 20, program="p", turn=0, is_last_turn=False),
        arrival("b", 4, 3, program="p", turn=1),
        arrival("look", at=9000),
    ]
    look = lambda view: seen.extend([(p.turns, p.live) for p in e.programs.values()] for e in run.engines)  # noqa: E731
    run = ClusterRun(items, Acts(10**9, [], look))
    run.go()
    assert run.ends()["b"][2] < 9000 < run.ends()["a"][2]
    assert seen == [[(1, 1)], []]


class Keeps(Fcfs):
    """Keeps every turn for as long as it takes."""

    def on_turn_end(self, request: RequestView) -> Pin:
        return Pin(until_ns=10**15)


@pytest.mark.parametrize("outcome", ["completed", "rejected", "cancelled"])
def test_no_instance_keeps_anything_of_a_program_that_is_over(outcome: str) -> None:
    """Turns at 0 and 1, the first of which moved to 2; the last ends at 1, or has never left the router."""

    class Turns(Acts):
        def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
            if request.id == "c" and outcome != "completed":
                return Reject("enough") if outcome == "rejected" else Hold(10**6)
            return Dispatch(prefill=int(request.id != "a"))

    items: list[Any] = [
        arrival(name, 8, 6, at=10_000 * k, program="p", turn=k, is_last_turn=name == "c")
        for k, name in enumerate("abc")
    ]
    items += [Cancel(29_000, "c"), arrival("d", 4, 9, at=30_000)]
    run = ClusterRun(items, Turns(3500, [move("a", 0, 2)]), 3, schedulers=[Keeps() for _ in range(3)]).go()
    assert (run.where()["a"], run.ends()["c"][1]) == (2, outcome)
    over = sorted((x.engine, x.reason, x.t_ns) for x in run.of(ContextEnded))
    assert over == [(k, "its program is over", run.ends()["c"][2]) for k in (1, 2)]
    assert not any(e.programs for e in run.engines) and not run.cluster.view.homes


def test_pages_that_left_the_window_during_a_live_copy_are_free_when_it_is_there() -> None:
    """A window of 80 tokens and a copy that takes 40 steps: the first pages are behind it by then."""
    pages: list[int] = []
    items = [arrival("a", 90, 150, cap=200), arrival("b", 4, 400, cap=500)]
    kvcaches = [ToyKV(toy_layout(4, windows=(80,))) for _ in range(2)]
    run = ClusterRun(
        items,
        Acts(4500, [move("a", 0, 1, "live")]),
        kvcaches=kvcaches,
        pages=64,
        limits=toy_limits(tokens=512, model_len=1000),
        cluster={"network_bytes_per_s": 4e6},
    )
    emit = run.driver._emit

    def watch(record: Any) -> None:
        emit(record)
        if isinstance(record, RequestMigrated):
            guest = run.engines[1].requests["a"]
            pages.append(len(guest.lease.tables[0]) - guest.lease.first[0])

    run.driver._emit = watch
    run.go()
    assert pages and pages[0] <= 21, pages


def test_a_pull_waits_until_there_is_a_place_in_one_piece() -> None:
    """At the target 16 of 24 places are free, 8 and 8, and it needs 12: it waits for the one between them."""

    def contiguous() -> TrueLengths:
        context = Context(
            kind="kvcache",
            name="contiguous_oracle",
            rng=Random(0),
            model=TOY_MODEL,
            hardware=None,
            limits=toy_limits(),
            oracle=lambda name: run.truths[name],
        )
        return TrueLengths(ContiguousConfig(page_tokens=1), context)

    items = [arrival(name, 6, 2) for name in ("b one", "b three")]
    items = [items[0], arrival("b two", 2, 6), items[1], arrival("a", 2, 10)]
    router = Acts(3500, [move("a", 0, 1, "pull")])
    run = ClusterRun(items, router, kvcaches=[contiguous(), contiguous()], pages=24)
    run.go()
    (moved,) = run.of(RequestMigrated)
    assert run.ends()["b one"][2] < 3500 < run.ends()["b two"][2] <= moved.stopped_ns + 1010
    assert run.where()["a"] == 1 and not run.of(ActionDropped)
