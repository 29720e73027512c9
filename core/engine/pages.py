"""Pages of one pool on one tier: which are free, how often the others are held, which are on their way out.

A page is free, held (one reference per table that lists it and per outside holder) or withdrawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from servelab.core.engine.state import Request
from servelab.core.errors import LedgerError, PluginCallError, ServeLabError
from servelab.core.families.kvcache import KVCache, Scratch

if TYPE_CHECKING:
    from servelab.core.engine.reuse import Reuse

T = TypeVar("T")
WITHDRAWN = -1
"""Reference count of a page that a resize took out of its pool."""


class Chooser:
    """The kvcache plugin of a ledger. What it raises is reported with its name."""

    def __init__(self, kvcache: KVCache, name: str) -> None:
        self.kvcache = kvcache
        self.name = name
        self.broken = False
        """The kvcache or the prefix store raised, perhaps halfway: the run ends, no page is given back."""

    def ask(self, method: Callable[..., T], *args: Any) -> T:
        try:
            return method(*args)
        except Exception as exc:
            raise self.fault(exc, getattr(method, "__name__", str(method))) from exc

    def fault(self, exc: Exception, method: str) -> Exception:
        """What to raise when the plugin raised."""
        self.broken = True
        if isinstance(exc, ServeLabError):
            return exc
        return PluginCallError(
            f"kvcache {self.name!r} raised {type(exc).__name__}: {exc}",
            where=f"{method}()",
            why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
            do="mend the plugin",
        )


class Pages:
    """Reference counts of one pool on one tier.

    Args:
        pool: index of the pool.
        pool_id: its name, for messages.
        reuse: the run's prefix store, on the device tier. Pages that it alone holds count as free; it gives
            them up when needed.
    """

    __slots__ = (
        "_chooser",
        "external",
        "free",
        "pool",
        "pool_id",
        "promised",
        "reading",
        "refs",
        "reuse",
        "tier",
        "total",
        "withdraw",
    )

    def __init__(
        self,
        chooser: Chooser,
        pool: int,
        pool_id: str,
        tier: Literal["device", "host"],
        pages: int,
        reuse: Reuse | None = None,
    ) -> None:
        self._chooser = chooser
        self.pool = pool
        self.pool_id = pool_id
        self.tier = tier
        self.reuse = reuse
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

    def left(self) -> int:
        """Free pages, promises deducted, those that a prefix store would give up included."""
        left = self.free - self.promised
        return left if self.reuse is None else left + self.reuse.evictable(self.pool)

    def idle(self, page: int) -> bool:
        """Whether a prefix store alone holds the page."""
        return self.refs[page] == self.external.get(page, 0)

    # ------------------------------------------------------------ held, given up

    def take(self, n: int, r: Request | None) -> list[int]:
        """Hold ``n`` free pages that the kvcache chooses, for a request or for nobody."""
        if n > self.free and self.reuse is not None:
            self._evict(self.reuse, n - self.free)
        chooser = self._chooser
        try:
            pages = list(chooser.kvcache.choose(self.pool, self.tier, n, r.view if r is not None else None))
        except Exception as exc:
            raise chooser.fault(exc, "choose") from exc
        name, refs, reading = chooser.name, self.refs, self.reading
        if len(pages) != n:
            raise LedgerError(
                f"kvcache {name!r} chose {len(pages)} pages, asked for {n}",
                where=f"{self.tier} pool {self.pool_id!r}",
                why=f"{self.free} pages are free",
                do="choose() must return exactly n free pages",
            )
        for page in pages:
            if not 0 <= page < len(refs) or refs[page] or page in reading:
                state = "outside the pool"
                if 0 <= page < len(refs):
                    state = f"held ({refs[page]} references)" if refs[page] else "still read in flight"
                raise LedgerError(
                    f"kvcache {name!r} chose page {page}, which is not free",
                    where=f"{self.tier} pool {self.pool_id!r}",
                    why=f"the page is {state}",
                    do="keep the free list in step with choose() and released()",
                )
            refs[page] = 1
        self.free -= n
        return pages

    def _evict(self, reuse: Reuse, n: int) -> None:
        """Take pages from the prefix store; a resize that waits for pages does not get these."""
        pages = reuse.evict(self.pool, n)
        for page in pages:
            if page not in self.external or not self.idle(page):
                raise LedgerError(
                    f"prefix store {reuse.name!r} evicted page {page}, which it cannot give up",
                    where=f"{self.tier} pool {self.pool_id!r}",
                    why="a request uses the page, or the store does not hold it",
                    do="evict() must name pages that only the store holds",
                )
            del self.external[page]
            self.refs[page] = 0
        self.free += len(pages)
        self._released(pages)

    def drop(self, pages: Sequence[int]) -> None:
        """Give up one reference to each."""
        refs = self.refs
        freed = []
        for page in pages:
            count = refs[page] - 1
            if not count:
                freed.append(page)
            elif count < 0:
                raise LedgerError(f"page {page} of {self.tier} pool {self.pool_id!r} released twice")
            refs[page] = count
        if self.reading:
            freed = [page for page in freed if page not in self.reading]
        if freed:
            self._freed(freed)

    def unread(self, page: int) -> bool:
        """A launch that read or wrote the page has landed. True if it comes back."""
        self.reading[page] -= 1
        if self.reading[page]:
            return False
        del self.reading[page]
        if self.refs[page]:
            return False
        self._freed([page])
        return True

    def _freed(self, pages: list[int]) -> None:
        """Nobody names these pages any more: withdraw those a resize waits for, give back the rest."""
        if self.withdraw:
            gone = pages[: self.withdraw]
            self.withdraw -= len(gone)
            self.total -= len(gone)
            for page in gone:
                self.refs[page] = WITHDRAWN
            pages = pages[len(gone) :]
        self.free += len(pages)
        if pages:
            self._released(pages)

    def _released(self, pages: Sequence[int]) -> None:
        self._chooser.ask(self._chooser.kvcache.released, self.pool, self.tier, pages)

    def retain(self, page: int) -> None:
        """An outside holder adds a reference to a held page."""
        if self.refs[page] < 1:
            raise LedgerError(f"page {page} of pool {self.pool} is not held, so it cannot be retained")
        self.refs[page] += 1
        self.external[page] += 1

    # ------------------------------------------------------------ size

    def resize(self, delta: int) -> None:
        """Take ``-delta`` pages out (now if free, else once freed), or put back ``delta``.

        A pool never grows beyond its capacity at composition.
        """
        if delta > 0:
            unwanted = min(delta, self.withdraw)
            self.withdraw -= unwanted
            back = [p for p, refs in enumerate(self.refs) if refs == WITHDRAWN][: delta - unwanted]
            for page in back:
                self.refs[page] = 0
            self.free += len(back)
            self.total += len(back)
            if back:
                self._released(back)
            return
        self.withdraw += min(-delta, self.total - self.withdraw)
        self.withdraw_free()

    def withdraw_free(self) -> None:
        """Take out free pages that nobody was promised, as far as a resize asked for it."""
        now = min(self.withdraw, self.left())
        for page in self.take(now, None) if now else ():
            self.refs[page] = WITHDRAWN
        self.withdraw -= now
        self.total -= now

    # ------------------------------------------------------------ inspection

    def check_integrity(self, held: Counter[int], promised: int, reading: Counter[int]) -> None:
        """Recount. Linear in pages.

        Args:
            held: references that leases account for.
            promised: pages that launches were promised.
            reading: pages that copies and leases say are read or written in flight.

        Raises:
            LedgerError: they and the counts here disagree.
        """
        place = f"{self.tier} pool {self.pool_id!r}"
        left = self.left()
        if self.reuse is not None:
            alone = sum(self.idle(page) for page in self.external)
            if alone != self.reuse.evictable(self.pool):
                raise LedgerError(
                    f"prefix store {self.reuse.name!r} counts {self.reuse.evictable(self.pool)} pages it "
                    "could evict",
                    where=place,
                    why=f"it alone holds {alone}",
                )
        if promised != self.promised or not 0 <= self.withdraw <= self.total - left:
            raise LedgerError(
                f"{self.promised} pages promised, {self.withdraw} to withdraw in {place}",
                why=f"launches were promised {promised}, {self.total - self.free} are held",
            )
        if reading != self.reading:
            raise LedgerError(
                f"{place} has {dict(self.reading)} pages read or written in flight",
                why=f"copies and leases account for {dict(reading)}",
            )
        for page, refs in enumerate(self.refs):
            expected = held[page] + self.external.get(page, 0)
            if refs != expected and not (refs == WITHDRAWN and not expected):
                raise LedgerError(
                    f"{self.tier} page {page} of pool {self.pool_id!r} has {refs} references",
                    why=f"tables and holders account for {expected}",
                )
        if self.total != len(self.refs) - self.refs.count(WITHDRAWN):
            raise LedgerError(f"{place} counts {self.total} pages in all")
        free = self.refs.count(0) - sum(not self.refs[page] for page in self.reading)
        if self.free != free:
            raise LedgerError(
                f"{place} counts {self.free} free pages",
                why=f"{free} have no reference and are not read or written in flight",
            )
        if self.promised < 0 or left < 0:
            raise LedgerError(f"{self.promised} pages promised, {left + self.promised} free", where=place)


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
