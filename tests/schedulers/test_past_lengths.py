"""The window and both draws, card (e): exact counts over all values of the one random number a draw takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from servelab.plugins.schedulers._past_lengths import PastLengths
from servelab.plugins.schedulers.pastfuture import PastFutureConfig


class Given(Random):
    """Plays back random numbers."""

    def play(self, values: Iterable[float]) -> None:
        self.values = iter(values)

    def random(self) -> float:
        return next(self.values)


def past(lengths: list[int], rng: Random | None = None) -> PastLengths:
    """A window of exactly these."""
    made = PastLengths(len(lengths), 1, rng or Random(0))
    for length in lengths:
        made.record(length)
    return made


def grid(n: int) -> list[float]:
    """Midpoints of ``n`` equal parts of [0, 1)."""
    return [(k + 0.5) / n for k in range(n)]


def test_it_begins_with_half_a_window_of_the_initial_length() -> None:
    rng = Given()
    made = PastLengths(10, 7, rng)
    made.record(1)
    rng.play(grid(12))
    assert [made.draw(99) for _ in range(12)] == [1, 1] + [7] * 10
    for length in (2, 3, 4, 5):
        made.record(length)
    rng.play(grid(10))
    assert [made.draw(99) for _ in range(10)] == [1, 2, 3, 4, 5, 7, 7, 7, 7, 7]
    made.record(6)
    rng.play(grid(10))
    assert [made.draw(99) for _ in range(10)] == [1, 2, 3, 4, 5, 6, 7, 7, 7, 7]


def test_it_begins_with_as_many_copies_as_stated() -> None:
    rng = Given()
    made = PastLengths(10, 7, rng, copies=2)
    for length in (1, 2):
        made.record(length)
    rng.play(grid(8))
    assert [made.draw(99) for _ in range(8)] == [1, 1, 2, 2, 7, 7, 7, 7]
    for length in range(3, 10):
        made.record(length)
    rng.play(grid(10))
    assert [made.draw(99) for _ in range(10)] == [1, 2, 3, 4, 5, 6, 7, 7, 8, 9], (
        "it grows to the whole window"
    )


def test_from_the_command_line_the_window_is_the_papers_and_begins_with_two_entries() -> None:
    file = Path(__file__).parents[2] / "configs" / "scheduler" / "pastfuture.yaml"
    stated = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert stated.pop("name") == "pastfuture"
    config = PastFutureConfig(**stated)
    assert (config.window, config.initial_copies) == (1000, 2)
    assert (PastFutureConfig().window, PastFutureConfig().initial_copies) == (1000, None)


def test_copies_beyond_the_window_are_refused() -> None:
    with pytest.raises(ValidationError, match="initial_copies=11 do not fit in window=10"):
        PastFutureConfig(window=10, initial_copies=11)


def test_the_oldest_goes_first() -> None:
    rng = Given()
    made = past([5, 1, 9], rng)
    made.record(4)
    rng.play(grid(3))
    assert [made.draw(99) for _ in range(3)] == [1, 4, 9]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_tiny_window_is_never_empty(window: int) -> None:
    made = PastLengths(window, 50, Random(0))
    assert made.draw(99) == 50
    for length in (3, 4, 5):
        made.record(length)
    assert {made.draw(99) for _ in range(50)} <= set(range(6 - window, 6))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 60))
def test_a_new_request_draws_every_entry_equally_often(lengths: list[int], cap: int) -> None:
    rng = Given()
    made = past(lengths, rng)
    rng.play(grid(3 * len(lengths)))
    drawn = Counter(made.draw(cap) for _ in range(3 * len(lengths)))
    assert drawn == Counter(min(h, cap) for h in lengths for _ in range(3))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 60), st.integers(1, 40), st.data()
)
def test_a_running_request_draws_uniformly_between_neighbours(
    lengths: list[int], produced: int, more: int, data: st.DataObject
) -> None:
    """Against the list written out, in exact arithmetic."""
    cap, rng = produced + more, Given()
    made = past(lengths, rng)
    points = [produced, *sorted(h for h in lengths if h > produced)]
    if cap > points[-1]:
        points.append(cap)
    k = data.draw(st.integers(0, 16 * (len(points) - 1) - 1))
    u = Fraction(k, 16)
    left, right = points[int(u)], points[int(u) + 1]
    expected = min(round(left + (right - left) * (u - int(u))), cap)
    rng.play([float(u / (len(points) - 1)) + 1e-15])
    ((drawn,),) = made.draw_longer([(produced, cap)], 1)
    assert abs(drawn - expected) <= 1  # a tie may round either way
    assert produced <= drawn <= min(cap, max([cap, *lengths]))


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=9), st.integers(0, 60), st.integers(1, 40), st.randoms()
)
def test_a_running_request_never_draws_less_than_it_has_produced(
    lengths: list[int], produced: int, more: int, rng: Random
) -> None:
    (drawn,) = past(lengths, rng).draw_longer([(produced, produced + more)], 50)
    assert all(produced <= x <= produced + more for x in drawn)


def test_each_gap_is_equally_likely() -> None:
    """[5] + {10, 20, 30} + [40]: four gaps, a quarter of the draws in each."""
    rng = Given()
    made = past([10, 20, 30, 2, 4], rng)
    rng.play(grid(4000))
    (drawn,) = made.draw_longer([(5, 40)], 4000)
    shares = [sum(low < x <= high for x in drawn) for low, high in ((4, 10), (10, 20), (20, 30), (30, 40))]
    assert shares == pytest.approx([1000] * 4, abs=100)  # rounding moves some across each end
    assert (min(drawn), max(drawn)) == (5, 40)


def test_the_cap_is_a_neighbour_only_beyond_the_last() -> None:
    rng = Given()
    made = past([10, 20], rng)
    rng.play([0.999, 0.999])
    assert made.draw_longer([(15, 18)], 1) == [[18]], "20 is the last: interpolated up to it, then cut"
    assert made.draw_longer([(25, 30)], 1) == [[30]]


def test_nothing_longer_and_no_room_left() -> None:
    assert past([10, 20]).draw_longer([(30, 30)], 2) == [[30, 30]]


def test_it_says_how_much_is_known() -> None:
    made = PastLengths(2, 9, Random(0))
    assert made.describe() == "0 of 2 lengths known"
    for _ in range(3):
        made.record(1)
    assert made.describe() == "2 of 2 lengths known"


def test_requests_drawn_together_draw_what_they_would_one_by_one() -> None:
    lengths, requests = [3, 8, 8, 21, 40], [(0, 50), (9, 30), (40, 60), (45, 45)]
    together = past(lengths, Random(4)).draw_longer(requests, 3)
    alone = past(lengths, Random(4))
    assert together == [alone.draw_longer([one], 3)[0] for one in requests]
    assert past(lengths).draw_longer([], 3) == []
