"""Figures over time: exact against a slow reading of the same records, and bounded in memory."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.metrics.logs import (
    MS,
    POOL,
    admitted,
    arrived,
    ended,
    finished,
    preempted,
    started,
    step,
    three_requests,
)

from servelab.core.metrics import Timeline, summarize
from servelab.core.records import (
    ContextEnded,
    ContextKept,
    PagesEvicted,
    QualityBegan,
    Record,
    RequestForked,
    RequestPreempted,
    StepDone,
    TransferStarted,
)
from servelab.core.testing.fakes import Rig, make_engine, toy_limits
from servelab.plugins.observers.report.series import BINS, Channel, Series

S = 1_000_000_000
CHANGES = {"arrived": (1, 0), "admitted": (-1, 1), "preempted": (1, -1), "finished": (0, -1)}
"""How many more requests wait and run; preempted ones are recomputed, and only running ones end."""


def fed(*records: Record) -> Series:
    return Series().feed_all(records)


def counted(records: list[Record]) -> list[Record]:
    """The same, with steps that say how many requests wait and run, as the engine's do."""
    waiting = running = 0
    for record in records:
        more = CHANGES.get(record.ev, (0, 0))
        waiting, running = waiting + more[0], running + more[1]
        if isinstance(record, StepDone):
            record.waiting, record.running = waiting, running
    return records


def total(channel: Channel, series: Series) -> float:
    series.settle()
    return sum(channel.sums)


# ---------------------------------------------------------------- worked by hand


def test_levels_of_three_requests() -> None:
    """Waiting: a 0-50, b 10-110 and 120-160, c 100-140. Running: a 50-160, b 110-120, 160-210, c 140-160."""
    series = fed(*counted(three_requests()))
    assert total(series.waiting, series) == (50 + 100 + 40 + 40) * MS
    assert total(series.running, series) == (110 + 10 + 50 + 20) * MS
    assert max(series.peaks(series.waiting)) == 2
    assert max(series.peaks(series.running)) == 2
    assert total(series.away, series) == 0
    assert series.last_ns == 210 * MS


def test_launches_of_three_requests() -> None:
    """Prefill: a 10 tokens over 60 ms, b 20 over 10 ms, c 30 over 20 ms, b again 21 over 40 ms."""
    series = fed(*three_requests())
    assert sum(series.busy.sums) == 160 * MS
    assert sum(series.prefill.sums) == (10 * 60 + 20 * 10 + 30 * 20 + 21 * 40) * MS
    decode = 1 * 10 + 1 * 20 + 1 * 20 + 1 * 10  # a beside b, a in the hold, a beside c, b's last
    assert sum(series.tokens.sums) - sum(series.prefill.sums) == decode * MS
    assert sum(series.batch.sums) == (60 + 2 * 10 + 20 + 2 * 20 + 40 + 10) * MS
    assert max(series.tokens.peaks) == 31
    assert max(series.batch.peaks) == 2
    assert sum(series.emitted.sums) == pytest.approx(9)
    assert sum(series.arrived.sums) == sum(series.completed.sums) == 3


def test_pages_preemptions_and_the_rest_of_three_requests() -> None:
    """Free 90 from 110, 60 from 120, 80 from 140, 100 from 160, 70 from 200, 100 from 210."""
    series = fed(*three_requests())
    assert total(series.kv[0], series) == (10 * 10 + 40 * 20 + 20 * 20 + 0 * 40 + 30 * 10) * MS
    assert max(series.peaks(series.kv[0])) == 40
    assert {mode: sum(counts.sums) for mode, counts in series.preempted.items()} == {"recompute": 1}
    assert sum(series.lost.sums) == 20
    at = 120 * MS >> series.shift
    assert series.upto(series.lost)[at - 1 : at + 1] == [0, 20]


def test_a_hold_is_one_token_per_request_and_step_after_its_first_one() -> None:
    series = fed(
        started(),
        arrived(0, "a"),
        admitted(0, "a"),
        step(0, [4, 5, 6, 7], {"a": (10, 4)}, free=(99,)),
        finished(7, "a", 4),
        ended(7),
    )
    assert sum(series.tokens.sums) == (10 * 4 + 3) * MS
    assert sum(series.prefill.sums) == 10 * 4 * MS
    edges, rates = series.rate(series.emitted, 7)
    assert sum(r * (b - a) for r, a, b in zip(rates, edges, edges[1:], strict=False)) == pytest.approx(4)
    assert rates[0] == pytest.approx(250, rel=0.01)
    assert rates[-1] == pytest.approx(1000, rel=0.01)


