"""Reuse: the engine's side of a prefix store. Asks it at the right moments, and holds it to its contract.

A waiting request shows its hit only while a plan is made: it is looked up when the scheduler comes to the
request, held when the plan admits it, and forgotten otherwise. So nothing that waits ever locks memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from servelab.core.engine.state import Lease, Request
from servelab.core.errors import PluginCallError, PluginError, ServeLabError
from servelab.core.families.prefix import Content, PrefixStore, Provenance, Span
from servelab.core.plan import Background, Tokens
from servelab.core.records import PagesEvicted
from servelab.core.request import RequestSpec

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine


class Reuse:
    """One prefix store and the requests it serves. Pages are counted by the ledger."""

    def __init__(self, engine: Engine, store: PrefixStore, name: str) -> None:
        self._engine = engine
        self._store = store
        self.name = name
        self._share_tenants = bool(getattr(store, "share_tenants", False))
        pool = engine.layout.pools[0]
        self._page_tokens = pool.page_tokens
        self._codec, self._key_space = pool.codec, pool.key_space
        self._probed: dict[str, Request] = {}
        """Requests looked up for the plan in progress."""
        self._stays = 0

    def evictable(self, pool: int) -> int:
        """Pages of a pool that the store would give up now."""
        pages: int = self._call(self._store.evictable, pool)
        return pages

    # ----------------------------------------------------------- admission

    @contextmanager
    def planning(self) -> Iterator[list[Tokens | Background]]:
        """While a plan is made: what is put into the list is admitted, all else goes back to nothing."""
        taken: list[Tokens | Background] = []
        try:
            yield taken
            for item in taken:
                if type(item) is Tokens and item.request._r.lease.hit is not None:
                    self._hold(item.request._r)
        finally:
            for r in self._probed.values():
                if r.lease.hit is not None:
                    r.lease.hit = None
                    r.lease.tables = [[] for _ in r.lease.tables]
                    r.forget_progress(r.lease)
            self._probed.clear()

    def probe(self, r: Request) -> None:
        """Show what the store has for a waiting request; once per plan."""
        if r.id in self._probed or r.computed or r.spec.prompt_ids is None:
            return  # one that adopted a context has KV of its own
        self._probed[r.id] = r
        length = r.prompt_tokens + r.generated
        content, provenance = self._content(r, length), self._provenance(r)
        spans = self._call(self._store.match, content, provenance, self._engine.now_ns, readonly=True)
        if not spans:
            return
        tokens = self._checked(spans, length, r)
        r.lease.tables = [
            [page for span in spans for page in span.pages[i]] for i in range(len(r.lease.tables))
        ]
        r.lease.hit = spans
        r.computed = r.cached = tokens
        r.pending = length - tokens

    def known_tokens(self, spec: RequestSpec) -> int:
        """Leading tokens of a prompt that the store has; changes nothing."""
        if spec.prompt_ids is None:
            return 0
        r = Request(spec, 0, 1, Lease(spec.id, len(self._engine.layout.pools)))
        content, provenance = self._content(r, spec.prompt_tokens), self._provenance(r)
        spans = self._call(self._store.match, content, provenance, self._engine.now_ns, readonly=True)
        return self._checked(spans, spec.prompt_tokens, r) if spans else 0

    def _hold(self, r: Request) -> None:
        lease = r.lease
        spans = lease.hit
        assert spans is not None
        self._engine.ledger.share(lease)
        lease.published = r.computed // self._page_tokens
        self._call(self._store.acquire, self._holder(lease), spans, self._engine.now_ns)

    def _checked(self, spans: Sequence[Span], length: int, r: Request) -> int:
        """Tokens that the spans cover, from the first one on and all in place."""
        end = 0
        for span in spans:
            pages = -(-(span.end - span.start) // self._page_tokens)
            whole = not span.end % self._page_tokens
            placed = len(span.pages) == len(r.lease.tables) and all(len(p) == pages for p in span.pages)
            if span.start != end or not span.exact or span.layers_ready is not None or not (whole and placed):
                raise self._broken(f"matched {span}", r, "exact spans of full pages, one behind the other")
            end = span.end
        if end >= length:
            raise self._broken(f"matched {end} of {length} tokens", r, "at least one token left to compute")
        return end

    # -------------------------------------------------------- what is computed

    def publish(self, r: Request) -> bool:
        """A launch has landed: offer the pages it filled; True if any was taken.

        Drafts count only once they are accepted.
        """
        known = min(r.computed, r.prompt_tokens + r.generated)  # drafts accepted beyond its cap are no output
        lease, full = r.lease, known // self._page_tokens
        if full <= lease.published or r.spec.prompt_ids is None:
            return False
        full = self._engine.ledger.leading_own(lease, lease.published, full)
        if full == lease.published:
            return False
        lease.published = full
        done = self._call(
            self._store.commit,
            self._holder(lease),
            self._content(r, full * self._page_tokens),
            [table[:full] for table in lease.tables],
            self._provenance(r),
            self._engine.now_ns,
        )
        if any(done.replaced):
            raise self._broken(f"replaced pages {done.replaced}", r, "tables that only grow")
        for pool, pages in enumerate(done.taken):
            for page in pages:
                self._engine.ledger.retain(pool, page)
        return any(done.taken)

    def forked(self, parent: Request, child: Request) -> None:
        """The child shares pages of the parent; those that the store has too are used by both now."""
        lease = child.lease
        lease.published = parent.lease.published
        if parent.lease.holder is not None:
            fork = self._store.fork  # type: ignore[attr-defined]
            self._call(fork, self._holder(lease), lease.tables, self._engine.now_ns)

    def steps_to_publish(self, requests: Sequence[Request], steps: int) -> int:
        """Decode steps until these requests offer a full page that they have not offered, at most ``steps``.

        After a swap, pages that have long been full are offered again.
        """
        size = self._page_tokens
        known = (r for r in requests if r.spec.prompt_ids is not None)
        until = min(((r.lease.published + 1) * size - r.computed for r in known), default=steps)
        return max(1, min(until, steps))

    def released(self, lease: Lease) -> None:
        """Nothing names the pages of this lease any more (called by the ledger)."""
        self._call(self._store.release, self._holder(lease), self._engine.now_ns)
        lease.holder = None
        lease.published = 0

    def evict(self, pool: int, n: int) -> Sequence[int]:
        """Pages that the store gives up, because others need them (called by the ledger)."""
        pages = list(self._call(self._store.evict, pool, n, self._engine.now_ns))
        if len(pages) != n or len(set(pages)) != n:
            raise self._broken(f"evicted {pages}", None, f"{n} pages")
        self._engine.emit(
            PagesEvicted(t_ns=self._engine.now_ns, engine=self._engine.index, pool=pool, pages=n)
        )
        return pages

    # --------------------------------------------------------------- private

    def _holder(self, lease: Lease) -> str:
        if lease.holder is None:
            self._stays += 1
            lease.holder = f"{lease.owner}#{self._stays}"
        return lease.holder

    def _content(self, r: Request, length: int) -> Content:
        if r.memo is None:
            r.memo = {}
        ids = r.spec.prompt_ids
        assert ids is not None
        known = ids[:length] if length <= len(ids) else [*ids, *r.output[: length - len(ids)]]
        return Content(length=length, ids=known, memo=r.memo)

    def _provenance(self, r: Request) -> Provenance:
        salt = r.spec.features.get("cache_salt", "")
        tenant = "" if self._share_tenants else r.spec.tenant
        return Provenance(
            model=self._engine.model.name,
            namespace=f"{tenant}\n{salt}" if salt else tenant,
            codec=self._codec,
            key_space=self._key_space,
        )

    def _call(self, method: Callable[..., Any], *args: Any, **more: Any) -> Any:
        try:
            return method(*args, **more)
        except ServeLabError:
            raise
        except Exception as exc:
            self._engine.ledger.chooser.broken = True
            raise PluginCallError(
                f"prefix store {self.name!r} raised {type(exc).__name__}: {exc}",
                where=f"{method.__name__}(), t={self._engine.now_ns} ns",
                why="the exception is chained below (SERVELAB_TRACEBACK=1 shows it)",
                do="mend the plugin",
            ) from exc

    def _broken(self, what: str, r: Request | None, wanted: str) -> PluginError:
        return PluginError(
            f"prefix store {self.name!r} {what}",
            where=f"request {r.id}" if r is not None else f"t={self._engine.now_ns} ns",
            why=f"the engine needs {wanted}",
            do="mend the plugin",
        )
