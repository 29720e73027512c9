"""A prefix store in the engine: what is found, held, published, evicted, and refused. Pages of 4 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from servelab.core.api import Hold, Pin, StepPlan, StepView, Tokens
from servelab.core.context import Context, seeded
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import CapabilityError, LedgerError, PlanError, PluginCallError, PluginError
from servelab.core.families.prefix import Commit, Content, Provenance, Span
from servelab.core.plan import Outcome
from servelab.core.records import PagesEvicted, Planned, Record, RequestAdmitted, StepDone
from servelab.core.request import Phase
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
    step_by_step,
    toy_layout,
    toy_limits,
)
from servelab.plugins.prefix.hash import HashConfig, HashStore


def store(**settings: Any) -> HashStore:
    context = Context(
        kind="prefix",
        name="hash",
        rng=seeded(0, "prefix", "hash"),
        model=TOY_MODEL,
        hardware=None,
        limits=toy_limits(),
    )
    return HashStore(HashConfig(**settings), context)


def rig(scheduler: Any = None, *, pages: int = 16, prefix: Any = None, **more: Any) -> Rig:
    more.setdefault("checks", "full")
    return Rig(make_engine(scheduler or Fcfs(), pages=pages, prefix=prefix or store(), **more))


def ids(n: int, first: int = 1) -> list[int]:
    """``n`` tokens; another ``first`` is another text from the first token on."""
    return [first, *range(50, 50 + n - 1)]


def serve(r: Rig, id: str, prompt: Sequence[int], output: int = 1, **spec: Any) -> int:
    """Runs one request to its end; the tokens it found."""
    r.arrive(id, len(prompt), output, prompt_ids=prompt, **spec)
    r.drain()
    r.engine.check_integrity()
    return next(x.cached_tokens for x in r.records if isinstance(x, RequestAdmitted) and x.request == id)


# ------------------------------------------------------------ faithful when


@pytest.mark.parametrize(("prompt", "hit"), [(12, 8), (13, 12), (4, 0), (5, 4), (3, 0), (1, 0)])
def test_a_repeated_prompt_hits_its_full_pages_but_not_the_last_token(prompt: int, hit: int) -> None:
    r = rig()
    assert serve(r, "a", ids(prompt)) == 0
    assert serve(r, "b", ids(prompt)) == hit
    run = [x.tokens for x in r.records if isinstance(x, StepDone) and "b" in x.requests]
    assert run == [[prompt - hit]]


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": ids(13, first=2)},
        {"features": {"cache_salt": "s"}},
        {"tenant": "other"},
    ],
)
def test_another_first_token_salt_or_tenant_hits_nothing(changed: dict[str, Any]) -> None:
    r = rig()
    serve(r, "a", ids(13))
    assert serve(r, "b", **{"prompt": ids(13), **changed}) == 0
    assert serve(r, "c", **{"prompt": ids(13), **changed}) == 12, "it finds its own"
    assert serve(r, "d", ids(13)) == 12


def test_tenants_share_where_that_is_asked_for_and_salts_never() -> None:
    r = rig(prefix=store(share_tenants=True))
    serve(r, "a", ids(13))
    assert serve(r, "b", ids(13), tenant="other") == 12
    assert serve(r, "c", ids(13), tenant="other", features={"cache_salt": "s"}) == 0


def test_a_lookup_ends_at_the_first_page_that_differs() -> None:
    r = rig()
    serve(r, "a", ids(17))
    text = ids(17)
    text[5] = 0  # in the second page: the third and fourth are equal, and stand for another text
    assert serve(r, "b", text) == 4


def test_the_tail_of_the_sequence_released_first_is_evicted_first() -> None:
    s = store()
    r = rig(prefix=s)
    serve(r, "a", ids(12, first=1))  # pages 0 1 2
    serve(r, "b", ids(12, first=2))  # pages 3 4 5
    assert r.engine.ledger.device[0].free == 10 and r.free() == (16,)
    assert s.evict(0, 4, 0) == [2, 1, 0, 5]


def test_a_hit_takes_its_pages_out_of_the_queue() -> None:
    s = store()
    r = rig(prefix=s)
    serve(r, "a", ids(12, first=1))
    serve(r, "b", ids(12, first=2))
    serve(r, "c", ids(9, first=1))  # uses a's pages 0 and 1 again: they are released last; page 2 is not used
    assert s.evict(0, 6, 0) == [2, 5, 4, 3, 1, 0]


def test_pages_in_use_are_never_evicted() -> None:
    s = store()
    r = rig(prefix=s, pages=8)
    serve(r, "a", ids(13))  # 3 full pages stay, held by the store alone
    b = r.arrive("b", 14, 9, prompt_ids=ids(14))  # uses them
    r.finish()
    assert s.evictable(0) == 0 and b.lease.tables[0][:3] == [0, 1, 2]
    serve(r, "c", ids(13, first=7))  # the rest of the pool, and more than once
    serve(r, "d", ids(13, first=8))
    assert not set(s._free) & set(b.lease.tables[0])
    r.drain()
    assert serve(r, "e", ids(14)) == 12 or any(isinstance(x, PagesEvicted) for x in r.records)


def test_a_page_behind_one_that_is_gone_is_not_found() -> None:
    s = store()
    s.attach(toy_layout(4))
    text, at = Content(length=9, ids=ids(9)), Provenance(model="toy")
    s.commit("a", Content(length=8, ids=ids(8)), [[0, 1]], at, 0)
    s.acquire("b", [Span(handle=1, start=4, end=8, source_start=4, pages=((1,),))], 0)
    assert s.match(text, at, 0)[0].pages == ((0, 1),)
    s.release("a", 0)
    assert s.evict(0, 1, 0) == [0] and s.match(text, at, 0) == ()


def test_drafts_never_get_a_key() -> None:
    s = store()

    def drafts(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.work.append(Tokens(find(view, "a"), find(view, "a").pending_tokens, draft=4))
        return plan

    r = rig(Script(drafts), prefix=s)
    r.arrive("a", 7, 20, prompt_ids=ids(7))
    r.finish(outcomes=[Outcome((0,), accepted=0)])  # 11 tokens were written, 7 are of the text
    assert len(s._keys) == 1
    assert r.request("a").lease.published == 1


# ---------------------------------------------------------------- the engine


def test_outputs_are_found_by_a_prompt_that_repeats_them() -> None:
    r = rig()
    serve(r, "a", ids(6), 7)  # the outputs of toy executors are 0, 1, 2, ...; 12 tokens are computed
    assert serve(r, "b", [*ids(6), *range(7)]) == 12


def test_prompts_without_ids_match_nothing_and_are_no_error() -> None:
    r = rig()
    for id in "abc":
        r.arrive(id, 12, 3)
        r.drain()
    r.engine.check_integrity()
    assert r.engine.ledger.device[0].free == 16


def test_what_a_scheduler_sees_is_what_is_left_to_compute_and_only_while_it_plans() -> None:
    seen: list[tuple[int, int, int, tuple[int, ...]]] = []

    class Watch(Fcfs):
        def plan(self, view: StepView) -> StepPlan:
            for _ in range(2):
                seen.extend(
                    (x.cached_tokens, x.computed_tokens, x.pending_tokens, view.kv.pages_needed(x, 1))
                    for x in view.waiting
                )
            return StepPlan() if view.waiting.first() and view.now_ns < wait else super().plan(view)

    wait = 0
    s = store()
    r = rig(Watch(), prefix=s)
    serve(r, "a", ids(13))
    seen.clear()
    asked: list[int] = []
    match = s.match
    s.match = lambda *args, **more: asked.append(1) or match(*args, **more)  # type: ignore[func-returns-value, method-assign]
    wait = 1 << 60
    b = r.arrive("b", 14, 1, prompt_ids=ids(14))
    assert seen[:2] == [(12, 12, 2, (4,))] * 2  # 3 pages that only the store holds, and a new one
    r.arrive("c", 9, 1, prompt_ids=ids(9, first=2))
    assert len(asked) == 3, "once per request and plan, whether it hits or not"
    assert (b.computed, b.cached, b.pending, b.lease.tables) == (0, 0, 14, [[]])
    r.engine.check_integrity()
    wait = 0
    r.tick()
    r.drain()
    assert [x.cached_tokens for x in r.records if isinstance(x, RequestAdmitted)] == [0, 12, 0]


def test_a_preempted_request_finds_itself_again_outputs_included() -> None:
    def run(n: int) -> Any:
        def plan(view: StepView) -> StepPlan:
            p = StepPlan()
            request = find(view, "a")
            p.run(request, n or request.pending_tokens)
            return p

        return plan

    def preempt(view: StepView) -> StepPlan:
        p = StepPlan()
        p.preempt(find(view, "a"), "recompute", "the test says so")
        return p

    r = rig(Script(run(7), run(1), run(1), preempt, run(0), then=run(1)))
    a = r.arrive("a", 7, 9, prompt_ids=ids(7))
    for _ in range(3):
        r.finish()  # 9 computed, 10 known
    assert a.phase is Phase.RUNNING or a.phase is Phase.WAITING
    r.schedule()
    assert (a.computed, a.cached, a.flying) == (8, 8, 2)
    r.drain()
    assert r.ends("a")[0].output_tokens == 9 and a.output == list(range(9))


def test_pages_of_an_aborted_launch_are_used_again_only_when_it_has_landed() -> None:
    s = store()
    r = rig(prefix=s, pages=5)
    a = r.arrive("a", 9, 9, prompt_ids=ids(9))
    r.finish()  # two full pages published, the next token is in flight
    table = list(a.lease.tables[0])
    r.abort("a")
    assert s.evictable(0) == 0 and r.free() == (2,)
    r.arrive("b", 17, 1, prompt_ids=ids(17, first=2))
    assert not any(batch.requests[0].id == "b" for batch in r.flights[0])
    r.finish()
    assert r.request("b").lease.tables[0] and set(r.request("b").lease.tables[0]) >= set(table)
    r.drain()
    r.engine.check_integrity()
    assert r.free() == (5,)


def test_requests_admitted_together_share_and_the_last_pages_are_counted_once_each() -> None:
    s = store()
    r = rig(prefix=s, pages=6)
    serve(r, "a", ids(13))
    b, c = (r.arrive(id, 14, 2, prompt_ids=ids(14)) for id in "bc")
    assert b.lease.tables[0][:3] == [0, 1, 2]
    r.finish()
    assert c.lease.tables[0][:3] == [0, 1, 2] and r.engine.ledger.device[0].refs[:3] == [3, 3, 3]
    r.drain()
    assert r.free() == (6,)


@pytest.mark.parametrize("victim_first", [True, False])
def test_preempting_one_does_not_free_what_another_of_the_plan_reuses(victim_first: bool) -> None:
    """A budget that gave a victim's pages back must not hand them out twice."""
    taken: list[bool] = []

    def swap(view: StepView) -> StepPlan:
        plan, pages = StepPlan(), view.kv.budget()
        victim, new = find(view, "a"), find(view, "b")
        plan.preempt(victim, "recompute", "the test says so")
        if victim_first:
            pages.give_back(victim)
            assert pages.free == (8,), "what only the store holds afterwards is free"
        taken.append(pages.take(new, new.pending_tokens))
        if not victim_first:
            pages.give_back(victim)
        assert pages.free == (4,)
        plan.run(new, new.pending_tokens)
        return plan if len(taken) == 2 else StepPlan()

    def first(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "a"), 13)
        return plan

    r = rig(Script(first, lambda view: StepPlan(), swap, swap), pages=8)
    r.arrive("a", 13, 9, prompt_ids=ids(13))
    r.finish()
    r.arrive("b", 14, 2, prompt_ids=ids(14))
    r.schedule()
    assert taken == [True, True]
    r.drain()
    r.engine.check_integrity()


