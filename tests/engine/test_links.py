"""Links: bandwidth shared by those who are there, to the nanosecond."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.engine.links import Links, fair_rates
from servelab.core.events import InstanceLost
from servelab.core.plan import StepPlan
from servelab.core.records import RequestFinished, TransferEnded, TransferStarted
from servelab.core.testing.cluster import ClusterRun, To
from servelab.core.testing.fakes import Fcfs, Script, ToyCost, arrival

Transfer = tuple[int, tuple[Any, ...], int, int]
"""Start, path, latency, work."""


def ends(transfers: list[Transfer], cancelled: dict[int, int] | None = None) -> dict[int, int]:
    """When each ends, by its place in the list."""
    links, found, todo = Links(), dict[int, int](), sorted(enumerate(transfers), key=lambda x: x[1][0])
    numbers: dict[int, int] = {}
    gone = dict(cancelled or {})

    def finish(i: int) -> Any:
        return lambda now: found.__setitem__(i, now)

    while todo or len(links):
        times = [links.next_ns(), todo[0][1][0] if todo else None, min(gone.values(), default=None)]
        now = min(t for t in times if t is not None)
        for done in links.due(now):
            done(now)
        for i in [i for i, at in gone.items() if at == now]:
            del gone[i]
            links.cancel(numbers[i], now)
        while todo and todo[0][1][0] == now:
            i, (_, path, latency, work) = todo.pop(0)
            numbers[i] = links.start(now, path, latency, work, finish(i))
    return found


def test_alone_it_takes_its_own_time() -> None:
    assert ends([(7, ("a",), 30, 1000)]) == {0: 1037}
    assert ends([(7, ("a", "b"), 0, 1000)]) == {0: 1007}
    assert ends([(7, ("a",), 12, 0)]) == {0: 19}


def test_one_that_stays_alone_needs_one_look() -> None:
    """Its end is known at once, its latency included; also after others have come and gone."""
    links = Links()
    for start in (0, 5000):
        links.start(start, ("a",), 30, 1000, lambda now: None)
        assert links.next_ns() == start + 1030
        links.due(start + 1030)
    assert not len(links)


def test_two_equal_ones_take_twice_as_long_but_for_the_latency() -> None:
    assert ends([(0, ("a",), 50, 1000)] * 2) == {0: 2050, 1: 2050}
    assert ends([(0, ("a",), 50, 1000), (0, ("b",), 50, 1000)]) == {0: 1050, 1: 1050}


def test_one_that_joins_late_by_hand() -> None:
    """A alone for 400 of its 1000; both at half speed until A's 600 are done at 1600; then B alone."""
    assert ends([(0, ("a",), 0, 1000), (400, ("a",), 0, 1000)]) == {0: 1600, 1: 2000}


def test_latency_uses_no_bandwidth() -> None:
    """B joins at 900, when A has 100 left: both at half speed until A ends at 1100."""
    assert ends([(0, ("a",), 0, 1000), (400, ("a",), 500, 1000)]) == {0: 1100, 1: 2000}


def test_one_that_was_alone_when_it_began_shares_when_its_latency_is_over() -> None:
    """A would have ended at 1100; from 100 on B, which began at 50, has half of its link."""
    assert ends([(0, ("a",), 100, 1000), (50, ("a",), 0, 5000)]) == {0: 2100, 1: 6050}


def test_a_prediction_counts_what_is_done_already() -> None:
    """As one that joins late, by hand."""
    links = Links()
    links.start(0, ("a",), 0, 1000, lambda now: None)
    assert links.predict(400, ("a",), 0, 1000) == 2000


def test_the_fullest_link_of_a_path_decides() -> None:
    """1 and 2 leave by a; 2 and 3 arrive at y. All share with one other until one of them ends."""
    paths = [("a", "x"), ("a", "y"), ("b", "y")]
    assert ends([(0, path, 0, 600) for path in paths]) == {0: 1200, 1: 1200, 2: 1200}
    assert ends([(0, paths[0], 0, 600), (0, paths[2], 0, 600)]) == {0: 600, 1: 600}


def test_what_another_link_holds_back_the_others_use() -> None:
    """One over a and b, two more on a: a third each. That leaves two thirds of b for the last."""
    found = ends([(0, ("a", "b"), 0, 600), (0, ("a",), 0, 600), (0, ("a",), 0, 600), (0, ("b",), 0, 600)])
    assert found == {0: 1800, 1: 1800, 2: 1800, 3: 900}


