"""Pools with a sliding window: pages that no later token sees come back, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from servelab.core.api import Pin
from servelab.core.engine.ledger import Ledger
from servelab.core.engine.state import Request
from servelab.core.engine.swap import finish_transfer, swap_in, swap_out
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import LedgerError
from servelab.core.facts import Limits, ModelFacts
from servelab.core.layout import Capacity, Pool
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import Record, RequestPreempted
from servelab.core.request import Phase, RequestSpec
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    ListWorkload,
    Rig,
    Script,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    find,
    make_engine,
    raises_in,
    step_by_step,
    toy_layout,
    toy_limits,
)
from servelab.plugins.executors._pages import pages_in, stated_pages
from servelab.plugins.kvcache.paged import Paged
from servelab.plugins.schedulers._lightllm import Room
from servelab.plugins.schedulers.vllm_v1 import VllmV1


def ledger(pages: int = 8, *, page: int = 4, window: int = 6, host: int = 0) -> Ledger:
    """Two pools of equal pages: one keeps everything, one the window."""
    layout = toy_layout(page, page, windows=(None, window))
    capacity = Capacity(device_pages=(pages, pages), host_pages=(host, host) if host else ())
    return Ledger(ToyKV(layout), "toykv", layout, capacity)


def request(book: Ledger, id: str = "a") -> Request:
    return Request(RequestSpec(id=id, prompt_tokens=100, max_new_tokens=100), 0, 100, book.open(id))


def write(book: Ledger, r: Request, n: int) -> None:
    """``n`` more tokens, computed at once."""
    book.reserve(r, n)
    r.computed += n
    r.slack -= n
    book.slide(r)
    book.check_integrity()


# ------------------------------------------------------------------------- the ledger


@pytest.mark.parametrize("page", [1, 2, 4])
@pytest.mark.parametrize("window", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("step", [1, 3])
def test_a_table_holds_what_the_next_token_sees_and_no_page_more(page: int, window: int, step: int) -> None:
    book = ledger(60, page=page, window=window)
    a = request(book)
    for _ in range(30 // step):
        write(book, a, step)
        seen = max(0, a.computed - window + 1)  # of the token at position ``computed``
        first, last = seen // page, -(-a.computed // page)
        assert a.lease.first == [0, first]
        assert [len(t) for t in a.lease.tables] == [last, last - first]
        assert a.slack == last * page - a.computed
        assert book.free() == (60 - last, 60 - last + first)
    book.release(a.lease)
    assert book.free() == (60, 60)


@pytest.mark.parametrize("page", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("step", [1, 2, 3, 5])
def test_most_tokens_is_the_most_that_is_ever_held(page: int, window: int, step: int) -> None:
    """``step`` more tokens from every position: never more pages than promised, and somewhere as many."""
    pool = toy_layout(page, windows=(window,)).pools[0]
    most = -(-pool.most_tokens(1000, step) // page)
    held = []
    for start in range(100):
        first = max(0, start - window + 1) // page
        held.append(-(-(start + step) // page) - first)
    assert max(held) == most
    assert pool.most_tokens(3, step) == min(3, pool.most_tokens(1000, step))


def test_further_pages_are_counted_from_the_first_held() -> None:
    book = ledger()
    a = request(book)
    write(book, a, 14)
    assert (a.lease.first, [len(t) for t in a.lease.tables]) == ([0, 2], [4, 2])
    assert book.missing(a, 2) == [0, 0]
    assert book.missing(a, 3) == [1, 1]
    assert book.missing(a, 7) == [2, 2]


@pytest.mark.parametrize("queued", [1, 2, 3])
def test_a_page_is_free_once_every_launch_that_was_planned_with_it_has_landed(queued: int) -> None:
    book = ledger()
    a = request(book)
    write(book, a, 9)
    assert book.free() == (5, 6)  # positions 4 and later are seen: page 0 is gone
    book.reserve(a, 4)
    a.computed, a.slack = 13, a.slack - 4
    before = book.free()[1]
    a.lease.in_flight = queued
    book.slide(a)  # page 1 goes, which these launches may read
    assert a.lease.first == [0, 2]
    a.lease.in_flight += 1  # one more is launched: it does not know the page
    for _ in range(queued):
        assert book.free()[1] == before
        book.check_integrity()
        book.landed([a.lease])
    assert (book.free()[1], a.lease.in_flight) == (before + 1, 1)
    book.landed([a.lease])
    book.check_integrity()
    book.release(a.lease)
    assert book.free() == (8, 8)


def test_a_release_in_flight_gives_back_pages_of_the_window_too() -> None:
    book = ledger()
    a = request(book)
    write(book, a, 6)
    a.lease.in_flight = 2
    book.reserve(a, 6)
    a.computed += 6
    book.slide(a)
    book.release(a.lease)
    book.landed([a.lease])
    book.check_integrity()
    book.landed([a.lease])
    book.check_integrity()
    assert book.free() == (8, 8)


def test_a_fork_shares_what_is_left_and_each_gives_it_up_by_itself() -> None:
    book = ledger()
    parent, child = request(book, "p"), request(book, "c")
    write(book, parent, 11)
    child.computed = 11
    book.fork(parent, child)
    assert child.lease.first == parent.lease.first == [0, 1]
    assert child.lease.tables == parent.lease.tables
    write(book, parent, 1)  # copies the shared tail, page 2 of the sequence, in both pools
    copies = book.take_copies()
    assert [pool for pool, _, _ in copies] == [0, 1]
    assert {source for _, source, _ in copies} == {child.lease.tables[0][2], child.lease.tables[1][1]}
    write(book, parent, 2)
    assert parent.lease.first == [0, 2]
    assert child.lease.first == [0, 1]
    write(book, child, 3)
    book.landed([])
    for r in (parent, child):
        book.release(r.lease)
    book.check_integrity()
    assert book.free() == (8, 8)


def test_trimming_counts_from_the_first_page_held() -> None:
    book = ledger()
    a = request(book)
    write(book, a, 11)
    book.reserve(a, 13)
    book.trim(a, 12)
    assert (a.lease.first, [len(t) for t in a.lease.tables], a.slack) == ([0, 1], [3, 2], 1)
    book.check_integrity()


def test_a_swap_moves_what_is_left_and_keeps_its_place() -> None:
    book = ledger(host=8)
    a = request(book)
    write(book, a, 14)
    out = swap_out(book, a)
    assert [len(t) for t in out.source] == [4, 2]
    finish_transfer(book, out, a)
    assert a.lease.first == [0, 2]
    assert book.missing(a, 1) == [4, 2]
    finish_transfer(book, swap_in(book, a), a)
    assert (a.slack, book.free()) == (2, (4, 6))
    write(book, a, 10)
    assert (a.lease.first, [len(t) for t in a.lease.tables]) == ([0, 4], [6, 2])


def test_what_an_earlier_token_sees_may_be_gone() -> None:
    book = ledger()
    a = request(book)
    write(book, a, 11)  # page 0 of the window pool is gone: positions from 4 on are there
    assert [n for n in range(12) if book.sees_all(a.lease, n)] == [9, 10, 11]
    a.lease.first[1] = 2
    engine = make_engine(kvcache=ToyKV(toy_layout(4, windows=(6,))))
    rig = Rig(engine)
    rig.arrive("a", 11, 5)
    r = engine.requests["a"]
    rig.finish(0)
    engine.check_integrity()
    r.lease.first[0] = 2
    with pytest.raises(LedgerError, match="given up pages that its next token sees"):
        engine.check_integrity()


# ------------------------------------------------------------------------- the engine


def windowed(policy: Any = None, *, pages: Any = (40, 5), window: int = 6, **more: Any) -> Rig:
    return Rig(
        make_engine(policy, kvcache=ToyKV(toy_layout(4, 4, windows=(None, window))), pages=pages, **more)
    )


def test_a_long_request_goes_through_a_small_pool() -> None:
    """40 tokens through 5 pages of 4: as many as a window of 6 and a step of 9 tokens need."""
    limits = toy_limits(tokens=9)
    pool = toy_layout(4, windows=(6,)).pools[0]
    assert -(-pool.most_tokens(1000, limits.max_batch_tokens) // 4) == 5
    rig = windowed(limits=limits, checks="full")
    rig.arrive("a", 40, 30)
    rig.drain()
    assert rig.ends("a")[0].outcome == "completed"
    assert rig.engine.ledger.free() == (40, 5)
    assert not any(isinstance(x, RequestPreempted) for x in rig.records)


class Counting(Fcfs):
    calls = 0

    def plan(self, view: Any) -> StepPlan:
        self.calls += 1
        return super().plan(view)


def test_pages_that_come_back_end_a_hold_only_if_somebody_waits() -> None:
    for waits, foresight in product((False, True), repeat=2):
        policy = Counting(hold=100)
        rig = windowed(
            policy,
            pages=(40, 40),
            limits=toy_limits(requests=1, tokens=12),
            horizon=lambda batch, steps, most=100 if foresight else 1: min(steps, most),
        )
        rig.arrive("a", 4, 60)
        if waits:
            rig.arrive("b", 4, 1)  # there is no room for it in the batch
        while "a" in rig.engine.requests:
            rig.finish()
        assert (policy.calls > 15) == waits  # 60 tokens are 15 pages


@pytest.mark.parametrize("vllm", [False, True])
@pytest.mark.parametrize(("pages", "preempts"), [((200, 200), False), ((22, 30), True), ((60, 8), True)])
def test_held_and_stepped_runs_are_the_same_run(pages: tuple[int, int], preempts: bool, vllm: bool) -> None:
    def run(hold: int, foresight: bool) -> list[Record]:
        records: list[Record] = []
        truths: dict[str, Any] = {}
        executor = ToyExecutor(truths, foresight=foresight)
        limits = toy_limits(tokens=12)
        policy: Any = Fcfs(hold=hold)
        if vllm:
            policy = VllmV1(*vllm_parts(limits, hold))
        engine = make_engine(
            policy,
            kvcache=ToyKV(toy_layout(4, 4, windows=(None, 6))),
            pages=pages,
            limits=limits,
            horizon=executor.horizon,
            checks="full",
        )
        items = [arrival(f"r{i}", 5 + 7 * i % 30, 3 + 11 * i % 40, at=i * 900) for i in range(12)]
        VirtualDriver(
            engines=[engine],
            executors=[executor],
            costs=[ToyCost()],
            workload=ListWorkload(items),
            truths=truths,
            emit=records.append,
        ).run()
        engine.check_integrity()
        assert engine.ledger.free() == pages
        return records

    stepped = run(1, True)
    assert any(isinstance(x, RequestPreempted) for x in stepped) == preempts
    for records in (run(64, True), run(64, False)):
        assert step_by_step(records) == step_by_step(stepped)


def vllm_parts(limits: Limits, hold: int) -> Any:
    from servelab.core.context import Context, seeded
    from servelab.plugins.schedulers.vllm_v1 import VllmV1Config

    config = VllmV1Config(
        max_num_batched_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_batch_requests,
        hold_steps=hold,
    )
    rng = seeded(0, "scheduler", "v")
    return config, Context(kind="scheduler", name="v", rng=rng, model=TOY_MODEL, hardware=None, limits=limits)


def test_planning_ahead_frees_pages_behind_the_launch_in_flight() -> None:
    rig = windowed(pages=(40, 40), window=4, limits=toy_limits(in_flight=2))
    rig.auto = False
    rig.arrive("a", 4, 30)
    for _ in range(20):
        rig.schedule()
        rig.finish(0)
        rig.engine.check_integrity()
        r = rig.engine.requests["a"]
        held = len(r.lease.tables[1]) + len(r.lease.sources)
        assert held <= 4  # the window, a token in flight, and what its launch still reads
    assert r.lease.first[1] > 3


def test_rewriting_what_a_window_has_let_go_is_refused() -> None:
    def rewrite(n: int) -> Callable[[Any], StepPlan]:
        def plan(view: Any) -> StepPlan:
            made = StepPlan()
            made.work.append(Tokens(find(view, "a"), n, advance="rewrite"))
            return made

        return plan

    def chunk(view: Any) -> StepPlan:
        made = StepPlan()
        made.run(find(view, "a"), 11)
        return made

    for n, refused in ((2, False), (3, True)):
        rig = windowed(Script(chunk, rewrite(n)))
        rig.arrive("a", 20, 5)
        if not refused:
            rig.finish(0)
            continue
        error = raises_in(lambda rig=rig: rig.finish(0))
        assert error.what == "request a cannot rewrite 3 tokens"
        assert "pools with a window let go of what earlier ones see" in error.why


def test_a_context_is_adopted_only_where_the_window_has_not_moved_on() -> None:
    class Keeper(Fcfs):
        def on_turn_end(self, request: Any) -> Pin:
            return Pin(10**9, "test")

    for repeated, adopted in ((30, 30), (27, 0)):
        rig = windowed(Keeper(), pages=(40, 40))
        rig.arrive("a", 20, 11, program="chat", is_last_turn=False)
        rig.drain()
        kept = rig.engine.contexts.kept["chat"]
        assert (kept.tokens, kept.pages) == (30, (8, 2))
        b = rig.arrive("b", 40, 3, program="chat", turn=1, is_last_turn=True, context_tokens=repeated)
        assert b.cached == adopted
        rig.drain()
        assert rig.ends("b")[0].outcome == "completed"
        rig.engine.check_integrity()
        assert rig.engine.ledger.free() == (40, 40)


def test_recompute_starts_again_with_the_first_page() -> None:
    def drop(view: Any) -> StepPlan:
        made = StepPlan()
        made.preempt(find(view, "a"), "recompute", "test")
        return made

    rig = windowed(Script(lambda view: run_all(view, 14), drop))
    rig.arrive("a", 20, 5)
    r = rig.engine.requests["a"]
    rig.finish(0)
    assert (r.lease.first, r.phase) == ([0, 0], Phase.WAITING)
    assert rig.engine.ledger.free() == (40, 5)


def run_all(view: Any, n: int) -> StepPlan:
    made = StepPlan()
    made.run(find(view, "a"), n)
    return made


# --------------------------------------------------------------- what paged proposes


def model(*windows: int | None) -> ModelFacts:
    return ModelFacts(
        name="m",
        layers=len(windows) or 6,
        hidden=64,
        heads=4,
        kv_heads=2,
        head_dim=16,
        ffn=128,
        vocab=256,
        max_position=4096,
        windows=windows,
    )


def test_a_pool_for_full_layers_and_one_for_each_window(paged: Callable[..., Paged]) -> None:
    kv = paged(toy_limits(), page_tokens=16)
    made = kv.layout(model(512, 512, 512, None, 512, None))
    full, window = made.pools
    assert (full.id, full.layers, full.retention, full.window_tokens) == ("kv", (3, 5), "full", None)
    assert (window.id, window.layers, window.retention, window.window_tokens) == (
        "window_512",
        (0, 1, 2, 4),
        "window",
        512,
    )
    assert (full.bytes_per_page, window.bytes_per_page) == (16 * 2 * 128, 16 * 4 * 128)
    assert [p.id for p in kv.layout(model(64, 8, None)).pools] == ["kv", "window_8", "window_64"]
    assert [p.id for p in kv.layout(model(64, 64)).pools] == ["window_64"]
    for plain in (model(), model(None, None)):
        assert [(p.id, p.retention) for p in kv.layout(plain).pools] == [("kv", "full")]


def test_memory_is_divided_by_what_the_longest_request_needs(paged: Callable[..., Paged]) -> None:
    made = paged(toy_limits(), page_tokens=16).layout(model(32, 32, 32, None, 32, None))
    limits = toy_limits(model_len=1024, tokens=64)
    # 64 pages of the full layers; of the window (31 + 64 + 15) / 16 rounded up: 7
    one = 64 * made.pools[0].bytes_per_page + 7 * made.pools[1].bytes_per_page
    assert pages_in(one, made, limits) == (64, 7)
    assert pages_in(10 * one, made, limits) == (640, 70)
    assert pages_in(one + one // 2, made, limits) == (96, 10)
    half = 32 * made.pools[0].bytes_per_page + 7 * made.pools[1].bytes_per_page
    assert pages_in(half, made, limits) == (32, 7)  # one request of 512 tokens
    assert pages_in(1, made, limits) == (1, 1)
    plain = paged(toy_limits(), page_tokens=16).layout(model())
    size = plain.pools[0].bytes_per_page
    assert [pages_in(n, plain, limits) for n in (size * 100, size * 101 - 1, 7)] == [(100,), (100,), (1,)]


def test_pages_are_stated_for_all_pools_or_for_each(paged: Callable[..., Paged]) -> None:
    made = paged(toy_limits()).layout(model(32, None))
    assert stated_pages(7, made, "x") == (7, 7)
    assert stated_pages({"window_32": 3, "kv": 9}, made, "x") == (9, 3)
    for wrong in ({"kv": 9}, {"kv": 9, "window_32": 3, "w": 1}, {}):
        error = raises_in(lambda wrong=wrong: stated_pages(wrong, made, "executor.num_kv_pages"))
        assert error.where == "executor.num_kv_pages"
        assert error.why == "the KV layout of this run has the pools kv, window_32"
        assert error.do


@pytest.mark.parametrize(
    "wrong",
    [{"retention": "window"}, {"window_tokens": 4}, {"retention": "window", "window_tokens": 0}],
)
def test_a_pool_with_a_window_says_how_long_it_is(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="window_tokens"):
        Pool(id="p", layers=(0,), page_tokens=4, bytes_per_page=4, **wrong)


def test_forecasts_of_demand_leave_window_pools_out() -> None:
    rig = windowed(pages=(40, 9))
    rig.arrive("a", 24, 5)
    room = Room.of(rig.engine._view)
    assert (room.capacity, room.used, room.kept, room.page_tokens) == (160, 24, 0, 4)
    alone = Rig(make_engine(kvcache=ToyKV(toy_layout(4, windows=(6,))), pages=9))
    assert Room.of(alone.engine._view).capacity == 36
