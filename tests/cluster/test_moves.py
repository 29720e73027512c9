"""What a router may do after dispatch: move requests, split prefill and decode, change roles, scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.engine.test_reuse import store

from servelab.core.errors import CapabilityError, PluginError
from servelab.core.events import InstanceLost
from servelab.core.families.router import (
    Action,
    ClusterView,
    Dispatch,
    Drain,
    Hold,
    LendKV,
    Migrate,
    PlaceExperts,
    Reject,
    ReplicateKV,
    Resize,
    ScaleUp,
    SetRole,
    SetShare,
)
from servelab.core.metrics import Timeline, summarize
from servelab.core.plan import Pin, Release
from servelab.core.records import (
    ActionDropped,
    InstanceChanged,
    RequestMigrated,
    RequestPreempted,
    from_dict,
    to_dict,
)
from servelab.core.request import Arrival, Cancel, RequestSpec, RequestView
from servelab.core.testing.cluster import ClusterRun, To
from servelab.core.testing.fakes import Fcfs, ToyKV, arrival, raises_in, step_by_step, toy_layout
from servelab.plugins.commands.explain.reader import _Events

# a step of the toys takes 1000 ns and 10 per token; the network 100 ns and 1 per byte, 2 per token of KV


class Acts:
    """Everything to instance 0; does something once, at the first report at or after a time."""

    def __init__(
        self, *when: tuple[int, Sequence[Action]], to: Callable[[RequestSpec, ClusterView], Any] | None = None
    ) -> None:
        self.when = sorted(when, key=lambda x: x[0])
        self.to = to or (lambda request, view: 0)
        self.seen: list[tuple[int, tuple[int, ...]]] = []

    def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
        answer = self.to(request, view)
        return Dispatch(prefill=answer) if isinstance(answer, int) else answer

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        self.seen.append((view.now_ns, tuple(view.instances())))
        out: list[Action] = []
        while self.when and self.when[0][0] <= view.now_ns:
            out += self.when.pop(0)[1]
        return out

    def wake_at(self) -> int | None:
        return self.when[0][0] if self.when else None


def tokens_of(run: ClusterRun, name: str) -> int:
    return sum(
        emitted
        for x in run.steps()
        for request, emitted in zip(x.requests, x.emitted, strict=True)
        if request == name
    )


@pytest.mark.parametrize("hold", [1, 30])
def test_a_blocking_move_stops_copies_and_goes_on(hold: int) -> None:
    """Asked for at 3500, in the step that ends at 4070 with 4 tokens out and 7 stored: two pages of 8."""
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="blocking")]))
    run = ClusterRun([arrival("a", 4, 10)], router, hold=hold).go()
    (moved,) = run.of(RequestMigrated)
    assert (moved.source, moved.engine, moved.mode, moved.tokens) == (0, 1, "blocking", 7)
    assert (moved.bytes, moved.stages, moved.started_ns) == (16, 1, 3500)
    assert (moved.stopped_ns, moved.t_ns) == (4070, 4070 + 116)
    assert run.ends()["a"] == (1, "completed", 4186 + 6 * 1010) and tokens_of(run, "a") == 10
    assert not run.of(RequestPreempted) and not run.of(ActionDropped)
    assert [e.arrived for e in run.engines] == [1, 1]


def test_recompute_moves_nothing_and_computes_again() -> None:
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="recompute")]))
    run = ClusterRun([arrival("a", 4, 10)], router).go()
    (moved,) = run.of(RequestMigrated)
    assert (moved.t_ns, moved.tokens, moved.bytes, moved.stages) == (4070, 0, 0, 0)
    first = next(x for x in run.steps() if x.engine == 1)
    assert first.tokens == [8] and tokens_of(run, "a") == 10


def test_a_live_move_copies_while_the_request_runs_and_stops_it_shortly() -> None:
    """200 tokens in pages of 1: full pages first, at the end only what came meanwhile."""
    kwargs: dict[str, Any] = {"pages": 256}
    slow = {"network_bytes_per_s": 10_000_000}  # 200 ns per token of 2 bytes
    stood: dict[str, int] = {}
    for mode in ("live", "blocking"):
        router = Acts((3500, [Migrate(request="a", source=0, target=1, mode=mode)]))  # type: ignore[arg-type]
        run = ClusterRun([arrival("a", 200, 50)], router, cluster=slow, **kwargs).go()
        (moved,) = run.of(RequestMigrated)
        stood[mode] = moved.t_ns - moved.stopped_ns
        assert tokens_of(run, "a") == 50 and run.where()["a"] == 1
        if mode == "live":
            between = [x for x in run.steps() if x.engine == 0 and x.t_ns > moved.started_ns]
            assert 2 <= moved.stages <= 4 and len(between) > 30, "it ran on meanwhile"
    assert stood["live"] < stood["blocking"] / 3


def test_downtime_of_live_moves_is_bounded_however_long_the_context() -> None:
    down, whole = [], []
    for prompt in (100, 200, 400):
        router = Acts((12_000, [Migrate(request="a", source=0, target=1, mode="live")]))
        run = ClusterRun(
            [arrival("a", prompt, 80)],
            router,
            cluster={"network_bytes_per_s": 20_000_000},
            pages=256,
            limits=_long(),
        ).go()
        (moved,) = run.of(RequestMigrated)
        down.append(moved.t_ns - moved.stopped_ns)
        whole.append(moved.t_ns - moved.started_ns)
    last_pages = 16 * 8 * 50  # 16 pages of 8 bytes at 50 ns each
    assert max(down) <= last_pages + 100 and whole[2] > 2.5 * whole[0]


@pytest.mark.parametrize("at", [3500, 4500, 5500, 6500])
def test_a_live_move_copies_every_page_once(at: int) -> None:
    """Of the page that is being filled nothing is copied before the request stands still."""
    router = Acts((at, [Migrate(request="a", source=0, target=1, mode="live")]))
    cluster = {"network_bytes_per_s": 10_000_000}
    (moved,) = (
        ClusterRun([arrival("a", 200, 50)], router, cluster=cluster, pages=256).go().of(RequestMigrated)
    )
    assert moved.stages > 1 and moved.bytes == 8 * -(-moved.tokens // 4)


def test_a_live_move_that_cannot_keep_up_stops_the_request_after_three_copies() -> None:
    """A page takes 4000 ns to copy and 4040 to fill: 25 pages, then about 24, again and again."""
    router = Acts((2500, [Migrate(request="a", source=0, target=1, mode="live")]))
    cluster = {"network_bytes_per_s": 2_000_000}
    run = ClusterRun(
        [arrival("a", 100, 600, cap=700)], router, cluster=cluster, pages=256, limits=_long()
    ).go()
    (moved,) = run.of(RequestMigrated)
    assert moved.stages == 4 and moved.t_ns - moved.stopped_ns > 16 * 4000


def test_a_live_move_of_a_request_that_is_preempted_is_dropped() -> None:
    """It runs again when the copy ends, with other pages than those that were copied."""
    items = [arrival("old", 60, 30), arrival("a", 80, 50, at=5)]
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="live")]))
    cluster = {"network_bytes_per_s": 3_000_000}
    run = ClusterRun(items, router, cluster=cluster, pages=38, limits=_long()).go()
    (preempted,) = run.of(RequestPreempted)
    (dropped,) = run.of(ActionDropped)
    assert preempted.request == "a" and dropped.t_ns > preempted.t_ns
    assert dropped.reason == "it was taken off the device" and run.where()["a"] == 0


def test_a_moved_request_counts_at_its_new_home() -> None:
    """The next turn of its program is told where it went, and its new instance that it has one more."""
    seen: list[Any] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        seen.append((view.home("p"), view.row(0).dispatched, view.row(1).dispatched))
        return 0

    turns = [arrival(f"t{k}", 4, 9, at=20_000 * k, program="p", turn=k, is_last_turn=False) for k in (0, 1)]
    ClusterRun(turns, Acts((3500, [Migrate(request="t0", source=0, target=1)]), to=look)).go()
    assert seen == [(None, 0, 0), (1, 1, 1)]


def test_samples_of_a_prompt_are_not_split() -> None:
    error = raises_in(ClusterRun([arrival("a", 4, 3, n=2)], To(pair), shares=True).driver.run)
    assert isinstance(error, PluginError) and "splits request a of 2 samples" in error.what


def _long() -> Any:
    from servelab.core.testing.fakes import toy_limits

    return toy_limits(tokens=512, model_len=1000)


def test_a_waiting_request_moves_without_bytes() -> None:
    items = [arrival("a", 50, 12), arrival("b", 30, 3, at=10)]
    run = ClusterRun(items, Acts((1500, [Migrate(request="b", source=0, target=1)]))).go()
    (moved,) = run.of(RequestMigrated)
    assert (moved.request, moved.t_ns, moved.bytes) == ("b", 1500, 0)
    assert run.ends()["b"][:2] == (1, "completed")


def test_a_full_target_refuses_and_the_request_goes_on() -> None:
    items = [arrival("big", 50, 14), arrival("a", 30, 9, at=5)]
    router = Acts(
        (3500, [Migrate(request="a", source=0, target=1, mode="blocking")]),
        to=lambda r, v: int(r.id == "big"),
    )
    run = ClusterRun(items, router).go()
    (dropped,) = run.of(ActionDropped)
    assert dropped.reason == "instance 1 has no room for 33 tokens" and dropped.request == "a"
    assert (dropped.action, dropped.engine) == ("migrate a from 0 to 1, blocking", 0)
    assert run.ends()["a"][:2] == (0, "completed") and not run.of(RequestMigrated)


def test_a_pull_waits_for_room() -> None:
    items = [arrival("big", 55, 6), arrival("a", 30, 20, at=5)]
    router = Acts(
        (3500, [Migrate(request="a", source=0, target=1, mode="pull")]), to=lambda r, v: int(r.id == "big")
    )
    run = ClusterRun(items, router).go()
    (moved,) = run.of(RequestMigrated)
    gone = run.ends()["big"][2]
    assert moved.t_ns > gone and moved.stopped_ns < gone + 1100 and moved.started_ns == 3500
    assert run.ends()["a"][:2] == (1, "completed") and tokens_of(run, "a") == 20


@pytest.mark.parametrize("hold", [1, 16])
@pytest.mark.parametrize("report_ns", [0, 10**6])
def test_a_pull_takes_the_pages_that_a_plan_gives_back(hold: int, report_ns: int) -> None:
    """Of 16 pages two requests at the target hold all; when the younger loses its own, the copy begins.

    In that instant, and not at the next event of anybody, which depends on what is held.
    """
    items = [arrival("a", 14, 9), arrival("old", 28, 20), arrival("young", 24, 16)]
    router = To(lambda r, v: 1 if r.id != "a" else Dispatch(prefill=0, decode=1))
    run = ClusterRun(items, router, pages=16, hold=hold, report_ns=report_ns).go()
    (lost, *_), (moved,) = run.of(RequestPreempted), run.of(RequestMigrated)
    assert (lost.request, lost.engine, lost.t_ns) == ("young", 1, 5600)
    assert (moved.stopped_ns, moved.t_ns) == (1140, 5600 + 132)


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        (Migrate(request="x", source=0, target=1), "it is not there"),
        (Migrate(request="a", source=1, target=0), "it is not there"),
        (Migrate(request="a", source=0, target=9), "there is no such instance"),
        (Migrate(request="a", source=9, target=1), "there is no such instance"),
        (Migrate(request="s", source=0, target=1), "samples of one prompt stay together"),
        (Migrate(request="s#1", source=0, target=1, mode="pull"), "samples of one prompt stay together"),
        (SetRole(9, "prefill"), "there is no such instance"),
        (Drain(9), "there is no such instance"),
        (ScaleUp("h100"), "this cluster is made of one kind of device"),
        (ScaleUp(""), "there may be 2 instances (cluster.max_instances)"),
    ],
)
def test_actions_that_cannot_be_are_dropped_with_the_reason(action: Action, reason: str) -> None:
    run = ClusterRun([arrival("a", 4, 9), arrival("s", 4, 9, n=2)], Acts((3500, [action])), shares=True).go()
    (dropped,) = run.of(ActionDropped)
    assert dropped.reason == reason and dropped.t_ns == 3500 and dropped.action
    if isinstance(action, Migrate):
        told = f"migrate {action.request} from {action.source} to {action.target}, {action.mode}"
        assert (dropped.action, dropped.engine, dropped.request) == (told, action.source, action.request)


def test_the_second_of_two_moves_of_a_request_is_dropped() -> None:
    twice = [Migrate(request="a", source=0, target=k, mode="blocking") for k in (1, 2)]
    run = ClusterRun([arrival("a", 4, 9)], Acts((3500, twice)), 3).go()
    assert [x.reason for x in run.of(ActionDropped)] == ["it is on its way already"]
    assert run.where() == {"a": 1}


def test_a_request_that_ends_on_its_way_is_not_moved() -> None:
    """At 3500 it runs its last step: it stops, and has ended when that step lands."""
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="blocking")]))
    run = ClusterRun([arrival("a", 4, 4)], router).go()
    assert run.ends()["a"] == (0, "completed", 4070)
    assert [x.reason for x in run.of(ActionDropped)] == ["it has ended"]


def test_a_client_may_give_up_on_the_way() -> None:
    slow = {"network_latency_ns": 50_000}
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="blocking")]))
    run = ClusterRun([arrival("a", 4, 9), Cancel(20_000, "a")], router, cluster=slow).go()
    assert run.ends()["a"] == (0, "cancelled", 20_000) and not len(run.driver.links)
    assert [(x.reason, x.t_ns) for x in run.of(ActionDropped)] == [("it has ended", 20_000)]


@pytest.mark.parametrize("gone", [0, 1])
def test_an_instance_may_be_lost_in_the_middle_of_a_move(gone: int) -> None:
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="blocking")]))
    run = ClusterRun([arrival("a", 4, 9)], router, cluster={"network_latency_ns": 50_000})
    run.driver.post(20_000, InstanceLost("gone"), gone)
    run.go()
    assert run.ends()["a"][:2] == ((0, "completed") if gone else (0, "failed"))
    assert run.cluster.members[gone].state == "stopped" and len(run.of(ActionDropped)) == 1


def test_an_aborted_request_is_found_where_it_is_now() -> None:
    router = Acts((3500, [Migrate(request="a", source=0, target=1, mode="blocking")]))
    run = ClusterRun([arrival("a", 4, 50), Cancel(9000, "a")], router).go()
    assert run.ends()["a"] == (1, "cancelled", 9000)


# ------------------------------------------------------ prefill and decode apart


def pair(request: RequestSpec, view: ClusterView) -> Dispatch:
    return Dispatch(prefill=0, decode=1)


def test_prefill_here_and_decode_there() -> None:
    """The prompt's KV crosses once; no step of the decode instance runs a prompt."""
    items = [arrival(f"r{i}", 10, 5, at=300 * i) for i in range(6)]
    run = ClusterRun(items, To(pair), pages=64).go()
    assert set(run.where().values()) == {1} and all(tokens_of(run, f"r{i}") == 5 for i in range(6))
    moved = run.of(RequestMigrated)
    assert len(moved) == 6 and all(x.tokens == 10 and x.bytes == 3 * 8 and x.mode == "pull" for x in moved)
    assert all(n == 1 for x in run.steps() if x.engine == 1 for n in x.tokens)
    assert all(emitted <= 1 for x in run.steps() if x.engine == 0 for emitted in x.emitted)


