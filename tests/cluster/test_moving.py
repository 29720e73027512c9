"""What a move leaves on both sides: pages, holds, programs, and what the request keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from servelab.core.events import InstanceLost
from servelab.core.families.router import Action, ClusterView, Dispatch, Migrate
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import ActionDropped, RequestAdmitted, RequestMigrated, RequestPreempted
from servelab.core.request import Cancel, RequestSpec
from servelab.core.testing.cluster import ClusterRun
from servelab.core.testing.fakes import Fcfs, Script, ToyKV, arrival, toy_layout

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


def test_the_last_page_of_the_target_may_be_taken() -> None:
    """15 tokens: 4 pages, which is all there are."""
    run = ClusterRun([arrival("a", 12, 5, cap=5)], Acts(3500, [move("a", 0, 1)]), pages=4).go()
    assert run.where() == {"a": 1} and not run.of(ActionDropped)


# ---------------------------------------------------------- what it takes along


@pytest.mark.parametrize("mode", ["blocking", "recompute"])
def test_a_moved_request_keeps_what_it_has(mode: str) -> None:
    """Output, times of its tokens, when it was admitted first and how often it was preempted."""
    seen: list[Any] = []
    items = [
        arrival("a old", 20, 8),
        arrival("a", 4, 20, at=5, priority=3),
        arrival("look", at=16_500),
        arrival("look2", at=19_700),
    ]

    def look(view: ClusterView) -> None:
        r = next(e.requests["a"] for e in run.engines if "a" in e.requests)
        seen.append(
            (
                r.output[:3],
                len(r.output) == len(r.token_times) == r.generated,
                r.token_times[:3],
                r.admitted_ns,
                r.preemptions,
                r.arrival_ns,
                r.spec.priority,
            )
        )
        seen.append(run.engines.index(r.home))

    run = ClusterRun(items, Acts(17_000, [move("a", 0, 1, mode)], look), pages=8)
    run.go()
    assert len(run.of(RequestPreempted)) == 1 and len(run.of(RequestMigrated)) == 1
    assert seen[0] == seen[2] and seen[0][:2] == ([0, 1, 2], True) and seen[0][4] == 1
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
    run = ClusterRun(
        [arrival("a", 4, 9)], Acts(3500, [move("a", 0, 1)]), cluster={"network_latency_ns": 50_000}
    )
    run.driver.post(20_000, InstanceLost("gone"), 1)
    run.go()
    assert len(run.of(RequestAdmitted)) == 1
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
