"""What a router sees and what becomes of its answers: dispatch, hold, refuse."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.cluster.rows import constant_fields
from servelab.core.errors import (
    CapabilityError,
    PluginCallError,
    PluginError,
    StallError,
    ViewError,
    WorkloadError,
)
from servelab.core.families.router import ClusterView, Dispatch, Hold, InstanceRow, Reject, ScaleUp
from servelab.core.metrics import Timeline, summarize
from servelab.core.metrics.phases import Phases
from servelab.core.records import (
    ROUTER,
    RequestArrived,
    RequestFinished,
    RequestHeld,
    RequestRouted,
    StepDone,
    from_dict,
    to_dict,
)
from servelab.core.request import Arrival, Cancel, RequestSpec
from servelab.core.testing.cluster import ClusterRun, To
from servelab.core.testing.fakes import ToyCost, arrival, raises_in, step_by_step, toy_limits

# a step of the toys takes 1000 ns and 10 per token


def first(request: RequestSpec, view: ClusterView) -> int:
    return 0


def test_requests_go_where_the_router_says() -> None:
    router = To(lambda request, view: int(request.id[1:]) % 3)
    run = ClusterRun([arrival(f"r{i}", at=i) for i in range(7)], router, 3).go()
    assert run.where() == {f"r{i}": i % 3 for i in range(7)}
    assert [x.engine for x in run.of(RequestArrived)] == [0, 1, 2, 0, 1, 2, 0]
    assert router.asked == [(f"r{i}", "arrival", i) for i in range(7)]
    assert not run.of(RequestRouted) and not run.of(RequestHeld)


def test_a_refused_request_has_an_arrival_and_an_end_and_costs_nothing() -> None:
    reacted: list[str] = []

    def react(record: RequestFinished) -> list[Arrival]:
        reacted.append(record.request)
        return []

    router = To(lambda request, view: Reject("full") if request.id == "b" else 0)
    run = ClusterRun([arrival("a"), arrival("b", at=5)], router, react=react).go()
    arrived = {x.request: x for x in run.of(RequestArrived)}
    assert (arrived["b"].engine, arrived["b"].t_ns, arrived["b"].prompt_tokens) == (ROUTER, 5, 4)
    (end,) = [x for x in run.of(RequestFinished) if x.request == "b"]
    assert (end.engine, end.t_ns, end.outcome, end.reason) == (ROUTER, 5, "rejected", "full")
    assert [e.arrived for e in run.engines] == [1, 0] and sorted(reacted) == ["a", "b"]
    assert not run.truths


def test_all_samples_of_a_prompt_go_together() -> None:
    items = [arrival("a", n=3), arrival("b", n=2)]
    run = ClusterRun(items, To(lambda r, view: 1 if r.id == "a" else Reject("no")), shares=True).go()
    assert {k: v[:2] for k, v in run.ends().items()} == {
        "a": (1, "completed"),
        "a#1": (1, "completed"),
        "a#2": (1, "completed"),
        "b": (ROUTER, "rejected"),
        "b#1": (ROUTER, "rejected"),
    }
    assert [x.parent for x in run.of(RequestArrived)] == [None, "a", "a", None, "b"]


def hold_until(time_ns: int) -> To:
    return To(lambda request, view: 0 if view.now_ns >= time_ns else Hold(time_ns))


def test_a_held_request_is_asked_for_again_then_and_counts_from_its_arrival() -> None:
    router = hold_until(9000)
    run = ClusterRun([arrival("a", 4, 1, at=100)], router).go()
    assert router.asked == [("a", "arrival", 100), ("a", "hold_end", 9000)]
    (came,), (held,), (routed,) = run.of(RequestArrived), run.of(RequestHeld), run.of(RequestRouted)
    assert (came.t_ns, came.engine, held.until_ns) == (100, ROUTER, 9000)
    assert (routed.t_ns, routed.engine, routed.source) == (9000, 0, ROUTER)
    timeline = Timeline().feed_all(run.records)
    facts = timeline.requests["a"]
    assert facts.ttft_ns == 9000 - 100 + 1040 and facts.engine == 0
    phases = Phases()
    changes = [(x.phase, x.t_ns) for record in run.records for x in phases.feed(record)]
    assert changes == [("queued", 100), ("prefill", 9000), ("decode", 10040), (None, 10040)]


def test_a_held_request_is_asked_for_again_at_the_next_report() -> None:
    """A report is anything that happens to an instance: here the end of a step of another request."""
    router = To(lambda request, view: 0 if request.id == "a" or view.row(0).running == 0 else Hold(10**9))
    run = ClusterRun([arrival("a", 4, 3), arrival("b", at=1500)], router).go()
    assert [t for name, _, t in router.asked if name == "b"] == [1500, 2050, 3060]
    (routed,) = run.of(RequestRouted)
    assert routed.t_ns == 3060 == run.ends()["a"][2]


@pytest.mark.parametrize("hold", [1, 16])
def test_steps_inside_a_held_launch_are_reports_too(hold: int) -> None:
    router = To(
        lambda request, view: 0 if request.id == "a" or view.row(0).context_tokens > 10 else Hold(10**9)
    )
    ClusterRun([arrival("a", 4, 12), arrival("b", at=1500)], router, hold=hold).go()
    asked = [t for name, _, t in router.asked if name == "b"]
    assert asked == [1500, *range(2050, 8111, 1010)]


def test_with_periodic_reports_the_next_one_counts() -> None:
    router = To(lambda r, view: 0 if r.id == "a" or view.row(0).context_tokens > 6 else Hold(10**9))
    run = ClusterRun([arrival("a", 4, 12), arrival("b", at=1500)], router, report_ns=2500).go()
    assert [t for name, _, t in router.asked if name == "b"] == [1500, 2500, 5000]
    assert run.ends()["b"][1] == "completed"


def test_one_that_is_never_placed_ends_the_run() -> None:
    """Asked again and again while nothing else can happen; not before, however often."""
    items = [arrival("a"), arrival("b", output=3000, cap=3000), arrival("c", at=9_000_000)]
    router = To(lambda request, view: Hold(view.now_ns + 700) if request.id == "a" else 0)
    run = ClusterRun(items, router, limits=toy_limits(tokens=512, model_len=4000), pages=1024)
    error = raises_in(run.driver.run)
    assert isinstance(error, StallError) and "request a" in error.what and "'toy'" in error.where
    assert router.asked[-1][2] > 9_000_000 and set(run.ends()) == {"a", "b", "c"}
    assert [run.ends()[name][1] for name in "abc"] == ["unfinished", "completed", "completed"]


def test_whoever_waits_for_an_instance_that_starts_may_ask_for_long() -> None:
    class Scales(To):
        def rebalance(self, view: ClusterView) -> list[ScaleUp]:
            return [ScaleUp("")] if view.now_ns < 100 else []

    router = Scales(lambda request, view: 1 if 1 in view.instances() else Hold(view.now_ns + 100))
    cluster = {"max_instances": 2, "start_ns": 400_000}
    run = ClusterRun([arrival("a", at=50)], router, 1, cluster=cluster).go()
    assert run.where() == {"a": 1} and len(router.asked) > 2000


def test_a_client_may_give_up_while_its_request_is_held() -> None:
    run = ClusterRun([arrival("a", at=3), Cancel(50, "a")], hold_until(100)).go()
    assert run.ends() == {"a": (ROUTER, "cancelled", 50)} and run.driver.now_ns == 50


def test_a_run_that_fails_ends_held_requests() -> None:
    class Broken:
        def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
            if request.id == "b":
                raise ValueError("oops")
            return Hold(10**6)

    run = ClusterRun([arrival("a"), arrival("b", at=9)], Broken())
    error = raises_in(run.driver.run)
    assert isinstance(error, PluginCallError) and error.what == "the router 'toy' raised ValueError: oops"
    assert run.ends() == {"a": (ROUTER, "unfinished", 9)}


@pytest.mark.parametrize("answer", [None, 7, Hold(0)])
def test_so_does_one_that_fails_because_of_them(answer: Any) -> None:
    """The answer about a held request is wrong: it ends too, and those held behind it."""
    router = To(lambda request, view: answer if view.now_ns else Hold(500))
    run = ClusterRun([arrival("a"), arrival("b")], router)
    assert isinstance(raises_in(run.driver.run), PluginError)
    assert run.ends() == {name: (ROUTER, "unfinished", 500) for name in "ab"}


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (7, "router 'toy' sent request a to instance 7"),
        (-1, "router 'toy' sent request a to instance -1"),
        (None, "router 'toy' answered None for request a"),
        (Hold(0), "router 'toy' holds request a until 0"),
        (Dispatch(prefill=True), "router 'toy' sent request a to instance True"),
    ],
)
def test_wrong_answers_are_refused_by_name(answer: Any, told: str) -> None:
    error = raises_in(ClusterRun([arrival("a")], To(lambda r, view: answer)).driver.run)
    assert isinstance(error, PluginError) and error.what == told and error.do


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        (Dispatch(prefill=0, attention=1), "attention"),
        (Dispatch(prefill=0, model="other"), "model"),
        (Dispatch(prefill=0, fetch_from=1), "fetch_from"),
    ],
)
def test_what_is_not_carried_out_is_refused_and_not_ignored(answer: Dispatch, field: str) -> None:
    error = raises_in(ClusterRun([arrival("a")], To(lambda r, view: answer)).driver.run)
    assert isinstance(error, CapabilityError) and f"Dispatch.{field}" in str(error)


def test_the_model_of_the_run_may_be_named() -> None:
    ClusterRun([arrival("a")], To(lambda r, view: Dispatch(prefill=0, model="toy"))).go()
    seen: list[Any] = []
    look = lambda r, view: seen.extend(view.instances(model=m) for m in ("toy", "other")) or 0  # noqa: E731
    ClusterRun([arrival("a")], To(look)).go()
    assert seen == [(0, 1), ()]


def test_an_id_that_is_live_anywhere_is_refused() -> None:
    router = To(lambda request, view: 0 if view.now_ns == 0 else 1)
    error = raises_in(ClusterRun([arrival("a"), arrival("a", at=5)], router).driver.run)
    assert isinstance(error, WorkloadError) and "arrived twice" in str(error)


def test_an_id_that_is_held_is_refused() -> None:
    error = raises_in(ClusterRun([arrival("a"), arrival("a", at=5)], hold_until(9000)).driver.run)
    assert isinstance(error, WorkloadError) and "arrived twice" in str(error)


# ------------------------------------------------------------------ reports


def test_live_rows_are_the_engines_state() -> None:
    seen: list[InstanceRow] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        if request.id == "c":
            row = view.row(0)
            seen.append(row)
            assert (row.running, row.waiting, row.free_pages, row.total_pages) == (1, 1, 14, 16)
            assert (row.context_tokens, row.prefill_tokens, row.waiting_pages) == (6, 30, (8,))
            assert row.candidates == (("a", 6, 2, 7),)
            assert (row.step_ns, row.token_interval_ns, row.reported_ns) == (1010, 1010, 2500)
            assert (row.dispatched, row.page_tokens, row.role, row.state) == (2, 4, "mixed", "active")
            assert row.prefill_backlog_ns == 1300 and row.assigned_ns == 1050 + 1300
            assert view.row(1).running == 0 and view.row(1).reported_ns == 0
            assert view.row(0) is row, "one row per call"
            assert view.ttft_ns(0, request) == 1300 + 1040, "its queue first, then its own prompt"
        elif request.id == "b":
            assert view.row(0).assigned_ns == 1050
        return 0

    items = [arrival("a", 5, 9, priority=7), arrival("b", 30, 3, at=2500), arrival("c", at=2600)]
    ClusterRun(items, To(look), hold=8).go()
    (row,) = seen
    assert row.running == 1 and row.context_tokens == 6  # what was read may be kept

    unread: list[InstanceRow] = []
    ClusterRun([arrival("a")], To(lambda r, view: unread.append(view.row(0)) or 0)).go()
    with pytest.raises(ViewError, match="outside the call"):
        _ = unread[0].context_tokens


def test_samples_of_a_prompt_are_no_candidates() -> None:
    seen: list[Any] = []
    look = lambda r, view: seen.append(view.row(0).candidates) or 0  # noqa: E731
    items = [arrival("s", 5, 9, n=2), arrival("a", 5, 9, at=100), arrival("b", at=4000)]
    ClusterRun(items, To(look), shares=True).go()
    assert [name for name, *_ in seen[-1]] == ["a"]


def test_what_an_instance_is_made_of() -> None:
    """Its price is that of all its devices."""
    engine = ClusterRun([], To(first)).engines[0]
    about = constant_fields(engine, "toy", 2, 1.5)
    assert (about["cost_per_hour"], about["parallel"], about["page_tokens"]) == (3.0, {"tp": 2}, 4)
    assert constant_fields(engine, "toy", 1, 1.5)["parallel"] == {}


def test_periodic_rows_tell_their_age_and_nothing_fresher() -> None:
    ages: list[tuple[int, int, int]] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        row = view.row(0)
        ages.append((view.now_ns, row.reported_ns, row.running))
        return 0

    items = [arrival(f"r{i}", 4, 30, at=t) for i, t in enumerate((0, 999, 1000, 1001, 2500))]
    ClusterRun(items, To(look), report_ns=1000, pages=64).go()
    # the report of t = 1000 is made after the arrivals of that instant
    assert ages == [(0, 0, 0), (999, 0, 0), (1000, 0, 0), (1001, 1000, 1), (2500, 2000, 4)]


@pytest.mark.parametrize("hold", [1, 16])
@pytest.mark.parametrize("report_ns", [0, 5000])
def test_rows_count_every_step_that_has_ended(hold: int, report_ns: int) -> None:
    """Ends at 1040 and every 1010 after it: 3 decodes by 5000, 7 by 8500, in one launch or many."""
    seen: list[Any] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        row = view.row(0)
        seen.append((row.context_tokens, row.reported_ns, row.step_ns))
        return int(request.id == "b")

    ClusterRun([arrival("a", 4, 30), arrival("b", at=8500)], To(look), hold=hold, report_ns=report_ns).go()
    assert seen[1] == ((7, 5000, 1010) if report_ns else (11, 8110, 1010))


def test_periodic_figures_are_those_since_the_report_before() -> None:
    """One preemption, in the second interval; prompts run in the first, decodes alone in the third."""
    seen: list[tuple[int, int]] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        if request.id.startswith("look"):
            seen.append((view.row(0).preemptions, view.row(0).token_interval_ns))
        return int(request.id.startswith("look"))

    looks = [arrival(f"look{t}", 1, 1, at=t * 1000 + 1) for t in (10, 20, 30)]
    items = [arrival("old", 20, 30), arrival("a", 4, 16, at=5), *looks]
    run = ClusterRun(items, To(look), report_ns=10_000, pages=13).go()
    (at,) = [x.t_ns for x in run.records if x.ev == "preempted"]
    assert 10_000 < at < 20_000
    assert [n for n, _ in seen] == [0, 1, 0]
    assert seen[0][1] > 1020 and seen[2][1] == 1010


def test_periodic_reports_end_with_the_traffic() -> None:
    run = ClusterRun([arrival("a", 4, 2)], To(first), report_ns=100).go()
    assert run.driver.now_ns == 2050


def test_predictions_come_from_the_cost_model() -> None:
    """Steps cost 1000 + 10 per token + 1 per token of context; at most 64 tokens run in one."""
    seen: list[int] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        if request.id == "b":
            seen.append(view.ttft_ns(1, request))
            seen.append(view.ttft_ns(1, request, cached_tokens=80))
            seen.append(view.tpot_ns(0))
            seen.append(view.tpot_ns(0, extra_requests=1, extra_tokens=10))
            seen.append(view.tpot_ns(1))
            seen.append(view.kv_bytes(10))
        return 0

    costs = [ToyCost(context_ns=1) for _ in range(2)]
    ClusterRun([arrival("a", 6, 9), arrival("b", 100, 2, at=3000)], To(look), costs=costs, pages=64).go()
    two_chunks, cached = 1000 + 640 + (1000 + 360 + 64), 1000 + 200 + 80
    assert seen == [two_chunks, cached, 1010 + 7, 1020 + 17, 0, 20]


def test_home_is_where_the_last_turn_went() -> None:
    homes: list[Any] = []

    def look(request: RequestSpec, view: ClusterView) -> int:
        homes.append(view.home("p"))
        return 1

    turns = [arrival(f"t{k}", at=5000 * k, program="p", turn=k, is_last_turn=k == 2) for k in range(3)]
    ClusterRun([*turns, arrival("x", at=20_000)], To(look)).go()
    assert homes == [None, 1, 1, None]


def test_who_asks_for_no_instance_is_told() -> None:
    error = raises_in(ClusterRun([arrival("a")], To(lambda r, view: view.row(2).running)).driver.run)
    assert "there is no instance 2" in str(error) and "0 to 1" in str(error)


# ------------------------------------------------------------- any traffic


class AnyAnswer:
    """Reads and answers anything that is allowed."""

    def __init__(self, seed: int, most_holds: int = 4) -> None:
        self.rng = Random(seed)
        self.left: dict[str, int] = {}
        self.most = most_holds

    def route(self, request: RequestSpec, moment: Any, view: ClusterView) -> Any:
        rng = self.rng
        for i in rng.sample(view.instances(), rng.randrange(len(view.instances()) + 1)):
            row = view.row(i)
            if rng.randrange(2):
                assert row.context_tokens >= 0 and len(row.waiting_pages) == row.waiting
            if rng.randrange(3) == 0:
                view.ttft_ns(i, request), view.tpot_ns(i, 1, 5)
        kind = rng.randrange(8)
        left = self.left.setdefault(request.id, self.most)
        if kind < 2 and left:
            self.left[request.id] -= 1
            return Hold(view.now_ns + rng.randrange(1, 5000))
        return Reject("drawn") if kind == 2 else Dispatch(prefill=rng.choice(view.instances()))


def traffic(seed: int, n: int = 25) -> list[Arrival | Cancel]:
    rng = Random(seed)
    at, items = 0, list[Arrival | Cancel]()
    for i in range(n):
        at += rng.choice((0, 1, 300, 1010, 2500))
        prompt, output = rng.randrange(1, 30), rng.randrange(1, 20)
        items.append(arrival(f"r{i}", prompt, output, at=at, n=rng.choice((1, 1, 1, 2))))
        if rng.randrange(8) == 0:
            items.append(Cancel(at + rng.randrange(4000), f"r{i}"))
    items.sort(key=lambda item: item.time_ns)
    return items


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0, 700, 5000]))
def test_every_request_ends_once_and_runs_repeat(seed: int, instances: int, report_ns: int) -> None:
    def run(**more: Any) -> ClusterRun:
        return ClusterRun(
            traffic(seed), AnyAnswer(seed), instances, report_ns=report_ns, shares=True, **more
        ).go()

    once = run()
    assert once.records == run().records
    for record in once.records:
        assert from_dict(to_dict(record)) == record
    result = summarize(Timeline().feed_all(once.records))
    assert sum(one["requests"] for one in result["servelab"]["instances"]) <= len(once.ends())


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([0, 700]))
def test_holds_change_nothing(seed: int, instances: int, report_ns: int) -> None:
    """A router that reads rows in the middle of held launches sees what it would see step by step."""
    runs = [
        ClusterRun(
            traffic(seed),
            AnyAnswer(seed),
            instances,
            report_ns=report_ns,
            hold=20,
            foresight=foresight,
            shares=True,
        ).go()
        for foresight in (True, False)
    ]
    for index in range(-1, instances):
        held, stepped = ([x for x in run.records if x.engine == index] for run in runs)
        assert step_by_step(held) == step_by_step(stepped)
    launches = [sum(isinstance(x, StepDone) for x in run.records) for run in runs]
    assert launches[0] <= launches[1]