def test_a_plan_that_counts_reused_pages_of_its_victim_as_free_is_refused() -> None:
    def first(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "a"), 13)
        return plan

    def greedy(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.preempt(find(view, "a"), "recompute", "the test says so")
        new = find(view, "b")
        plan.run(new, new.pending_tokens)  # 6 pages; 4 are free, and a gives back 1 that b does not use
        return plan

    r = rig(Script(first, lambda view: StepPlan(), greedy), pages=8)
    r.arrive("a", 13, 9, prompt_ids=ids(13))
    r.finish()
    error = raises_in(lambda: r.arrive("b", 33, 2, prompt_ids=ids(33)))
    assert isinstance(error, PlanError) and "needs 6 KV pages" in str(error)


def test_rejecting_a_request_frees_nothing_of_what_it_would_have_reused() -> None:
    def first(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "a"), 13)
        return plan

    def reject(view: StepView) -> StepPlan:
        plan = StepPlan()
        new = find(view, "c")
        plan.reject(find(view, "b"), "the test says so")
        plan.run(new, new.pending_tokens)  # 5 pages, 4 are free
        return plan

    r = rig(Script(first), pages=8)
    r.arrive("a", 13, 9, prompt_ids=ids(13))
    r.finish()
    r.arrive("b", 14, 2, prompt_ids=ids(14))
    r.arrive("c", 20, 2, prompt_ids=ids(20, first=2))
    r.engine._plan = reject
    error = raises_in(r.schedule)
    assert isinstance(error, PlanError) and "needs 5 KV pages" in str(error)


