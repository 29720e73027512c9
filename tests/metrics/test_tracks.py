"""Counting per step what a log says per request: against the plain way, and without memory per token."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.errors import LogError
from servelab.core.metrics import RequestFacts, Timeline
from servelab.core.metrics.memory import MemoryFacts
from servelab.core.metrics.summary import _latencies, busiest_second
from servelab.core.metrics.tracks import Coverage, Track
from servelab.core.records import (
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestPreempted,
    StepDone,
)

NS_PER_S = 1_000_000_000
STEP = 130_000_000
"""About eight steps a second, so that seconds differ."""


class World:
    """A log made at random by the rules of an engine, and beside it the plain counts of every token."""

    def __init__(self, draw: st.DrawFn, chunks: bool) -> None:
        self.draw, self.chunks = draw, chunks
        self.records: list[Record] = []
        self.now = 0
        self.times: dict[str, list[int]] = {}
        self.sizes: dict[str, list[int]] = {}
        self.stored: dict[str, int] = {}
        """Tokens in memory; who has left is here until the next step."""
        self.running: dict[str, bool] = {}
        """Who runs, and whether its prompt is done."""
        self.waiting: list[str] = []
        self.leaving: set[str] = set()
        self.tokens_ns = 0
        self.ended: set[str] = set()

    def pick(self, options: list[str]) -> list[str]:
        return [one for one in options if self.draw(st.integers(0, 4))]

    def chance(self, one_in: int) -> bool:
        return not self.draw(st.integers(0, one_in - 1))

    def arrive(self) -> None:
        name = f"r{len(self.times)}"
        self.times[name], self.sizes[name] = [], []
        self.records.append(RequestArrived(t_ns=self.now, request=name, prompt_tokens=9, max_new_tokens=99))
        self.waiting.append(name)

    def fork(self) -> None:
        """A further sample of a request that runs, with pages of its own."""
        parent, name = next(iter(self.running)), f"r{len(self.times)}"
        self.times[name], self.sizes[name] = [self.now], [1]
        self.records += [
            RequestArrived(t_ns=self.now, request=name, prompt_tokens=9, max_new_tokens=99, parent=parent),
            RequestForked(t_ns=self.now, request=name, parent=parent, shared_tokens=0, reason="no"),
        ]
        self.waiting.append(name)

    def admit(self) -> None:
        for name in self.pick(self.waiting):
            self.waiting.remove(name)
            self.records.append(RequestAdmitted(t_ns=self.now, request=name, resumed=bool(self.times[name])))
            self.running[name] = False

    def leave(self) -> None:
        for name in list(self.running):
            if self.chance(6):
                mode = self.draw(st.sampled_from(["recompute", "end"]))
                del self.running[name]
                if name in self.stored:
                    self.leaving.add(name)
                if mode == "end":
                    self.ended.add(name)
                    self.records.append(
                        RequestFinished(
                            t_ns=self.now,
                            request=name,
                            outcome="completed",
                            reason="stop",
                            output_tokens=sum(self.sizes[name]),
                        )
                    )
                else:
                    self.waiting.append(name)
                    self.records.append(
                        RequestPreempted(t_ns=self.now, request=name, mode=mode, reason="", lost_tokens=0)
                    )

    def step(self, lane: int, batch: list[str]) -> None:
        """Some run: prompts in chunks, decodes with one token, or with several if there are drafts."""
        steps = 1 if any(not self.running[name] for name in batch) else self.draw(st.integers(1, 3))
        start = self.now
        ends = [start + STEP * (i + 1) for i in range(steps)]
        self.tokens_ns += sum(self.stored.values()) * (ends[-1] - start)
        for name in self.leaving:
            del self.stored[name]
        self.leaving.clear()
        tokens, emitted = [], []
        for name in batch:
            n = out = 1
            if not self.running[name]:
                n, out = self.draw(st.integers(1, 5)), int(not self.chance(3))
                self.running[name] = bool(out)
            elif self.chunks and self.chance(3):
                out = 3
            tokens.append(n)
            emitted.append(out * steps)
            self.stored[name] = self.stored.get(name, 0) + n + steps - 1
            self.times[name] += ends if out else []
            self.sizes[name] += [out] * steps if out else []
        self.now = ends[-1]
        self.records.append(
            StepDone(
                t_ns=self.now,
                lane=lane,
                step=0,
                start_ns=start,
                ends_ns=ends,
                requests=batch,
                tokens=tokens,
                emitted=emitted,
                waiting=0,
                running=0,
                free_pages=(9,),
            )
        )


@st.composite
def worlds(draw: st.DrawFn, chunks: bool) -> World:
    world = World(draw, chunks)
    for _ in range(draw(st.integers(3, 14))):
        for _ in range(draw(st.integers(0, 2))):
            world.arrive()
        if world.running and world.chance(5):
            world.fork()
        world.admit()
        # most often everybody runs, as decodes do; sometimes only some, on this lane or another
        batch = list(world.running) if draw(st.booleans()) else world.pick(list(world.running))
        if batch:
            world.step(draw(st.sampled_from([0, 0, 0, 1])), batch)
        world.leave()
    return world


def check(world: World) -> None:
    timeline = Timeline().feed_all(world.records)
    for name, facts in timeline.requests.items():
        times, sizes = world.times[name], world.sizes[name]
        assert list(facts.times) == times, name
        assert facts.output_tokens == sum(sizes)
        assert list(facts.sizes) == sizes if facts.sizes is not None else set(sizes) <= {1}
        assert facts.chunks == len(times)
        assert facts.ttft_ns == (times[0] - facts.arrival_ns if times else None)
        assert facts.last_chunk_ns == (times[-1] if times else None)
        assert facts.tbt_ns == max((b - a for a, b in pairwise(times)), default=0)
    if not timeline.engines:
        return
    memory = timeline.engines[0].memory
    assert memory.stored_ns == world.tokens_ns
    assert memory._total == sum(world.stored.values())
    done = [facts for facts in timeline.requests.values() if facts.outcome == "completed"]
    gaps = Counter(b - a for facts in done for a, b in pairwise(world.times[facts.id]))
    itl = _latencies(done, "chunk")["itl"]
    assert dict(zip(itl.values, itl.counts, strict=True)) == gaps
    if done:
        origin = min(facts.arrival_ns for facts in done)
        seconds: Counter[int] = Counter()
        for facts in done:
            for time, size in zip(world.times[facts.id], world.sizes[facts.id], strict=True):
                seconds[(time - origin) // NS_PER_S] += size
        assert busiest_second(done) == max(seconds.values(), default=0)


@settings(max_examples=80)
@given(worlds(chunks=False))
def test_as_if_every_token_were_counted(world: World) -> None:
    check(world)


@settings(max_examples=40)
@given(worlds(chunks=True))
def test_chunks_of_several_tokens(world: World) -> None:
    check(world)


def alone(n: int, steps: int) -> Iterator[Record]:
    """``n`` requests that decode side by side for so many steps."""
    names = [f"r{i}" for i in range(n)]
    for name in names:
        yield RequestArrived(t_ns=0, request=name, prompt_tokens=9, max_new_tokens=9999)
        yield RequestAdmitted(t_ns=0, request=name, resumed=False)
    for k in range(steps):
        yield decode(k, names)


def decode(k: int, names: list[str], lane: int = 0) -> StepDone:
    return StepDone(
        t_ns=(k + 1) * 10,
        lane=lane,
        step=k,
        start_ns=k * 10,
        ends_ns=[(k + 1) * 10],
        requests=list(names),
        tokens=[1] * len(names),
        emitted=[1] * len(names),
        waiting=0,
        running=len(names),
        free_pages=(9,),
    )


@pytest.mark.parametrize("n", [1, 200])
def test_memory_does_not_grow_with_output_tokens(n: int) -> None:
    timeline = Timeline().feed_all(alone(n, 3000))
    (track,) = timeline.engines[0].tracks.values()
    assert len(track.ends) == 3000
    assert track.ends.itemsize == 8
    for facts in timeline.requests.values():
        assert facts._spans == []  # all of its times are the track's
        assert facts._own is None
        assert facts.output_tokens == 3000
    memory = timeline.engines[0].memory
    assert all(len(getattr(memory, name)) <= n for name in ("_stored", "_on", "_since", "_begin"))


def test_what_ended_leaves_one_span_and_no_entry_in_the_account_of_memory() -> None:
    timeline = Timeline().feed_all(alone(3, 5))
    timeline.feed(finished(50, "r1", 5))
    timeline.feed(decode(5, ["r0", "r2"]))
    facts = timeline.requests["r1"]
    assert [(first, last) for _, first, last in facts._spans] == [(0, 5)]
    memory = timeline.engines[0].memory
    for name in ("_stored", "_on", "_since", "_begin", "_final", "_resident_ns", "_ended", "_leaving"):
        assert "r1" not in getattr(memory, name), name
    # to the end that shows it gone: 5 tokens for 50 ns, and 6 for 50 ns twice; 3 (1 + .. + 5) were stored
    assert memory.awaited_ns == 5 * 50 + 2 * 6 * 50 - 3 * 15 * 10


def test_prompts_that_run_by_themselves_do_not_disturb_who_decodes() -> None:
    """As in schedulers that run prompts in steps of their own: decodes stand still for them."""
    records = list(alone(20, 3))
    records += [
        RequestArrived(t_ns=30, request="new", prompt_tokens=9, max_new_tokens=9),
        RequestAdmitted(t_ns=30, request="new", resumed=False),
        decode(3, ["new"]),
        decode(4, [f"r{i}" for i in range(20)] + ["new"]),
    ]
    timeline = Timeline().feed_all(records)
    assert all(not timeline.requests[f"r{i}"]._spans for i in range(20))
    assert list(timeline.requests["r0"].times) == [10, 20, 30, 50]
    assert list(timeline.requests["new"].times) == [40, 50]


def test_a_request_on_another_lane_is_on_one_track_only() -> None:
    timeline = Timeline().feed_all(alone(2, 2))
    timeline.feed(decode(2, ["r1"], lane=1))
    timeline.feed(decode(3, ["r0"], lane=0))
    timeline.feed(decode(4, ["r0", "r1"], lane=0))
    assert list(timeline.requests["r1"].times) == [10, 20, 30, 50]
    assert list(timeline.requests["r0"].times) == [10, 20, 40, 50]
    assert timeline.engines[0].memory._total == 8


def test_a_step_after_the_end_it_caused_stores_nothing() -> None:
    timeline = Timeline().feed_all(alone(2, 2))
    timeline.feed(finished(30, "r1", 3))
    timeline.feed(decode(2, ["r0", "r1"]))
    timeline.feed(decode(3, ["r0"]))
    assert list(timeline.requests["r1"].times) == [10, 20, 30]
    assert timeline.engines[0].memory._total == 4


def test_lists_of_a_step_go_together() -> None:
    timeline = Timeline().feed_all(alone(2, 1))
    step = decode(1, ["r0", "r1"])
    step.emitted.pop()
    with pytest.raises(LogError, match="2 requests, 2 counts of tokens and 1 of output"):
        timeline.feed(step)


def test_coverage_counts_spans_per_time() -> None:
    ends, other = array("q", [10, 20, 35, 50]), array("q", [7])
    coverage = Coverage()
    for first, last in ((0, 4), (1, 3), (1, 2)):
        coverage.add(ends, first, last)
    coverage.add(other, 0, 1)
    assert list(coverage.times()) == [(10, 1), (20, 3), (35, 2), (50, 1), (7, 1)]
    assert list(coverage.gaps()) == [(10, 1), (10, 3), (15, 2), (15, 1), (7, 1)]


def test_one_own_array_for_times_apart() -> None:
    facts = RequestFacts(RequestArrived(t_ns=0, request="r", prompt_tokens=1, max_new_tokens=9))
    facts.add(array("q", [5]), 1)
    facts.add(array("q", [8]), 1)
    track = Track(MemoryFacts())
    facts.join(track)
    track.ends.append(11)
    facts.add(array("q", [13]), 1)
    assert [(list(ends), first, last) for ends, first, last in facts.spans()] == [
        ([5, 8], 0, 2),
        ([11], 0, 1),
        ([13], 0, 1),
    ]


def finished(t_ns: int, name: str, output: int) -> RequestFinished:
    return RequestFinished(t_ns=t_ns, request=name, outcome="completed", reason="stop", output_tokens=output)
