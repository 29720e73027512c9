"""KV between turns: kept on the device or the host, adopted, dropped, expired; pages conserved throughout."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.api import SLO, KeepHost, Pin, Release, RequestView, StepPlan, StepView, TurnEnd
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import LedgerError, PlanError, PluginCallError
from servelab.core.records import ContextEnded, ContextKept, Record, RequestAdmitted, StepDone
from servelab.core.request import Arrival, Phase, RequestSpec, Truth
from servelab.core.testing.fakes import (
    Fcfs,
    ListWorkload,
    Rig,
    ToyCost,
    ToyExecutor,
    make_engine,
    raises_in,
    toy_limits,
)


class Keeper(Fcfs):
    """Fcfs that answers ``on_turn_end`` with what the test says, and swaps in whatever waits on the host."""

    def __init__(self, answer: Any, unpins: list[str] | None = None) -> None:
        super().__init__()
        self.answer = answer
        self.unpins = unpins if unpins is not None else []
        self.asked: list[str] = []
        self.seen: list[dict[str, tuple[int, str]]] = []

    def on_turn_end(self, request: RequestView) -> TurnEnd:
        self.asked.append(request.id)
        answer = self.answer
        return answer(request) if callable(answer) else answer

    def plan(self, view: StepView) -> StepPlan:
        self.seen.append({p: (c.tokens, c.tier) for p, c in view.contexts.items()})
        plan = super().plan(view)
        for request in view.swapped:
            plan.swap_in(request, "its turn")
        while self.unpins:
            plan.unpin(self.unpins.pop(0), "the test says so")
        return plan


def rig(answer: Any, *, pages: int = 16, host_pages: int = 0, checks: str = "full", **more: Any) -> Rig:
    keeper = Keeper(answer, more.pop("unpins", None))
    return Rig(make_engine(keeper, pages=pages, host_pages=host_pages, checks=checks, **more))  # type: ignore[arg-type]


def turn(
    r: Rig, id: str, prompt: int, output: int = 3, *, context: int = 0, last: bool = False, n: int = 0
) -> Any:
    return r.arrive(id, prompt, output, program="chat", turn=n, is_last_turn=last, context_tokens=context)


def of(r: Rig, kind: type[Record]) -> list[Any]:
    return [x for x in r.records if isinstance(x, kind)]


PAGE = 4  # tokens per page of the toy kvcache


def test_the_toy_page_is_as_these_tests_assume() -> None:
    assert make_engine().layout.pools[0].page_tokens == PAGE


def test_without_on_turn_end_nothing_is_kept() -> None:
    r = Rig(make_engine(Fcfs()))
    turn(r, "a", 6)
    r.drain()
    assert r.free() == (16,) and not r.engine.contexts.kept and not of(r, ContextKept)


def test_release_is_the_same_as_no_answer() -> None:
    r = rig(Release())
    turn(r, "a", 6)
    r.drain()
    assert r.free() == (16,) and not of(r, ContextKept)


def test_a_pin_keeps_the_pages_and_the_next_turn_starts_behind_them() -> None:
    r = rig(Pin(10**9, "tool call"))
    turn(r, "a", 6, 3)
    r.drain()
    # 6 prompt + 3 output, the last output token never ran: 8 tokens on 2 pages
    (kept,) = of(r, ContextKept)
    assert (kept.program, kept.tokens, kept.pages, kept.tier, kept.until_ns) == (
        "chat",
        8,
        (2,),
        "device",
        10**9,
    )
    assert r.free() == (14,) and r.engine.ledger.kvcache is not None
    assert r.engine._view.kv.pinned_pages == (2,)
    r.engine.check_integrity()

    b = turn(r, "b", 12, 2, context=9, last=True, n=1)  # the prompt repeats all 9 tokens and adds 3
    assert (b.cached, b.computed) == (8, 8)
    assert not r.engine.contexts.kept
    r.drain()
    first = next(s for s in of(r, StepDone) if "b" in s.requests)
    assert first.tokens == [4]  # 12 - 8, not 12
    (admitted,) = (x for x in of(r, RequestAdmitted) if x.request == "b")
    assert admitted.cached_tokens == 8 and not admitted.resumed
    (ended,) = of(r, ContextEnded)
    assert (ended.program, ended.request) == ("chat", "b")
    assert r.free() == (16,)
    r.engine.check_integrity()


@pytest.mark.parametrize(
    ("context", "prompt", "cached"),
    [
        (0, 12, 0),  # the next turn does not repeat anything: the context stays where it is
        (5, 12, 5),  # repeats part of it
        (9, 9, 8),  # repeats all of it: one token is left to run
        (3, 2, 1),  # a shorter prompt
    ],
)
def test_only_what_the_prompt_repeats_is_adopted(context: int, prompt: int, cached: int) -> None:
    r = rig(lambda request: Pin(10**9) if request.turn == 0 else Release())
    turn(r, "a", 6, 3)
    r.drain()
    b = turn(r, "b", prompt, 2, context=context, last=True, n=1)
    assert b.cached == cached
    assert bool(r.engine.contexts.kept) == (cached == 0)
    r.drain()
    assert r.ends("b")[0].outcome == "completed" and r.ends("b")[0].output_tokens == 2
    r.engine.check_integrity()


def test_a_last_turn_and_a_request_without_program_are_not_asked_about() -> None:
    r = rig(Pin(10**9))
    turn(r, "a", 6, last=True)
    r.arrive("b", 5, is_last_turn=False)
    r.drain()
    assert r.engine.ended["completed"] == 2 and r.free() == (16,)
    assert r.engine._view.contexts == {}


def test_a_cancelled_turn_keeps_nothing() -> None:
    r = rig(Pin(10**9))
    turn(r, "a", 6)
    r.abort("a")
    r.drain()
    assert r.free() == (16,) and not of(r, ContextKept)


def test_expiry_drops_the_pin_but_not_one_whose_next_turn_waits() -> None:
    r = rig(lambda request: Pin(r.now_ns + 10_000))
    turn(r, "a", 6)
    r.drain()
    until = r.engine.contexts.kept["chat"].until_ns
    assert until in r.timers
    r.now_ns = until - r.tick_ns
    r.tick()
    assert r.free() == (16,) and of(r, ContextEnded)[-1].reason == "its time is up"

    turn(r, "b", 6, n=1)
    r.drain()
    until = r.engine.contexts.kept["chat"].until_ns
    assert until is not None
    r.auto = False  # the next turn has arrived and is not admitted yet
    c = turn(r, "c", 12, context=8, last=True, n=2)
    r.now_ns = until - r.tick_ns
    r.tick()
    assert c.cached == 8 and c.phase is Phase.WAITING
    r.auto = True
    r.schedule()
    r.drain()
    assert r.free() == (16,)
    r.engine.check_integrity()


def test_a_later_turn_replaces_what_an_earlier_one_left() -> None:
    r = rig(Pin(10**9))
    turn(r, "a", 6)
    turn(r, "b", 10, n=1)  # in parallel: it cannot adopt what is not there yet
    r.drain()
    assert [x.reason for x in of(r, ContextEnded)] == ["a later turn left its own"]
    assert len(r.engine.contexts.kept) == 1
    r.engine.check_integrity()


def test_unpin_frees_a_pin_and_also_one_the_next_turn_waits_with() -> None:
    unpins: list[str] = []
    r = rig(Pin(10**9), unpins=unpins)
    turn(r, "a", 6)
    r.drain()
    unpins.append("chat")
    r.tick()
    assert r.free() == (16,) and not r.engine.contexts.kept

    turn(r, "b", 6, n=1)
    r.drain()
    r.auto = False
    c = turn(r, "c", 12, context=8, last=True, n=2)
    assert c.cached == 8
    plans = [_unpin("chat"), StepPlan()]  # an unpin changes something, so the engine asks again
    r.engine._plan = lambda view: plans.pop(0)
    r.schedule()
    assert (c.cached, c.computed, c.pending) == (0, 0, 12) and r.free() == (16,)
    r.engine.check_integrity()


def _unpin(program: str) -> StepPlan:
    plan = StepPlan()
    plan.unpin(program, "pressure")
    return plan


def test_unpinning_what_nobody_keeps_is_refused() -> None:
    r = rig(Release())
    turn(r, "a", 6)
    r.engine._plan = lambda view: _unpin("nobody")
    r.flights[0].clear()
    error = raises_in(lambda: r.engine._plan_lane(r.engine._lanes[0]))
    assert isinstance(error, PlanError)
    assert "program 'nobody' keeps no KV that could be dropped" in str(error)


def test_a_heir_cannot_be_unpinned_and_run_in_one_plan() -> None:
    r = rig(Pin(10**9))
    turn(r, "a", 6)
    r.drain()
    r.auto = False
    turn(r, "b", 12, context=8, n=1)

    def both(view: StepView) -> StepPlan:
        plan = _unpin("chat")
        plan.run(view.waiting.first(), 1)  # type: ignore[arg-type]
        return plan

    r.engine._plan = both
    error = raises_in(r.schedule)
    assert isinstance(error, PlanError) and "named twice" in str(error)


def test_freed_pins_count_as_room_in_the_same_plan() -> None:
    r = rig(Pin(10**9), pages=4)
    turn(r, "a", 12, 2)  # 13 tokens kept on all 4 pages
    r.drain()
    assert r.free() == (0,)
    r.auto = False
    other = r.arrive("other", 16, 1)

    def swap(view: StepView) -> StepPlan:
        plan = _unpin("chat")
        plan.run(view.waiting.first(), 16)  # type: ignore[arg-type]
        return plan

    r.engine._plan = swap
    r.schedule()
    assert other.phase is Phase.RUNNING and r.free() == (0,)
    r.engine.check_integrity()


def test_keep_host_moves_the_pages_and_the_next_turn_comes_swapped() -> None:
    r = rig(KeepHost("long tool"), host_pages=8)
    turn(r, "a", 6)
    while r.flights[0]:
        r.finish()
    (kept,) = of(r, ContextKept)
    assert (kept.tier, kept.until_ns, kept.tokens) == ("host", None, 8)
    assert r.free() == (14,)  # still being copied
    r.finish_transfer()
    assert r.free() == (16,) and r.free("host") == (6,)

    b = turn(r, "b", 12, 2, context=9, last=True, n=1)
    assert b.phase is Phase.LOADING and b.computed == 8  # Keeper swaps it in at once
    r.drain()
    (admitted,) = (x for x in of(r, RequestAdmitted) if x.request == "b")
    assert admitted.cached_tokens == 8
    assert r.ends("b")[0].outcome == "completed"
    assert r.free() == (16,) and r.free("host") == (8,)
    r.engine.check_integrity()


def test_a_turn_that_arrives_while_its_context_is_still_moving_out() -> None:
    r = rig(KeepHost(), host_pages=8)
    turn(r, "a", 6)
    while r.flights[0]:
        r.finish()
    b = turn(r, "b", 12, 2, context=9, last=True, n=1)
    assert b.phase is Phase.SWAPPING
    r.engine.check_integrity()
    r.drain()
    assert r.ends("b")[0].outcome == "completed"
    assert r.free() == (16,) and r.free("host") == (8,)


@pytest.mark.parametrize("arrived", [False, True])
def test_dropping_a_context_that_is_moving_keeps_its_pages_fenced(arrived: bool) -> None:
    unpins: list[str] = []
    r = rig(KeepHost(), host_pages=8, unpins=unpins)
    turn(r, "a", 6)
    while r.flights[0]:
        r.finish()
    unpins.append("chat")
    if arrived:
        b = turn(r, "b", 12, 2, context=9, last=True, n=1)
        assert b.cached == 0  # dropped in the very plan that could have used it
    else:
        r.tick()
    assert r.free("host") == (6,), "the copy is still being written"
    r.engine.check_integrity()
    r.drain()
    assert r.free() == (16,) and r.free("host") == (8,)
    r.engine.check_integrity()


def test_losing_the_instance_or_ending_the_run_gives_everything_back() -> None:
    for end in ("lose", "stop"):
        r = rig(Pin(10**9))
        turn(r, "a", 6)
        r.drain()
        if end == "lose":
            r.lose()
        else:
            r._take(r.engine.stop(r.now_ns, "the run is over"))
        assert r.free() == (16,) and len(of(r, ContextEnded)) == 1
        r.engine.check_integrity()


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (None, "on_turn_end answered None"),
        (Pin(0), "Pin(until_ns=0"),
        (KeepHost(), "KeepHost needs a host tier"),
    ],
)
def test_answers_that_cannot_be_carried_out(answer: Any, part: str) -> None:
    r = rig(answer)
    turn(r, "a", 6)
    error = raises_in(r.drain)
    assert isinstance(error, PlanError) and part in str(error) and "request a" in str(error)


def test_a_full_host_is_an_error_not_a_silent_release() -> None:
    r = rig(KeepHost(), host_pages=1)
    turn(r, "a", 6)
    error = raises_in(r.drain)
    assert isinstance(error, LedgerError) and "cannot be swapped out" in str(error)


def test_an_on_turn_end_that_raises_names_the_plugin() -> None:
    def broken(request: RequestView) -> TurnEnd:
        raise RuntimeError("boom")

    r = rig(broken)
    turn(r, "a", 6)
    error = raises_in(r.drain)
    assert isinstance(error, PluginCallError) and "on_turn_end(), request a" in str(error)


def test_views_given_to_on_turn_end_expire_with_it() -> None:
    kept: list[RequestView] = []

    def keep(request: RequestView) -> TurnEnd:
        assert request.generated_tokens == 3
        kept.append(request)
        return Release()

    r = rig(keep)
    turn(r, "a", 6)
    r.drain()
    assert "outside the call" in str(raises_in(lambda: kept[0].generated_tokens))


def test_a_run_ends_without_waiting_for_its_pins() -> None:
    """On the virtual clock: three turns with pauses; the last pin is let go at the end."""
    hour = 3600 * 10**9

    def spec(n: int, prompt: int, context: int) -> RequestSpec:
        return RequestSpec(
            id=f"t{n}",
            prompt_tokens=prompt,
            max_new_tokens=50,
            program="chat",
            turn=n,
            is_last_turn=False,
            context_tokens=context,
            slo=SLO(),
        )

    keeper = Keeper(lambda request: Pin(hour))
    truths: dict[str, Truth] = {}
    engine = make_engine(keeper, checks="full", limits=toy_limits())
    records: list[Record] = []
    items = [
        Arrival(0, spec(0, 6, 0), Truth(3)),
        Arrival(10**6, spec(1, 12, 9), Truth(3)),
        Arrival(2 * 10**6, spec(2, 20, 15), Truth(3)),
    ]
    VirtualDriver(
        engines=[engine],
        executors=[ToyExecutor(truths)],
        costs=[ToyCost()],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    assert engine.ended["completed"] == 3
    assert records[-1].t_ns < hour, "the clock stops with the last request, not with the last pin"
    cached = [x.cached_tokens for x in records if isinstance(x, RequestAdmitted)]
    assert cached == [0, 8, 14]
    assert [x.reason for x in records if isinstance(x, ContextEnded)][-1] == "the run is over"
    assert engine.ledger.free() == engine.ledger.total()
