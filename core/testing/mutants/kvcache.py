"""Broken kvcaches, each one change away from fixed pages out of a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from servelab.core.facts import ModelFacts
from servelab.core.layout import KVLayout, Pool
from servelab.core.request import RequestView
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import ToyKV, toy_layout
from servelab.core.testing.mutants import Mutant


class Pages(ToyKV):
    """The honest one: one pool per window, pages of 4 tokens, the lowest free ones first."""

    spec = PluginSpec(
        name="pages",
        factory="servelab.core.testing.mutants.kvcache:Pages",
        provides=frozenset({"kvcache.block_table", "kvcache.fork", "kvcache.swap"}),
    )

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__()

    def layout(self, model: ModelFacts) -> KVLayout:
        windows = sorted(set(model.windows or (None,)), key=lambda w: w or 0)
        layout = toy_layout(*(4,) * len(windows), windows=windows)
        of = model.windows or (None,) * model.layers
        pools = tuple(
            replace(pool, layers=tuple(i for i, w in enumerate(of) if w == pool.window_tokens))
            for pool in layout.pools
        )
        return replace(layout, pools=pools)


class LeaksAPage(Pages):
    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        super().released(pool, tier, pages[:-1] if len(pages) > 3 else pages)


class FreesTwice(Pages):
    """A list instead of a set, to which a page is added once too often."""

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__()
        self.lists: dict[tuple[int, str], list[int]] = {}

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        self.lists[pool, tier] = list(range(num_pages))

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        free = self.lists[pool, tier]
        pages, self.lists[pool, tier] = free[:n], free[n:]
        return pages

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        self.lists[pool, tier] += [*pages, *(pages[:1] if len(pages) > 2 else ())]


class GivesTooFew(Pages):
    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        return super().choose(pool, tier, min(n, 3), request)


class MixesTiers(Pages):
    """One list for all tiers of a pool."""

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        self.free.setdefault((pool, "any"), set()).update(range(num_pages))

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        return super().choose(pool, "any", n, request)

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        super().released(pool, "any", pages)


class ForgetsThePageBoundary(Pages):
    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        return max(1, tokens // pool.page_tokens) if tokens else 0


class HalfPages(Pages):
    def tokens_in(self, pool: Pool, pages: int) -> int:
        return pages / 2 * pool.page_tokens * 2  # type: ignore[return-value]


class IgnoresTheWindow(Pages):
    """All layers in the pool of the shortest window."""

    def layout(self, model: ModelFacts) -> KVLayout:
        layout = super().layout(model)
        return replace(layout, pools=(replace(layout.pools[-1], layers=tuple(range(model.layers))),))


class LosesWhatIsForked(Pages):
    """Counts its own users, and forgets that a page has several."""

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        if tier == "host":
            return
        super().released(pool, tier, pages)


class WatermarkOfEverything(Pages):
    def watermark(self, pool: Pool, pages: int) -> int:
        return max(1, pages // 50)


class ReservesLess(Pages):
    """Says that a request needs a page less once it runs."""

    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        pages = super().pages_for(pool, request, tokens)
        return pages - 1 if request is not None and pages > 2 else pages


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(suite="kvcache", plugin=plugin, original=Pages, check=check, message=message, breaks=breaks)


MUTANTS = (
    _mutant(LeaksAPage, "test_chooses_free_pages", "distinct pages", "loses the last page of a long release"),
    _mutant(FreesTwice, "test_chooses_free_pages", "are not free", "frees a page twice"),
    _mutant(
        GivesTooFew, "test_chooses_free_pages", "that is 3 distinct pages", "gives fewer pages than asked for"
    ),
    _mutant(
        MixesTiers,
        "test_pools_and_tiers_are_apart",
        "choose(0, 'host', 24) returned",
        "has one free list for device and host",
    ),
    _mutant(
        ForgetsThePageBoundary,
        "test_pages_hold_their_tokens",
        "5 tokens are said to need 1 pages",
        "forgets the page that has begun",
    ),
    _mutant(HalfPages, "test_pages_hold_their_tokens", "tokens_in('kv0', 0) is 0.0", "counts in fractions"),
    _mutant(
        IgnoresTheWindow,
        "test_windows",
        "keeps 8 tokens of layer 0, which sees all",
        "puts layers that see everything into a pool with a window",
    ),
    _mutant(
        LosesWhatIsForked,
        "test_any_plans_keep_the_books",
        "in world 'little memory'",
        "does not take back pages of the host tier",
    ),
    _mutant(
        WatermarkOfEverything,
        "test_watermark",
        "watermark() of a pool of 1 pages is 1",
        "wants a whole pool left free",
    ),
    _mutant(
        ReservesLess,
        "test_serves_the_worlds",
        "cannot get 1 pages",
        "reserves a page less for a request that is known",
    ),
)
