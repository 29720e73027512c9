"""Conformance of prefix stores: what they match, keep and give up, and the KV that requests then read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar

import pytest

from servelab.core.engine.state import Request
from servelab.core.events import Batch
from servelab.core.families.prefix import Commit, Content, Provenance, Span
from servelab.core.plan import Outcome
from servelab.core.records import RequestAdmitted, RequestFinished
from servelab.core.request import Arrival, Phase, Truth
from servelab.core.testing.fakes import TOY_MODEL, Fcfs, ToyExecutor, toy_layout, toy_limits
from servelab.core.testing.suite import PolicySuite
from servelab.core.testing.worlds import Served, World, serve, stem, traffic

PAGE = 4
"""Tokens per page."""
HOME = Provenance(model="toy")

METHODS = {
    "prefix.fork": ("fork",),
    "prefix.pin": ("pin", "unpin", "relieve"),
    "prefix.approximate": ("plan_fixup",),
    "prefix.events": ("events",),
}
"""Methods that a capability adds."""
ENGINE = "docs/explanation/engine.md"


class Desk:
    """A store and what the engine would know of it: texts of pages, and who uses which."""

    def __init__(self, suite: PrefixSuite, store: Any) -> None:
        self.suite, self.store, self.now = suite, store, 0
        self.text: dict[int, tuple[int, ...]] = {}
        """Of each stored page, the whole text up to its end."""
        self.used: dict[str, set[int]] = {}
        """Stored pages that each request uses."""
        self.next_page = 0

    def match(
        self, ids: Sequence[int], where: Provenance = HOME, *, readonly: bool = False
    ) -> Sequence[Span]:
        """A lookup, checked."""
        self.now += 1
        content = Content(length=len(ids), ids=list(ids))
        spans = list(self.store.match(content, where, self.now, readonly=readonly))
        self.suite.check_spans(self, ids, spans)
        return spans

    def serve(self, id: str, ids: Sequence[int], where: Provenance = HOME) -> int:
        """A request looks up, uses what it found, and publishes the rest; the tokens it found."""
        spans = self.match(ids, where)
        found = spans[-1].end if spans else 0
        table = [page for span in spans for page in span.pages[0]]
        if spans:
            self.store.acquire(id, spans, self.now)
            self.used.setdefault(id, set()).update(table)
        fresh = -(-len(ids) // PAGE) - len(table)
        table += range(self.next_page, self.next_page + fresh)
        self.next_page += fresh
        full = len(ids) // PAGE
        if full > found // PAGE:
            content = Content(length=full * PAGE, ids=list(ids[: full * PAGE]))
            done = self.store.commit(id, content, [table[:full]], where, self.now)
            self.suite.check_commit(self, done, table[:full])
            for page in done.taken[0]:
                self.text[page] = tuple(ids[: (table.index(page) + 1) * PAGE])
                self.used.setdefault(id, set()).add(page)
        return found

    def release(self, id: str) -> None:
        self.store.release(id, self.now)
        self.used.pop(id, None)

    @property
    def busy(self) -> set[int]:
        """Stored pages that somebody uses."""
        return set().union(*self.used.values()) if self.used else set()

    def evict(self, n: int) -> list[int]:
        """``n`` pages are given up, checked."""
        pages = list(self.store.evict(0, n, self.now))
        self.suite.check_evicted(self, n, pages)
        for page in pages:
            del self.text[page]
        return pages


class Shadow(ToyExecutor):
    """Remembers which text the KV in each slot of a page stands for, and compares where a request reads "
    "it."""

    def __init__(self, truths: dict[str, Truth]) -> None:
        super().__init__(truths)
        self.slots: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.wrong: list[str] = []

    def text(self, r: Request, end: int) -> tuple[Any, ...]:
        """Prompt and output of a request up to a position."""
        output = range(1000 * r.spec.sample, 1000 * r.spec.sample + 999)
        return tuple([*(r.spec.prompt_ids or ()), *output][:end])

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        for _, source, target in batch.copies:
            for slot in range(PAGE):
                self.slots[target, slot] = self.slots.get((source, slot), ())
        for r, lease, start, n in zip(batch.requests, batch.leases, batch.starts, batch.tokens, strict=True):
            if lease is not r.lease or r.phase is Phase.FINISHED:
                continue  # its outcome is dropped
            table = lease.tables[0]
            for at in range(start):
                if self.slots.get((table[at // PAGE], at % PAGE)) != self.text(r, at + 1):
                    self.wrong.append(f"request {r.id} reads KV of another text at position {at}")
            for at in range(start, start + n + steps - 1):
                self.slots[table[at // PAGE], at % PAGE] = self.text(r, at + 1)
        return super().launch(batch, steps)


class PrefixSuite(PolicySuite):
    """What is true of every prefix store that publishes exact KV; see ``servelab.core.families.prefix``."""

    kind: ClassVar[str] = "prefix"
    contract: ClassVar[str] = "servelab/core/families/prefix.py"

    # ------------------------------------------------------------- helpers

    def store(self) -> Any:
        """A fresh store, attached to one pool of pages of 4 tokens."""
        store = self.make(limits=toy_limits(), model=TOY_MODEL)
        store.attach(toy_layout(PAGE))
        return store

    def exact(self) -> None:
        """Skip checks of exact prefixes for stores that return something else."""
        if self.provides("prefix.approximate") or self.provides("prefix.moving"):
            pytest.skip(f"{self.name} returns spans that are not exact prefixes")

    def check_spans(self, desk: Desk, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """Spans are exact, whole pages, in order from the first token, of this very text."""
        end = 0
        for span in spans:
            pages = span.pages[0] if span.pages else ()
            whole = not span.end % PAGE and len(pages) * PAGE == span.end - span.start
            if span.start != end or not whole or not span.exact:
                self.fail(
                    f"{self.name} matched {span}",
                    rule="spans are disjoint, in token order, and of whole pages",
                    do="return one Span from token 0 to the end of the last full page that is equal",
                )
            for k, page in enumerate(pages):
                stands_for, wanted = desk.text.get(page), tuple(ids[: end + (k + 1) * PAGE])
                if stands_for is None:
                    self.fail(
                        f"{self.name} matched page {page}, which it does not hold (any more)",
                        rule="a match names pages whose references the store holds",
                        do="forget a page's key when the page is evicted",
                    )
                if stands_for != wanted:
                    self.fail(
                        f"{self.name} matched page {page} for the text {_short(wanted)}, and its KV was "
                        f"computed behind {_short(stands_for)}",
                        rule="KV of a token depends on all tokens before it: only an equal text is a match",
                        do="let the key of a page contain the key of the page before it",
                    )
            end = span.end
        if end >= len(ids):
            self.fail(
                f"{self.name} matched {end} of {len(ids)} tokens",
                rule="a match never covers the last token: one must be computed",
                do="look up (length - 1) // page_tokens pages at most",
            )

    def check_commit(self, desk: Desk, done: Commit, offered: Sequence[int]) -> None:
        """What was taken was offered, once, and no table is changed."""
        taken = list(done.taken[0])
        wrong = [page for page in taken if page not in offered or page in desk.text or taken.count(page) > 1]
        if len(done.taken) != 1 or wrong or any(done.replaced):
            self.fail(
                f"{self.name}: commit() of pages {list(offered)} took {taken} and replaced "
                f"{[pair for pool in done.replaced for pair in pool]}",
                rule="a store takes references on offered pages that it does not hold yet, and tables only "
                "grow",
                do="list in Commit.taken just the offered pages that are new to the store; replace none",
            )

    def check_evicted(self, desk: Desk, n: int, pages: Sequence[int]) -> None:
        """As many distinct pages as asked for, that the store holds and nobody uses."""
        unknown = [page for page in pages if page not in desk.text]
        busy = sorted(set(pages) & desk.busy)
        if len(set(pages)) != n or len(pages) != n or unknown or busy:
            why = (
                f"{busy} are in use"
                if busy
                else f"{unknown} are not the store's"
                if unknown
                else "not as asked"
            )
            self.fail(
                f"{self.name}: evict(0, {n}) gave up {list(pages)}: {why}",
                rule="evict() drops n distinct pages that only the store holds; pages in use stay",
                do="count the users of each page from acquire(), commit() and fork() to release()",
            )

    def filled(self) -> Desk:
        """A store with three texts that begin alike and one that does not, all released."""
        desk = Desk(self, self.store())
        for k, ids in enumerate((stem(0, 13), stem(3, 17), stem(6, 9), stem(1, 13))):
            desk.serve(f"r{k}", ids)
        for k in range(4):
            desk.release(f"r{k}")
        return desk

    # -------------------------------------------------------------- checks

    def test_has_what_it_declares(self) -> None:
        """Capabilities come with their methods."""
        store = self.make()
        for capability, methods in METHODS.items():
            for method in methods:
                if self.provides(capability) != hasattr(store, method):
                    self.fail(
                        f"{self.name} declares {capability!r}: {self.provides(capability)}; has {method}(): "
                        f"{hasattr(store, method)}",
                        rule="the core calls the methods of a capability where the spec names it",
                        do=f"write {method}() and declare {capability!r}, or neither",
                    )

    def test_finds_what_it_stored(self) -> None:
        """A text that was stored is found by one that continues it."""
        self.exact()
        desk, ids = Desk(self, self.store()), stem(0, 13)
        desk.serve("a", ids)
        if not desk.text:
            pytest.skip(f"{self.name} did not publish a prompt of 13 tokens")
        for longer in (ids, [*ids, 7, 8, 9]):
            found = desk.match(longer)
            if not found or found[-1].end != 12:
                self.fail(
                    f"{self.name} stored {len(desk.text)} pages of 13 tokens, and matched "
                    f"{found[-1].end if found else 0} tokens of {len(longer)} that begin with them",
                    rule="match() finds KV that was committed, up to the last full page",
                    do="look at the key of the last page",
                )

    def test_never_covers_the_last_token(self) -> None:
        """Of a prompt that is stored whole, one token is left to compute."""
        self.exact()
        desk = Desk(self, self.store())
        desk.serve("a", stem(0, 12))
        for length in range(1, 13):
            desk.match(stem(0, length))

    def test_matches_only_equal_texts(self) -> None:
        """One other token anywhere before the end of a page, and the page is no match."""
        self.exact()
        desk, ids = self.filled(), stem(3, 17)
        for at in range(len(ids)):
            desk.match([*ids[:at], 999, *ids[at + 1 :]])
        desk.match([*ids[4:], 1, 2, 3, 4, 5])  # the same pages one place earlier

    def test_keeps_provenance_apart(self) -> None:
        """KV of another model, tenant, codec, key space or eviction is never a match."""
        self.exact()
        ids = stem(0, 13)
        for field, value in (
            ("model", "other"),
            ("namespace", "tenant-b"),
            ("codec", "fp8"),
            ("key_space", "pre_rope"),
            ("eviction", "h2o/128"),
            ("exact", False),
        ):
            desk = Desk(self, self.store())
            desk.serve("a", ids)
            changed: Any = {field: value}
            if desk.match(ids, replace(HOME, **changed)):
                self.fail(
                    f"{self.name} matches KV whose {field} is {getattr(HOME, field)!r} for a request with "
                    f"{value!r}",
                    rule="provenance is part of every key: entries that differ in it never match each other",
                    do="begin the chain of keys with the whole Provenance",
                )

    def test_readonly_changes_nothing(self) -> None:
        """A probe leaves the order of eviction as it is."""
        orders = []
        for probes in (0, 3):
            desk = self.filled()
            for k in range(probes):
                desk.match(stem(3 * (k % 3), 17), readonly=True)
                desk.match(stem(1, 13), readonly=True)
            orders.append([desk.evict(1)[0] for _ in range(desk.store.evictable(0))])
        if orders[0] != orders[1]:
            self.fail(
                f"{self.name} evicts {orders[1]} after lookups with readonly=True, and {orders[0]} without",
                rule="readonly changes nothing, not even recency",
                do="move entries in acquire(), or in match() only where readonly is False",
            )

    def test_gives_up_what_nobody_uses(self) -> None:
        """Any order of lookups, publications, releases and evictions: pages in use stay, all others can "
        "go."""
        self.exact()
        for seed in range(8):
            rng, desk, live = Random(seed), Desk(self, self.store()), list[str]()
            for k in range(60):
                choice = rng.randrange(4)
                if choice < 2:
                    live.append(f"r{k}")
                    desk.serve(live[-1], stem(rng.randrange(6), rng.randint(1, 24)))
                elif choice == 2 and live:
                    desk.release(live.pop(rng.randrange(len(live))))
                elif n := desk.store.evictable(0):
                    desk.evict(rng.randint(1, min(n, 4)))
                self._counts(desk)
            for id in live:
                desk.release(id)
            self._counts(desk)
            desk.evict(desk.store.evictable(0))
            if desk.text:
                self.fail(
                    f"{self.name} still holds pages {sorted(desk.text)} after it gave up all it could",
                    rule="what a store holds and nobody uses counts as free: it can be given up",
                    do="make a page evictable when its last user releases it",
                )

    def _counts(self, desk: Desk) -> None:
        most, told = len(desk.text.keys() - desk.busy), desk.store.evictable(0)
        if told > most or (not desk.busy and told < most):
            self.fail(
                f"{self.name}: evictable(0) is {told}, and {most} of its {len(desk.text)} pages are in "
                "nobody's use",
                rule="evictable() counts the pages that evict() could give back now",
                do="count a page while it has no user: from the last release() to the next acquire() or "
                "fork()",
            )

    def test_fork(self) -> None:
        """Pages that samples share are in use until the last of them ends."""
        self.needs("prefix.fork")
        desk, ids = Desk(self, self.store()), stem(0, 12)
        desk.serve("a", ids)
        table = sorted(desk.text)
        desk.store.fork("a#1", [table], desk.now)
        desk.used["a#1"] = set(table)
        desk.release("a")
        if desk.store.evictable(0):
            self.fail(
                f"{self.name}: evictable(0) is {desk.store.evictable(0)} while a sample still uses the "
                "prompt",
                rule="after fork() the new request uses the stored pages as if it had acquired them",
                do="add a user to each of these pages that is stored",
            )
        desk.release("a#1")
        self._counts(desk)

    def test_requests_read_their_own_kv(self) -> None:
        """In the real engine every token is computed from KV of its own text, and no token changes."""
        self.exact()
        hits = 0
        for world in self.prefix_worlds():
            truths: dict[str, Truth] = {}
            shadow = Shadow(truths)
            served = serve(world, scheduler=Fcfs(), prefix=self.fresh(), executor=shadow, truths=truths)
            self._honest(served, shadow)
            hits += sum(x.cached_tokens > 0 for x in served.of(RequestAdmitted))
            plain = serve(replace(world, reuse=False), scheduler=Fcfs())
            whole = {id for id, ends in served.ends.items() if ends[0].outcome == "completed"}
            for id in whole & plain.tokens.keys():
                done = [x for x in plain.of(RequestFinished) if x.request == id and x.outcome == "completed"]
                if done and served.tokens[id] != plain.tokens[id]:
                    self.fail(
                        f"{self.name}: request {id} has other tokens than without the store, in world "
                        f"{world.name!r}",
                        rule="greedy output is equal with and without an exact store",
                        where=ENGINE,
                        do="look at what was matched for it",
                    )
        if not hits:
            self.fail(
                f"{self.name} reused nothing in {len(self.prefix_worlds())} worlds of prompts that begin "
                "alike",
                rule="the store finds stored KV for a prompt",
                do="publish full pages of prompts in commit(), and find them in match()",
            )

    def test_no_clock_no_chance_no_environment(self) -> None:
        """What is kept and given up follows from the calls and the times they are given."""
        desk = self.filled()

        def calls() -> None:
            desk.serve("r9", stem(6, 17))
            desk.release("r9")
            desk.evict(min(1, desk.store.evictable(0)))

        self.calls_nothing_forbidden(calls)

    def fresh(self) -> Any:
        """A store that the engine attaches."""
        return self.make(limits=toy_limits(), model=TOY_MODEL)

    def prefix_worlds(self) -> list[World]:
        """Prompts that begin alike: with room and without, with samples and clients that give up."""

        def ids(k: int, rng: Random) -> dict[str, Any]:
            return {"n": rng.choice([1, 1, 2]) if self.provides("prefix.fork") else 1}

        out = []
        for seed, pages, gaps in ((0, 200, (2000,)), (1, 24, (0, 1500)), (2, 17, (0, 900)), (3, 30, (0,))):
            items = traffic(seed, 16, prompt=30, gaps=gaps, more=ids)
            out.append(
                World(
                    name=f"prompts that begin alike, {pages} pages",
                    items=tuple(
                        replace(x, spec=replace(x.spec, prompt_ids=stem(k % 5, x.spec.prompt_tokens)))
                        for k, x in enumerate(items)
                        if isinstance(x, Arrival)
                    ),
                    limits=toy_limits(model_len=64),
                    pages=pages,
                    reuse=True,
                    shares=True,
                )
            )
        return out

    def _honest(self, served: Served, shadow: Shadow) -> None:
        world, error = served.world.name, served.error
        if error is not None:
            self.fail(
                f"{self.name}, in world {world!r}: {getattr(error, 'what', error)}; "
                f"{getattr(error, 'why', '')}",
                rule="the engine asks the store at admission, when pages are full, at release and when "
                "pages are needed, and holds it to its answers",
                where=ENGINE,
                do=getattr(error, "do", "") or "mend the plugin; the cause is chained",
                cause=error,
            )
        if shadow.wrong:
            self.fail(
                f"{self.name}: {shadow.wrong[0]}, in world {world!r}",
                rule="using an exact span equals computing it",
                do="match only pages of equal text that are still stored",
            )
        ledger = served.engine.ledger
        if ledger.free() != ledger.total():
            self.fail(
                f"{self.name}: {ledger.free()} of {ledger.total()} pages are free or could be given up at "
                f"the end of world {world!r}",
                rule="pages that only the store holds count as free",
                where=ENGINE,
                do="make a page evictable when its last user releases it",
            )


def _short(ids: Sequence[int]) -> str:
    return f"{list(ids[:6])}..." if len(ids) > 6 else f"{list(ids)}"
