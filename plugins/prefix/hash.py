"""Prefix store by hashes of pages: vLLM's automatic prefix caching.

Source: vLLM v1 (vllm-project/vllm, ``vllm/v1/core/`` block_pool, kv_cache_manager, kv_cache_utils); no paper.

Mechanism: the key of full page i is h_i = H(h_{i-1}, tokens of page i); the chain begins with the provenance
of the KV: model, codec, key space, tenant, salt. A lookup walks a request's keys to the first that is unknown
and ends before the last token, so that one is always computed. Pages of equal content are not merged: tables
only grow, and a lookup takes the first. A page that no request uses stays, keyed, in a queue by time of
release; a sequence is released from its last page to its first, so its tail goes before its head. Its key is
forgotten only when the page is evicted.

Symbols: P -> page_tokens, H -> BLAKE2b of 128 bits, free queue -> ``_free``, ref_cnt -> ``_users``.

Deviations:
1. Pages are published when their launch has landed; vLLM does so when it is planned. So requests admitted in
   one step do not share with each other.
2. Pages without a key return to the kvcache and are taken before any cached page; vLLM has one queue.
3. H is BLAKE2b; vLLM's default is SHA-256 of pickled tuples, with a random seed per process.
4. No events for routers, no reset. Prompt log-probs, which vLLM computes uncached, do not exist here.

Faithful when: greedy output is equal with and without it; at P = 4 a repeated prompt of 12 tokens hits 8 and
one of 13 hits 12; another first token or salt hits 0; evicting k pages takes the k last pages of the sequence
released first; pages in use are never evicted; drafts never get a key.

Tier: stable.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import CapabilityError, Context, KVLayout
from servelab.core.families.prefix import Commit, Content, Provenance, Span

DIGEST = 16
"""Bytes of a key: two pages among 2^40 share one by chance with probability 2^-49."""


class HashConfig(BaseModel):
    """Settings of ``+prefix=hash``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share_tenants: bool = Field(
        False,
        description="tenants share pages; else none learns from latencies how another's prompts begin",
    )


class HashStore:
    """O(pages of the request) to match, commit and release; O(1) per page evicted."""

    def __init__(self, config: HashConfig, ctx: Context) -> None:
        self.share_tenants = config.share_tenants
        self._page_tokens = 0
        self._keys: dict[int, bytes] = {}
        """Of every stored page."""
        self._pages: dict[bytes, dict[int, None]] = {}
        """Pages of each key, the first stored first."""
        self._users: dict[int, int] = {}
        """How many requests use each stored page."""
        self._held: dict[str, list[int]] = {}
        """Stored pages that each request uses, in token order."""
        self._free: OrderedDict[int, None] = OrderedDict()
        """Stored pages that nobody uses, the next to be evicted first."""

    def attach(self, layout: KVLayout) -> None:
        if len(layout.pools) != 1:
            raise CapabilityError(
                "prefix 'hash' keeps pages of one KV pool",
                where="the KV layout",
                why=f"it has {len(layout.pools)}: {', '.join(pool.id for pool in layout.pools)}",
                do="run this model without a prefix store (prefix=null)",
            )
        self._page_tokens = layout.pools[0].page_tokens

    def match(
        self, content: Content, provenance: Provenance, now_ns: int, *, readonly: bool = False
    ) -> Sequence[Span]:
        pages: list[int] = []
        for key in self._chain(content, provenance, (content.length - 1) // self._page_tokens):
            found = self._pages.get(key)
            if found is None:
                break
            pages.append(next(iter(found)))
        if not pages:
            return ()
        end = len(pages) * self._page_tokens
        return (Span(handle=pages[-1], start=0, end=end, source_start=0, pages=(tuple(pages),)),)

    def acquire(self, request_id: str, spans: Sequence[Span], now_ns: int) -> None:
        held = self._held.setdefault(request_id, [])
        for span in spans:
            for page in span.pages[0]:
                self._free.pop(page, None)
                self._users[page] += 1
                held.append(page)

    def fork(self, request_id: str, pages: Sequence[Sequence[int]], now_ns: int) -> None:
        (table,) = pages
        held = self._held.setdefault(request_id, [])
        for page in table:
            if page in self._keys:
                self._users[page] += 1
                held.append(page)

    def commit(
        self,
        request_id: str,
        content: Content,
        pages: Sequence[Sequence[int]],
        provenance: Provenance,
        now_ns: int,
    ) -> Commit:
        (table,) = pages
        keys = self._chain(content, provenance, content.length // self._page_tokens)
        new = [(page, key) for page, key in zip(table, keys, strict=False) if page not in self._keys]
        held = self._held.setdefault(request_id, [])
        for page, key in new:
            self._keys[page] = key
            self._pages.setdefault(key, {})[page] = None
            self._users[page] = 1
            held.append(page)
        return Commit(taken=(tuple(page for page, _ in new),))

    def release(self, request_id: str, now_ns: int) -> None:
        for page in reversed(self._held.pop(request_id, ())):
            self._users[page] -= 1
            if not self._users[page]:
                self._free[page] = None

    def evictable(self, pool: int) -> int:
        return len(self._free)

    def evict(self, pool: int, n: int, now_ns: int) -> Sequence[int]:
        pages = [self._free.popitem(last=False)[0] for _ in range(n)]
        for page in pages:
            key = self._keys.pop(page)
            del self._users[page], self._pages[key][page]
            if not self._pages[key]:
                del self._pages[key]
        return pages

    def _chain(self, content: Content, provenance: Provenance, pages: int) -> Sequence[bytes]:
        """Keys of the first pages. Those of earlier calls for the same request are kept in its memo."""
        if content.ids is None:
            return ()
        size = self._page_tokens
        keys: list[bytes] = content.memo.setdefault("hash", [])
        parent = keys[-1] if keys else _digest(b"", repr(provenance).encode())
        for start in range(len(keys) * size, pages * size, size):
            parent = _digest(parent, array("q", content.ids[start : start + size]).tobytes())
            keys.append(parent)
        return keys[:pages]


def _digest(parent: bytes, page: bytes) -> bytes:
    return blake2b(parent + page, digest_size=DIGEST).digest()
