"""Paged KV cache: fixed pages, one block table per sequence.

Paper: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
SOSP 2023, arXiv 2309.06180.

Mechanism: a pool of equal pages, each holding ``page_tokens`` tokens of K and V of all heads of its layers;
a sequence holds the pages of its tokens in order and wastes at most ``page_tokens - 1`` slots. Pages need not
be adjacent, so any free page serves any sequence. The core's ledger counts references; this plugin keeps
the free lists.

Layers with a sliding window have a pool of their own for each size of window, beside that of the layers
which see everything: a sequence gives its old pages there back as the window moves on.

Symbols: N -> pages of a pool, P -> ``page_tokens``, slot(t) = table[t // P - f] * P + t % P, where f is the
first page the sequence still holds: 0 without a window.

Deviations:
1. The released engine keeps page 0 as a null page; here a table simply begins later.
2. The watermark is 0 unless set. It is stated here and heeded by the budget that schedulers plan with, as v1
   does: for requests not running yet, and only while others run.

Faithful when: waste per sequence <= P - 1 tokens; free + held = N; reference counts equal table entries; a
fork of 6 tokens at P = 4 that both write to copies exactly one page and leaves 3 live.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, KVLayout, ModelFacts, Pool, RequestView


class PagedConfig(BaseModel):
    """Settings of ``+kvcache=paged``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page_tokens: int = Field(
        16, ge=1, le=4096, description="tokens per page (P); 16 is the paper's and vLLM's default"
    )
    watermark: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of a pool's pages left free when a request is admitted while others run, for "
        "these to grow into (vLLM v0: 0.01; v1: 0)",
    )


class Paged:
    """Free lists, last in first out, so that recently used pages are used again. O(1) per page."""

    def __init__(self, config: PagedConfig, ctx: Context) -> None:
        self.config = config
        self._free: dict[tuple[int, str], list[int]] = {}

    def layout(self, model: ModelFacts) -> KVLayout:
        windows = model.windows or (None,) * model.layers
        of = {w: tuple(i for i, own in enumerate(windows) if own == w) for w in windows}
        ordered = sorted(of, key=lambda window: window or 0)  # full layers first
        return KVLayout(addressing="block_table", pools=tuple(self._pool(model, w, of[w]) for w in ordered))

    def _pool(self, model: ModelFacts, window: int | None, layers: tuple[int, ...]) -> Pool:
        pages = self.config.page_tokens
        return Pool(
            id="kv" if window is None else f"window_{window}",
            layers=layers,
            page_tokens=pages,
            bytes_per_page=pages * len(layers) * model.kv_bytes_per_token_layer,
            retention="full" if window is None else "window",
            window_tokens=window,
        )

    def watermark(self, pool: Pool, pages: int) -> int:
        return int(self.config.watermark * pages)

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        self._free[pool, tier] = list(range(num_pages - 1, -1, -1))

    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        return -(-tokens // pool.page_tokens)

    def tokens_in(self, pool: Pool, pages: int) -> int:
        return pages * pool.page_tokens

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        free = self._free[pool, tier]
        pages = free[: -n - 1 : -1]
        del free[-n:]
        return pages

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        self._free[pool, tier].extend(reversed(pages))
