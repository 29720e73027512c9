"""Prefix store: reuse of KV that was computed before.

Intent: find stored KV for a prompt, publish new KV, decide what is evicted first and what stays pinned. The
ledger owns pages and reference counts; the store holds references and answers with data.

What must be expressible: chained page hashes and token trees; spans that are not prefixes, stored at other
positions and repaired by recomputing some tokens (in prefill and in decode); tiers below the device with
layer-by-layer loading; pins with deadlines while a tool runs; a read-only probe for routers and for
ordering the queue; stored and removed events for routers; namespaces per tenant and adapter.

Capabilities: ``prefix.exact`` (publishes KV as equal to computing it), ``prefix.page_sharing`` (one page in
several requests), ``prefix.owns_pool`` (decides eviction in the device pools), ``prefix.moving`` (reuses KV
at other positions), ``prefix.approximate`` (returns spans that need a fix-up), ``prefix.decode_fixup``
(recomputes tokens while decoding), ``prefix.provenance`` (keys entries by eviction policy and exactness),
``prefix.pin``, ``prefix.tiers`` (keeps entries off the device), ``prefix.probe`` (matches without changing
state), ``prefix.fork`` (counts users of pages that samples of one prompt share), ``prefix.events`` (tells
routers what it stores).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from servelab.core.layout import KeySpace

if TYPE_CHECKING:
    from servelab.core.layout import KVLayout
    from servelab.core.request import RequestView

StoreTier = Literal["device", "host", "disk", "remote"]
Deviation = Literal["none", "k", "v", "attention_mass"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """How KV came to be. Part of every key: entries that differ in it never match each other."""

    model: str
    namespace: str = ""
    """Tenant, adapter and salt; ``""`` is shared by all. Sharing across tenants must be asked for."""
    codec: str = "none"
    key_space: KeySpace = "post_rope"
    eviction: str = "none"
    """Policy and budget of a lossy eviction that ran before the KV was written."""
    exact: bool = True
    """False if any of it descends from a span that was not exact."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """The tokens KV stands for: ids where there are any, else one chained hash per ``hash_tokens`` tokens."""

    length: int
    ids: Sequence[int] | None = None
    hashes: Sequence[int] | None = None
    hash_tokens: int = 0
    segments: Sequence[tuple[int, int, str]] = ()
    """``(start, end, key)`` of pieces that may be stored on their own (chunks, semantic variables)."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Where a store keeps what it derived from the tokens (hashes). All contents of one request share it: the
    shorter one always begins the longer one."""

    def __post_init__(self) -> None:
        if (self.ids is None) == (self.hashes is None):
            raise ValueError("content is given as ids or as hashes, exactly one of them")
        if self.ids is not None and len(self.ids) != self.length:
            raise ValueError(f"content has {len(self.ids)} ids for {self.length} tokens")
        if self.hashes is not None and self.hash_tokens < 1:
            raise ValueError(f"hashes need hash_tokens of at least 1, not {self.hash_tokens}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Stored KV for tokens ``start..end-1`` of a request."""

    handle: int
    """The store's name for it."""
    start: int
    end: int
    source_start: int
    """Position of its first token when it was computed; keys move by ``start - source_start``."""
    pages: tuple[tuple[int, ...], ...] = ()
    """Device pages per pool, in token order; empty while it is on another tier."""
    exact: bool = True
    """Using it as it is equals computing it."""
    needs_fixup: bool = False
    """Some of its tokens must be recomputed, see ``plan_fixup``."""
    layers_ready: int | None = None
    """Leading layers that are in place (layer-by-layer loading); None: all."""
    tier: StoreTier = "device"
    bytes: int = 0
    """To move before use; 0 on the device."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ValueError(f"span {self.start}..{self.end} is empty or negative")
        if self.exact and self.needs_fixup:
            raise ValueError("an exact span needs no fix-up")
        if self.exact and self.start != self.source_start:
            raise ValueError(
                f"a span computed at {self.source_start} and used at {self.start} is not exact: "
                "its tokens attended to another context"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class FixupPlan:
    """Which tokens of reused spans are computed again, as data. Masks are causal by original index."""

    always: tuple[tuple[int, int], ...] = ()
    """``(start, end)`` ranges recomputed in every layer: holes and the suffix."""
    check_layers: tuple[int, ...] = ()
    """Layers in which all tokens run and the deviation of reused KV is measured, ascending."""
    measure: Deviation = "none"
    keep: tuple[float, ...] = ()
    """Per check layer, share of reused tokens that stay active behind it, never growing."""
    threshold_std: float | None = None
    """Instead of ``keep``: tokens more than this many standard deviations above the mean."""
    decode_every: int = 0
    """Steps between repairs while decoding; 0: none."""
    decode_tokens: int = 0
    """Tokens per such repair, at most."""

    def __post_init__(self) -> None:
        if self.check_layers and self.measure == "none":
            raise ValueError("check layers need a measure")
        if self.check_layers and (len(self.keep) != len(self.check_layers)) == (self.threshold_std is None):
            raise ValueError("give one keep share per check layer, or threshold_std")
        if any(not 0.0 <= k <= 1.0 for k in self.keep) or list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"keep shares lie in 0..1 and never grow, not {self.keep}")


@dataclass(frozen=True, slots=True)
class Commit:
    """What the store did with offered pages, per pool in token order."""

    taken: tuple[tuple[int, ...], ...]
    """Pages it now references."""
    replaced: tuple[tuple[tuple[int, int], ...], ...] = ()
    """``(offered, stored)`` pages of equal content: the request is pointed to the stored one."""


@dataclass(frozen=True, slots=True)
class StoreEvent:
    """Content became available here, or stopped being so; for routers."""

    kind: Literal["stored", "removed"]
    hashes: tuple[int, ...]
    tier: StoreTier


class PrefixStore(Protocol):
    """Called by the core around admission, commit and release. Pages are named per pool of the layout.

    The protocols below add methods; the core calls them where the plugin's spec names the capability.

    ``request_id`` names one stay of a request on the device: it is another one after a preemption, because
    launches in flight may still use the pages of the stay before. A store with an attribute ``share_tenants``
    that is true is given one namespace for all tenants.
    """

    def attach(self, layout: KVLayout) -> None:
        """The frozen layout; called once."""
        ...

    def match(
        self, content: Content, provenance: Provenance, now_ns: int, *, readonly: bool = False
    ) -> Sequence[Span]:
        """Disjoint spans in token order, never covering the last token: one must be computed.

        ``readonly`` changes nothing, not even recency.
        """
        ...

    def acquire(self, request_id: str, spans: Sequence[Span], now_ns: int) -> None:
        """The request uses these spans until ``release``; their pages cannot be evicted meanwhile."""
        ...

    def commit(
        self,
        request_id: str,
        content: Content,
        pages: Sequence[Sequence[int]],
        provenance: Provenance,
        now_ns: int,
    ) -> Commit:
        """KV of all of ``content`` is computed and verified (never drafts). Publish what is worth keeping."""
        ...

    def release(self, request_id: str, now_ns: int) -> None:
        """The request lets go of its pages (finished, preempted, aborted)."""
        ...

    def evictable(self, pool: int) -> int:
        """Pages that ``evict`` could give back now."""
        ...

    def evict(self, pool: int, n: int, now_ns: int) -> Sequence[int]:
        """Drop ``n`` pages, the least valuable first; asked only for ``n <= evictable(pool)``."""
        ...


class ForkingStore(PrefixStore, Protocol):
    """With ``prefix.fork``: without it, further samples of a prompt (``n > 1``) compute it themselves."""

    def fork(self, request_id: str, pages: Sequence[Sequence[int]], now_ns: int) -> None:
        """A new request shares these pages of another one, per pool: it uses those that are stored, as if it
        had acquired them.
        """
        ...


class PinningStore(PrefixStore, Protocol):
    """With ``prefix.pin``."""

    def pin(self, request_id: str, until_ns: int, reason: str) -> int:
        """Keep what the request published out of eviction until then; returns a handle."""
        ...

    def unpin(self, handle: int) -> None:
        """End a pin early. Unknown or expired handles are ignored."""
        ...

    def relieve(self, now_ns: int) -> Sequence[int]:
        """Nothing can be scheduled and pins hold memory: handles given up, at least one if any is left."""
        ...


class RepairingStore(PrefixStore, Protocol):
    """With ``prefix.approximate``."""

    def plan_fixup(self, request: RequestView, spans: Sequence[Span], budget_tokens: int) -> FixupPlan:
        """How to repair spans with ``needs_fixup``; recomputes at most ``budget_tokens`` per layer."""
        ...


class ReportingStore(PrefixStore, Protocol):
    """With ``prefix.events``."""

    def events(self) -> Sequence[StoreEvent]:
        """What changed since the last call, in order."""
        ...
