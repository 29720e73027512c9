"""The KV ledger: who holds which page, how often, and whether something in flight still names it.

The core owns identity, reference counts and fences; the kvcache plugin chooses pages. ``pages`` counts the
pages of one pool and tier; the ledger keeps the tables of all requests in step with it; ``swap`` moves them
between tiers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from servelab.core.engine.pages import Chooser, Pages
from servelab.core.engine.state import Lease, Request
from servelab.core.errors import LedgerError
from servelab.core.families.kvcache import KVCache, Scratch
from servelab.core.layout import Capacity, KVLayout

if TYPE_CHECKING:
    from servelab.core.engine.reuse import Reuse


class Ledger:
    """Accounts for every page of every pool.

    Args:
        reuse: the run's prefix store. Pages that it alone holds count as free.
        any_order: there are several lanes: launches in flight may run in another order than they were sent.

    Raises:
        LedgerError: from any call that would lose, double-book or over-release a page, and when the
            kvcache plugin chooses pages that are not free.
    """

    def __init__(
        self,
        kvcache: KVCache,
        name: str,
        layout: KVLayout,
        capacity: Capacity,
        *,
        reuse: Reuse | None = None,
        any_order: bool = False,
    ) -> None:
        self.kvcache = kvcache
        self.chooser = Chooser(kvcache, name)
        self.layout = layout
        self.pools = layout.pools
        self.reuse = reuse
        host = capacity.host_pages or (0,) * len(self.pools)
        numbered = [(i, pool.id) for i, pool in enumerate(self.pools)]
        self.device = [
            Pages(self.chooser, i, id, "device", n, reuse)
            for (i, id), n in zip(numbered, capacity.device_pages, strict=True)
        ]
        self.host = [Pages(self.chooser, i, id, "host", n) for (i, id), n in zip(numbered, host, strict=True)]
        self.windows = [(i, p.page_tokens, w) for i, p in enumerate(self.pools) if (w := p.window_tokens)]
        """Pools that let go of old tokens: index, tokens per page, tokens seen."""
        watermark = getattr(kvcache, "watermark", lambda pool, pages: 0)
        self.watermark: tuple[int, ...] = tuple(
            self.chooser.ask(watermark, pool, pages)
            for pool, pages in zip(self.pools, capacity.device_pages, strict=True)
        )
        """Device pages per pool that admissions leave free."""
        self.kept_free = self.watermark if any(self.watermark) else None
        """Likewise; None: none of any."""
        self._scratch = getattr(kvcache, "scratch", None)
        self._any_order = any_order
        self.transfers = 0
        """Transfers between tiers so far."""
        self._leases: dict[int, Lease] = {}
        self._promises: dict[int, list[int]] = {}
        self._shares = False
        """True once any page was shared: until then nothing need be copied on write."""
        self._copies: list[tuple[Lease, int, int, int]] = []
        for i in range(len(self.pools)):
            self.chooser.ask(kvcache.attach, i, "device", capacity.device_pages[i])
            if host[i]:
                self.chooser.ask(kvcache.attach, i, "host", host[i])

    # ------------------------------------------------------------ questions

    @property
    def has_host_tier(self) -> bool:
        return any(t.refs for t in self.host)

    def free(self, tier: str = "device") -> tuple[int, ...]:
        """Free pages per pool, promises deducted, those that a prefix store would give up included."""
        if self.reuse is not None and tier == "device":
            return tuple(pages.left() for pages in self.device)
        return tuple([t.free - t.promised for t in (self.device if tier == "device" else self.host)])

    def total(self, tier: str = "device") -> tuple[int, ...]:
        """Pages per pool that are not withdrawn."""
        return tuple(t.total for t in (self.device if tier == "device" else self.host))

    def missing(self, r: Request, n: int) -> list[int]:
        """Further device pages, per pool, for ``n`` more tokens of the request; copies on write included."""
        if n <= r.slack:
            return [0] * len(self.pools)
        scheduled = r.computed + r.flying
        lease, pages_for, view = r.lease, self.kvcache.pages_for, r.view
        tables = lease.tables
        out = []
        try:
            if len(tables) == 1 and tables[0] and not self._shares:  # the common case, in a hurry
                need = pages_for(self.pools[0], view, scheduled + n) - lease.first[0] - len(tables[0])
                return [need if need > 0 else 0]
            for i, pool in enumerate(self.pools):
                table = lease.tables[i]
                need = pages_for(pool, view, scheduled + n) - lease.first[i] - len(table)
                if need < 0:
                    need = 0
                if self._shares and self._shared_tail(i, lease, scheduled) is not None:
                    need += 1
                if not table:  # swapped out: all its pages come back
                    need = max(need, len(lease.host_tables[i]))
                if lease.hit is not None:  # once it holds these, they are free no longer
                    need += sum(self.device[i].idle(page) for page in table)
                out.append(need)
        except Exception as exc:
            raise self.chooser.fault(exc, "pages_for") from exc
        return out

    def releasable(self, leases: Sequence[Lease], hits: Sequence[Lease] = ()) -> list[int]:
        """Device pages, per pool, that releasing these leases together gives up at once.

        Those that a resize waits for (``withdrawing``) do not become free. ``hits``: leases that are about to
        hold what they show.
        """
        idle = [lease for lease in leases if not lease.in_flight and lease.hit is None]
        out = []
        for i, tier in enumerate(self.device):
            refs = tier.refs
            if tier.external:
                held = Counter(p for lease in idle for p in lease.tables[i])
                held.update(p for lease in idle for pool, p in lease.kept if pool == i)
                wanted = {p for lease in hits for p in lease.tables[i]}
                external = tier.external
                given = (p for p, n in held.items() if refs[p] - external.get(p, 0) == n)
                out.append(sum(p not in wanted and (p not in tier.reading or p in external) for p in given))
            elif len(idle) == 1 and not tier.reading:
                out.append(sum(refs[p] == 1 for p in idle[0].tables[i]))
            else:
                held = Counter(p for lease in idle for p in lease.tables[i])
                reading = tier.reading  # another sample's launch copies from it: free once that has landed
                out.append(sum(refs[p] == count and p not in reading for p, count in held.items()))
        return out

    def scratches(self) -> list[Scratch] | None:
        """Where the free pages of each pool are, to try a plan on; None: any free pages will do."""
        if self._scratch is None:
            return None
        return [self.chooser.ask(self._scratch, i) for i in range(len(self.pools))]

    def unusable(self, r: Request) -> tuple[int, ...]:
        """Free pages, per pool, that are of no use to the request or any like it; empty: all are."""
        if self._scratch is None:
            return ()
        needs = enumerate(self.missing(r, 1))
        unusable: Callable[[int, int], int] = self.kvcache.unusable  # type: ignore[attr-defined]
        return tuple(self.chooser.ask(unusable, i, n) if n else 0 for i, n in needs)

    def withdrawing(self) -> list[int]:
        """Device pages, per pool, that leave the pool as soon as they are given up."""
        return [tier.withdraw for tier in self.device]

    def sees_all(self, lease: Lease, tokens: int) -> bool:
        """Whether everything that the token after so many sees is still stored."""
        return all(lease.first[i] * page <= max(0, tokens + 1 - window) for i, page, window in self.windows)

    def _shared_tail(self, i: int, lease: Lease, tokens: int) -> int | None:
        """Index in the table of the partly filled page that the next token is written to, if shared with
        another request or with a copy that another's launch is to make.
        """
        table = lease.tables[i]
        index, offset = divmod(tokens, self.pools[i].page_tokens)
        index -= lease.first[i]
        tier = self.device[i]
        if offset and index < len(table):
            page = table[index]
            # a launch on another lane may copy it before or after this one writes to it
            if tier.refs[page] > 1 or (self._any_order and page in tier.reading):
                return index
        return None

    def slack_of(self, r: Request) -> int:
        """Further tokens that its pages have room for without a call of ``reserve``."""
        scheduled = r.computed + r.flying
        lease, tokens_in = r.lease, self.kvcache.tokens_in
        capacity = None
        for i, pool in enumerate(self.pools):
            if self._shares and self._shared_tail(i, lease, scheduled) is not None:
                return 0  # the next write must come through reserve() to copy the page first
            try:
                tokens = tokens_in(pool, lease.first[i] + len(lease.tables[i]))
            except Exception as exc:
                raise self.chooser.fault(exc, "tokens_in") from exc
            if capacity is None or tokens < capacity:
                capacity = tokens
        return (capacity or 0) - scheduled

    # -------------------------------------------------------------- actions

    def open(self, owner: str) -> Lease:
        """A lease on nothing yet."""
        lease = Lease(owner, len(self.pools))
        self._leases[id(lease)] = lease
        return lease

    def reserve(self, r: Request, n: int) -> None:
        """Make room for ``n`` more tokens in every pool, all or nothing; updates ``r.slack``."""
        if n <= r.slack:
            return
        needs = self.missing(r, n)
        for need, tier in zip(needs, self.device, strict=True):
            if need > tier.free - tier.promised and need > (left := tier.left()):
                raise LedgerError(
                    f"request {r.id} cannot get {need} pages",
                    where=f"pool {tier.pool_id!r}, kvcache {self.chooser.name!r}",
                    why=f"{left} pages are free",
                    do="preempt first, or plan fewer tokens",
                )
        lease = r.lease
        scheduled = r.computed + r.flying
        for i, need in enumerate(needs):
            if not need:
                continue
            table, tier = lease.tables[i], self.device[i]
            pages = tier.take(need, r)
            if self._shares and (tail := self._shared_tail(i, lease, scheduled)) is not None:
                old = table[tail]
                table[tail] = pages.pop()
                self._copies.append((lease, i, old, table[tail]))
                tier.reading[old] += 1
                if old in tier.external:
                    lease.kept.append((i, old))
                else:
                    tier.drop([old])
            table.extend(pages)
        r.slack = self.slack_of(r)

    def promise(self, launch: int, requests: Sequence[Request], tokens: int) -> int:
        """Set pages aside so that each request can grow by up to ``tokens`` more; returns how many fit.

        Used for the later steps of a held launch: the pages are not taken until the steps have run.
        """
        free = self.free()

        def needs(n: int) -> list[int] | None:
            total = [0] * len(free)
            for r in requests:
                if n > r.slack:
                    for i, need in enumerate(self.missing(r, n)):
                        total[i] += need
                        if total[i] > free[i]:
                            return None
            return total

        fits, best = 0, [0] * len(free)
        low, high = 1, tokens
        probe = tokens  # most often everything fits
        while low <= high:
            total = needs(probe)
            if total is None:
                high = probe - 1
            else:
                fits, best, low = probe, total, probe + 1
            probe = (low + high) // 2
        if any(best):
            self._promises[launch] = best
            for tier, n in zip(self.device, best, strict=True):
                tier.promised += n
        return fits

    def settle(self, launch: int) -> None:
        """End the promise of a launch, if it has one; its requests reserve what they really used."""
        promised = self._promises.pop(launch, None)
        if promised is not None:
            for tier, n in zip(self.device, promised, strict=True):
                tier.promised -= n

    def fork(self, parent: Request, child: Request) -> None:
        """The child shares the pages of its ``computed`` tokens, which the parent has too.

        Who first writes to a shared page copies it. Pages the parent holds beyond these tokens stay its own.
        """
        if child.lease.tables != [[] for _ in self.pools]:
            raise LedgerError(f"fork target {child.id} already holds pages", do="fork into a new request")
        self._shares = True
        tokens = child.computed
        for i, pool in enumerate(self.pools):
            first = child.lease.first[i] = parent.lease.first[i]
            pages = self.chooser.ask(self.kvcache.pages_for, pool, child.view, tokens) - first
            shared = parent.lease.tables[i][:pages]
            refs = self.device[i].refs
            for page in shared:
                refs[page] += 1
            child.lease.tables[i] = shared
        parent.slack = self.slack_of(parent)
        child.slack = self.slack_of(child)

    def trim(self, r: Request, tokens: int) -> None:
        """Keep pages for the first ``tokens`` tokens only (rejected drafts, unused reservations)."""
        if tokens < r.computed + r.flying:
            raise LedgerError(
                f"request {r.id} cannot be trimmed to {tokens} tokens",
                why=f"{r.computed + r.flying} are computed or in flight",
            )
        for i, pool in enumerate(self.pools):
            table = r.lease.tables[i]
            keep = 0
            if tokens:
                keep = self.chooser.ask(self.kvcache.pages_for, pool, r.view, tokens) - r.lease.first[i]
            extra = table[keep:]
            del table[keep:]
            if extra:
                self._give_up(r.lease, i, extra)
        r.slack = self.slack_of(r)

    def steps_to_slide(self, requests: Sequence[Request]) -> int:
        """Decode steps until a page of these requests falls out of a window; there must be pools with one."""
        return min(
            (r.lease.first[i] + 1) * page + window - 1 - r.computed
            for r in requests
            for i, page, window in self.windows
        )

    def slide(self, r: Request) -> bool:
        """Give up pages of window pools that no token still to come sees; True if there were any.

        The next one stands at ``computed``, whatever is in flight: launches that are were planned with these
        pages, which are free once the last of them has landed.
        """
        lease, any_gone = r.lease, False
        for i, page, window in self.windows:
            gone = (r.computed + 1 - window) // page - lease.first[i]
            if gone > 0:
                table = lease.tables[i]
                pages = table[:gone]
                del table[:gone]
                lease.first[i] += gone
                self._give_up(lease, i, pages)
                any_gone = True
        return any_gone

    def _give_up(self, lease: Lease, i: int, pages: list[int]) -> None:
        """Drop pages that are no longer in the lease's table, after the launches in flight that know them.

        Those that a prefix store holds too stay until the lease ends: it counts them as used till then.
        """
        tier = self.device[i]
        if external := tier.external:
            lease.kept += [(i, page) for page in pages if page in external]
            pages = [page for page in pages if page not in external]
        if lease.in_flight:
            tier.reading.update(pages)
            lease.sources += [(i, page, lease.in_flight) for page in pages]
        tier.drop(pages)

    def adopted(self, r: Request) -> None:
        """The request took over a lease with tokens in it; pages beyond those it reuses are given up.

        They may be shared (a prefix store), and their content is not the request's.
        """
        r.slack = 0
        r.lease.published = 0  # the pages it will fill from here on are offered again
        if any(r.lease.tables) and not any(r.lease.host_tables):
            self.trim(r, r.computed)

    def release(self, lease: Lease) -> None:
        """The owner is done. Pages return now, or when the last launch or transfer naming them ends."""
        if self.chooser.broken:
            return
        if lease.released:
            raise LedgerError(f"lease of {lease.owner} released twice")
        lease.released = True
        if not lease.in_flight:
            self._reap(lease)

    def take_copies(self) -> tuple[tuple[int, int, int], ...]:
        """(pool, source, destination) page copies due before the next launch; forgets them.

        Their sources are not free before the launch that makes the copies has landed.
        """
        if not self._copies:
            return ()
        copies, self._copies = self._copies, []
        for lease, pool, source, _ in copies:
            lease.sources.append((pool, source, lease.in_flight))
        return tuple(copy[1:] for copy in copies)

    def landed(self, leases: Iterable[Lease]) -> bool:
        """A launch or transfer that named (and so fenced) these leases has ended. True if pages came back."""
        came_back = self.unfence(leases)
        for tier in self.device:
            if tier.withdraw:  # what its launch was promised and did not use
                tier.withdraw_free()
        return came_back

    def unfence(self, leases: Iterable[Lease]) -> bool:
        """One launch or transfer fewer names these leases. True if pages came back."""
        came_back = False
        for lease in leases:
            lease.in_flight -= 1
            if lease.sources:
                came_back |= self._drop_sources(lease)
            if lease.released and not lease.in_flight:
                self._reap(lease)
                came_back = True
        return came_back

    def _drop_sources(self, lease: Lease) -> bool:
        """A launch has landed: free what no other in flight reads or writes. True if there was any."""
        later, came_back = [], False
        for pool, page, landings in lease.sources:
            if landings > 1 and lease.in_flight:
                later.append((pool, page, landings - 1))
                continue
            came_back |= self.device[pool].unread(page)
        lease.sources = later
        return came_back

    def _reap(self, lease: Lease) -> None:
        if self._copies:  # copies it will never make
            lease.sources += [(i, source, 0) for owner, i, source, _ in self._copies if owner is lease]
            self._copies = [copy for copy in self._copies if copy[0] is not lease]
        self._drop_sources(lease)
        for i in range(len(self.pools)):
            if lease.tables[i]:
                self.device[i].drop(lease.tables[i])
            if lease.host_tables[i]:
                self.host[i].drop(lease.host_tables[i])
        lease.tables = [[] for _ in self.pools]
        lease.host_tables = [[] for _ in self.pools]
        del self._leases[id(lease)]
        if lease.holder is not None:
            self.leave_store(lease)

    def leave_store(self, lease: Lease) -> None:
        """The lease uses no page of the prefix store any more, and nothing in flight does for it."""
        for i, page in lease.kept:
            self.device[i].drop([page])
        lease.kept = []
        if self.reuse is not None:
            self.reuse.released(lease)
        for tier in self.device:
            if tier.withdraw:
                tier.withdraw_free()

    def share(self, lease: Lease) -> None:
        """A plan admits a request: it holds the pages of the prefix store that its tables show."""
        self._shares = True
        for i, table in enumerate(lease.tables):
            for page in table:
                if not self.device[i].external[page]:
                    raise LedgerError(f"page {page} of pool {i} is not the store's, so it cannot be shared")
                self.device[i].refs[page] += 1
        lease.hit = None

    def leading_own(self, lease: Lease, start: int, end: int) -> int:
        """End of the pages from ``start`` on, ``end`` at most, that a prefix store may have: no other sample
        of the prompt holds one of them unstored, or copies from it.

        One that ran ahead of a fork may have filled the page that the others are still to copy.
        """
        for k in range(start, end) if self._shares else ():
            for i, table in enumerate(lease.tables):
                page, tier = table[k], self.device[i]
                if page in tier.reading or (tier.refs[page] > 1 and page not in tier.external):
                    return k
        return end

    def retain(self, pool: int, page: int) -> None:
        """An outside holder (a prefix store) adds a reference to a held page.

        The page must be full: its holders never write to it again.
        """
        self.device[pool].retain(page)
        self._shares = True

    # ----------------------------------------------------------- inspection

    def check_integrity(self) -> None:
        """Recount everything. Linear in pages; run by tests and by ``checks=full`` when a run ends.

        Raises:
            LedgerError: counts and tables disagree.
        """
        leases = self._leases.values()
        for lease in leases:
            if lease.in_flight < 0 or (lease.released and not lease.in_flight):
                raise LedgerError(
                    f"lease of {lease.owner} is {'released' if lease.released else 'held'}",
                    why=f"{lease.in_flight} launches and transfers name it",
                )
        for i, (device, host) in enumerate(zip(self.device, self.host, strict=True)):
            held = _held("device", [(x.owner, x.tables[i]) for x in leases])
            held.update(page for x in leases for pool, page in x.kept if pool == i)
            reading = Counter(source for _, pool, source, _ in self._copies if pool == i)
            reading.update(page for x in leases for pool, page, _ in x.sources if pool == i)
            device.check_integrity(held, sum(promise[i] for promise in self._promises.values()), reading)
            host.check_integrity(_held("host", [(x.owner, x.host_tables[i]) for x in leases]), 0, Counter())


def _held(tier: str, tables: Iterable[tuple[str, list[int]]]) -> Counter[int]:
    """References that tables account for."""
    held: Counter[int] = Counter()
    for owner, table in tables:
        if len(set(table)) != len(table):
            raise LedgerError(f"lease of {owner} lists a {tier} page twice", why=f"{table}")
        held.update(table)
    return held
