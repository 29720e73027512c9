"""Conformance of kvcaches: their arithmetic, their choices, and the real ledger under any plans."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar, Literal

import pytest

from servelab.core.engine.engine import Engine
from servelab.core.families.scheduler import StepView
from servelab.core.layout import KVLayout, Pool
from servelab.core.plan import StepPlan
from servelab.core.records import RequestFinished
from servelab.core.request import Truth
from servelab.core.testing.fakes import TOY_MODEL, RandomPlans, toy_limits
from servelab.core.testing.suite import PolicySuite
from servelab.core.testing.worlds import Served, World, expected_output, serve, worlds

LONGEST = 130
"""Tokens up to which the arithmetic is checked."""
PAGES, HOST_PAGES = 40, 24
SEEDS = 4

ENGINE = "docs/explanation/engine.md"


class AnyPlans:
    """Legal plans of every kind, and a pool that shrinks and grows; in the end it lets everybody finish.

    Args:
        kinds: what the kvcache allows.
        shrinks: pages may be taken out of the pools and put back.
    """

    def __init__(self, seed: int, kinds: frozenset[str], shrinks: bool) -> None:
        self.engine: Engine | None = None
        self._rng = Random(seed)
        self._plans = RandomPlans(self._rng, kinds)
        self._shrinks = shrinks
        self._calls = 0

    def started(self, engine: Engine) -> None:
        """Given the engine whose pools it shrinks."""
        self.engine = engine

    def plan(self, view: StepView) -> StepPlan:
        self._calls += 1
        if self._calls == 400:  # enough: what is paused or swapped comes back, and all run to their end
            self._plans.kinds = frozenset({"recompute", "resume", "swap_in"})
        if self._shrinks and self.engine is not None and self._rng.randrange(4) == 0:
            ledger = self.engine.ledger
            for pool, pages in enumerate(ledger.total()):
                ledger.device[pool].resize(4 if pages <= PAGES * 3 // 4 else -4)
        plan = self._plans.plan(view)
        if not plan.work and plan.wake_at is None:
            plan.wake_at = view.now_ns + 1000
        return plan


class KVCacheSuite(PolicySuite):
    """What is true of every kvcache; see ``servelab.core.families.kvcache``."""

    kind: ClassVar[str] = "kvcache"
    contract: ClassVar[str] = "servelab/core/families/kvcache.py"

    # ------------------------------------------------------------- helpers

    def kvcache(self, truths: dict[str, Truth] | None = None, **context: Any) -> Any:
        """A fresh kvcache, not attached to anything."""
        oracle = (truths if truths is not None else {}).__getitem__ if self.spec.oracle else None
        return self.make(
            **{"limits": toy_limits(model_len=64), "model": TOY_MODEL, "oracle": oracle} | context
        )

    def layout(self, kv: Any, **shape: Any) -> KVLayout:
        """What it proposes for the toy model."""
        layout = kv.layout(replace(TOY_MODEL, **shape))
        if not isinstance(layout, KVLayout) or not layout.pools:
            self.fail(
                f"{self.name}: layout() returned {layout!r:.80}",
                rule="a kvcache proposes a KVLayout with at least one pool",
                do="return KVLayout(addressing=..., pools=(Pool(...), ...))",
            )
        return layout

    @property
    def tiers(self) -> list[tuple[Literal["device", "host"], int]]:
        """Tiers it has, with pages to try it with."""
        return [("device", PAGES), *([("host", HOST_PAGES)] if self.provides("kvcache.swap") else [])]  # type: ignore[list-item]

    def attached(self) -> tuple[Any, KVLayout]:
        """A fresh kvcache with all its pools."""
        kv = self.kvcache()
        layout = self.layout(kv)
        for i in range(len(layout.pools)):
            for tier, pages in self.tiers:
                kv.attach(i, tier, pages)
        return kv, layout

    def places(self, layout: KVLayout) -> Iterator[tuple[int, Literal["device", "host"], int]]:
        """Every pool on every tier, with its pages."""
        for i in range(len(layout.pools)):
            for tier, pages in self.tiers:
                yield i, tier, pages

    def chosen(self, kv: Any, pool: int, tier: str, n: int, free: set[int]) -> list[int]:
        """What it chooses of these free pages, checked."""
        pages = list(kv.choose(pool, tier, n, None))
        wrong = [page for page in pages if page not in free]
        if len(pages) != n or len(set(pages)) != n or wrong:
            why = f"{wrong} are not free" if wrong else f"that is {len(set(pages))} distinct pages"
            self.fail(
                f"{self.name}: choose({pool}, {tier!r}, {n}) returned {pages}, and {why}",
                rule="choose() gives n distinct free pages of that pool and tier",
                do="keep a list of free pages for each (pool, tier), and take what you give out of it",
            )
        return pages

    # -------------------------------------------------------------- checks

    def test_layout(self) -> None:
        """Every layer has a pool, sizes are positive, and the answer is the same each time."""
        kv = self.kvcache()
        layout = self.layout(kv)
        missing = set(range(TOY_MODEL.layers)) - {n for pool in layout.pools for n in pool.layers}
        bad = [p.id for p in layout.pools if p.page_tokens < 1 or p.bytes_per_page < 1]
        if missing or bad or len({p.id for p in layout.pools}) < len(layout.pools):
            self.fail(
                f"{self.name}: layers {sorted(missing)} have no pool; pools {bad} hold nothing; ids are "
                f"{[p.id for p in layout.pools]}",
                rule="each layer of the model stores its KV in a pool with an id of its own",
                do="give every layer of model.layers a pool",
            )
        if kv.layout(TOY_MODEL) != layout or self.layout(self.kvcache()) != layout:
            self.fail(
                f"{self.name} proposes another layout for the same model the second time",
                rule="the layout follows from the model and the settings, and is frozen at composition",
                do="compute it from its argument alone",
            )

    def test_windows(self) -> None:
        """No pool keeps fewer tokens than its layers see."""
        windows = (None, 8, None, 8)
        layout = self.layout(self.kvcache(), windows=windows)
        for pool in layout.pools:
            for layer in pool.layers:
                kept, sees = pool.window_tokens, windows[layer]
                if kept is not None and (sees is None or sees > kept):
                    self.fail(
                        f"{self.name}: pool {pool.id!r} keeps {kept} tokens of layer {layer}, which sees "
                        f"{sees or 'all'}",
                        rule="a pool with a window keeps what its layers see",
                        do="put layers of different windows into different pools",
                    )

    def test_pages_hold_their_tokens(self) -> None:
        """``pages_for`` and ``tokens_in`` are inverse, never decrease, and respect the size of a page."""
        kv, layout = self.attached()
        for pool in layout.pools:
            before = 0
            for tokens in range(LONGEST + 1):
                pages = kv.pages_for(pool, None, tokens)
                self._whole(pages, f"pages_for({pool.id!r}, None, {tokens})")
                holds = kv.tokens_in(pool, pages)
                if holds < tokens:
                    self.fail(
                        f"{self.name}: {tokens} tokens are said to need {pages} pages of pool {pool.id!r}, "
                        f"which hold {holds}",
                        rule="pages_for() gives the pages that must be held so that the tokens are stored",
                        do="round up: -(-tokens // pool.page_tokens)",
                    )
                if pages < before:
                    self.fail(
                        f"{self.name}: {tokens} tokens need {pages} pages, one token less needs {before}",
                        rule="pages_for() never decreases in tokens",
                        do="look at the last token of a page",
                    )
                before = pages
            self._holds(kv, pool)

    def _holds(self, kv: Any, pool: Pool) -> None:
        for pages in range(LONGEST // pool.page_tokens + 2):
            holds = kv.tokens_in(pool, pages)
            self._whole(holds, f"tokens_in({pool.id!r}, {pages})")
            if holds > pages * pool.page_tokens:
                self.fail(
                    f"{self.name}: {pages} pages of {pool.page_tokens} tokens are said to hold {holds}",
                    rule="a page holds page_tokens tokens",
                    do="count pages * pool.page_tokens",
                )
            if kv.pages_for(pool, None, holds) > pages:
                self.fail(
                    f"{self.name}: {pages} pages hold {holds} tokens, but these are said to need "
                    f"{kv.pages_for(pool, None, holds)}",
                    rule="tokens_in() is the inverse of pages_for()",
                    do="count as many tokens as fit, no page more",
                )

    def _whole(self, n: object, call: str) -> None:
        if type(n) is not int or n < 0:
            self.fail(
                f"{self.name}: {call} is {n!r}",
                rule="pages and tokens are whole numbers from 0",
                do="use // instead of /",
            )

    def test_chooses_free_pages(self) -> None:
        """Any order of choosing and releasing gives distinct free pages, and all come back."""
        kv, layout = self.attached()
        for pool, tier, pages in self.places(layout):
            rng, free, held = Random(f"{pool}/{tier}"), set(range(pages)), list[list[int]]()
            for _ in range(120):
                if held and rng.randrange(2):
                    gone = held.pop(rng.randrange(len(held)))
                    kv.released(pool, tier, gone)
                    free |= set(gone)
                elif free:
                    got = self.chosen(kv, pool, tier, rng.randint(1, min(5, len(free))), free)
                    free -= set(got)
                    held.append(got)
            for gone in held:
                kv.released(pool, tier, gone)
            self.chosen(kv, pool, tier, pages, set(range(pages)))

    def test_pools_and_tiers_are_apart(self) -> None:
        """Emptying one pool or tier leaves every other full."""
        kv, layout = self.attached()
        for pool, tier, pages in self.places(layout):
            self.chosen(kv, pool, tier, pages, set(range(pages)))

    def test_scratch_agrees(self) -> None:
        """A copy of the free pages says what ``choose`` would do, and changes nothing."""
        kv, layout = self.attached()
        if not hasattr(kv, "scratch"):
            pytest.skip(f"{self.name} takes any free pages: it has no scratch()")
        for pool in range(len(layout.pools)):
            rng, held = Random(pool), list[Sequence[int]]()
            for _ in range(60):
                scratch, n = kv.scratch(pool), rng.randint(1, 6)
                trial = scratch.take(n)
                if trial is not None and (len(set(trial)) != n or any(set(trial) & set(h) for h in held)):
                    self.fail(
                        f"{self.name}: scratch({pool}).take({n}) gave {list(trial)}, which are not {n} free "
                        "pages",
                        rule="take() gives what choose() would give for one request, taken out",
                        do="copy the free pages as they are now, and take as choose() does",
                    )
                if trial is not None:
                    scratch.give_back(trial)
                    again = scratch.take(n)
                    if again is None:
                        self.fail(
                            f"{self.name}: scratch({pool}) has no place for the {n} pages given back to it",
                            rule="give_back() of a scratch does as released()",
                            do="join the pages to the free ones they lie beside",
                        )
                    fresh = kv.scratch(pool).take(n)
                    if fresh is None or list(fresh) != list(trial):
                        self.fail(
                            f"{self.name}: taking from a scratch of pool {pool} changed what the next one "
                            "shows",
                            rule="changing a scratch changes nothing else",
                            do="return a copy",
                        )
                unusable = kv.unusable(pool, n)
                if not 0 <= unusable <= PAGES - sum(map(len, held)):
                    self.fail(
                        f"{self.name}: unusable({pool}, {n}) is {unusable}, of "
                        f"{PAGES - sum(map(len, held))} free pages",
                        rule="unusable() counts free pages",
                        do="count the pages of free runs that are too short",
                    )
                if held and rng.randrange(2):
                    kv.released(pool, "device", held.pop(rng.randrange(len(held))))
                elif trial is not None:
                    held.append(list(kv.choose(pool, "device", n, None)))

    def test_watermark(self) -> None:
        """What it wants left free is a number of pages that an admission can leave."""
        kv = self.kvcache()
        layout = self.layout(kv)
        if not hasattr(kv, "watermark"):
            pytest.skip(f"{self.name} has no watermark()")
        for pool in layout.pools:
            for pages in (1, 7, 100, 10_000):
                n = kv.watermark(pool, pages)
                if type(n) is not int or not 0 <= n < pages:
                    self.fail(
                        f"{self.name}: watermark() of a pool of {pages} pages is {n!r}",
                        rule="an admission leaves a whole number of pages free, from 0 to less than the pool",
                        do="round down, and keep it below the number of pages",
                    )

    def test_serves_the_worlds(self) -> None:
        """Every world runs to its end in the real engine, with all tokens and all pages."""
        for world in worlds(self.seed):
            if world.windows or world.reuse:
                continue  # these are about layouts of their own
            world = replace(world, host_pages=world.host_pages if self.provides("kvcache.swap") else 0)
            world = replace(
                world, shares=world.shares and self.provides("kvcache.fork"), pages=self._pages(world)
            )
            truths: dict[str, Truth] = {}
            served = serve(world, kvcache=self.kvcache(truths, limits=world.limits), truths=truths)
            self._honest(served)
            expected, tokens = expected_output(world), served.tokens
            for end in served.of(RequestFinished):
                got = [token % 1000 for token in tokens.get(end.request, [])]
                if (
                    end.outcome == "completed"
                    and end.request in expected
                    and len(got) != expected[end.request]
                ):
                    self.fail(
                        f"{self.name}: request {end.request} was given {len(got)} tokens of "
                        f"{expected[end.request]}",
                        rule="a request that fits alone is served whole",
                        where=ENGINE,
                        do="look at pages_for() near the end of the request",
                    )

    def _pages(self, world: World) -> int:
        """Enough for the longest request of the world, whatever the size of a page."""
        kv = self.kvcache(limits=world.limits)
        layout = self.layout(kv)
        need = max(
            kv.pages_for(p, None, p.most_tokens(world.limits.max_model_len, world.limits.max_batch_tokens))
            for p in layout.pools
        )
        tight = world.pages * world.page_tokens[0] // layout.pools[0].page_tokens
        return max(int(need), tight)

    def test_any_plans_keep_the_books(self) -> None:
        """Preemption, swapping, drafts, forks, shrinking pools in any order: no page is lost or given "
        "twice."""
        kinds = RandomPlans.KINDS
        if not self.provides("kvcache.swap"):
            kinds -= {"swap", "swap_in"}
        if "spec.drafts" in self.spec.conflicts:
            kinds -= {"draft"}
        picked = [
            w for w in worlds(self.seed) if w.name in ("little memory", "samples that share", "host tier")
        ]
        for world in picked:
            for seed in range(SEEDS):
                world = replace(
                    world,
                    pages=max(PAGES, self._pages(world)),
                    host_pages=HOST_PAGES if self.provides("kvcache.swap") else 0,
                    shares=self.provides("kvcache.fork"),
                )
                truths: dict[str, Truth] = {}
                plans = AnyPlans(seed, kinds, shrinks=self._pages(world) <= PAGES // 2)
                self._honest(
                    serve(
                        world,
                        scheduler=plans,
                        kvcache=self.kvcache(truths, limits=world.limits),
                        truths=truths,
                        started=plans.started,
                    )
                )

    def test_no_clock_no_chance_no_environment(self) -> None:
        """Which page is chosen follows from what was chosen and released before."""
        kv, layout = self.attached()

        def calls() -> None:
            for pool, tier, pages in self.places(layout):
                kv.pages_for(layout.pools[pool], None, 9)
                kv.released(pool, tier, kv.choose(pool, tier, pages // 2, None))

        self.calls_nothing_forbidden(calls)

    def _honest(self, served: Served) -> None:
        """The run came to its end, and every page came back: in the ledger, and in the plugin."""
        world, error = served.world.name, served.error
        if error is not None:
            what, why = getattr(error, "what", str(error)), getattr(error, "why", "")
            self.fail(
                f"{self.name}, in world {world!r}: {what} ({getattr(error, 'where', '')}); {why}",
                rule="the ledger counts every page: free, held as often as tables list it, or taken out",
                where=ENGINE,
                do=getattr(error, "do", "") or "mend the plugin; the cause is chained",
                cause=error,
            )
        ledger = served.engine.ledger
        if ledger.free() != ledger.total():
            self.fail(
                f"{self.name}: {ledger.free()} of {ledger.total()} pages are free at the end of world "
                f"{world!r}",
                rule="KV memory is conserved",
                where=ENGINE,
                do="look at released()",
            )
        for pool, pages in enumerate(ledger.total()):
            self.chosen(
                ledger.kvcache,
                pool,
                "device",
                pages,
                {p for p, n in enumerate(ledger.device[pool].refs) if not n},
            )
