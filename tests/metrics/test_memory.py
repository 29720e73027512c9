"""What KV memory was used for, worked out by hand from small logs."""

from __future__ import annotations

from typing import Any

from tests.metrics.logs import MS, admitted, arrived, finished, preempted, started, step

from servelab.core.metrics import Timeline, summarize
from servelab.core.records import Record, RequestPreempted


def row(*records: Record, addressing: str = "contiguous_slot", **pool: Any) -> dict[str, Any]:
    stated = {"id": "kv", "pages": 100, "page_tokens": 2, **pool}
    first = started(kv={"addressing": addressing, "pools": [stated]})
    (found,) = summarize(Timeline().feed_all([first, *records]))["servelab"]["kv_pages"]
    return {name.removeprefix("mean_").removesuffix("_tokens"): n for name, n in found.items()}


def one_request() -> list[Record]:
    """In memory from 10 to 40, in a range of 20 pages; 5, 6, 7 tokens stored, each for 10 ms."""
    return [
        arrived(0, "a", 5),
        admitted(0, "a"),
        step(0, [10], {"a": (5, 1)}, free=(80,)),
        step(10, [20], {"a": (1, 1)}, free=(80,)),
        step(20, [30], {"a": (1, 1)}, free=(80,)),
        finished(30, "a", 3),
    ]


def other(t: float, id: str = "z") -> list[Record]:
    """Somebody else's launch, so that time goes on."""
    return [arrived(t - 10, id, 1), admitted(t - 10, id), step(t - 10, [t], {id: (1, 1)}, free=(100,))]


def test_what_is_stored_and_what_is_still_to_come() -> None:
    found = row(*one_request(), *other(40))
    assert found["stored"] == (5 + 6 + 7) / 3
    assert found["awaited"] == (2 + 1 + 0) / 3
    assert found["idle"] == 40 - 7
    assert found["unusable"] == 0


def test_pages_are_not_reserved() -> None:
    found = row(*one_request(), *other(40), addressing="block_table")
    assert (found["awaited"], found["idle"]) == (0, 40 - 6)


def test_a_request_that_is_still_there_has_come_as_far_as_it_has() -> None:
    found = row(*one_request()[:-1])
    assert found["stored"] == (5 + 6) / 2
    assert found["awaited"] == (2 + 1) / 2


def test_held_steps_and_cached_tokens() -> None:
    found = row(
        arrived(0, "a", 9),
        admitted(0, "a", cached=4),
        step(0, [10], {"a": (5, 1)}),
        step(10, [20, 30], {"a": (1, 2)}),
        *other(40)[:2],
        step(30, [40], {"a": (1, 1), "z": (1, 1)}),
    )
    assert found["stored"] == (9 * 20 + 11 * 10) / 30
    assert found["idle"] is None, "others may have counted the cached tokens too"


def test_what_was_dropped_is_not_there_and_what_is_still_run_for_it_neither() -> None:
    found = row(
        arrived(0, "a", 5),
        admitted(0, "a"),
        step(0, [10], {"a": (5, 1)}),
        preempted(10, "a", 5),
        step(10, [20], {"a": (1, 0)}),  # it was in flight
        *other(30),
        admitted(30, "a", resumed=True),
        step(30, [40], {"a": (6, 1)}),
        step(40, [50], {"a": (1, 1)}),
        finished(50, "a", 3),
        step(50, [60], {"a": (1, 0)}),
    )
    # a: 5 until 20, nothing until 40, 6 until 50, 7 until 60; z: 1 from 30
    assert found["stored"] == (5 * 10 + 0 * 10 + 1 * 10 + 7 * 10 + 8 * 10) / 50
    assert found["awaited"] == ((7 - 5) * 10 + (7 - 6) * 10) / 50


def test_a_swap_takes_the_tokens_away_and_brings_them_back() -> None:
    def swap(t: int, mode: str) -> Record:
        return RequestPreempted(t_ns=t * MS, request="a", mode=mode, reason="r", lost_tokens=0)

    def with_(mode: str) -> float:
        found = row(
            arrived(0, "a", 5),
            admitted(0, "a"),
            step(0, [10], {"a": (5, 1)}),
            swap(10, mode),
            *other(20),
            *other(30, "y"),
            step(30, [40], {"a": (1, 1)}),
            step(40, [50], {"a": (1, 1)}),
        )
        return float(found["stored"])

    assert with_("swap") == (5 + 1 + 2 + 8) / 4
    assert with_("pause") == (5 + 6 + 7 + 8) / 4


def test_pieces_count_as_long_as_they_are_shown() -> None:
    found = row(
        arrived(0, "a", 5),
        admitted(0, "a"),
        step(0, [10], {"a": (5, 1)}, unusable_pages=(3,)),
        step(10, [30], {"a": (1, 1)}),
        step(30, [40], {"a": (1, 1)}),
    )
    assert found["unusable"] == 3 * 2 * 20 / 30


def test_pools_with_a_window_are_left_out() -> None:
    found = row(*one_request(), *other(40), window_tokens=4)
    assert found["pages"] == 20 * 2 / 3 * 1.5  # as for every pool
    assert [found[name] for name in ("stored", "awaited", "idle", "unusable")] == [None] * 4