@pytest.mark.parametrize(
    ("paths", "rates"),
    [
        (["a"], "1"),
        (["a", "a", "a"], "1/3 1/3 1/3"),
        (["abc", "a", "b", "c"], "1/2 1/2 1/2 1/2"),
        (["a", "ab", "b", "c", "bd"], "2/3 1/3 1/3 1 1/3"),
        (["abc", "a", "b", "b", "c", "c", "c"], "1/4 3/4 3/8 3/8 1/4 1/4 1/4"),
        (["a", "a", "a", "ab", "bc", "c"], "1/4 1/4 1/4 1/4 1/2 1/2"),
        (["a", "a", "a", "ab", "bc", "c", "c"], "1/4 1/4 1/4 1/4 1/3 1/3 1/3"),
    ],
    ids=[
        "alone",
        "one link",
        "a long one and its neighbours",
        "five sessions",
        "parking lot",
        "two",
        "three",
    ],
)
def test_fair_rates_by_hand(paths: list[str], rates: str) -> None:
    """As in textbooks, all links alike: one letter is one link."""
    assert fair_rates(paths) == [Fraction(x) for x in rates.split()]


@settings(max_examples=200)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=4, unique=True), max_size=10))
def test_no_rate_can_be_raised_without_lowering_one_that_is_no_higher(paths: list[list[str]]) -> None:
    """That is: everyone has a full link on its path where nobody is faster. No link carries more than 1."""
    rates = fair_rates(paths)
    through: dict[str, list[Fraction]] = defaultdict(list)
    for rate, path in zip(rates, paths, strict=True):
        for link in path:
            through[link].append(rate)
    assert all(sum(there) <= 1 for there in through.values())
    for rate, path in zip(rates, paths, strict=True):
        assert any(sum(through[link]) == 1 and max(through[link]) == rate for link in path)


def test_one_that_is_given_up_leaves_its_share() -> None:
    assert ends([(0, ("a",), 0, 1000), (0, ("a",), 0, 1000)], {1: 500}) == {0: 1250}


def test_one_that_has_ended_may_be_given_up() -> None:
    links = Links()
    number = links.start(0, ("a",), 0, 10, lambda now: None)
    assert len(links.due(10)) == 1
    links.cancel(number, 10)
    assert links.next_ns() is None and not len(links)


def test_thirds_are_not_rounded_on_the_way() -> None:
    """Three of 1000 take 3000, whatever else comes and goes in between at odd times."""
    assert set(ends([(0, ("a",), 0, 1000)] * 3).values()) == {3000}
    found = ends([(0, ("a",), 0, 1000)] * 3 + [(t, ("a",), 0, 0) for t in (1, 7, 100, 1001, 2999)])
    assert [found[i] for i in range(3)] == [3000] * 3


@st.composite
def many(draw: st.DrawFn) -> list[Transfer]:
    names = draw(st.sampled_from(["a", "ab", "abc", "abcdef"]))
    out = []
    for _ in range(draw(st.integers(1, 8))):
        path = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
        out.append(
            (draw(st.integers(0, 50)), tuple(path), draw(st.integers(0, 20)), draw(st.integers(0, 99)))
        )
    return out


@settings(max_examples=300)
@given(many(), st.randoms(use_true_random=False))
def test_properties(transfers: list[Transfer], rng: Random) -> None:
    found = ends(transfers)
    assert set(found) == set(range(len(transfers)))
    for i, (start, _, latency, work) in enumerate(transfers):
        assert found[i] >= start + latency + work, "none ends earlier than alone"
    for link in {link for _, path, _, _ in transfers for link in path}:
        through = [(s + la, found[i], w) for i, (s, path, la, w) in enumerate(transfers) if link in path]
        work = sum(w for _, _, w in through)
        assert max(e for _, e, _ in through) - min(s for s, _, _ in through) >= work, "no link is overtaken"
    order = list(range(len(transfers)))
    rng.shuffle(order)
    again = ends([transfers[i] for i in order])
    assert [again[order.index(i)] for i in range(len(order))] == [found[i] for i in range(len(order))]


