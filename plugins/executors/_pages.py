"""How many KV pages each pool gets: stated in an executor's settings, or what an amount of memory holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator

from servelab.core.api import ConfigError, KVLayout, Limits, Pool

Stated = int | Mapping[str, int]


def _between(least: int, most: int) -> Callable[[Stated], Stated]:
    def check(given: Stated) -> Stated:
        for pages in given.values() if isinstance(given, Mapping) else (given,):
            if not least <= pages <= most:
                raise ValueError(f"pages of a pool must be from {least:,} to {most:,}")
        return given

    return check


MAX_PAGES = 50_000_000
"""More than any device has. The ledger keeps a few bytes per page: a slip of the finger would eat memory."""
Pages = Annotated[int | dict[str, int], AfterValidator(_between(1, 1 << 62))]
BoundedPages = Annotated[int | dict[str, int], AfterValidator(_between(1, MAX_PAGES))]
HostPages = Annotated[int | dict[str, int], AfterValidator(_between(0, MAX_PAGES))]


def stated_pages(given: Stated, layout: KVLayout, setting: str) -> tuple[int, ...]:
    """That many in every pool, or those given for each by its id.

    Raises:
        ConfigError: a mapping that leaves a pool out, or names one that the layout does not have.
    """
    if isinstance(given, int):
        return (given,) * len(layout.pools)
    pools = [pool.id for pool in layout.pools]
    if {*given} != {*pools}:
        raise ConfigError(
            f"{setting} states pages for {', '.join(given) or 'no pool'}",
            where=setting,
            why=f"the KV layout of this run has the pools {', '.join(pools)}",
            do="state one number for each of them, or one number for all",
        )
    return tuple(given[pool] for pool in pools)


def pages_in(memory_bytes: int, layout: KVLayout, limits: Limits) -> tuple[int, ...]:
    """Divide memory so that every pool holds equally many requests of the greatest length.

    Where it does not hold even one, the greatest length that it does hold counts.
    """

    def needs(longest: int) -> list[int]:
        return [_pages(pool, pool.most_tokens(longest, limits.max_batch_tokens)) for pool in layout.pools]

    def size(pages: list[int]) -> int:
        return sum(n * pool.bytes_per_page for n, pool in zip(pages, layout.pools, strict=True))

    low, high = 1, limits.max_model_len
    while low < high:  # the greatest length that fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(needs(middle)) <= memory_bytes else (low, middle - 1)
    share = needs(low)
    return tuple(max(1, memory_bytes * n // size(share)) for n in share)


def _pages(pool: Pool, tokens: int) -> int:
    return -(-tokens // pool.page_tokens)
