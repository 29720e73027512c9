"""The KV ledger: who holds which page, how often, and whether something in flight still names it.

The core owns identity, reference counts and fences; the kvcache plugin chooses pages. Every page of a
pool is free, held (one reference per table that lists it and per outside holder) or withdrawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from servelab.core.engine.state import Lease, Request
from servelab.core.errors import LedgerError, PluginCallError, ServeLabError
from servelab.core.families.kvcache import KVCache, Scratch
from servelab.core.layout import Capacity, KVLayout

if TYPE_CHECKING:
    from servelab.core.engine.reuse import Reuse

T = TypeVar("T")
WITHDRAWN = -1
"""Reference count of a page that a resize took out of its pool."""


@dataclass(slots=True)
class Transfer:
    """Pages on their way between tiers. Both sides are fenced until it ends."""

    id: int
    request_id: str
    direction: Literal["out", "in"]
    lease: Lease
    source: list[list[int]]
    """Pages read, per pool."""
    destination: list[list[int]]
    """Pages written, per pool, same lengths."""
    bytes: int
    calls: int
    """Separate copies this takes if adjacent pages move together."""


class _Tier:
    """Reference counts of one pool on one tier."""

    __slots__ = ("external", "free", "promised", "reading", "refs", "total", "withdraw")

    def __init__(self, pages: int) -> None:
        self.refs = [0] * pages
        self.free = pages
        self.total = pages
        """Pages not withdrawn."""
        self.promised = 0
        """Free pages set aside for the later steps of a held launch."""
        self.withdraw = 0
        """Pages to take out as soon as they are free."""
        self.external: Counter[int] = Counter()
        """References held outside leases (prefix stores)."""
        self.reading: Counter[int] = Counter()
        """Pages that launches in flight still read or write: not free even when nobody refers to them."""


class Ledger:
    """Accounts for every page of every pool.

    Raises:
        LedgerError: from any call that would lose, double-book or over-release a page, and when the
            kvcache plugin chooses pages that are not free.
    """

    def __init__(self, kvcache: KVCache, name: str, layout: KVLayout, capacity: Capacity) -> None:
        self.kvcache = kvcache
        self.name = name
        self.layout = layout
        self.pools = layout.pools
        self._device = [_Tier(n) for n in capacity.device_pages]
        host = capacity.host_pages or (0,) * len(self.pools)
        self._host = [_Tier(n) for n in host]
        self.windows = [(i, p.page_tokens, w) for i, p in enumerate(self.pools) if (w := p.window_tokens)]
        """Pools that let go of old tokens: index, tokens per page, tokens seen."""
        watermark = getattr(kvcache, "watermark", lambda pool, pages: 0)
        self.watermark: tuple[int, ...] = tuple(
            self._ask(watermark, pool, pages)
            for pool, pages in zip(self.pools, capacity.device_pages, strict=True)
        )
        """Device pages per pool that admissions leave free."""
        self._scratch = getattr(kvcache, "scratch", None)
        self.reuse: Reuse | None = None
        """The run's prefix store. Pages that it alone holds count as free; it gives them up when needed."""
        self.any_order = False
        """There are several lanes: launches in flight may run in another order than they were sent in."""
        self.broken = False
        """The kvcache or the prefix store raised, perhaps halfway: the run ends, no page is given back."""
        self._leases: dict[int, Lease] = {}
        self._transfers = 0
        self._promises: dict[int, list[int]] = {}
        self._shares = False
        """True once any page was shared: until then nothing need be copied on write."""
        self._copies: list[tuple[Lease, int, int, int]] = []
        for i in range(len(self.pools)):
            self._ask(kvcache.attach, i, "device", capacity.device_pages[i])
            if host[i]:
                self._ask(kvcache.attach, i, "host", host[i])

    # ------------------------------------------------------------ questions

    @property
    def has_host_tier(self) -> bool:
        return any(t.refs for t in self._host)

    def free(self, tier: str = "device") -> tuple[int, ...]:
        """Free pages per pool, promises deducted, those that a prefix store would give up included."""
        if self.reuse is not None and tier == "device":
            return tuple(map(self._left, range(len(self.pools))))
        return tuple(t.free - t.promised for t in (self._device if tier == "device" else self._host))

    def _left(self, i: int) -> int:
        tier = self._device[i]
        left = tier.free - tier.promised
        return left if self.reuse is None else left + self.reuse.evictable(i)

    def total(self, tier: str = "device") -> tuple[int, ...]:
        """Pages per pool that are not withdrawn."""
        return tuple(t.total for t in (self._device if tier == "device" else self._host))

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
                    need += sum(self._idle(i, page) for page in table)
                out.append(need)
        except Exception as exc:
            raise self._fault(exc, "pages_for") from exc
        return out

    def _idle(self, i: int, page: int) -> bool:
        """Whether a prefix store alone holds the page."""
        tier = self._device[i]
        return tier.refs[page] == tier.external.get(page, 0)

    def releasable(self, leases: Sequence[Lease], hits: Sequence[Lease] = ()) -> list[int]:
        """Device pages, per pool, that releasing these leases together gives up at once.

        Those that a resize waits for (``withdrawing``) do not become free. ``hits``: leases that are about to
        hold what they show.
        """
        idle = [lease for lease in leases if not lease.in_flight and lease.hit is None]
        out = []
        for i, tier in enumerate(self._device):
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
                reading = (
                    tier.reading
                )  # another sample's launch copies from it: not free before that has landed
                out.append(sum(refs[p] == count and p not in reading for p, count in held.items()))
        return out

    def scratches(self) -> list[Scratch] | None:
        """Where the free pages of each pool are, to try a plan on; None: any free pages will do."""
        if self._scratch is None:
            return None
        return [self._ask(self._scratch, i) for i in range(len(self.pools))]

    def unusable(self, r: Request) -> tuple[int, ...]:
        """Free pages, per pool, that are of no use to the request or any like it; empty: all are."""
        if self._scratch is None:
            return ()
        needs = enumerate(self.missing(r, 1))
        unusable: Callable[[int, int], int] = self.kvcache.unusable  # type: ignore[attr-defined]
        return tuple(self._ask(unusable, i, n) if n else 0 for i, n in needs)

    def withdrawing(self) -> list[int]:
        """Device pages, per pool, that leave the pool as soon as they are given up."""
        return [tier.withdraw for tier in self._device]

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
        tier = self._device[i]
        if offset and index < len(table):
            page = table[index]
            # a launch on another lane may copy it before or after this one writes to it
            if tier.refs[page] > 1 or (self.any_order and page in tier.reading):
                return index
        return None

    def _slack(self, r: Request) -> int:
        scheduled = r.computed + r.flying
        lease, tokens_in = r.lease, self.kvcache.tokens_in
        capacity = None
        for i, pool in enumerate(self.pools):
            if self._shares and self._shared_tail(i, lease, scheduled) is not None:
                return 0  # the next write must come through reserve() to copy the page first
            try:
                tokens = tokens_in(pool, lease.first[i] + len(lease.tables[i]))
            except Exception as exc:
                raise self._fault(exc, "tokens_in") from exc
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
        for i, need in enumerate(needs):
            tier = self._device[i]
            if need > tier.free - tier.promised and need > (left := self._left(i)):
                raise LedgerError(
                    f"request {r.id} cannot get {need} pages",
                    where=f"pool {self.pools[i].id!r}, kvcache {self.name!r}",
                    why=f"{left} pages are free",
                    do="preempt first, or plan fewer tokens",
                )
        lease = r.lease
        scheduled = r.computed + r.flying
        for i, need in enumerate(needs):
            if not need:
                continue
            table = lease.tables[i]
            pages = self._take(i, "device", need, r)
            if self._shares and (tail := self._shared_tail(i, lease, scheduled)) is not None:
                old = table[tail]
                table[tail] = pages.pop()
                self._copies.append((lease, i, old, table[tail]))
                self._device[i].reading[old] += 1
                if old in self._device[i].external:
                    lease.kept.append((i, old))
                else:
                    self._drop_refs(i, "device", [old])
            table.extend(pages)
        r.slack = self._slack(r)

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
            for tier, n in zip(self._device, best, strict=True):
                tier.promised += n
        return fits

    def settle(self, launch: int) -> None:
        """End the promise of a launch, if it has one; its requests reserve what they really used."""
        promised = self._promises.pop(launch, None)
        if promised is not None:
            for tier, n in zip(self._device, promised, strict=True):
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
            pages = self._ask(self.kvcache.pages_for, pool, child.view, tokens) - first
            shared = parent.lease.tables[i][:pages]
            refs = self._device[i].refs
            for page in shared:
                refs[page] += 1
            child.lease.tables[i] = shared
        parent.slack = self._slack(parent)
        child.slack = self._slack(child)

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
                keep = self._ask(self.kvcache.pages_for, pool, r.view, tokens) - r.lease.first[i]
            extra = table[keep:]
            del table[keep:]
            if extra:
                self._give_up(r.lease, i, extra)
        r.slack = self._slack(r)

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
        if external := self._device[i].external:
            lease.kept += [(i, page) for page in pages if page in external]
            pages = [page for page in pages if page not in external]
        if lease.in_flight:
            self._device[i].reading.update(pages)
            lease.sources += [(i, page, lease.in_flight) for page in pages]
        self._drop_refs(i, "device", pages)

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
        if self.broken:
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
        for i, tier in enumerate(self._device):
            if tier.withdraw:  # what its launch was promised and did not use
                self._withdraw_free(i)
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
            tier = self._device[pool]
            tier.reading[page] -= 1
            if not tier.reading[page]:
                del tier.reading[page]
                if not tier.refs[page]:
                    self._free(pool, "device", [page])
                    came_back = True
        lease.sources = later
        return came_back

    def _reap(self, lease: Lease) -> None:
        if self._copies:  # copies it will never make
            lease.sources += [(i, source, 0) for owner, i, source, _ in self._copies if owner is lease]
            self._copies = [copy for copy in self._copies if copy[0] is not lease]
        self._drop_sources(lease)
        for i in range(len(self.pools)):
            if lease.tables[i]:
                self._drop_refs(i, "device", lease.tables[i])
            if lease.host_tables[i]:
                self._drop_refs(i, "host", lease.host_tables[i])
        lease.tables = [[] for _ in self.pools]
        lease.host_tables = [[] for _ in self.pools]
        del self._leases[id(lease)]
        if lease.holder is not None:
            self._let_go(lease)

    def _let_go(self, lease: Lease) -> None:
        """The lease uses no page of the prefix store any more, and nothing in flight does for it."""
        for i, page in lease.kept:
            self._drop_refs(i, "device", [page])
        lease.kept = []
        if self.reuse is not None:
            self.reuse.released(lease)
        for i, tier in enumerate(self._device):
            if tier.withdraw:
                self._withdraw_free(i)

    def share(self, lease: Lease) -> None:
        """A plan admits a request: it holds the pages of the prefix store that its tables show."""
        self._shares = True
        for i, table in enumerate(lease.tables):
            for page in table:
                if not self._device[i].external[page]:
                    raise LedgerError(f"page {page} of pool {i} is not the store's, so it cannot be shared")
                self._device[i].refs[page] += 1
        lease.hit = None

    def leading_own(self, lease: Lease, start: int, end: int) -> int:
        """End of the pages from ``start`` on, ``end`` at most, that a prefix store may have: no other sample
        of the prompt holds one of them unstored, or copies from it.

        One that ran ahead of a fork may have filled the page that the others are still to copy.
        """
        for k in range(start, end) if self._shares else ():
            for i, table in enumerate(lease.tables):
                page, tier = table[k], self._device[i]
                if page in tier.reading or (tier.refs[page] > 1 and page not in tier.external):
                    return k
        return end

    def retain(self, pool: int, page: int) -> None:
        """An outside holder (a prefix store) adds a reference to a held page.

        The page must be full: its holders never write to it again.
        """
        tier = self._device[pool]
        if tier.refs[page] < 1:
            raise LedgerError(f"page {page} of pool {pool} is not held, so it cannot be retained")
        self._shares = True
        tier.refs[page] += 1
        tier.external[page] += 1

    def drop(self, pool: int, page: int) -> None:
        """The outside holder lets go."""
        tier = self._device[pool]
        if not tier.external[page]:
            raise LedgerError(f"page {page} of pool {pool} was not retained")
        tier.external[page] -= 1
        if not tier.external[page]:
            del tier.external[page]
        self._drop_refs(pool, "device", [page])

    def resize(self, pool: int, delta: int) -> None:
        """Take ``-delta`` device pages out of a pool (now if free, else once freed), or put back ``delta``.

        A pool never grows beyond its capacity at composition.
        """
        tier = self._device[pool]
        if delta > 0:
            unwanted = min(delta, tier.withdraw)
            tier.withdraw -= unwanted
            back = [p for p, refs in enumerate(tier.refs) if refs == WITHDRAWN][: delta - unwanted]
            for page in back:
                tier.refs[page] = 0
            tier.free += len(back)
            tier.total += len(back)
            if back:
                self._ask(self.kvcache.released, pool, "device", back)
            return
        tier.withdraw += min(-delta, tier.total - tier.withdraw)
        self._withdraw_free(pool)

    def _withdraw_free(self, pool: int) -> None:
        """Take out free pages that nobody was promised, as far as a resize asked for it."""
        tier = self._device[pool]
        now = min(tier.withdraw, self._left(pool))
        for page in self._take(pool, "device", now, None) if now else ():
            tier.refs[page] = WITHDRAWN
        tier.withdraw -= now
        tier.total -= now

    # ------------------------------------------------------------ transfers

    def swap_out(self, r: Request) -> Transfer:
        """Start moving a request's pages to the host tier; raises if the host lacks room."""
        lease = r.lease
        self._need_host([len(t) for t in lease.tables], r.id)
        source = [list(t) for t in lease.tables]
        for i, table in enumerate(source):
            lease.host_tables[i] = self._take(i, "host", len(table), r) if table else []
        return self._transfer(r, "out", source, [list(t) for t in lease.host_tables])

    def swap_in(self, r: Request) -> Transfer:
        """Start moving a swapped request's pages back to the device."""
        lease = r.lease
        for i, table in enumerate(lease.host_tables):
            left = self._left(i)
            if len(table) > left:
                raise LedgerError(
                    f"request {r.id} cannot be swapped in",
                    where=f"pool {self.pools[i].id!r}",
                    why=f"it needs {len(table)} pages, {left} are free",
                )
        for i, table in enumerate(lease.host_tables):
            lease.tables[i] = self._take(i, "device", len(table), r) if table else []
        return self._transfer(r, "in", [list(t) for t in lease.host_tables], [list(t) for t in lease.tables])

    def finish_transfer(self, transfer: Transfer, r: Request | None) -> None:
        """The bytes are in place: the side they came from is released. ``r`` is None if its request ended."""
        lease = transfer.lease
        tier = "device" if transfer.direction == "out" else "host"
        tables = lease.tables if tier == "device" else lease.host_tables
        for i, pages in enumerate(transfer.source):
            if pages:
                self._drop_refs(i, tier, pages)
            tables[i] = []
        if tier == "device" and lease.holder is not None:
            self._let_go(lease)
        self.landed([lease])
        if r is not None:
            r.slack = self._slack(r) if transfer.direction == "in" else 0

    def _transfer(
        self, r: Request, direction: Literal["out", "in"], source: list[list[int]], to: list[list[int]]
    ) -> Transfer:
        r.lease.in_flight += 1
        self._transfers += 1
        size = sum(len(t) * p.bytes_per_page for t, p in zip(source, self.pools, strict=True))
        calls = sum(_runs(a, b) for a, b in zip(source, to, strict=True))
        return Transfer(self._transfers, r.id, direction, r.lease, source, to, size, calls)

    def _need_host(self, needs: Sequence[int], request_id: str) -> None:
        for i, need in enumerate(needs):
            if need > self._host[i].free:
                raise LedgerError(
                    f"request {request_id} cannot be swapped out",
                    where=f"host tier of pool {self.pools[i].id!r}",
                    why=f"it needs {need} pages, {self._host[i].free} are free",
                    do="preempt by recompute, or give the executor more host pages",
                )

    # -------------------------------------------------------------- private

    def _take(self, i: int, tier_name: str, n: int, r: Request | None) -> list[int]:
        tier = (self._device if tier_name == "device" else self._host)[i]
        if n > tier.free and self.reuse is not None and tier_name == "device":
            self._evict(i, n - tier.free)
        try:
            pages = list(self.kvcache.choose(i, tier_name, n, r.view if r is not None else None))
        except Exception as exc:
            raise self._fault(exc, "choose") from exc
        refs = tier.refs
        if len(pages) != n:
            raise LedgerError(
                f"kvcache {self.name!r} chose {len(pages)} pages, asked for {n}",
                where=f"{tier_name} pool {self.pools[i].id!r}",
                why=f"{tier.free} pages are free",
                do="choose() must return exactly n free pages",
            )
        for page in pages:
            if not 0 <= page < len(refs) or refs[page] != 0 or page in tier.reading:
                state = "outside the pool"
                if 0 <= page < len(refs):
                    state = f"held ({refs[page]} references)" if refs[page] else "still read in flight"
                raise LedgerError(
                    f"kvcache {self.name!r} chose page {page}, which is not free",
                    where=f"{tier_name} pool {self.pools[i].id!r}",
                    why=f"the page is {state}",
                    do="keep the free list in step with choose() and released()",
                )
            refs[page] = 1
        tier.free -= n
        return pages

    def _evict(self, i: int, n: int) -> None:
        """Take pages from the prefix store; a resize that waits for pages does not get these."""
        assert self.reuse is not None
        tier, pages = self._device[i], self.reuse.evict(i, n)
        for page in pages:
            if page not in tier.external or not self._idle(i, page):
                raise LedgerError(
                    f"prefix store {self.reuse.name!r} evicted page {page}, which it cannot give up",
                    where=f"device pool {self.pools[i].id!r}",
                    why="a request uses the page, or the store does not hold it",
                    do="evict() must name pages that only the store holds",
                )
            del tier.external[page]
            tier.refs[page] = 0
        tier.free += len(pages)
        self._ask(self.kvcache.released, i, "device", pages)

    def _drop_refs(self, i: int, tier_name: str, pages: Sequence[int]) -> None:
        tier = (self._device if tier_name == "device" else self._host)[i]
        refs = tier.refs
        freed = []
        for page in pages:
            count = refs[page]
            if count == 1:
                freed.append(page)
            elif count < 1:
                raise LedgerError(f"page {page} of {tier_name} pool {self.pools[i].id!r} released twice")
            refs[page] = count - 1
        if tier.reading:
            freed = [page for page in freed if page not in tier.reading]
        if freed:
            self._free(i, tier_name, freed)

    def _free(self, i: int, tier_name: str, pages: list[int]) -> None:
        """Nobody names these pages any more: withdraw those a resize waits for, give back the rest."""
        tier = (self._device if tier_name == "device" else self._host)[i]
        if tier.withdraw and tier_name == "device":
            gone = pages[: tier.withdraw]
            tier.withdraw -= len(gone)
            tier.total -= len(gone)
            for page in gone:
                tier.refs[page] = WITHDRAWN
            pages = pages[len(gone) :]
        tier.free += len(pages)
        if pages:
            self._ask(self.kvcache.released, i, tier_name, pages)

    def _ask(self, method: Callable[..., T], *args: Any) -> T:
        """Call the kvcache; what it raises is reported with its name."""
        try:
            return method(*args)
        except Exception as exc:
            raise self._fault(exc, getattr(method, "__name__", str(method))) from exc

    def _fault(self, exc: Exception, method: str) -> Exception:
        """What to raise when the kvcache plugin raised."""
        self.broken = True
        if isinstance(exc, ServeLabError):
            return exc
        return PluginCallError(
            f"kvcache {self.name!r} raised {type(exc).__name__}: {exc}",
            where=f"{method}()",
            why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
            do="mend the plugin",
        )

    def check_integrity(self) -> None:
        """Recount everything. Linear in pages; run by tests and by ``checks=full`` when a run ends.

        Raises:
            LedgerError: counts and tables disagree.
        """
        for lease in self._leases.values():
            if lease.in_flight < 0 or (lease.released and not lease.in_flight):
                raise LedgerError(
                    f"lease of {lease.owner} is {'released' if lease.released else 'held'}",
                    why=f"{lease.in_flight} launches and transfers name it",
                )
        for name, tiers in (("device", self._device), ("host", self._host)):
            for i, tier in enumerate(tiers):
                held: Counter[int] = Counter(tier.external)
                if name == "device":
                    self._check_claims(i, tier)
                for lease in self._leases.values():
                    table = (lease.tables if name == "device" else lease.host_tables)[i]
                    if len(set(table)) != len(table):
                        raise LedgerError(f"lease of {lease.owner} lists a {name} page twice", why=f"{table}")
                    held.update(table)
                    if name == "device":
                        held.update(page for pool, page in lease.kept if pool == i)
                for page, refs in enumerate(tier.refs):
                    if refs != held[page] and not (refs == WITHDRAWN and not held[page]):
                        raise LedgerError(
                            f"{name} page {page} of pool {self.pools[i].id!r} has {refs} references",
                            why=f"tables and holders account for {held[page]}",
                        )
                if tier.total != len(tier.refs) - tier.refs.count(WITHDRAWN):
                    raise LedgerError(f"{name} pool {self.pools[i].id!r} counts {tier.total} pages in all")
                free = tier.refs.count(0) - sum(not tier.refs[page] for page in tier.reading)
                if tier.free != free:
                    raise LedgerError(
                        f"{name} pool {self.pools[i].id!r} counts {tier.free} free pages",
                        why=f"{free} have no reference and are not read or written in flight",
                    )
                left = self._left(i) if name == "device" else tier.free
                if tier.promised < 0 or left < 0:
                    raise LedgerError(
                        f"{tier.promised} pages promised, {left + tier.promised} free",
                        where=f"{name} {self.pools[i].id!r}",
                    )

    def _check_claims(self, i: int, tier: _Tier) -> None:
        """Promises, withdrawals and pages being read agree with who made them."""
        promised = sum(promise[i] for promise in self._promises.values())
        if self.reuse is not None:
            alone = sum(self._idle(i, page) for page in tier.external)
            if alone != self.reuse.evictable(i):
                raise LedgerError(
                    f"prefix store {self.reuse.name!r} counts {self.reuse.evictable(i)} pages it could evict",
                    where=f"pool {self.pools[i].id!r}",
                    why=f"it alone holds {alone}",
                )
        if promised != tier.promised or not 0 <= tier.withdraw <= tier.total - self._left(i):
            raise LedgerError(
                f"{tier.promised} pages promised, {tier.withdraw} to withdraw in pool {self.pools[i].id!r}",
                why=f"launches were promised {promised}, {tier.total - tier.free} are held",
            )
        reading = Counter(source for _, pool, source, _ in self._copies if pool == i)
        reading.update(page for x in self._leases.values() for pool, page, _ in x.sources if pool == i)
        if reading != tier.reading:
            raise LedgerError(
                f"pool {self.pools[i].id!r} has {dict(tier.reading)} pages read or written in flight",
                why=f"copies and leases account for {dict(reading)}",
            )


def place(scratches: Sequence[Scratch], needs: Sequence[int], tables: Sequence[Sequence[int]]) -> bool:
    """Take pages for one request out of every scratch; False (and nothing) if one has no place for them.

    What it holds (``tables``) cannot grow: another place would not be beside it.
    """
    placed: list[Sequence[int]] = []
    for scratch, n, table in zip(scratches, needs, tables, strict=True):
        pages = (scratch.take(n) if not table else None) if n else ()
        if pages is None:
            for other, taken in zip(scratches, placed, strict=False):
                other.give_back(taken)
            return False
        placed.append(pages)
    return True


def _runs(source: Sequence[int], destination: Sequence[int]) -> int:
    """Copies needed when pages adjacent on both sides move together."""
    pairs = list(zip(source, destination, strict=True))
    return sum(
        k == 0 or a != pairs[k - 1][0] + 1 or b != pairs[k - 1][1] + 1 for k, (a, b) in enumerate(pairs)
    )
