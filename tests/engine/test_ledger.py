"""The ledger: references, fences, reservations, sharing, tiers, and plugins that misbehave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.engine.ledger import Ledger
from servelab.core.engine.state import Request
from servelab.core.engine.swap import finish_transfer, swap_in, swap_out
from servelab.core.errors import LedgerError
from servelab.core.layout import Capacity, KVLayout, Pool
from servelab.core.request import RequestSpec, RequestView
from servelab.core.testing.fakes import TOY_MODEL, ToyKV, raises_in, toy_layout, toy_limits
from servelab.plugins.kvcache.paged import Paged


def ledger(
    pages: int | tuple[int, ...] = 8, host: int = 0, kv: Any = None, layout: KVLayout | None = None
) -> Ledger:
    kv = kv or ToyKV(layout)
    layout = kv.layout(TOY_MODEL)
    pools = len(layout.pools)
    device = (pages,) * pools if isinstance(pages, int) else pages
    return Ledger(
        kv, "toykv", layout, Capacity(device_pages=device, host_pages=(host,) * pools if host else ())
    )


def request(book: Ledger, id: str = "a") -> Request:
    return Request(RequestSpec(id=id, prompt_tokens=100, max_new_tokens=100), 0, 100, book.open(id))


def write(book: Ledger, r: Request, n: int) -> None:
    """``n`` more tokens, computed at once."""
    book.reserve(r, n)
    r.computed += n
    r.slack -= n


# ------------------------------------------------------------------ reservations


def test_a_page_is_given_back_once() -> None:
    book = ledger(8)
    a = request(book)
    write(book, a, 1)
    a.lease.tables[0] *= 2
    assert raises_in(lambda: book.release(a.lease)).what == "page 0 of device pool 'kv0' released twice"


def test_pages_come_one_per_started_page_of_tokens() -> None:
    book = ledger(8)
    a = request(book)
    for tokens, pages in ((1, 1), (4, 1), (5, 2), (8, 2), (9, 3)):
        write(book, a, tokens - a.computed)
        assert len(a.lease.tables[0]) == pages
        assert a.slack == pages * 4 - tokens
        assert book.free() == (8 - pages,)
    book.check_integrity()


def test_slack_is_used_before_pages() -> None:
    book = ledger(1)
    a = request(book)
    write(book, a, 1)
    assert book.missing(a, 3) == [0]
    assert book.missing(a, 4) == [1]
    book.reserve(a, 3)
    assert book.free() == (0,)


def test_reservation_is_all_or_nothing_across_pools() -> None:
    book = ledger((8, 1), layout=toy_layout(4, 2))
    a = request(book)
    error = raises_in(lambda: book.reserve(a, 4))  # 1 page of 4, but 2 pages of 2
    assert error.what == "request a cannot get 2 pages"
    assert error.where == "pool 'kv1', kvcache 'toykv'"
    assert error.why == "1 pages are free"
    assert error.do == "preempt first, or plan fewer tokens"
    assert a.lease.tables == [[], []]
    assert (a.slack, book.free()) == (0, (8, 1))
    book.check_integrity()


def test_slack_is_that_of_the_tightest_pool() -> None:
    book = ledger(8, layout=toy_layout(4, 3))
    a = request(book)
    book.reserve(a, 3)
    assert a.slack == 3
    book.reserve(a, 4)
    assert (a.slack, [len(t) for t in a.lease.tables]) == (4, [1, 2])


# -------------------------------------------------------------------------- fences


def test_a_page_freed_in_flight_is_not_reusable_until_it_has_landed() -> None:
    book = ledger(2)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 8)
    a.lease.in_flight += 1
    book.release(a.lease)
    assert book.free() == (0,)
    assert book.releasable([a.lease]) == [0]
    with pytest.raises(LedgerError):
        book.reserve(b, 1)
    book.check_integrity()
    book.landed([a.lease])
    assert book.free() == (2,)
    book.reserve(b, 1)
    book.check_integrity()


def test_the_last_of_several_launches_opens_the_fence() -> None:
    book = ledger(2)
    a = request(book)
    write(book, a, 8)
    a.lease.in_flight += 2
    book.release(a.lease)
    book.landed([a.lease])
    assert book.free() == (0,)
    book.landed([a.lease])
    assert book.free() == (2,)


def test_releasing_twice_is_refused() -> None:
    book = ledger(2)
    a = request(book)
    book.release(a.lease)
    assert raises_in(lambda: book.release(a.lease)).what == "lease of a released twice"


# ------------------------------------------------------------------------- sharing


@pytest.fixture(params=["toy", "paged"])
def any_kv(request: pytest.FixtureRequest, paged: Callable[..., Paged]) -> Any:
    return ToyKV(toy_layout(4)) if request.param == "toy" else paged(toy_limits(), page_tokens=4)


def test_fork_of_six_tokens_copies_one_page_and_leaves_three(any_kv: Any) -> None:
    """Card kv_paged, faithful when (3): P=4, 6 tokens forked in 2, each appends one token."""
    book = ledger(8, kv=any_kv)
    parent, child = request(book, "parent"), request(book, "child")
    write(book, parent, 6)
    child.computed = 6
    book.fork(parent, child)
    assert book.free() == (6,)
    assert parent.lease.tables == child.lease.tables
    assert (parent.slack, child.slack) == (0, 0)
    write(book, parent, 1)
    write(book, child, 1)
    copies = book.take_copies()
    assert len(copies) == 1
    (pool, source, target), full = copies[0], parent.lease.tables[0][0]
    assert pool == 0
    assert child.lease.tables[0][0] == full
    assert {parent.lease.tables[0][1], child.lease.tables[0][1]} == {source, target}
    assert 8 - book.free()[0] == 3
    assert book.take_copies() == ()
    book.check_integrity()
    book.release(parent.lease)
    assert book.free() == (6,)
    book.release(child.lease)
    assert book.free() == (8,)
    book.check_integrity()


def test_full_pages_are_never_copied() -> None:
    book = ledger(8)
    parent, child = request(book, "p"), request(book, "c")
    write(book, parent, 8)
    child.computed = 8
    book.fork(parent, child)
    write(book, parent, 1)
    write(book, child, 1)
    assert book.take_copies() == ()
    assert 8 - book.free()[0] == 4


def test_the_last_holder_of_a_shared_tail_writes_in_place() -> None:
    book = ledger(4)
    parent, child = request(book, "p"), request(book, "c")
    write(book, parent, 2)
    child.computed = 2
    book.fork(parent, child)
    book.release(parent.lease)
    write(book, child, 2)
    assert book.take_copies() == ()
    assert 4 - book.free()[0] == 1


def test_a_copy_needs_a_page_of_its_own() -> None:
    book = ledger(1)
    parent, child = request(book, "p"), request(book, "c")
    write(book, parent, 2)
    child.computed = 2
    book.fork(parent, child)
    assert book.missing(parent, 1) == [1]
    with pytest.raises(LedgerError, match="cannot get 1 pages"):
        book.reserve(parent, 1)


def _copied_in_flight() -> tuple[Ledger, Any, Any, Any, int]:
    """Three samples share a tail page; the second copies it in a launch in flight, the third is gone.

    The ledger, the samples and the page.
    """
    book = ledger(8)
    samples = [request(book, name) for name in ("r", "r#1", "r#2")]
    first, second, third = samples
    write(book, first, 6)
    for other in (second, third):
        other.computed = 6
        book.fork(first, other)
    tail = first.lease.tables[0][1]
    write(book, second, 1)
    second.lease.in_flight += 1
    assert [source for _, source, _ in book.take_copies()] == [tail]
    book.release(third.lease)
    return book, first, second, third, tail


def test_a_page_that_another_sample_copies_from_is_not_free_when_its_last_holder_gives_it_up() -> None:
    book, first, second, _, tail = _copied_in_flight()
    assert book.releasable([first.lease]) == [0]  # the full page is the second's too, the tail is being read
    before = book.free()
    book.release(first.lease)
    assert book.free() == before
    book.landed([second.lease])
    assert book.free() == (before[0] + 1,) and book.device[0].refs[tail] == 0
    book.check_integrity()


def test_a_page_that_another_sample_copies_from_is_not_published() -> None:
    """The store could evict it before the copy is made."""
    book, first, second, _, _ = _copied_in_flight()
    assert book.leading_own(first.lease, 0, 2) == 0, "the full page is the second's too, and not stored"
    for page in first.lease.tables[0][:1]:
        book.retain(0, page)
    assert book.leading_own(first.lease, 0, 2) == 1, "the tail is being read"
    book.landed([second.lease])
    assert book.leading_own(first.lease, 0, 2) == 2


def test_fork_into_a_request_with_pages_is_refused() -> None:
    book = ledger(4)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 1)
    write(book, b, 1)
    error = raises_in(lambda: book.fork(a, b))
    assert (error.what, error.do) == ("fork target b already holds pages", "fork into a new request")


def test_releasable_counts_shared_pages_only_if_all_holders_go() -> None:
    book = ledger(4)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 8)
    b.computed = 8
    book.fork(a, b)
    assert book.releasable([a.lease]) == [0]
    assert book.releasable([a.lease, b.lease]) == [2]
    b.lease.in_flight = 1
    assert book.releasable([a.lease, b.lease]) == [0]


def test_an_outside_holder_keeps_a_page_alive() -> None:
    book = ledger(4)
    a = request(book)
    write(book, a, 8)
    page = a.lease.tables[0][0]
    book.retain(0, page)
    book.check_integrity()
    book.release(a.lease)
    assert book.free() == (3,)
    book.check_integrity()
    assert raises_in(lambda: book.retain(0, page + 1)).what == (
        f"page {page + 1} of pool 0 is not held, so it cannot be retained"
    )


# ----------------------------------------------------------- trim, resize, promises


def test_trim_keeps_what_is_computed_or_in_flight() -> None:
    book = ledger(8)
    a = request(book)
    book.reserve(a, 20)
    a.computed, a.flying = 3, 4
    book.trim(a, 7)
    assert len(a.lease.tables[0]) == 2
    assert (a.slack, book.free()) == (1, (6,))
    error = raises_in(lambda: book.trim(a, 6))
    assert (error.what, error.why) == (
        "request a cannot be trimmed to 6 tokens",
        "7 are computed or in flight",
    )
    a.computed = a.flying = 0
    book.trim(a, 0)
    assert book.free() == (8,)
    book.check_integrity()


def test_resize_takes_free_pages_now_and_held_ones_later_and_puts_them_back() -> None:
    book = ledger(4)
    a = request(book)
    write(book, a, 8)
    book.device[0].resize(-3)
    assert (book.free(), book.total()) == ((0,), (2,))
    book.check_integrity()
    book.release(a.lease)
    assert (book.free(), book.total()) == ((1,), (1,))
    book.check_integrity()
    book.device[0].resize(2)
    assert (book.free(), book.total()) == ((3,), (3,))
    book.device[0].resize(99)
    assert (book.free(), book.total()) == ((4,), (4,))
    book.check_integrity()
    write(book, request(book, "b"), 16)


def test_growing_first_cancels_pages_still_to_be_withdrawn() -> None:
    book = ledger(2)
    a = request(book)
    write(book, a, 8)
    book.device[0].resize(-2)
    book.device[0].resize(1)
    book.release(a.lease)
    assert (book.free(), book.total()) == ((1,), (1,))
    book.check_integrity()


def test_a_pool_cannot_shrink_below_nothing() -> None:
    book = ledger(2)
    book.device[0].resize(-5)
    book.device[0].resize(-5)
    assert (book.free(), book.total()) == ((0,), (0,))
    book.device[0].resize(1)
    assert (book.free(), book.total()) == ((1,), (1,))
    book.check_integrity()


def test_promised_pages_are_nobody_elses_until_settled() -> None:
    book = ledger(4)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 4)
    assert book.promise(0, [a], 8) == 8
    assert book.free() == (1,)
    book.device[0].resize(-3)
    assert (book.free(), book.total()) == ((0,), (3,))
    with pytest.raises(LedgerError):
        book.reserve(b, 1)
    book.check_integrity()
    book.settle(0)
    write(book, a, 8)
    book.check_integrity()
    book.settle(0)  # nothing to settle: no harm


def test_a_promise_is_the_longest_that_fits_for_all() -> None:
    book = ledger(5)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 4)
    write(book, b, 2)
    # 3 pages are left; a needs one for tokens 1..4, b for tokens 3..6; both a second after that
    assert book.promise(0, [a, b], 100) == 6 - 2 + 2
    assert book.free() == (0,)
    book.settle(0)
    assert book.free() == (3,)
    assert book.promise(0, [a, b], 2) == 2
    assert book.free() == (2,)


def test_two_lanes_promise_from_the_same_pool() -> None:
    book = ledger(3)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 4)
    assert book.promise(0, [a], 4) == 4
    assert book.promise(1, [b], 8) == 4
    book.settle(1)
    assert book.free() == (1,)
    book.settle(0)
    assert book.free() == (2,)


# --------------------------------------------------------------------------- tiers


def test_swap_out_and_in_holds_both_sides_until_done() -> None:
    book = ledger(4, host=4)
    a = request(book)
    write(book, a, 6)
    out = swap_out(book, a)
    assert (out.direction, out.request_id, out.bytes, out.calls) == ("out", "a", 2 * 8, 1)
    assert (book.free(), book.free("host")) == ((2,), (2,))
    book.check_integrity()
    finish_transfer(book, out, a)
    assert (book.free(), book.free("host"), a.slack) == ((4,), (2,), 0)
    assert a.lease.tables == [[]]
    book.check_integrity()
    back = swap_in(book, a)
    assert (book.free(), book.free("host")) == ((2,), (2,))
    finish_transfer(book, back, a)
    assert (book.free(), book.free("host"), a.slack) == ((2,), (4,), 2)
    book.check_integrity()


def test_a_swap_needs_host_room_in_every_pool() -> None:
    book = ledger(4, host=1)
    a = request(book)
    write(book, a, 6)
    error = raises_in(lambda: swap_out(book, a))
    assert error.what == "request a cannot be swapped out"
    assert error.where == "host tier of pool 'kv0'"
    assert error.why == "it needs 2 pages, 1 are free"
    assert error.do == "preempt by recompute, or give the executor more host pages"
    assert a.lease.host_tables == [[]]
    book.check_integrity()


def test_a_swap_in_needs_device_room() -> None:
    book = ledger(3, host=3)
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 8)
    finish_transfer(book, swap_out(book, a), a)
    write(book, b, 8)
    error = raises_in(lambda: swap_in(book, a))
    assert (error.what, error.where) == ("request a cannot be swapped in", "pool 'kv0'")
    assert error.why == "it needs 2 pages, 1 are free"
    book.check_integrity()


def test_a_transfer_that_outlives_its_request_gives_both_sides_back() -> None:
    for direction in ("out", "in"):
        book = ledger(4, host=4)
        a = request(book)
        write(book, a, 6)
        transfer = swap_out(book, a)
        if direction == "in":
            finish_transfer(book, transfer, a)
            transfer = swap_in(book, a)
        book.release(a.lease)
        assert (book.free(), book.free("host")) == ((2,), (2,))
        book.check_integrity()
        finish_transfer(book, transfer, None)
        assert (book.free(), book.free("host")) == ((4,), (4,)), direction
        book.check_integrity()


def test_adjacent_pages_move_in_one_call() -> None:
    book = ledger(8, host=8)
    a, b = request(book, "a"), request(book, "b")
    for r in (a, b, a, a):  # a: 0, 2, 3; b: 1
        write(book, r, 4)
    assert a.lease.tables == [[0, 2, 3]]
    assert swap_out(book, a).calls == 2


def test_without_a_host_tier_there_is_none() -> None:
    assert not ledger(4).has_host_tier
    assert ledger(4, host=1).has_host_tier


# ---------------------------------------------------------------------- misbehaviour


class Misbehaving(ToyKV):
    def __init__(self, answer: Callable[[int], Sequence[int]]) -> None:
        super().__init__()
        self.answer = answer

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        return self.answer(n)


@pytest.mark.parametrize(
    ("answer", "what", "why", "do"),
    [
        (
            lambda n: [5] * (n - 1),
            "kvcache 'toykv' chose 1 pages, asked for 2",
            "7 pages are free",
            "choose() must return exactly n free pages",
        ),
        (
            lambda n: [5, 6, 7],
            "kvcache 'toykv' chose 3 pages, asked for 2",
            "7 pages are free",
            "choose() must return exactly n free pages",
        ),
        (
            lambda n: [0, 1],
            "kvcache 'toykv' chose page 0, which is not free",
            "the page is held (1 references)",
            "keep the free list in step with choose() and released()",
        ),
        (
            lambda n: [5, 5],
            "kvcache 'toykv' chose page 5, which is not free",
            "the page is held (1 references)",
            "keep the free list in step with choose() and released()",
        ),
        (
            lambda n: [5, 8],
            "kvcache 'toykv' chose page 8, which is not free",
            "the page is outside the pool",
            "keep the free list in step with choose() and released()",
        ),
        (
            lambda n: [-1, 5],
            "kvcache 'toykv' chose page -1, which is not free",
            "the page is outside the pool",
            "keep the free list in step with choose() and released()",
        ),
    ],
    ids=["too few", "too many", "held", "twice", "too large", "negative"],
)
def test_bad_choices_are_refused_with_the_reason(
    answer: Callable[[int], Sequence[int]], what: str, why: str, do: str
) -> None:
    kv = Misbehaving(lambda n: [0])
    book = ledger(8, kv=kv)
    book.reserve(request(book, "first"), 1)
    kv.answer = answer
    error = raises_in(lambda: book.reserve(request(book, "second"), 8))
    assert isinstance(error, LedgerError)
    assert (error.what, error.where) == (what, "device pool 'kv0'")
    assert (error.why, error.do) == (why, do)


def test_a_withdrawn_page_may_not_be_chosen() -> None:
    kv = Misbehaving(lambda n: [3])
    book = ledger(4, kv=kv)
    book.device[0].resize(-1)
    error = raises_in(lambda: book.reserve(request(book), 1))
    assert error.what == "kvcache 'toykv' chose page 3, which is not free"


# ------------------------------------------------------------------- check_integrity


def plant(name: str, book: Ledger, a: Request) -> None:
    device, host = book.device[0], book.host[0]
    match name:
        case "a reference too many":
            device.refs[a.lease.tables[0][0]] += 1
        case "a held page called free":
            device.refs[a.lease.tables[0][0]] = 0
        case "a lost page":
            a.lease.tables[0].pop()
        case "a page listed twice":
            a.lease.tables[0].append(a.lease.tables[0][0])
        case "a free page in a table":
            a.lease.tables[0].append(7)
        case "a free count off":
            device.free += 1
        case "a total off":
            device.total -= 1
        case "a promise beyond what is free":
            device.promised = device.free + 1
        case "a negative promise":
            device.promised = -1
        case "an outside holder without a reference":
            device.external[a.lease.tables[0][0]] += 1
        case "a withdrawn page in a table":
            device.refs[a.lease.tables[0][0]] = -1
        case "a host page nobody holds":
            host.refs[0] = 1
        case "a host free count off":
            host.free -= 1
        case "a forgotten lease":
            del book._leases[id(a.lease)]
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "a reference too many",
        "a held page called free",
        "a lost page",
        "a page listed twice",
        "a free page in a table",
        "a free count off",
        "a total off",
        "a promise beyond what is free",
        "a negative promise",
        "an outside holder without a reference",
        "a withdrawn page in a table",
        "a host page nobody holds",
        "a host free count off",
        "a forgotten lease",
    ],
)
def test_planted_corruption_is_found(name: str) -> None:
    book = ledger(8, host=4)
    a = request(book)
    write(book, a, 10)
    book.check_integrity()
    plant(name, book, a)
    with pytest.raises(LedgerError):
        book.check_integrity()


# ---------------------------------------------------------------------------- paged


def test_paged_wastes_less_than_a_page_and_conserves_the_pool(paged: Callable[..., Paged]) -> None:
    """Card kv_paged, faithful when (2), (4) and (5), over 10^4 random operations."""
    _conserve(paged, 10_000)


@pytest.mark.slow
def test_paged_conserves_the_pool_over_1e5_operations(paged: Callable[..., Paged]) -> None:
    _conserve(paged, 100_000)


def _conserve(paged: Callable[..., Paged], operations: int) -> None:
    from random import Random

    rng, size, page = Random(7), 32, 4
    book = ledger(size, host=16, kv=paged(toy_limits(), page_tokens=page))
    live: list[Request] = []
    away: list[Request] = []
    fenced: list[Any] = []
    for k in range(operations):
        match rng.randrange(9):
            case 0:
                live.append(request(book, f"r{k}"))
            case 1 | 2 | 3 if live:
                r, n = rng.choice(live), rng.randrange(1, 9)
                if book.missing(r, n)[0] <= book.free()[0]:
                    write(book, r, n)
            case 4 if live:
                r = live.pop(rng.randrange(len(live)))
                if rng.randrange(2):
                    r.lease.in_flight += 1
                    fenced.append(r.lease)
                book.release(r.lease)
            case 5 if fenced:
                book.landed([fenced.pop(rng.randrange(len(fenced)))])
            case 6 if live:
                parent, child = rng.choice(live), request(book, f"f{k}")
                child.computed = parent.computed
                book.fork(parent, child)
                live.append(child)
            case 7 if live:
                r = rng.choice(live)
                shared = any(book.device[0].refs[p] > 1 for p in r.lease.tables[0])
                if not shared and len(r.lease.tables[0]) <= book.free("host")[0]:
                    live.remove(r)
                    finish_transfer(book, swap_out(book, r), r)
                    away.append(r)
            case 8 if away:
                r = away[0]
                if len(r.lease.host_tables[0]) <= book.free()[0]:
                    away.remove(r)
                    finish_transfer(book, swap_in(book, r), r)
                    live.append(r)
        tables = [lease.tables[0] for lease in book._leases.values()]
        held = {p for t in tables for p in t}
        copied = {p for p in book.device[0].reading if p not in held}  # a fork's launch still reads them
        assert book.free()[0] + len(held) + len(copied) == size
        assert sum(book.device[0].refs) == sum(map(len, tables))
        for r in live:
            assert 0 <= len(r.lease.tables[0]) * page - r.computed < page
        if len(live) > 12:
            book.release(live.pop(0).lease)
        if k % 100 == 0:
            book.check_integrity()
    book.check_integrity()


@settings(max_examples=50)
@given(tokens=st.integers(0, 10_000), page=st.integers(1, 64))
def test_paged_arithmetic_is_its_own_inverse(tokens: int, page: int) -> None:
    kv = Paged.__new__(Paged)  # the arithmetic needs no settings
    pool = Pool(id="kv", layers=(0,), page_tokens=page, bytes_per_page=1)
    pages = kv.pages_for(pool, None, tokens)
    assert tokens <= kv.tokens_in(pool, pages) < tokens + page


def test_paged_uses_the_page_last_freed_first(paged: Callable[..., Paged]) -> None:
    book = ledger(8, kv=paged(toy_limits(), page_tokens=4))
    a, b = request(book, "a"), request(book, "b")
    write(book, a, 8)
    assert a.lease.tables == [[0, 1]]
    book.release(a.lease)
    write(book, b, 4)
    assert b.lease.tables == [[0]]