def test_rates_have_no_sliver_of_a_slice_at_the_end() -> None:
    """1,000 requests, one every ms, and the run ends a little after the border of a slice."""
    series = fed(started(), *(arrived(i, f"r{i}") for i in range(1000)), arrived(1006.7, "last"))
    edges, rates = series.rate(series.arrived, 10)
    assert 5 <= len(rates) <= 10
    assert min(b - a for a, b in pairwise(edges)) == pytest.approx(edges[1])
    assert rates == pytest.approx([1000] * len(rates), rel=0.05)


def test_a_prompt_in_chunks_is_prefill_until_it_emits() -> None:
    series = fed(
        started(),
        arrived(0, "a", 9),
        admitted(0, "a"),
        step(0, [1], {"a": (8, 0)}),
        step(1, [2], {"a": (1, 1)}),  # the last chunk has one token
        step(2, [3], {"a": (1, 1)}),
    )
    assert sum(series.prefill.sums) == 9 * MS
    assert sum(series.tokens.sums) == 10 * MS


def test_after_a_swap_a_request_decodes_and_after_recompute_it_prefills() -> None:
    def swapped(mode: str) -> Series:
        return fed(
            started(),
            arrived(0, "a", 9),
            admitted(0, "a"),
            step(0, [1], {"a": (9, 1)}),
            RequestPreempted(t_ns=1 * MS, request="a", mode=mode, reason="full", lost_tokens=9),
            *([admitted(5, "a", resumed=True)] if mode == "recompute" else []),
            step(5, [6], {"a": (10 if mode == "recompute" else 1, 1)}),
        )

    assert sum(swapped("swap").prefill.sums) == 9 * MS
    assert sum(swapped("recompute").prefill.sums) == 19 * MS


def test_paused_and_swapped_requests_neither_wait_nor_run() -> None:
    series = fed(
        started(),
        arrived(0, "a"),
        arrived(0, "b"),
        admitted(0, "a"),
        admitted(0, "b"),
        step(0, [1], {"a": (10, 1), "b": (10, 1)}),
        RequestPreempted(t_ns=1 * MS, request="b", mode="swap", reason="full", lost_tokens=0),
        TransferStarted(t_ns=1 * MS, transfer=1, request="b", direction="out", pages=1, bytes=4096),
        step(1, [4], {"a": (1, 1)}),
        TransferStarted(t_ns=4 * MS, transfer=2, request="b", direction="in", pages=1, bytes=4096),
        step(4, [6], {"a": (1, 1), "b": (1, 1)}),
    )
    assert total(series.away, series) == (4 - 1 + 2) * MS  # until a step says that it runs again
    assert total(series.waiting, series) == 0
    assert {way: sum(counts.sums) for way, counts in series.moved.items()} == {"out": 4096, "in": 4096}


def test_when_nothing_is_live_no_page_is_in_use_but_for_kept_kv() -> None:
    def last(*between: Record) -> float:
        series = fed(
            started(),
            arrived(0, "a"),
            admitted(0, "a"),
            step(0, [10], {"a": (10, 1)}, free=(70,)),
            *between,
            finished(10, "a", 1),
            arrived(100, "b"),
        )
        return series.pages(0)[-1]

    kept = ContextKept(
        t_ns=10 * MS,
        program="p",
        request="a",
        tokens=10,
        pages=(30,),
        tier="device",
        until_ns=None,
        reason="",
    )
    gone = ContextEnded(t_ns=10 * MS, program="p", reason="")
    assert last() == 0
    assert last(kept) == pytest.approx(30)
    assert last(kept, gone) == 0


def test_a_peak_that_is_given_back_at_once_is_seen() -> None:
    series = fed(
        started(),
        arrived(0, "a"),
        admitted(0, "a"),
        step(0, [10], {"a": (10, 1)}, free=(5,)),
        finished(10, "a", 1),
    )
    assert max(series.peaks(series.kv[0])) == 95


@pytest.mark.parametrize("outcome", ["cancelled", "rejected"])
def test_a_request_that_ends_in_the_queue_leaves_it(outcome: str) -> None:
    series = fed(started(), arrived(0, "a"), arrived(0, "b"), finished(4, "b", 0, outcome), arrived(10, "c"))
    assert total(series.waiting, series) == (2 * 4 + 6) * MS
    assert sum(series.completed.sums) == 0


