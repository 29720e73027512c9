"""How KV memory is divided. Proposed by the kvcache plugin, frozen when a run is composed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Addressing = Literal["block_table", "contiguous_slot", "segments", "remote_spans"]
KeySpace = Literal["post_rope", "pre_rope", "block_local", "latent", "x", "x_delta"]
Tier = Literal["device", "host"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pool:
    """Pages of equal size that are interchangeable. A page id names the same page in all its layers."""

    id: str
    """Its name, as in ``executor.num_kv_pages``."""
    layers: tuple[int, ...]
    """Layers whose KV its pages hold."""
    head_group: tuple[int, ...] | None = None
    """KV heads stored here; None: all."""
    captures: tuple[str, ...] = ("k", "v")
    """What the attention backend must hand over to ``append``."""
    key_space: KeySpace = "post_rope"
    """Form in which keys are stored."""
    codec: str = "none"
    """KV codec of what is stored."""
    page_tokens: int
    """Tokens a page holds."""
    bytes_per_page: int
    """Bytes of one page over all its layers, codec metadata included."""
    retention: Literal["full", "window", "repack"] = "full"
    """What a page is kept for: all tokens, those in sight of a window, or what a policy repacks."""
    window_tokens: int | None = None
    """With ``retention="window"``: how many recent tokens a token sees, itself included. Pages of which no
    later token sees any are given back."""
    tier: Tier = "device"
    """Where it lies."""

    def __post_init__(self) -> None:
        window = self.window_tokens
        if (self.retention == "window") != (window is not None) or (window is not None and window < 1):
            raise ValueError(f"pool {self.id!r} has retention {self.retention!r} and window_tokens={window}")

    def most_tokens(self, longest: int, step: int) -> int:
        """Tokens whose pages one request may hold here at once.

        A window pool holds what the first token of a step sees and the step's own tokens, both ends of
        which may lie anywhere in a page.

        Args:
            longest: tokens of the request in all.
            step: tokens of it one step may run.
        """
        if self.window_tokens is None:
            return longest
        return min(longest, self.window_tokens - 1 + step + self.page_tokens - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class KVLayout:
    """The frozen layout of a run: device pools, in the order every per-pool tuple uses."""

    addressing: Addressing
    """How a request's KV is named."""
    pools: tuple[Pool, ...]
    """Device pools."""

    @property
    def bytes_per_token(self) -> float:
        """KV bytes one more token costs once pages are full, over all pools."""
        return sum(p.bytes_per_page / p.page_tokens for p in self.pools)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How many pages an executor can hold, per pool of the layout and in layout order."""

    device_pages: tuple[int, ...]
    """Pages on the device."""
    host_pages: tuple[int, ...] = ()
    """Empty: no host tier, so ``swap`` preemption is refused."""