def test_the_decode_instance_may_be_chosen_when_the_prompt_is_computed() -> None:
    class Late:
        asked: ClassVar[list[tuple[str, str, int]]] = []

        def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Dispatch:
            self.asked.append((request.id, moment, view.now_ns))
            if moment == "arrival":
                return Dispatch(prefill=0, decide_decode_late=True)
            return Dispatch(prefill=0, decode={"a": 1, "b": 2, "c": None}[request.id])

    run = ClusterRun([arrival(name, 4, 3) for name in "abc"], Late(), 3).go()
    assert run.where() == {"a": 1, "b": 2, "c": 0}
    assert Late.asked == [
        *((name, "arrival", 0) for name in "abc"),
        *((name, "prefill_end", 1120) for name in "abc"),
    ]


def test_a_request_of_one_token_never_moves() -> None:
    run = ClusterRun([arrival("a", 4, 1)], To(pair)).go()
    assert run.where() == {"a": 0} and not run.of(RequestMigrated)


def test_prefilled_requests_wait_for_room_with_their_kv() -> None:
    items = [arrival(f"r{i}", 28, 8, at=10 * i) for i in range(4)]
    run = ClusterRun(items, To(pair), pages=18).go()
    assert {x[:2] for x in run.ends().values()} == {(1, "completed")}
    waits = [x.t_ns - x.stopped_ns for x in run.of(RequestMigrated)]
    assert max(waits) > 3000 and not run.of(ActionDropped)


