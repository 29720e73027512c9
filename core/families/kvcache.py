"""KV cache: which pages a request gets and how they are addressed.

Intent: page size, addressing, choice of pages, sharing and tiers. The core's ledger owns identity,
reference counts and fences and checks every choice; the plugin never sees bytes.

Capabilities: ``kvcache.block_table``, ``kvcache.contiguous_slot``, ``kvcache.segments``,
``kvcache.remote_spans`` (addressing, read by attention backends); ``kvcache.fork`` (copy-on-write),
``kvcache.swap`` (host tier), ``kvcache.pin``, ``kvcache.per_head_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.facts import ModelFacts
    from servelab.core.layout import KVLayout, Pool
    from servelab.core.request import RequestView


class KVCache(Protocol):
    """Chooses pages for the ledger. Pages are small integers from 0, per pool and tier."""

    def layout(self, model: ModelFacts) -> KVLayout:
        """Propose pools, page sizes and addressing for a model; frozen at composition."""
        ...

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        """A pool (by layout index) has pages ``0..num_pages-1`` on this tier, all free. Called once each."""
        ...

    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        """Pages that must be held so that ``tokens`` tokens of the request are stored.

        ``request`` is None in questions about any request. Non-decreasing in ``tokens``. In a pool with a
        window too all tokens count, from the first: the ledger takes off the pages it has given back, so
        page k must hold tokens ``k * page_tokens`` to ``(k + 1) * page_tokens - 1``.
        """
        ...

    def tokens_in(self, pool: Pool, pages: int) -> int:
        """Tokens that ``pages`` pages hold; the inverse of ``pages_for``."""
        ...

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        """``n`` distinct free pages. The ledger asks only when at least ``n`` are free, and takes them all.

        Raises nothing: a choice of pages that are not free is a ``LedgerError`` naming the plugin.
        """
        ...

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        """These pages are free again, in the order they were held."""
        ...


class Scratch(Protocol):
    """A copy of a pool's free pages, to try out where things would go. Changing it changes nothing else."""

    def take(self, n: int) -> Sequence[int] | None:
        """What ``choose`` would give for one request, taken out; None: it could not."""
        ...

    def give_back(self, pages: Sequence[int]) -> None:
        """As ``released``."""
        ...


class PlacingKVCache(KVCache, Protocol):
    """A kvcache for which not every ``n`` free pages will do, such as one of contiguous ranges.

    What a request holds there does not grow: no budget gives it more.
    """

    def scratch(self, pool: int) -> Scratch:
        """Free device pages as they are now."""
        ...

    def unusable(self, pool: int, n: int) -> int:
        """Free device pages that are of no use to requests of ``n`` pages: external fragmentation."""
        ...


class CautiousKVCache(KVCache, Protocol):
    """A kvcache that wants pages left free for requests that already run."""

    def watermark(self, pool: Pool, pages: int) -> int:
        """Device pages of a pool of ``pages`` that an admission leaves free. Asked once."""
        ...
