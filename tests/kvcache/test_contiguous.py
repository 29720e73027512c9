"""Contiguous ranges: where they go, how long they are, and what is wasted. Card kv_contiguous."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.context import Context
from servelab.core.engine.engine import Engine
from servelab.core.engine.pages import place
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import CapabilityError, ConfigError, LedgerError, PlanError, WorkloadError
from servelab.core.metrics import Timeline, summarize
from servelab.core.plan import StepPlan
from servelab.core.records import Record, RequestPreempted, StepDone
from servelab.core.registry import Registry
from servelab.core.request import Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    Fcfs,
    ListWorkload,
    Rig,
    Script,
    ToyCost,
    ToyExecutor,
    arrival,
    find,
    make_engine,
    raises_in,
    toy_limits,
)
from servelab.plugins.kvcache import TABLE
from servelab.plugins.kvcache._runs import Runs
from servelab.plugins.kvcache.contiguous import Contiguous, ContiguousConfig, Pow2, TrueLengths

KINDS = {"max": Contiguous, "pow2": Pow2, "oracle": TrueLengths}


def cache(kind: str = "max", truths: dict[str, Truth] | None = None, **more: Any) -> Contiguous:
    limits = toy_limits(model_len=more.pop("model_len", 64))
    return KINDS[kind](
        ContiguousConfig(**{"page_tokens": 1, **more}),
        Context(
            kind="kvcache",
            name=f"contiguous_{kind}",
            rng=random.Random(0),
            model=TOY_MODEL,
            hardware=None,
            limits=limits,
            oracle=None if truths is None else truths.__getitem__,
        ),
    )


def rig(kind: str = "max", policy: Any = None, *, pages: int = 200, **more: Any) -> Rig:
    truths: dict[str, Truth] = {}
    limits = toy_limits(model_len=more.get("model_len", 64), tokens=256)
    made = cache(kind, truths, **more)
    return Rig(
        make_engine(policy or Fcfs(), kvcache=made, pages=pages, limits=limits, checks="full"), truths=truths
    )


def table(r: Rig, id: str) -> list[int]:
    return r.engine.requests[id].lease.tables[0]


# ------------------------------------------------------------------------- free runs


@settings(max_examples=200)
@given(data=st.data(), placement=st.sampled_from(["first_fit", "best_fit", "buddy"]))
def test_runs_against_a_map_of_every_page(data: st.DataObject, placement: Any) -> None:
    pages = data.draw(st.integers(1, 40))
    runs, free, held = Runs(pages, placement), [True] * pages, list[Sequence[int]]()
    for _ in range(data.draw(st.integers(1, 25))):
        move = data.draw(st.sampled_from(["take", "take", "give", "any", "copy"]))
        if move == "take":
            n = data.draw(st.integers(1, 12))
            n = 1 << (n - 1).bit_length() if placement == "buddy" else n
            step = n if placement == "buddy" else 1
            places = [i for i in range(0, pages - n + 1, step) if all(free[i : i + n])]
            got = runs.take(n)
            assert (got is None) == (not places)
            if got is None:
                continue
            assert list(got) == list(range(got[0], got[0] + n)) and got[0] in places
            if placement == "best_fit":
                assert length_at(free, got[0]) == min(length_at(free, i) for i in places)
            else:
                assert got[0] == places[0]
            held.append(got)
        elif move == "any":
            n = data.draw(st.integers(0, sum(free)))
            got_any = runs.take_any(n)
            assert len(set(got_any)) == n and all(free[i] for i in got_any)
            held.append(got_any)
        elif move == "give" and held:
            back = held.pop(data.draw(st.integers(0, len(held) - 1)))
            runs.give_back(back)
            for page in back:
                free[page] = True
            continue
        else:
            scratch = runs.copy()
            scratch.take(1)
            continue
        for page in held[-1]:
            free[page] = False
    assert runs._runs == spans(free)
    n = 1 << data.draw(st.integers(0, 4))
    left, rest = sum(free), runs.copy()
    while rest.take(n) is not None:
        left -= n
    assert runs.unusable(n) == left


def spans(free: list[bool]) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    for i, is_free in enumerate(free):
        if is_free and out and sum(out[-1]) == i:
            out[-1] = (out[-1][0], out[-1][1] + 1)
        elif is_free:
            out.append((i, 1))
    return out


def length_at(free: list[bool], page: int) -> int:
    """Length of the free run a page is in."""
    return next(n for start, n in spans(free) if start <= page < start + n)


# ------------------------------------------------------------------------ how much


def test_max_reserves_the_longest_request_for_each() -> None:
    """Faithful when (1): requests running <= floor(pool tokens / R)."""
    r = rig("max", pages=200)
    for i in range(5):
        r.arrive(f"r{i}", 3, 4)
    r.finish()
    assert [len(table(r, f"r{i}")) for i in range(3)] == [64] * 3
    assert len(r.engine.running) == 200 // 64 == 3
    assert r.engine.ledger.free() == (200 - 3 * 64,)
    assert [table(r, f"r{i}")[0] for i in range(3)] == [0, 64, 128]  # slab by slab
    r.drain()
    assert r.engine.ledger.free() == (200,)


@pytest.mark.parametrize(
    ("kind", "prompt", "output", "cap", "reserved"),
    [
        ("pow2", 7, 25, 40, 7 + 32),  # the paper's example: 32 positions for an output of 25
        ("pow2", 7, 32, 40, 7 + 32),
        ("pow2", 7, 33, 40, 64),  # 7 + 64, but no request is longer than 64
        ("pow2", 7, 1, 40, 8),
        ("pow2", 7, 25, 12, 7 + 16),  # it ends at its cap
        ("oracle", 7, 25, 40, 32),
        ("oracle", 7, 25, 12, 19),
        ("oracle", 60, 25, 40, 64),
        ("max", 7, 25, 40, 64),
    ],
)
def test_reservations(kind: str, prompt: int, output: int, cap: int, reserved: int) -> None:
    r = rig(kind)
    r.arrive("a", prompt, output, cap=cap)
    assert len(table(r, "a")) == reserved
    r.drain()
    assert r.engine.ledger.free() == (200,)


@pytest.mark.parametrize(
    ("page", "placement", "pages"), [(4, "first_fit", 8), (5, "best_fit", 7), (4, "buddy", 8)]
)
def test_ranges_are_whole_pages(page: int, placement: str, pages: int) -> None:
    r = rig("oracle", page_tokens=page, placement=placement)
    r.arrive("a", 7, 25)  # 32 tokens
    assert len(table(r, "a")) == pages


def test_buddies_are_powers_of_two_at_multiples_of_their_size() -> None:
    r = rig("oracle", pages=64, placement="buddy")
    for i, output in enumerate((3, 9, 2, 20)):
        r.arrive(f"r{i}", 2, output)  # 5, 11, 4, 22 tokens
    r.finish()
    sizes = {f"r{i}": n for i, n in enumerate((8, 16, 4, 32)) if f"r{i}" in r.engine.requests}
    assert len(sizes) >= 3
    for id, n in sizes.items():
        held = table(r, id)
        assert len(held) == n and held[0] % n == 0 and held == list(range(held[0], held[0] + n))


def test_appends_never_allocate() -> None:
    """Faithful when (2)."""
    for kind in KINDS:
        r = rig(kind)
        a = r.arrive("a", 6, 20)
        before = table(r, "a")[:]
        while "a" in r.engine.requests and r.engine.in_flight:
            assert table(r, "a") == before
            r.finish()
        assert a.generated == 20
        assert not any(isinstance(x, RequestPreempted) for x in r.records)


def test_a_request_waits_while_no_run_is_long_enough() -> None:
    """Free memory in pieces: 20 pages are free, 10 on either side of a range."""
    r = rig("oracle", pages=40)
    r.auto = False
    for id, prompt, output in (("a", 8, 2), ("b", 8, 12), ("c", 7, 3)):
        r.arrive(id, prompt, output)
    r.schedule()
    assert [table(r, id)[0] for id in "abc"] == [0, 10, 30]
    r.auto = True
    while "c" in r.engine.requests:
        r.finish()
    assert r.engine.ledger.free() == (20,)
    d = r.arrive("d", 10, 2)  # 12 pages
    r.finish()
    assert d.phase == "waiting" and r.engine.ledger.free() == (20,)
    assert [x for x in r.records if isinstance(x, StepDone)][-1].unusable_pages == (20,)
    budget = r.engine._view.kv.budget()
    assert not budget.take(d.view, 1)
    budget.give_back(r.engine.requests["b"].view)  # in flight: its range does not join the pieces yet
    assert not budget.take(d.view, 1)
    r.drain()
    assert r.ends("d")[0].outcome == "completed"
    assert r.engine.ledger.free() == (40,)


def only_a(view: Any) -> StepPlan:
    plan = StepPlan()
    plan.run(find(view, "a"), 5)
    return plan


def test_a_budget_counts_ranges_that_preemption_gives_back() -> None:
    r = rig("max", Script(only_a), pages=100)
    a = r.arrive("a", 5, 5)
    b = r.arrive("b", 5, 5)
    budget = r.engine._view.kv.budget()
    assert not budget.take(b.view, 5)
    budget.give_back(a.view)  # in flight: nothing yet
    assert not budget.take(b.view, 5)
    r.finish()
    budget = r.engine._view.kv.budget()
    budget.give_back(a.view)
    assert budget.free == (100,)
    assert budget.take(b.view, 5)


def test_best_fit_takes_the_shortest_run_that_is_long_enough() -> None:
    for placement, at in (("first_fit", 0), ("best_fit", 20)):
        runs = Runs(40, placement)  # type: ignore[arg-type]
        for n in (10, 10, 5, 15):
            runs.take(n)
        runs.give_back(range(10))
        runs.give_back(range(20, 25))
        assert runs.take(5) == range(at, at + 5)


# ------------------------------------------------------------------- waste, measured


def measured(kind: str, items: list[Any], *, pages: int, **more: Any) -> dict[str, Any]:
    truths: dict[str, Truth] = {}
    limits = toy_limits(model_len=64, tokens=256)
    engine: Engine = make_engine(
        Fcfs(), kvcache=cache(kind, truths, **more), pages=pages, limits=limits, checks="full"
    )
    timeline = Timeline()
    pool = {"id": "kv", "page_tokens": 1, "pages": pages, "window_tokens": None}
    timeline.info = {"kv": {"addressing": "contiguous_slot", "pools": [pool]}}
    records: list[Record] = []
    VirtualDriver(
        engines=[engine],
        executors=[ToyExecutor(truths, foresight=False)],
        costs=[ToyCost(step_ns=100, token_ns=0)],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    timeline.feed_all(records)
    (row,) = summarize(timeline)["servelab"]["kv_pages"]
    return row


@pytest.mark.parametrize(("kind", "reserved"), [("max", 64), ("pow2", 12), ("oracle", 9)])
def test_waste_of_one_request_by_hand(kind: str, reserved: int) -> None:
    """Prompt of 4, output of 5. Ends of launches show 4, 5, 6, 7, 8 stored; each holds for one step, but
    the last, which is the end. Of R reserved, 8 are used at the end."""
    row = measured(kind, [arrival("a", 4, 5)], pages=64)
    assert row["mean_pages"] == reserved
    assert row["mean_stored_tokens"] == (4 + 5 + 6 + 7) / 4
    assert row["mean_awaited_tokens"] == 8 - (4 + 5 + 6 + 7) / 4
    assert row["mean_idle_tokens"] == reserved - 8  # faithful when (3)
    assert row["mean_unusable_tokens"] == 0


def test_memory_in_pieces_is_of_no_use_to_the_head_of_the_queue() -> None:
    """Ranges of 9, 30 and 9 in 50 pages. The outer two end; one of 20 waits for the inner one: 20 pages are
    free then, 9 before it and 11 behind."""
    items = [arrival("a", 4, 5), arrival("b", 4, 26), arrival("c", 4, 5), arrival("d", 15, 5, at=1)]
    row = measured("oracle", items, pages=50)
    # a launch ends every 100 ns, the first at 100. a and c end at 500: the end at 600 is the first to show 20
    # free; b ends at 2600, and d is in memory at 2700
    free_in_pieces = 2 * (600 - 100) + 20 * (2700 - 600)
    assert row["mean_unusable_tokens"] == pytest.approx(free_in_pieces / 3000)


def test_equal_reservations_leave_only_the_remainder_of_the_division() -> None:
    """Faithful when (3): with Max, outside ranges, 200 mod 64 = 8 at most."""
    items = [arrival(f"r{i}", 3 + i % 9, 2 + i % 7, at=i * 40) for i in range(40)]
    row = measured("max", items, pages=200)
    assert 0 < row["mean_unusable_tokens"] <= 8


# ------------------------------------------------------------------------- refusals


def test_true_lengths_are_asked_for_by_name_and_stamped() -> None:
    specs = {spec.name: spec for spec in TABLE if spec.name.startswith("contiguous")}
    assert {name: spec.oracle for name, spec in specs.items()} == {
        "contiguous": False,
        "contiguous_pow2": True,
        "contiguous_oracle": True,
    }
    for spec in specs.values():
        assert spec.provides == {"kvcache.contiguous_slot"}
        assert spec.conflicts - {"spec.drafts"} == {"scheduler.retains", "scheduler.swap"}
        assert ("spec.drafts" in spec.conflicts) == spec.oracle, "no room beyond a true length"
    with pytest.raises(ConfigError, match="without the workload's truths"):
        cache("oracle", None)
    made = cache("pow2", {})
    r = Rig(make_engine(Script(), kvcache=cache("max")))
    view = r.arrive("a").view
    with pytest.raises(WorkloadError, match="request a has no true output length"):
        made.reserved_tokens(view)


def test_no_host_tier() -> None:
    error = raises_in(lambda: make_engine(kvcache=cache(), host_pages=4))
    assert isinstance(error, CapabilityError)
    assert error.where == "executor.num_host_pages"


def test_a_plan_that_finds_no_place_is_refused() -> None:
    """Two requests that fit one by one: their pages are free, but not side by side."""

    def both(view: Any) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "d"), 10)
        return plan

    def three(view: Any) -> StepPlan:
        plan = StepPlan()
        for id in "abc":
            plan.run(find(view, id), find(view, id).pending_tokens)
        return plan

    def outer(view: Any) -> StepPlan:
        plan = both(view)
        plan.preempt(find(view, "a"), "recompute", "test")
        plan.preempt(find(view, "c"), "recompute", "test")
        return plan

    for plan, fits in ((outer, False), (lambda view: drop_all(view, both(view)), True)):
        r = rig("oracle", Script(three, plan), pages=30)
        r.auto = False
        for id in "abc":
            r.arrive(id, 7, 3)
        r.arrive("d", 10, 2)
        r.schedule()
        r.auto = True
        if fits:
            r.finish()
            assert table(r, "d") == list(range(12))
            continue
        with pytest.raises(PlanError) as error:
            r.finish()
        assert error.value.what == "the plan needs (12,) adjacent KV pages for request d"


def test_a_range_in_flight_is_not_given_back_by_a_plan_that_preempts_it() -> None:
    def abc(view: Any) -> StepPlan:
        plan = StepPlan()
        for id in "abc":
            plan.run(find(view, id), find(view, id).pending_tokens)
        return plan

    def middle(view: Any) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "b"), 1)
        return plan

    def instead(view: Any) -> StepPlan:
        plan = StepPlan()
        plan.preempt(find(view, "b"), "recompute", "test")
        plan.run(find(view, "d"), 9)
        return plan

    truths: dict[str, Truth] = {}
    engine = make_engine(
        Script(abc, middle, instead),
        kvcache=cache("oracle", truths),
        pages=30,
        limits=toy_limits(model_len=64, in_flight=2),
    )
    r = Rig(engine, truths=truths, auto=False)
    for id, output in (("a", 1), ("b", 5), ("c", 1)):  # ranges of 8, 12, 8
        r.arrive(id, 7, output)
    r.arrive("d", 9, 1)  # 10 pages: 8 before b, 10 behind it
    r.schedule()
    r.finish()
    r.engine.ledger.device[0].resize(-2)  # and now 8 behind it
    with pytest.raises(PlanError, match="adjacent KV pages for request d"):
        r.schedule()


def test_a_place_in_one_pool_only_is_no_place() -> None:
    first, second = Runs(10, "first_fit"), Runs(3, "first_fit")
    assert not place([first, second], [4, 4], [[], []])
    assert (first._runs, second._runs) == ([(0, 10)], [(0, 3)])
    assert place([first, second], [4, 0], [[], []]) and first.take(7) is None


@pytest.mark.parametrize(("placement", "pages", "reserved"), [("first_fit", 50, 50), ("buddy", 48, 32)])
def test_max_is_at_most_what_the_pool_can_hold(placement: str, pages: int, reserved: int) -> None:
    r = rig("max", pages=pages, placement=placement)
    r.arrive("a", 5, 5)
    assert len(table(r, "a")) == reserved
    kv: Any = r.engine.ledger.kvcache
    assert kv.tokens_in(r.engine.ledger.pools[0], pages) == reserved


def drop_all(view: Any, plan: StepPlan) -> StepPlan:
    for id in "abc":
        plan.preempt(find(view, id), "recompute", "test")
    return plan


def test_a_range_cannot_grow() -> None:
    r = rig("max")
    a = r.arrive("a", 5, 5)
    with pytest.raises(LedgerError, match="its range cannot grow"):
        r.engine.ledger.reserve(a, 100)
    kv: Any = r.engine.ledger.kvcache
    r.arrive("b", 5, 5)
    r.finish()
    made = kv.scratch(0)
    assert made.take(1000) is None
    assert kv.unusable(0, 1000) == r.engine.ledger.free()[0]


def test_pages_that_leave_the_pool_come_from_its_end() -> None:
    r = rig("max", pages=150)
    r.engine.ledger.device[0].resize(-20)
    r.arrive("a", 5, 5)
    r.arrive("b", 5, 5)
    r.finish()
    assert [table(r, x)[0] for x in "ab"] == [0, 64]
    r.engine.ledger.device[0].resize(20)
    r.drain()
    assert r.engine.ledger.free() == (150,)


# ---------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("scheduler", ["vllm_v1", "aggressive", "pastfuture"])
@pytest.mark.parametrize("placement", ["first_fit", "best_fit", "buddy"])
@pytest.mark.parametrize("kind", ["contiguous", "contiguous_pow2", "contiguous_oracle"])
def test_composed_runs_keep_to_their_ranges(kind: str, placement: str, scheduler: str) -> None:
    registry = Registry.load()
    raw = {
        "scheduler": {"name": scheduler},
        "kvcache": {"name": kind, "page_tokens": 8, "placement": placement},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted", "num_kv_pages": 70},
        "workload": {
            "name": "synthetic",
            "num_requests": 40,
            "request_rate": 200,
            "prompt_length": {"law": "uniform", "min": 1, "max": 120},
            "output_length": {"law": "uniform", "min": 1, "max": 100},
        },
        "task": {"name": "bench"},
        "clock": {"name": "virtual"},
        "engine": {"max_model_len": 256, "checks": "full"},
        "model": {
            "name": "tiny",
            "layers": 2,
            "hidden": 64,
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 16,
            "ffn": 128,
            "vocab": 256,
            "max_position": 512,
        },
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    ended = run.engine.ended
    assert ended["completed"] == 40
    assert run.engine.ledger.free() == (70,)
    assert run.info["stamps"] == ([] if kind == "contiguous" else [f"oracle: {kind}"])


def test_schedulers_that_keep_or_swap_kv_are_refused() -> None:
    registry = Registry.load()
    for capability in ("scheduler.retains", "scheduler.swap"):
        provides = {spec.name: spec.conflicts for spec in TABLE}
        assert capability in provides["contiguous"] and capability not in provides["paged"]
    assert registry.spec("kvcache", "contiguous_oracle").requires == {"workload.truth"}