@pytest.mark.parametrize("state", ["draining", "starting"])
@pytest.mark.parametrize(
    "answer",
    [lambda i: Dispatch(prefill=i), lambda i: Dispatch(prefill=0, decode=i)],
    ids=["prefill", "decode"],
)
def test_nothing_is_sent_to_an_instance_that_is_not_active(state: str, answer: Any) -> None:
    """Not to decode either, and the error says in which state it is."""
    what, i = (Drain(1), 1) if state == "draining" else (ScaleUp(""), 2)
    to = lambda request, view: answer(i) if request.id == "b" else 1  # noqa: E731
    run = ClusterRun(
        [arrival("a", 4, 9), arrival("b", 4, 3, at=2600)],
        Acts((2500, [what]), to=to),
        cluster={"max_instances": 3},
    )
    error = raises_in(run.driver.run)
    assert isinstance(error, PluginError) and f"it is {state}" in error.why and "request b" in error.what


def test_a_move_to_an_instance_that_is_not_active_is_dropped() -> None:
    """At its beginning, and when the last of its stages is reached; one that drains still takes it."""
    moves = [Migrate(request="a", source=0, target=k, mode="blocking") for k in (1, 2)]
    router = Acts((2500, [Drain(1)]), (3500, moves), to=lambda request, view: int(request.id == "b"))
    items = [arrival("a", 4, 20), arrival("b", 4, 20)]
    run = ClusterRun(items, router, 3).go()
    assert [x.reason for x in run.of(ActionDropped)] == ["instance 1 is draining"]
    assert run.where() == {"a": 2, "b": 1}
    late = Acts((3500, moves[:1]), (9000, [Drain(1)]), to=lambda request, view: 0)
    run = ClusterRun(items[:1], late, cluster={"network_latency_ns": 10_000}).go()
    assert run.where() == {"a": 1} and not run.of(ActionDropped)
    assert [x.state for x in run.of(InstanceChanged)] == ["draining", "stopped"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (Dispatch(prefill=1), "for decode"),
        (Dispatch(prefill=0), "which only prefills"),
        (Dispatch(prefill=0, decode=0), "to decode"),
        (Dispatch(prefill=0, decode=5), "to decode"),
        (Dispatch(prefill=0, decode=2), "to decode"),
    ],
)
def test_roles_are_kept(answer: Dispatch, told: str) -> None:
    roles = [SetRole(0, "prefill"), SetRole(1, "decode"), SetRole(2, "prefill")]
    hold_first = lambda r, view: answer if view.now_ns >= 1000 else Hold(1000)  # noqa: E731
    run = ClusterRun([arrival("a", 4, 3)], Acts((10, roles), to=hold_first), 3)
    error = raises_in(run.driver.run)
    assert isinstance(error, PluginError) and told in str(error)


