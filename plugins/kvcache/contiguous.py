"""Contiguous KV cache: one range of memory per request, reserved when it is admitted. The baseline of paging.

Source: the servers that paging was compared with, as Kwon et al. describe them (SOSP 2023, arXiv 2309.06180,
sections 3 and 6.1): FasterTransformer, and Orca (Yu et al., OSDI 2022), which has no public code.

Mechanism: attention reads a request's keys and values from one block, so room for all the tokens it may
ever have is reserved at admission; it waits while no free run is long enough. Nothing is allocated after
that, and decoding never fails. How much is reserved:

- ``contiguous`` (Orca Max): ``engine.max_model_len`` tokens, whatever the request;
- ``contiguous_pow2`` (Orca Pow2): its prompt and its true output rounded up to a power of two;
- ``contiguous_oracle`` (Orca Oracle): its prompt and its true output length.

The last two read true lengths, as in the paper, and stamp the run. Where ranges go: the first free run
that is long enough, the shortest such run, or a buddy allocator (power-of-two sizes, each aligned to its
own).

Symbols: R -> tokens reserved, ``page_tokens`` -> what R is rounded up to.

Deviations:
1. Ranges are counted in pages of ``page_tokens`` tokens; with 1 nothing is rounded.
2. No reservation exceeds ``engine.max_model_len``.

Faithful when: requests running <= floor(pool tokens / R); no pages are taken after admission; with equal
reservations memory outside ranges is what is left of the pool by division; tokens equal those under
``paged``.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import (
    CapabilityError,
    ConfigError,
    Context,
    KVLayout,
    LedgerError,
    ModelFacts,
    Pool,
    RequestView,
    WorkloadError,
)
from servelab.plugins.kvcache._runs import Placement, Runs


class ContiguousConfig(BaseModel):
    """Settings of ``+kvcache=contiguous`` and its kin."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    page_tokens: int = Field(
        16,
        ge=1,
        le=4096,
        description="ranges are rounded up to a multiple of so many tokens (ours: as paged)",
    )
    placement: Placement = Field(
        "first_fit",
        description="which free run a range is cut from: the first that is long enough, the shortest that "
        "is, or a buddy allocator, which rounds ranges up to powers of two (Orca in the paper)",
    )


class Contiguous:
    """Reserves the longest request there may be. O(free runs) per admission."""

    def __init__(self, config: ContiguousConfig, ctx: Context) -> None:
        self.config, self._name = config, ctx.name
        self._longest = ctx.limits.max_model_len
        self._runs: list[Runs] = []

    def reserved_tokens(self, request: RequestView) -> int:
        """Tokens to reserve for a request."""
        return self._longest

    # ------------------------------------------------------------- the contract

    def layout(self, model: ModelFacts) -> KVLayout:
        page, layers = self.config.page_tokens, tuple(range(model.layers))
        size = page * model.layers * model.kv_bytes_per_token_layer
        return KVLayout(
            addressing="contiguous_slot",
            pools=(Pool(id="kv", layers=layers, page_tokens=page, bytes_per_page=size),),
        )

    def attach(self, pool: int, tier: str, num_pages: int) -> None:
        if tier != "device":
            raise CapabilityError(
                f"kvcache {self._name!r} has no host tier",
                where="executor.num_host_pages",
                why="ranges are never moved: a request keeps its own until it ends",
                do="set it to 0, or take kvcache=paged",
            )
        self._runs.append(Runs(num_pages, self.config.placement))
        self._longest = min(self._longest, self._whole(num_pages) * self.config.page_tokens)

    def pages_for(self, pool: Pool, request: RequestView | None, tokens: int) -> int:
        if request is not None and tokens:
            tokens = max(tokens, min(self.reserved_tokens(request), self._longest))
        pages = -(-tokens // pool.page_tokens)
        return _power(pages) if self.config.placement == "buddy" else pages

    def tokens_in(self, pool: Pool, pages: int) -> int:
        return self._whole(pages) * pool.page_tokens

    def _whole(self, pages: int) -> int:
        """The longest range that so many pages may be."""
        return 1 << pages.bit_length() - 1 if self.config.placement == "buddy" and pages else pages

    def choose(self, pool: int, tier: str, n: int, request: RequestView | None) -> Sequence[int]:
        if request is None:  # pages that leave the pool need not be adjacent
            return self._runs[pool].take_any(n)
        pages = self._runs[pool].take(n) if not request.pages[pool] else None
        if pages is None:
            raise LedgerError(
                f"request {request.id} cannot have {n} adjacent pages",
                where=f"kvcache {self._name!r}",
                why="its range cannot grow" if request.pages[pool] else "no free run is long enough",
                do="plan with view.kv.budget(), which knows the free runs",
            )
        return pages

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        self._runs[pool].give_back(pages)

    # --------------------------------------------------------------- placement

    def scratch(self, pool: int) -> Runs:
        return self._runs[pool].copy()

    def unusable(self, pool: int, n: int) -> int:
        return self._runs[pool].unusable(n)


class TrueLengths(Contiguous):
    """Reserves by what a request will really need, which no server knows."""

    def __init__(self, config: ContiguousConfig, ctx: Context) -> None:
        super().__init__(config, ctx)
        if ctx.oracle is None:
            raise ConfigError(
                f"kvcache {ctx.name!r} was built without the workload's truths",
                why="it reserves by true output lengths",
                do="use compose(), or declare oracle=True in its spec",
            )
        self._truth = ctx.oracle

    def reserved_tokens(self, request: RequestView) -> int:
        return request.prompt_tokens + self.output_tokens(request)

    def output_tokens(self, request: RequestView) -> int:
        """Its true output length, cut at its cap."""
        try:
            truth = self._truth(request.id).output_tokens
        except KeyError:
            raise WorkloadError(
                f"request {request.id} has no true output length",
                where=f"kvcache {self._name!r}",
                why="it reserves by true lengths, and the workload states none",
                do="use a workload that enforces output lengths, or +kvcache=contiguous",
            ) from None
        return min(truth, request.max_new_tokens)


class Pow2(TrueLengths):
    """Reserves at most twice the true output."""

    def output_tokens(self, request: RequestView) -> int:
        return _power(super().output_tokens(request))


def _power(n: int) -> int:
    """The least power of two that is no less; 0 of 0."""
    return 1 << (n - 1).bit_length() if n else 0
