"""Where a request is follows from the records, whatever took it off the device."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests.metrics.logs import MS, admitted, arrived, finished, step

from servelab.core.metrics.phases import ON_DEVICE, WAITING, Phases
from servelab.core.records import (
    Record,
    RequestForked,
    RequestPreempted,
    TransferEnded,
    TransferStarted,
)


def off(t: float, mode: str, request: str = "a") -> RequestPreempted:
    return RequestPreempted(t_ns=int(t * MS), request=request, mode=mode, reason="x", lost_tokens=0)


def move(t: float, number: int, direction: str, request: str = "a") -> TransferStarted:
    return TransferStarted(
        t_ns=int(t * MS), transfer=number, request=request, direction=direction, pages=1, bytes=1
    )  # type: ignore[arg-type]


def moved(t: float, number: int) -> TransferEnded:
    return TransferEnded(t_ns=int(t * MS), transfer=number)


def forked(t: float, shared: int) -> RequestForked:
    return RequestForked(t_ns=int(t * MS), request="a", parent="p", shared_tokens=shared)


def story(records: Sequence[Record]) -> list[tuple[str | None, float]]:
    """(phase, ms) of request ``a``."""
    phases = Phases()
    found = [change for record in records for change in phases.feed(record)]
    return [(one.phase, one.t_ns / MS) for one in found if one.request == "a"]


START = [arrived(0, "a"), admitted(1, "a")]
FIRST = step(1, [5], {"a": (10, 1)})
BEGIN = [("queued", 0), ("prefill", 1)]

STORIES = {
    "a prompt in chunks": (
        [step(1, [5], {"a": (4, 0)}), step(5, [7], {"a": (6, 1)}), finished(7, "a", 1)],
        [("decode", 7), (None, 7)],
    ),
    "dropped and computed again": (
        [FIRST, off(6, "recompute"), admitted(8, "a", resumed=True), step(8, [9], {"a": (11, 1)})],
        [("decode", 5), ("preempted", 6), ("recompute", 8), ("decode", 9)],
    ),
    "a mode that is new": ([FIRST, off(6, "compress")], [("decode", 5), ("preempted", 6)]),
    "swapped while it decodes": (
        [FIRST, move(6, 3, "out"), off(6, "swap"), moved(8, 3), move(9, 4, "in"), moved(11, 4)],
        [("decode", 5), ("swap out", 6), ("swapped", 8), ("swap in", 9), ("decode", 11)],
    ),
    "swapped in its prompt": (
        [step(1, [5], {"a": (4, 0)}), off(6, "swap"), move(6, 3, "out"), moved(8, 3), move(9, 4, "in"),
         moved(11, 4), step(11, [12], {"a": (6, 1)})],
        [("swap out", 6), ("swapped", 8), ("swap in", 9), ("prefill", 11), ("decode", 12)],
    ),
    "paused and resumed, which no record says": (
        [FIRST, off(6, "pause"), step(9, [10], {"a": (1, 1)})],
        [("decode", 5), ("paused", 6), ("decode", 9)],
    ),
    "paused in its prompt": (
        [step(1, [5], {"a": (4, 0)}), off(6, "pause"), step(9, [10], {"a": (2, 0)}),
         step(10, [11], {"a": (4, 1)})],
        [("paused", 6), ("prefill", 9), ("decode", 11)],
    ),
    "paused while the launch with its first token runs": (
        [off(4, "pause"), FIRST, step(9, [10], {"a": (1, 1)})],
        [("paused", 4), ("decode", 9)],
    ),
    "paused while a launch with a chunk runs": (
        [off(4, "pause"), step(1, [5], {"a": (4, 0)}), step(9, [10], {"a": (2, 0)})],
        [("paused", 4), ("prefill", 9)],
    ),
    "dropped while a launch runs": (
        [off(4, "recompute"), step(1, [5], {"a": (10, 0)}), admitted(6, "a", resumed=True)],
        [("preempted", 4), ("recompute", 6)],
    ),
    "a step that ended before the record in front of it": (
        [off(6, "pause"), step(6, [5], {"a": (10, 1)})],
        [("paused", 6), ("prefill", 6), ("decode", 6)],
    ),
    "a kept context comes from the host": (
        [finished(2, "a", 0), arrived(3, "a"), move(4, 1, "in"), moved(5, 1), admitted(5, "a")],
        [(None, 2), ("queued", 3), ("swap in", 4), ("prefill", 5), ("prefill", 5)],
    ),
    "a sample that shares its prompt": ([forked(5, 9)], [("decode", 5)]),
    "a sample that computes its prompt": (
        [forked(5, 0), admitted(6, "a", resumed=True), step(6, [7], {"a": (10, 1)})],
        [("preempted", 5), ("recompute", 6), ("decode", 7)],
    ),
    "what happens after its end": (
        [finished(4, "a", 0), FIRST, forked(5, 9), off(6, "swap"), move(6, 1, "in"), moved(7, 1),
         finished(8, "a", 0)],
        [(None, 4)],
    ),
    "others": ([off(6, "swap", "b"), moved(7, 9), move(7, 1, "in", "b"), moved(8, 1)], []),
}  # fmt: skip


@pytest.mark.parametrize("case", STORIES)
def test_story(case: str) -> None:
    records, expected = STORIES[case]
    assert story([*START, *records]) == [*BEGIN, *expected]


def test_who_is_where_by_engine() -> None:
    phases = Phases()
    for record in (arrived(0, "a"), arrived(0, "b"), arrived(0, "c"), admitted(1, "b"), admitted(1, "c")):
        phases.feed(record)
    phases.feed(off(2, "pause", "c"))
    assert phases.names(0, ON_DEVICE) == ["b"]
    assert phases.names(0, WAITING) == ["a", "c"]
    assert phases.names(1, WAITING) == []