def test_roles_are_seen_and_told() -> None:
    seen: list[Any] = []

    def look(request: RequestSpec, view: ClusterView) -> Any:
        if request.id == "b":
            seen.extend([view.instances("prefill"), view.instances("decode"), view.row(1).role])
            return Dispatch(prefill=0, decode=1)
        return 0

    roles = [SetRole(0, "prefill"), SetRole(1, "decode"), SetRole(1, "decode")]
    run = ClusterRun([arrival("a", 4, 3), arrival("b", 4, 3, at=4000)], Acts((100, roles), to=look)).go()
    assert seen == [(0,), (1,), "decode"]
    assert [(x.engine, x.role, x.t_ns) for x in run.of(InstanceChanged)] == [
        (0, "prefill", 100),
        (1, "decode", 100),
    ]
    assert run.where() == {"a": 0, "b": 1}


# --------------------------------------------------------------------- scaling


def test_a_new_instance_serves_when_it_is_ready() -> None:
    to = lambda request, view: max(view.instances())  # noqa: E731
    router = Acts((100, [ScaleUp("", 2)]), to=to)
    items = [arrival("a", 4, 9), arrival("b", 4, 3, at=5000), arrival("c", 4, 3, at=5101)]
    run = ClusterRun(items, router, 1, cluster={"max_instances": 2}).go()
    changes = [(x.engine, x.state, x.t_ns, x.ready_ns) for x in run.of(InstanceChanged)]
    assert changes == [(1, "starting", 100, 5100), (1, "active", 5100, None)]
    assert len(run.of(ActionDropped)) == 1, "of two that were asked for there may be one"
    assert run.where() == {"a": 0, "b": 0, "c": 1}