def test_a_context_kept_between_turns_comes_before_the_store() -> None:
    class Keeper(Fcfs):
        def on_turn_end(self, request: Any) -> Pin:
            return Pin(10**9, "tool call")

    r = rig(Keeper())
    first = ids(6)
    serve(r, "a", first, 7, program="p", is_last_turn=False)
    b = r.arrive("b", 14, 2, prompt_ids=[*first, *range(5), 9, 9, 9], program="p", turn=1, context_tokens=11)
    assert b.cached == 11  # in the middle of a full page that the store holds: copied on write
    r.drain()
    r.engine.check_integrity()
    assert r.free() == (16,)
    assert serve(r, "c", [*first, *range(5), 9, 9, 9, 0]) == 12  # the page as the second turn wrote it
    assert serve(r, "d", [*first, *range(7)]) == 12  # and as the first one did


def test_pages_a_turn_gives_up_stay_its_own_for_the_store() -> None:
    """The store learns that a request lets go when it lets go of all: till then nothing may be evicted."""

    class Keeper(Fcfs):
        def on_turn_end(self, request: Any) -> Pin:
            return Pin(10**9, "tool call")

    s = store()
    r = rig(Keeper(), prefix=s)
    first = ids(6)
    serve(r, "a", first, 7, program="p", is_last_turn=False)  # 3 full pages
    b = r.arrive("b", 9, 9, prompt_ids=[*first, 9, 9, 9], program="p", turn=1, context_tokens=6)
    assert b.cached == 6 and b.lease.kept == [(0, 2), (0, 1)]  # not repeated, and copied on write
    assert s.evictable(0) == 0
    r.engine.check_integrity()
    r.auto = False
    r.finish()
    r.engine.check_integrity()
    assert r.engine.ledger.releasable([b.lease]) == [5]  # three in its table, two given up
    r.abort("b")
    r.drain()
    r.engine.check_integrity()
    assert r.free() == (16,)