def test_what_comes_after_the_serving_is_not_in_it() -> None:
    series = fed(*three_requests()[:-1], QualityBegan(t_ns=900 * S, labels=["x"], total=1), ended(900_000))
    assert series.last_ns == 210 * MS


def test_a_run_that_was_cut_off_lasts_to_its_end() -> None:
    series = fed(
        started(), arrived(0, "a"), admitted(0, "a"), step(0, [10], {"a": (10, 1)}, free=(60,)), ended(30)
    )
    assert series.last_ns == 30 * MS
    assert total(series.kv[0], series) == 40 * 20 * MS
    assert total(series.running, series) == 30 * MS


def test_engines_are_added_up_and_their_pages_averaged() -> None:
    records = [started(), arrived(0, "a"), arrived(0, "b"), admitted(0, "a"), admitted(0, "b")]
    first = step(0, [10], {"a": (10, 1)}, free=(80,))
    second = step(0, [10], {"b": (10, 1)}, free=(40,))
    second.engine = 1
    series = fed(*records, first, second, arrived(20, "c"))
    assert sum(series.busy.sums) == 20 * MS
    assert series.pages(0)[-2] == pytest.approx(40)
    assert max(series.peaks(series.kv[0])) == 60
    assert series.per_step(series.tokens)[0] == pytest.approx(10)


def test_pools_without_pages_are_not_followed() -> None:
    info = {"kv": {"pools": [{"id": "x"}, {**POOL, "id": "y", "pages": 50}]}}
    series = fed(
        started(**info), arrived(0, "a"), admitted(0, "a"), step(0, [10], {"a": (9, 1)}, free=(1, 20))
    )
    assert [pool["id"] for pool in series.pools] == ["y"]
    assert max(series.peaks(series.kv[0])) == 30


def test_counts_of_evicted_pages() -> None:
    series = fed(started(), PagesEvicted(t_ns=5, pool=0, pages=3), PagesEvicted(t_ns=9 * MS, pool=0, pages=4))
    assert series.upto(series.evicted)[0] == 3
    assert series.upto(series.evicted)[-1] == 7


def test_nothing_fed_is_nothing() -> None:
    series = Series()
    assert series.bins == 0
    assert series.level(series.waiting) == []
    assert series.rate(series.emitted, 60) == ([0.0], [])


# ---------------------------------------------------------------- against a slow reading


def at(ns: int, record: Record) -> Record:
    record.t_ns = ns
    return record


def records_of(seed: int, n: int, scale: int) -> Iterator[Record]:
    """One engine's life by chance, consistent with itself: queue, holds, preemptions, idle time."""
    rng = random.Random(seed)
    yield started()
    now, waiting, running, born = 0, [], [], 0  # type: ignore[var-annotated]
    for number in range(n):
        for _ in range(rng.randrange(3)):
            waiting.append(f"r{born}")
            yield at(now, arrived(0, waiting[-1]))
            born += 1
        while waiting and rng.random() < 0.6:
            running.append(waiting.pop(0))
            yield at(now, admitted(0, running[-1]))
        if running and rng.random() < 0.2:
            waiting.insert(0, running.pop())
            yield at(now, preempted(0, waiting[0], rng.randrange(9)))
        start, k = now, rng.choice((1, 1, 1, 7))
        ends = sorted(start + rng.randrange(1, scale) for _ in range(k))
        if running:
            now = ends[-1]
            yield StepDone(
                t_ns=now,
                lane=0,
                step=number,
                start_ns=start,
                ends_ns=ends,
                requests=list(running),
                tokens=[rng.randrange(1, 9) for _ in running],
                emitted=[k] * len(running),
                waiting=len(waiting),
                running=len(running),
                free_pages=(rng.randrange(100),),
            )
            for name in [name for name in running if rng.random() < 0.3]:
                running.remove(name)
                yield at(now, finished(0, name, 1))
        else:
            now += rng.randrange(scale)


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 60), st.sampled_from([5, 10**4, 10**9, 10**13]))
@example(11885, 42, 5)  # held steps that take no time
def test_sums_and_peaks_are_those_of_a_slow_reading(seed: int, n: int, scale: int) -> None:
    records = list(records_of(seed, n, scale))
    series = fed(*records)
    steps = [record for record in records if isinstance(record, StepDone)]
    spans = [
        (a, b, sum(one.tokens) if i == 0 else len(one.requests), len(one.requests))
        for one in steps
        for i, (a, b) in enumerate(zip([one.start_ns, *one.ends_ns], one.ends_ns, strict=False))
    ]
    assert sum(series.busy.sums) == sum(b - a for a, b, _, _ in spans)
    assert sum(series.tokens.sums) == sum((b - a) * tokens for a, b, tokens, _ in spans)
    assert sum(series.batch.sums) == sum((b - a) * size for a, b, _, size in spans)
    assert max(series.batch.peaks) == max((size for *_, size in spans), default=0)
    assert sum(series.emitted.sums) == pytest.approx(sum(sum(one.emitted) for one in steps))
    waits, runs = levels(records)
    assert total(series.waiting, series) == waits
    assert total(series.running, series) == runs
    # every bin by itself: as much busy time as launches cover of it
    width = 1 << series.shift
    for i in random.Random(seed).sample(range(BINS), 20):
        inside = sum(max(0, min(b, (i + 1) * width) - max(a, i * width)) for a, b, _, _ in spans)
        assert series.busy.sums[i] == inside
        most = [tokens for a, b, tokens, _ in spans if a < (i + 1) * width and b > i * width and b > a]
        assert series.tokens.peaks[i] >= max(most, default=0)