def test_nobody_knows_how_long_a_start_takes() -> None:
    run = ClusterRun(
        [arrival("a")], Acts((10, [ScaleUp("")])), 1, cluster={"max_instances": 2, "start_ns": None}
    )
    error = raises_in(run.driver.run)
    assert isinstance(error, CapabilityError) and "cluster.start_s" in error.do


def test_a_drained_instance_finishes_what_it_has_and_gets_nothing_more() -> None:
    to = lambda request, view: min(view.instances())  # noqa: E731
    items = [arrival("a", 4, 9), arrival("b", 4, 3, at=4000)]
    run = ClusterRun(items, Acts((2500, [Drain(0), Drain(1)]), to=to)).go()
    assert run.where() == {"a": 0, "b": 1}
    changes = [(x.engine, x.state) for x in run.of(InstanceChanged)]
    assert changes == [(0, "draining"), (0, "stopped")]
    assert run.of(InstanceChanged)[1].t_ns == run.ends()["a"][2]
    assert [x.reason for x in run.of(ActionDropped)] == ["no other instance is active"]
    again = ClusterRun(items, To(lambda r, view: 0))
    again.cluster.members[0].state = "stopped"
    again.cluster.view.changed()
    assert "it is stopped" in str(raises_in(again.driver.run))


def test_one_that_has_stopped_makes_room_for_another_and_stops_once() -> None:
    """Two at a time: the third starts when the first has stopped, whose device is lost after that."""
    items = [arrival("a", 4, 3), arrival("b", 4, 40, at=2600)]
    router = Acts((2500, [Drain(0)]), (15_000, [ScaleUp("")]), to=lambda request, view: min(view.instances()))
    run = ClusterRun(items, router)
    run.driver.post(18_000, InstanceLost("gone"), 0)
    run.go()
    changes = [(x.engine, x.state) for x in run.of(InstanceChanged)]
    assert changes == [(0, "draining"), (0, "stopped"), (2, "starting"), (2, "active")]
    assert not run.of(ActionDropped)


