"""How much of prompts a prefix cache could reuse, from the hashes of their blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

Blocks = tuple[int, Sequence[int]]
"""Prompt length in tokens, and one chained hash per block: equal hashes are equal prefixes."""


def reusable_tokens(requests: Iterable[Blocks], block_tokens: int, pool_tokens: int | None = None) -> int:
    """Prompt tokens that are in the cache when their request comes, summed over the requests.

    A hit is a prefix: it ends with the first block that is missing, and no block counts for more tokens than
    the prompt has. After each request all its blocks are in the cache; the least recently used go first.

    Args:
        requests: in the order in which they are served.
        block_tokens: tokens of a block.
        pool_tokens: size of the cache in tokens; None: nothing ever leaves it.
    """
    kept: OrderedDict[int, None] = OrderedDict()
    most = None if pool_tokens is None else pool_tokens // block_tokens
    reused = 0
    for tokens, hashes in requests:
        hit = 0
        while hit < len(hashes) and hashes[hit] in kept:
            hit += 1
        reused += min(hit * block_tokens, tokens)
        for one in hashes:
            kept[one] = None
            if most is not None:
                kept.move_to_end(one)
        while most is not None and len(kept) > most:
            kept.popitem(last=False)
    return reused