@settings(max_examples=150)
@given(many())
def test_ends_are_those_of_all_rates_counted_anew_at_every_event(transfers: list[Transfer]) -> None:
    """Without the short cuts: whoever is not connected, or alone, is not looked at again."""
    left = {i: Fraction(work) for i, (*_, work) in enumerate(transfers)}
    joins = {i: start + latency for i, (start, _, latency, _) in enumerate(transfers)}
    found: dict[int, int] = {}
    now = 0
    while left:
        there = [i for i in left if joins[i] <= now]
        rates = dict(zip(there, fair_rates([transfers[i][1] for i in there]), strict=True))
        times = [now + max(0, -(-left[i] // rates[i])) for i in there]
        times += [joins[i] for i in left if joins[i] > now]
        later = min(times)
        for i in there:
            left[i] -= rates[i] * (later - now)
        now = later
        for i in [i for i in there if left[i] <= 0]:
            del left[i]
            found[i] = now
    assert ends(transfers) == found


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 20), st.integers(1, 99)), min_size=1, max_size=8)
)
def test_one_link_never_rests_while_there_is_work(parts: list[tuple[int, int, int]]) -> None:
    """Work conservation: the link's last end is that of a single queue of the same work, rounded up."""
    found = ends([(start, ("a",), latency, work) for start, latency, work in parts])
    busy = 0
    for ready, work in sorted((start + latency, work) for start, latency, work in parts):
        busy = max(busy, ready) + work
    assert busy <= max(found.values()) <= busy + len(parts)


@settings(max_examples=100)
@given(many(), st.integers(0, 20), st.integers(0, 99))
def test_predictions_come_true_if_nothing_else_comes(
    transfers: list[Transfer], latency: int, work: int
) -> None:
    transfers = [(0, *rest) for _, *rest in transfers]  # type: ignore[misc]
    links = Links()
    for _, path, lat, amount in transfers:
        links.start(0, path, lat, amount, lambda now: None)
    before = links.next_ns()
    told = links.predict(0, ("a",), latency, work)
    assert links.next_ns() == before and len(links) == len(transfers)
    assert told == ends([*transfers, (0, ("a",), latency, work)])[len(transfers)]


# ------------------------------------------------------------- in a run


class SizedCost(ToyCost):
    """A transfer takes 500 ns, and 100 per byte."""

    def transfer_time(self, transfer: Any) -> int:
        return 500 + 100 * transfer.bytes


def swapping(view: Any) -> StepPlan:
    """Everybody out as soon as all have a token, and in again as soon as all are out."""
    plan = StepPlan()
    if len(view.swapped) == 2:
        for request in view.swapped:
            plan.swap_in(request, "back")
    elif len(view.running) == 2 and all(r.preemptions == 0 and r.generated_tokens for r in view.running):
        for request in view.running:
            plan.preempt(request, "swap", "out")
    else:
        return Fcfs().plan(view)
    return plan


def test_swaps_at_once_share_the_host_link_and_each_way_is_its_own() -> None:
    """Two pages of 8 bytes each way: 500 + 1600 alone, 500 + 3200 together. Engine 1 swaps undisturbed."""
    items = [arrival(f"{name}{k}", 5, 2) for name in "ab" for k in range(2)][:3]
    schedulers = [Script(then=swapping), Fcfs()]
    run = ClusterRun(
        items,
        To(lambda r, view: int(r.id[0] == "b")),
        costs=[SizedCost(), SizedCost()],
        schedulers=schedulers,
        host_pages=16,
    ).go()
    took = {}
    began = {(x.engine, x.transfer): x for x in run.of(TransferStarted)}
    for x in run.of(TransferEnded):
        one = began[x.engine, x.transfer]
        took[one.request, one.direction] = x.t_ns - one.t_ns
    assert took == {(f"a{k}", way): 3700 for k in range(2) for way in ("out", "in")}


def test_swaps_of_a_lost_instance_do_not_end() -> None:
    run = ClusterRun(
        [arrival("a0", 5, 2), arrival("a1", 5, 2)],
        To(lambda r, view: 0),
        costs=[SizedCost(), SizedCost()],
        schedulers=[Script(then=swapping), Fcfs()],
        host_pages=16,
    )
    run.driver.post(2000, InstanceLost("gone"), 0)
    run.go()
    assert len(run.of(TransferStarted)) == 2 and not run.of(TransferEnded)
    assert {x.outcome for x in run.of(RequestFinished)} == {"failed"} and not len(run.driver.links)