def test_instances_count_from_their_start_until_they_stop() -> None:
    """Of three, one is drained at 2500 and has finished at some end of a request, one is started at 3000."""
    items = [arrival("a", 4, 9), arrival("b", 4, 30, at=2600)]
    router = Acts((2500, [Drain(0)]), (3000, [ScaleUp("")]), to=lambda request, view: min(view.instances()))
    run = ClusterRun(items, router, cluster={"max_instances": 3}).go()
    result = summarize(Timeline().feed_all(run.records))["servelab"]
    ends = {name: t_ns for name, (_, _, t_ns) in run.ends().items()}
    lasted = {"0": ends["a"], "1": ends["b"], "2": ends["b"] - 3000}
    assert {x["instance"]: x["lasted"] for x in result["instances"]} == {
        name: ns / 1e9 for name, ns in lasted.items()
    }
    assert result["instance_hours"] == pytest.approx(sum(lasted.values()) / 3.6e12)


@pytest.mark.parametrize(
    "action",
    [
        SetShare(0, 0.5, 0.5),
        LendKV("a", 0, 1, 3),
        ReplicateKV((1,), 0, 1),
        PlaceExperts(0, {}),
        Resize(0, 1, 1),
        "nonsense",
    ],
)
def test_other_actions_are_refused_and_not_ignored(action: Any) -> None:
    error = raises_in(ClusterRun([arrival("a", 4, 9)], Acts((1500, [action]))).driver.run)
    assert isinstance(error, CapabilityError if action != "nonsense" else PluginError)
    assert type(action).__name__ in str(error) or "nonsense" in str(error)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "answered None to rebalance()"),
        ((x for x in ()), "a list of actions"),
        ([None], "wants None"),
    ],
)
def test_what_is_no_list_of_actions_is_refused(answer: Any, told: str) -> None:
    class Odd(To):
        def rebalance(self, view: ClusterView) -> Any:
            return answer

    error = raises_in(ClusterRun([arrival("a", 4, 9)], Odd(lambda request, view: 0)).driver.run)
    assert isinstance(error, PluginError) and told in str(error)


