"""What must hold of an engine after every event, whatever has happened."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy

from servelab.core.engine.pages import WITHDRAWN
from servelab.core.engine.state import Request
from servelab.core.events import Batch
from servelab.core.facts import Limits
from servelab.core.records import RequestArrived, RequestFinished
from servelab.core.request import Phase as Stage
from servelab.core.testing.fakes import Rig
from servelab.core.testing.faulty import Faulty
from servelab.core.testing.shadow import Launched, Shadow


class Invariants:
    """Checks of the engine of a rig; the machine that plays with it sets the attributes."""

    rig: Rig
    over = False
    """The device is lost, or a plugin has broken the run."""
    limits: Limits
    capacity: tuple[int, ...]
    """Pages that the device has now, per pool."""
    kvcache: Faulty
    store: Faulty | None
    shadow: Shadow
    launched: dict[int, Launched]
    """By launch, what is in flight."""
    seen_output: dict[str, int]
    """By request, output tokens seen so far."""
    read: int
    """Records looked at so far, and by them:"""
    open: set[str]
    """Requests that have arrived and not ended."""

    def check_batch(self, batch: Batch) -> None:
        assert batch.num_tokens() <= self.limits.max_batch_tokens
        assert len(batch.requests) <= self.limits.max_batch_requests
        assert len({r.id for r in batch.requests}) == len(batch.requests)
        for i, lease in enumerate(batch.leases):
            item = batch.extras.get(i)
            assert batch.starts[i] >= 0
            if batch.requests[i].lease is not lease or batch.requests[i].phase is Stage.FINISHED:
                continue  # it ended while a held launch went on: its row is dropped
            pools = self.rig.engine.ledger.pools
            if item is None or item.advance == "append":
                reach = batch.starts[i] + batch.tokens[i] + (item.draft if item else 0)
                for pool, first, table in zip(pools, lease.first, lease.tables, strict=True):
                    assert reach <= (first + len(table)) * pool.page_tokens, "writes beyond its pages"
            for pool, first in zip(pools, lease.first, strict=True):
                seen = max(0, batch.starts[i] + 1 - (pool.window_tokens or 1 << 30))
                assert first * pool.page_tokens <= seen, "reads what was given up"

    def integrity(self) -> None:
        self.rig.engine.check_integrity()

    def pages_are_conserved(self) -> None:
        ledger = self.rig.engine.ledger
        for i in range(len(ledger.pools)):
            tier = ledger.device[i]
            holders: Counter[int] = Counter(tier.external)
            fading: set[int] = set()
            for lease in ledger._leases.values():
                holders.update(lease.tables[i])
                holders.update(page for pool, page in lease.kept if pool == i)
                fading |= {page for pool, page, _ in lease.sources if pool == i}
            for page, refs in enumerate(tier.refs):
                assert refs == holders[page] or (refs == WITHDRAWN and not holders[page]), "miscounted"
            fading -= set(holders)
            gone = tier.refs.count(WITHDRAWN)
            assert tier.free + len(holders) + len(fading) + gone == self.capacity[i]
            assert tier.promised == sum(p[i] for p in ledger._promises.values())

    def plugins_agree(self) -> None:
        """Copies of the plugins would choose exactly the free pages, and evict exactly the unused ones."""
        ledger = self.rig.engine.ledger
        for i, (device, host) in enumerate(zip(ledger.device, ledger.host, strict=True)):
            for name, tier in (("device", device), ("host", host)):
                if not tier.refs:
                    continue
                free = {p for p, refs in enumerate(tier.refs) if refs == 0} - set(tier.reading)
                chosen = deepcopy(self.kvcache.inner).choose(i, name, len(free), None) if free else ()
                assert sorted(chosen) == sorted(free), f"kvcache and ledger disagree about {name} pages"
        if self.store is not None:
            store, tier = self.store.inner, ledger.device[0]
            n = store.evictable(0)
            evicted = deepcopy(store).evict(0, n, self.rig.now_ns) if n else ()
            alone = {p for p in tier.external if tier.refs[p] == tier.external[p]}
            assert sorted(evicted) == sorted(alone), "the store would evict what is used, or keep what is not"

    def fences_hold(self) -> None:
        """Pages that a launch in flight names are neither free nor evictable nor another request's; and no
        page that it writes to is read by another, but for what the other does not read: a sample that forked
        while its first ran ahead copies the page, or has it alone, before it writes.
        """
        ledger, requests = self.rig.engine.ledger, self.rig.engine.requests
        of: dict[int, Request] = {id(r.lease): r for r in requests.values()}
        for launched in self.launched.values():
            of |= {
                id(lease): r for r, lease in zip(launched.batch.requests, launched.batch.leases, strict=True)
            }
        for i, pool in enumerate(ledger.pools):
            tier, size = ledger.device[i], pool.page_tokens
            alone = {p for p in tier.external if tier.refs[p] == tier.external[p]}
            readers: dict[int, set[int]] = {}
            owners: dict[int, set[int]] = {}
            for lease in ledger._leases.values():
                r = of.get(id(lease))
                forked = r.prompt_tokens // size if r is not None and r.spec.sample else -1
                for k, page in enumerate(lease.tables[i], lease.first[i]):
                    owners.setdefault(page, set()).add(id(lease))
                    if k != forked:
                        readers.setdefault(page, set()).add(id(lease))
                for p, page, _ in lease.sources:
                    if p == i:
                        owners.setdefault(page, set()).add(id(lease))
                for p, page in lease.kept:
                    if p == i:
                        owners.setdefault(page, set()).add(id(lease))
            for launched in self.launched.values():
                for row, lease in enumerate(launched.batch.leases):
                    first = launched.first[row][i]
                    writes = launched.batch.starts[row] // size
                    item = launched.batch.extras.get(row)
                    for k, page in enumerate(launched.tables[row][i], first):
                        assert id(lease) in owners.get(page, ()), f"page {page} was given away in flight"
                        assert page not in alone, f"page {page} could be evicted in flight"
                        if k >= writes and (item is None or item.advance == "append"):
                            others = readers.get(page, set()) - {id(lease)}
                            assert not others, f"page {page} is written to while another reads it"

    def fences_count_what_is_in_flight(self) -> None:
        engine = self.rig.engine
        named: Counter[int] = Counter(id(t.lease) for t in engine.transfers.values())
        launches: Counter[str] = Counter()
        lanes: dict[str, set[int]] = {}
        for lane, flights in self.rig.flights.items():
            for batch in flights:
                named.update(map(id, batch.leases))
                for r, lease in zip(batch.requests, batch.leases, strict=True):
                    if r.lease is lease:
                        launches[r.id] += 1
                        lanes.setdefault(r.id, set()).add(lane)
        for lease in engine.ledger._leases.values():
            assert lease.in_flight == named[id(lease)]
            assert lease.in_flight or not lease.released, "a released lease was left behind"
        for r in engine.requests.values():
            assert r.launches == launches[r.id]
            assert len(lanes.get(r.id, ())) <= 1, "in flight on two lanes"

    def tokens_add_up(self) -> None:
        for r in self.rig.engine.requests.values():
            first = 1000 * r.spec.sample
            assert r.output == list(range(first, first + r.generated)), "output lost, repeated or disordered"
            assert len(r.token_times) == r.generated
            assert r.token_times == sorted(r.token_times)
            assert r.generated >= self.seen_output.get(r.id, 0), "output was taken back"
            self.seen_output[r.id] = r.generated
            assert r.generated < r.max_new_tokens
            assert r.generated + r.expected <= r.max_new_tokens
            assert min(r.computed, r.flying, r.expected, r.pending, r.slack) >= 0
            assert r.computed <= r.prompt_tokens + r.generated
            left = r.prompt_tokens + r.generated + r.expected - r.computed - r.flying
            capped = r.generated + r.expected >= r.max_new_tokens
            drafting = left < 0
            assert r.pending == left or (r.pending == 0 and (capped or drafting))
            if r.phase in (Stage.RUNNING, Stage.PAUSED):
                self._room_is_known(r)
            elif r.phase in (Stage.FORKING, Stage.SWAPPED) or (r.phase is Stage.WAITING and not r.computed):
                assert not any(r.lease.tables)

    def _room_is_known(self, r: Request) -> None:
        ledger = self.rig.engine.ledger
        at, tokens_in = r.computed + r.flying, self.kvcache.inner.tokens_in
        ends, tails = [], []
        for i, (pool, first, table) in enumerate(
            zip(ledger.pools, r.lease.first, r.lease.tables, strict=True)
        ):
            ends.append(tokens_in(pool, first + len(table)))
            tails.append(ledger._shared_tail(i, r.lease, at))
            hidden = max(0, r.computed + 1 - (pool.window_tokens or 1 << 30))
            assert first == hidden // pool.page_tokens, "pages nobody sees are kept, or seen ones not"
        # after a fork it is 0 until the request asks again, even if the other has made its copy
        assert r.slack == min(ends) - at or (r.slack == 0 and ledger._shares)
        assert not r.slack or all(tail is None for tail in tails), "it would write to a shared page"

    def kv_is_right(self) -> None:
        for r in self.rig.engine.requests.values():
            if r.phase in (Stage.RUNNING, Stage.PAUSED) or (r.phase is Stage.WAITING and r.computed):
                self.shadow.check(r, "device")
            elif r.phase is Stage.SWAPPED:
                self.shadow.check(r, "host")

    def one_terminal_record_each(self) -> None:
        records = self.rig.records
        for at in range(self.read, len(records)):
            record = records[at]
            assert not at or records[at - 1].t_ns <= record.t_ns, "records out of order"
            if isinstance(record, RequestArrived):
                self.open.add(record.request)
            elif isinstance(record, RequestFinished):
                self.open.remove(record.request)  # KeyError: it has ended before, or never arrived
        self.read = len(records)
        assert self.open == self.rig.engine.requests.keys(), "gone without an end, or not arrived"

    def everything_holds(self) -> None:
        if self.over:
            return
        self.integrity()
        self.pages_are_conserved()
        self.fences_hold()
        self.fences_count_what_is_in_flight()
        self.tokens_add_up()
        self.kv_is_right()
        self.one_terminal_record_each()