def test_shrinking_the_pool_takes_cached_pages_too() -> None:
    r = rig(pages=8)
    serve(r, "a", ids(13))
    r.engine.ledger.device[0].resize(-7)
    r.engine.check_integrity()
    assert r.free() == (1,) and r.engine.ledger.total() == (1,)
    r.engine.ledger.device[0].resize(7)
    assert serve(r, "b", ids(13)) in (0, 4)


def test_a_page_that_a_resize_waits_for_leaves_when_its_last_user_does() -> None:
    r = rig(pages=4)
    r.arrive("a", 13, 1, prompt_ids=ids(13))
    r.engine.ledger.device[0].resize(-3)
    r.drain()
    r.engine.check_integrity()
    assert r.free() == (1,) and r.engine.ledger.total() == (1,)


def test_swapping_out_lets_go_of_the_store() -> None:
    def move(kind: str) -> Any:
        def plan(view: StepView) -> StepPlan:
            p = StepPlan()
            request = find(view, "a")
            if kind == "out":
                p.preempt(request, "swap", "the test says so")
            elif kind == "in":
                p.swap_in(request, "the test says so")
            else:
                p.run(request, request.pending_tokens)
            return p

        return plan

    s = store()
    r = rig(Script(move("run"), move("out"), move("in"), then=move("run")), prefix=s, host_pages=8)
    r.arrive("a", 9, 5, prompt_ids=ids(9))
    r.finish()
    assert s.evictable(0) == 0
    r.finish_transfer()
    assert s.evictable(0) == 2
    r.engine.check_integrity()
    r.finish_transfer()
    r.drain()
    r.engine.check_integrity()
    assert r.ends("a")[0].output_tokens == 5 and r.free() == (16,)