@pytest.mark.parametrize("at", [0, 3000, 3500.0, "soon"])
def test_a_time_to_wake_at_is_to_come(at: Any) -> None:
    class Wakes(Acts):
        def wake_at(self) -> Any:
            return at if self.seen and self.seen[-1][0] >= 3000 else 3000

    error = raises_in(ClusterRun([arrival("a", 4, 9)], Wakes()).driver.run)
    assert isinstance(error, PluginError) and f"{at!r}" in error.what and "t=3000 ns" in error.where


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Migrate(request="a", source=0, target=1, mode="fast"), "live, blocking"),  # type: ignore[arg-type]
        (lambda: SetRole(0, "worker"), "mixed, prefill"),  # type: ignore[arg-type]
        (lambda: ScaleUp("", 1, "worker"), "mixed, prefill"),  # type: ignore[arg-type]
        (lambda: ScaleUp("", 0), "0 instances"),
    ],
)
def test_actions_that_mean_nothing_cannot_be_made(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


@pytest.mark.parametrize("report_ns", [0, 2500])
def test_a_router_acts_once_per_report_and_when_it_asked_to(report_ns: int) -> None:
    """At the first instant, at the end of every step or at every report, at 1700; of three arrivals, once."""
    router = Acts((1700, []))
    items = [arrival(name, 4, 3, at=200) for name in "abc"]
    run = ClusterRun(items, router, report_ns=report_ns).go()
    ends = sorted({x.t_ns for x in run.steps()})
    reports = [200, 1700, *ends] if not report_ns else [200, 1700, *range(2500, ends[-1], 2500)]
    assert [at for at, _ in router.seen] == sorted(reports)


def test_moves_without_a_stated_network_are_refused() -> None:
    for router in (Acts((100, [Migrate(request="a", source=0, target=1)])), To(pair)):
        run = ClusterRun([arrival("a", 4, 9)], router, cluster={"network_bytes_per_s": None})
        error = raises_in(run.driver.run)
        assert isinstance(error, CapabilityError) and "cluster.network_gb_per_s" in error.do


def test_a_router_hears_every_record_with_the_report() -> None:
    class Learns(To):
        def observe(self, instance: int, record: Any) -> None:
            heard.append((record.ev, instance))

    for report_ns in (0, 3000):
        heard: list[tuple[str, int]] = []
        run = ClusterRun([arrival("a", 4, 5)], Learns(lambda r, v: 1), report_ns=report_ns).go()
        told = [(x.ev, x.engine) for x in run.records if x.ev != "planned"]
        assert heard == told[: len(heard)] and len(heard) > 2


def test_a_router_hears_nothing_before_the_report() -> None:
    heard: list[str] = []
    asked: list[int] = []

    class Learns(To):
        def observe(self, instance: int, record: Any) -> None:
            heard.append(record.ev)

    look = lambda request, view: asked.append(len(heard)) or 0  # noqa: E731
    items = [arrival("a", 4, 5), arrival("b", at=2900), arrival("c", at=3100)]
    ClusterRun(items, Learns(look), report_ns=3000).go()
    assert asked[:2] == [0, 0] and asked[2] > 2


# ------------------------------------------------------------------ anything


class RoutesAnyhow:
    """Routes in every way there is, and does nothing later: no step needs to be looked at for its sake."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(seed)
        self.now = 0

    def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
        rng, ids = self.rng, view.instances()
        fills = [i for i in ids if view.row(i).role in ("mixed", "prefill")]
        decodes = [i for i in ids if view.row(i).role in ("mixed", "decode")]
        if moment == "prefill_end":
            return Dispatch(prefill=0, decode=rng.choice([None, *decodes]))
        if not fills or rng.randrange(10) == 0:
            return Reject("drawn") if rng.randrange(2) else Hold(view.now_ns + 500)
        prefill = rng.choice(fills)
        if request.n == 1 and decodes and (view.row(prefill).role == "prefill" or rng.randrange(3) == 0):
            if rng.randrange(2):
                return Dispatch(prefill=prefill, decide_decode_late=True)
            others = [i for i in decodes if i != prefill]
            if others:
                return Dispatch(prefill=prefill, decode=rng.choice(others))
        if view.row(prefill).role == "prefill":
            return Reject("nobody decodes")
        return Dispatch(prefill=prefill)


class Anything(RoutesAnyhow):
    """Acts in every way there is, too."""

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        rng, out, self.now = self.rng, list[Action](), view.now_ns
        ids = list(view.instances())
        for i in ids:
            for name, *_ in view.row(i).candidates:
                if rng.randrange(6) == 0 and len(ids) > 1:
                    mode = rng.choice(["live", "blocking", "recompute", "pull"])
                    target = rng.choice([k for k in ids if k != i])
                    out.append(Migrate(request=name, source=i, target=target, mode=mode))  # type: ignore[arg-type]
        if rng.randrange(25) == 0:
            out.append(SetRole(rng.choice(ids), rng.choice(["mixed", "mixed", "prefill", "decode"])))  # type: ignore[arg-type]
        if rng.randrange(25) == 0:
            out.append(Drain(rng.choice(ids)))
        if rng.randrange(20) == 0:
            out.append(ScaleUp("", rng.randrange(1, 3), rng.choice(["mixed", "decode"])))  # type: ignore[arg-type]
        return out

    def wake_at(self) -> int | None:
        return self.rng.choice((None, self.now + self.rng.randrange(1, 3000)))


STEMS = ([1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4, 9, 9, 9, 9] * 3)


def traffic(seed: int) -> list[Arrival | Cancel]:
    rng = Random(seed)
    at, items = 0, list[Arrival | Cancel]()
    for i in range(14):
        at += rng.choice((0, 300, 1010, 2500))
        program = rng.choice((None, None, "p"))
        prompt = rng.randrange(1, 25)
        items.append(
            arrival(
                f"r{i}",
                prompt,
                rng.randrange(1, 25),
                at=at,
                n=rng.choice((1, 1, 1, 2)),
                program=program,
                turn=i,
                is_last_turn=False,
                context_tokens=prompt // 2 if program else 0,
                prompt_ids=STEMS[i % 2][:prompt],
            )
        )
        if rng.randrange(8) == 0:
            items.append(Cancel(at + rng.randrange(9000), f"r{i}"))
    items.sort(key=lambda item: item.time_ns)
    return items


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0, 700, 4000]), st.sampled_from([1, 16]))
def test_whatever_a_router_does_nothing_is_lost_or_doubled(
    seed: int, instances: int, report_ns: int, hold: int
) -> None:
    """One end per request, each token once, every page back, both sides; and it repeats."""

    def run() -> ClusterRun:
        return ClusterRun(
            traffic(seed),
            Anything(seed),
            instances,
            report_ns=report_ns,
            hold=hold,
            shares=True,
            pages=20,
            cluster={"max_instances": 5, "network_bytes_per_s": 1e7},
        ).go()

    once = run()
    assert once.records == run().records
    assert not once.cluster.moves.live and not len(once.driver.links)
    outputs = {x.request: x.output_tokens for x in once.records if x.ev == "finished"}  # type: ignore[attr-defined]
    forked = {x.request for x in once.records if x.ev == "forked"}  # type: ignore[attr-defined]
    for name, count in outputs.items():
        assert tokens_of(once, name) + (name in forked) == count
    for record in once.records:
        assert from_dict(to_dict(record)) == record
    result = summarize(Timeline().feed_all(once.records))
    assert result["completed"] == sum(1 for _, how, _ in once.ends().values() if how == "completed")


class Keeps(Fcfs):
    """Keeps every other turn of a program."""

    def on_turn_end(self, request: RequestView) -> Pin | Release:
        return Pin(until_ns=10**9) if request.prompt_tokens % 2 else Release()


def holds() -> Fcfs:
    return Fcfs(hold=16)


WORLDS: dict[str, dict[str, Callable[[], Any]]] = {
    "plain": {"schedulers": holds},
    "in chunks": {"schedulers": lambda: Fcfs(hold=16, chunk=5)},
    "window": {"schedulers": holds, "kvcaches": lambda: ToyKV(toy_layout(4, windows=[6]))},
    "two pools": {"schedulers": holds, "kvcaches": lambda: ToyKV(toy_layout(4, 8))},
    "store": {"schedulers": holds, "stores": store},
    "kept": {"schedulers": lambda: Keeps(hold=16)},
}
"""What an instance is made of: by argument of ``ClusterRun``, how to make one."""


@settings(max_examples=40)
@given(
    st.integers(0, 10**6),
    st.integers(2, 3),
    st.sampled_from([0, 700, 4000, 10**6]),
    st.sampled_from([Anything, RoutesAnyhow]),
    st.sampled_from(sorted(WORLDS)),
)
@example(6, 3, 10**6, Anything, "plain")  # a plan makes room for a pull
@example(14, 3, 4000, Anything, "plain")
@example(0, 2, 0, RoutesAnyhow, "in chunks")  # the last chunk of a prompt is one token, as in a hold
@example(12, 3, 700, Anything, "window")  # without its KV a request needs pages for its whole prompt
def test_holds_change_nothing_that_a_router_does(
    seed: int, instances: int, report_ns: int, router: type[RoutesAnyhow], world: str
) -> None:
    """Also where steps within a held launch are not reported, and the router acts in the middle of one."""
    runs = [
        ClusterRun(
            traffic(seed),
            router(seed),
            instances,
            report_ns=report_ns,
            foresight=foresight,
            shares=True,
            pages=24,
            cluster={"network_bytes_per_s": 1e7},
            **WORLDS[world],
        ).go()
        for foresight in (True, False)
    ]
    for index in range(-1, instances):
        held, stepped = ([x for x in run.records if x.engine == index] for run in runs)
        assert step_by_step(held) == step_by_step(stepped)
    moved = [[(x.t_ns, x.request, x.engine) for x in run.of(RequestMigrated)] for run in runs]
    assert moved[0] == moved[1]


def test_explain_tells_where_a_request_was() -> None:
    router = Acts(
        (9500, [Migrate(request="a", source=0, target=1)]), to=lambda r, v: 0 if v.now_ns else Hold(2000)
    )
    run = ClusterRun([arrival("a", 4, 12)], router).go()
    reader = _Events("a")
    for record in run.records:
        reader.feed(record)
    life = reader.close()
    assert [x.ev for x in life.hops] == ["routed", "migrated"]
    assert [x.phase for x in life.stretches] == ["queued", "prefill", "decode"]
    assert life.facts.output_tokens == 12 and life.facts.outcome == "completed"