def levels(records: list[Record]) -> tuple[int, int]:
    """Integrals of waiting and running, from the records of arrival, admission, preemption and end alone."""
    waiting = running = waits = runs = last = 0
    for record in records:
        waits += waiting * (record.t_ns - last)
        runs += running * (record.t_ns - last)
        last = record.t_ns
        more = CHANGES.get(record.ev, (0, 0))
        waiting, running = waiting + more[0], running + more[1]
    return waits, runs


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 10**16))
def test_between_half_and_all_bins_are_used_however_long_the_run(seed: int, length: int) -> None:
    series = fed(started(), arrived(0, "a"), at(length, arrived(0, "b")))
    assert series.bins <= BINS
    assert series.bins > BINS // 2 or series.shift == 10
    assert sum(series.arrived.sums) == 2
    assert all(len(one.sums) == BINS for one in series._all())


def test_memory_does_not_grow_with_the_run() -> None:
    series = fed(started())
    for i in range(3000):
        name = f"r{i}"
        t = i * 10.0
        for record in (
            arrived(t, name),
            admitted(t, name),
            step(t, [t + 5], {name: (9, 1)}),
            finished(t + 5, name, 1),
        ):
            series.feed(record)
    for record in (arrived(40_000, "x"), admitted(40_000, "x"), finished(40_001, "x", 0, "aborted")):
        series.feed(record)
    assert not series._on_device and not series._prefilling
    assert len(series._used) == 1 and len(series._counts) <= 1


def test_the_means_agree_with_the_results() -> None:
    """On a log in which time stands still between launches, the mean of pages is that of results.json."""
    records = three_requests()
    timeline, series = Timeline().feed_all(records), fed(*records)
    stated = summarize(timeline)["servelab"]["kv_pages"][0]["mean_pages"]
    assert total(series.kv[0], series) / (100 * MS) == pytest.approx(stated)


def test_samples_of_a_prompt_are_where_the_engine_has_them() -> None:
    """Waiting and running, told by events, equal the engine's own counts at the end of every launch."""
    rng = random.Random(5)
    rig = Rig(make_engine(pages=14, shares=True, limits=toy_limits(requests=4)))
    for k in range(12):
        rig.arrive(f"r{k}", rng.randint(1, 9), rng.randint(1, 6), n=rng.randint(1, 3))
        rig.finish()
    rig.abort("r11")
    rig.drain()
    series, told = Series(), []
    for record in rig.records:
        if isinstance(record, StepDone):
            told.append((series._counts.get(0), (record.waiting, record.running)))
        series.feed(record)
    assert sum(isinstance(x, RequestForked) and x.shared_tokens > 0 for x in rig.records) > 3
    assert sum(isinstance(x, RequestForked) and not x.shared_tokens for x in rig.records) > 0
    assert [a for a, _ in told] == [b for _, b in told]
    assert max(series.peaks(series.away)) == 0
    assert sum(series.emitted.sums) == pytest.approx(sum(x.output_tokens for x in rig.ends()))