def test_evictions_are_recorded() -> None:
    r = rig(pages=4)
    serve(r, "a", ids(13))
    serve(r, "b", ids(13, first=2))
    (evicted,) = (x for x in r.records if isinstance(x, PagesEvicted))
    assert (evicted.pool, evicted.pages) == (0, 3)


@pytest.mark.parametrize("pages", [14, 40])
@pytest.mark.parametrize("rows", [2, 16])
def test_held_and_stepped_runs_are_the_same_run(pages: int, rows: int) -> None:
    """Also where pages that fill up in the middle of a hold are what a waiting request begins with."""

    def run(hold: int, foresight: bool) -> list[Any]:
        records: list[Record] = []
        truths: dict[str, Any] = {}
        executor = ToyExecutor(truths, foresight=foresight)
        engine = make_engine(
            Fcfs(hold=hold),
            pages=pages,
            prefix=store(),
            horizon=executor.horizon,
            limits=toy_limits(tokens=32, requests=rows),
        )
        items = []
        for i in range(14):  # every other prompt repeats the outputs of the one before
            text = [i // 2, *range(90, 95), *(range(9 + i) if i % 2 else ())]
            items.append(arrival(f"r{i}", len(text), 12 + 7 * i % 11, at=i * 900, prompt_ids=text))
        VirtualDriver(
            engines=[engine],
            executors=[executor],
            costs=[ToyCost()],
            workload=ListWorkload(items),
            truths=truths,
            emit=records.append,
        ).run()
        engine.check_integrity()
        admitted = [(x.t_ns, x.request, x.cached_tokens) for x in records if isinstance(x, RequestAdmitted)]
        assert sum(n for _, _, n in admitted) > 40
        return [admitted, step_by_step(records)]

    stepped = run(1, True)
    assert run(64, True) == stepped
    assert run(64, False) == stepped


class Picky:
    """Lets a request in beside others only if most of it was computed before."""

    def __init__(self, hold: int) -> None:
        self.hold = hold

    def plan(self, view: StepView) -> StepPlan:
        plan = StepPlan()
        for request in view.running:
            plan.run(request, request.pending_tokens)
        for request in view.waiting:
            if request.pending_tokens <= 4 or not plan.work:
                plan.run(request, request.pending_tokens)
                return plan
        if self.hold > 1 and all(request.pending_tokens == 1 for request in view.running) and plan.work:
            plan.hold = Hold(self.hold)
        return plan


def test_a_hold_ends_where_a_waiting_request_finds_a_new_page() -> None:
    def run(hold: int, foresight: bool) -> list[Any]:
        records: list[Record] = []
        truths: dict[str, Any] = {}
        executor = ToyExecutor(truths, foresight=foresight)
        engine = make_engine(Picky(hold), pages=40, prefix=store(), horizon=executor.horizon)
        text = ids(6)
        items = [
            arrival("a", 6, 30, prompt_ids=text),
            arrival("b", 19, 3, at=900, prompt_ids=[*text, *range(13)]),
        ]
        VirtualDriver(
            engines=[engine],
            executors=[executor],
            costs=[ToyCost()],
            workload=ListWorkload(items),
            truths=truths,
            emit=records.append,
        ).run()
        assert [x.cached_tokens for x in records if isinstance(x, RequestAdmitted)] == [0, 16]
        return step_by_step(records)

    assert run(1, True) == run(64, True) == run(64, False)


def test_a_hold_of_requests_without_ids_is_not_cut() -> None:
    r = rig(Fcfs(hold=64), pages=9)
    r.arrive("a", 8, 20)
    r.arrive("b", 32, 2)
    r.finish()
    assert r.engine.waiting and r.flights[0][0].steps > 4


def test_what_a_cut_launch_was_promised_goes_to_the_resize_that_waits_for_it() -> None:
    r = Rig(make_engine(Fcfs(hold=8), pages=4, checks="full"))
    r.arrive("a", 7, 30)
    r.finish()
    assert r.flights[0][0].steps == 8 and r.free() == (0,)  # two pages are promised
    r.engine.ledger.device[0].resize(-4)
    r.finish(steps=1, more=True)
    r.engine.check_integrity()
    assert r.free() == (0,) and r.engine.ledger.total() == (3,)  # the step that runs took the other


# ------------------------------------------------------------------ refusals


def test_rewriting_is_refused() -> None:
    def rewrite(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.work.append(Tokens(find(view, "a"), 2, advance="rewrite"))
        return plan

    def first(view: StepView) -> StepPlan:
        plan = StepPlan()
        plan.run(find(view, "a"), 9)
        return plan

    r = rig(Script(first, rewrite))
    r.arrive("a", 9, 9, prompt_ids=ids(9))
    error = raises_in(r.finish)
    assert isinstance(error, PlanError) and "prefix store" in str(error)


def test_layouts_of_several_pools_are_refused_by_the_store() -> None:
    error = raises_in(lambda: store().attach(toy_layout(4, 4)))
    assert isinstance(error, CapabilityError) and "kv0, kv1" in str(error)


class Wrong(HashStore):
    """A store that breaks its contract in one way."""

    def __init__(self, fault: str) -> None:
        super().__init__(HashConfig(), None)  # type: ignore[arg-type]
        self.fault = fault

    def match(self, content: Content, provenance: Provenance, now_ns: int, *, readonly: bool = False) -> Any:
        if self.fault == "raises":
            raise ZeroDivisionError("planted")
        spans = super().match(content, provenance, now_ns)
        if spans and self.fault == "all":
            n = content.length // 4
            pages = (tuple(range(n)),)
            return [Span(handle=0, start=0, end=content.length, source_start=0, pages=pages)]
        if spans and self.fault == "gap":
            return [Span(handle=0, start=4, end=8, source_start=4, pages=((1,),))]
        if spans and self.fault == "short":
            return [Span(handle=0, start=0, end=8, source_start=0, pages=((1,),))]
        return spans

    def commit(self, *args: Any) -> Commit:
        done = super().commit(*args)
        return Commit(done.taken, replaced=(((0, 1),),)) if self.fault == "replaces" else done

    def evict(self, pool: int, n: int, now_ns: int) -> Sequence[int]:
        if self.fault == "evicts":
            return range(15, 15 - n, -1)
        return super().evict(pool, n, now_ns)[:-1] if self.fault == "few" else super().evict(pool, n, now_ns)


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("raises", PluginCallError, "ZeroDivisionError: planted"),
        ("all", PluginError, "matched 12 of 12 tokens"),
        ("gap", PluginError, "exact spans of full pages"),
        ("short", PluginError, "exact spans of full pages"),
        ("replaces", PluginError, "tables that only grow"),
        ("few", PluginError, "evicted []"),
        ("evicts", LedgerError, "cannot give up"),
    ],
)
def test_a_store_that_breaks_its_contract_is_told_so(fault: str, kind: type, says: str) -> None:
    r = rig(prefix=Wrong(fault), pages=3 if fault == "few" else 16)

    def run() -> None:
        serve(r, "a", ids(12))
        serve(r, "b", ids(12))
        if fault == "evicts":
            r.engine.ledger.device[0].resize(-14)
        serve(r, "c", ids(12, first=2))

    error = raises_in(run)
    assert isinstance(error, kind) and says in str(error), str(error)
    r.engine.stop(r.now_ns, "it failed")  # nothing is left that cannot be ended
    assert not r.engine.requests


def test_plans_are_logged_alike() -> None:
    r = rig()
    serve(r, "a", ids(13))
    serve(r, "b", ids(13))
    assert [x.work for x in r.records if isinstance(x, Planned)] == [[("a", 13)], [("b", 1)]]
