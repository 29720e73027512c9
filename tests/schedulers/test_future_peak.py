"""M*, card (a)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from servelab.plugins.schedulers._future_peak import FuturePeak

DEMANDS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 40)), max_size=12)


def stepped(demands: list[tuple[int, int]]) -> int:
    """Every request grows by a token a step and leaves when it has made its last one."""
    batch, top = [list(d) for d in demands], 0
    while batch:
        top = max(top, sum(a for a, _ in batch))
        batch = [[a + 1, b - 1] for a, b in batch if b]
    return top


def of(demands: list[tuple[int, int]]) -> FuturePeak:
    return FuturePeak([a for a, _ in demands], [b for _, b in demands])


def test_worked_example() -> None:
    assert FuturePeak([10, 20, 8], [5, 2, 3]).peak() == 44


def test_nobody_needs_nothing() -> None:
    assert FuturePeak().peak() == 0


@given(DEMANDS)
def test_equals_brute_force(demands: list[tuple[int, int]]) -> None:
    assert of(demands).peak() == stepped(demands)


@given(DEMANDS, DEMANDS)
def test_candidates_join_one_by_one(running: list[tuple[int, int]], waiting: list[tuple[int, int]]) -> None:
    future = of(running)
    for k, (a, b) in enumerate(waiting, 1):
        future.add(a, b)
        assert future.most == sum(map(sum, running + waiting[:k]))
        assert future.most >= future.peak() == stepped(running + waiting[:k])
