"""Semantic cache: answer or augment a request before it reaches an engine.

Intent: decide from meaning instead of tokens. Every result carries what it cost, because a cache whose
misses are free wins every comparison. The embedder is injected: a model, hashed n-grams, or vectors that
the workload supplies together with ground-truth answer ids, so that false hits can be counted.

What must be expressible: one threshold for all; threshold, lifetime and quota per category; policies that
relax under load; a search that answers before any document is fetched; examples prepended instead of
answers; eviction, expiry and off-peak regeneration of entries; rewards that arrive later.

Capabilities: ``semantic.answers`` (returns stored answers), ``semantic.augments`` (adds examples to
prompts), ``semantic.category_policy`` (constrained and tool-calling requests must be allowed per category),
``semantic.load_adaptive`` (reads the load of models), ``semantic.replay`` (regenerates entries off-peak).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.request import RequestSpec


def _no_negative(**costs: int) -> None:
    for name, value in costs.items():
        if value < 0:
            raise ValueError(f"{name} is a cost and cannot be {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """What the cache may know about a request."""

    request: RequestSpec
    embedding: Sequence[float]
    """Unit length, ``Embedder.dims`` numbers."""
    text: str = ""
    model: str = ""
    category: str = ""
    session: str | None = None
    temperature: float = 0.0
    constrained: bool = False
    """The answer must obey a grammar or may call tools."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Miss:
    """Nothing usable. ``reason`` is ``below_threshold``, ``expired``, ``category``, ``skipped``, ``empty``,
    ...
    """

    search_ns: int
    reason: str

    def __post_init__(self) -> None:
        _no_negative(search_ns=self.search_ns)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The request ends here. Its tokens are reported as cached, never as generated."""

    entry: str
    similarity: float
    """Cosine, -1..1."""
    output_tokens: int
    search_ns: int
    fetch_ns: int
    output_ids: Sequence[int] | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        _no_negative(search_ns=self.search_ns, fetch_ns=self.fetch_ns, output_tokens=self.output_tokens)
        if not -1.0 <= self.similarity <= 1.0:
            raise ValueError(f"similarity is a cosine in -1..1, not {self.similarity}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Augment:
    """The request goes on with examples in front of its prompt; their tokens are charged as prompt."""

    entries: tuple[str, ...]
    added_tokens: int
    search_ns: int
    fetch_ns: int = 0
    added_ids: Sequence[int] | None = None
    model: str | None = None
    """Model that is now good enough; a hint to the router."""

    def __post_init__(self) -> None:
        _no_negative(search_ns=self.search_ns, fetch_ns=self.fetch_ns, added_tokens=self.added_tokens)


Lookup = Miss | Answer | Augment


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """Off-peak work: answer ``request`` again, best of ``n``, to improve an entry."""

    entry: str
    request: RequestSpec
    n: int = 1


class Embedder(Protocol):
    """Injected by the core."""

    dims: int

    def embed(self, request: RequestSpec) -> tuple[Sequence[float], int]:
        """The unit vector and what computing it costs in nanoseconds."""
        ...


class SemanticCache(Protocol):
    """Called before the router, on the engine's clock. Pure in its arguments, its state and its generator."""

    def lookup(self, query: Query, now_ns: int, load: Mapping[str, float]) -> Lookup:
        """``load`` is the load factor per model, 0 (idle) to 1 (full); an entry aged exactly its lifetime
        is stale.
        """
        ...

    def insert(
        self,
        query: Query,
        output_ids: Sequence[int] | None,
        output_tokens: int,
        model: str,
        quality: float | None,
        now_ns: int,
    ) -> str | None:
        """A request was answered by a model. Returns the new entry's id, None if it is not kept."""
        ...

    def feedback(self, entry: str, reward: float, now_ns: int) -> None:
        """A later judgement of a result that used the entry, -1 to 1. Unknown entries are ignored."""
        ...

    def maintain(self, now_ns: int, idle_ns: int) -> Sequence[Replay]:
        """Expire, enforce quotas and rebuild; ``idle_ns`` of device time may be spent on the replays
        returned.
        """
        ...
