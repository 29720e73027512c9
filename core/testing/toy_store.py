"""The smallest honest prefix store: full pages by the whole text before them. No technique."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from servelab.core.errors import CapabilityError
from servelab.core.families.prefix import Commit, Content, Provenance, Span
from servelab.core.layout import KVLayout

Key = tuple[Any, ...]
"""Where KV comes from, and the whole text up to the end of its page."""


class ToyStore:
    """For one pool. Keys are texts, so nothing is mistaken for another; the page released first goes "
    "first."""

    def __init__(self, config: Any = None, context: Any = None) -> None:
        self.page_tokens = 0
        self.pages: dict[Key, int] = {}
        self.keys: dict[int, Key] = {}
        self.users: dict[int, int] = {}
        """How many requests use each stored page."""
        self.held: dict[str, list[int]] = {}
        """Stored pages that each request uses, in token order."""
        self.idle: dict[int, None] = {}
        """Stored pages that nobody uses, by time of release."""

    def attach(self, layout: KVLayout) -> None:
        if len(layout.pools) > 1:
            raise CapabilityError(
                "the toy store keeps pages of one pool", why=f"here are {len(layout.pools)}"
            )
        self.page_tokens = layout.pools[0].page_tokens

    def key(self, content: Content, provenance: Provenance, end: int) -> Key:
        """The key of the page that ends behind ``end`` tokens."""
        assert content.ids is not None
        return (provenance, *content.ids[:end])

    def chain(self, content: Content, provenance: Provenance, pages: int) -> list[Key]:
        """Keys of the first pages of a content."""
        if content.ids is None:
            return []
        return [self.key(content, provenance, (k + 1) * self.page_tokens) for k in range(pages)]

    def longest(self, content: Content) -> int:
        """Pages that a match may cover: full ones, and never the last token."""
        return (content.length - 1) // self.page_tokens

    def match(
        self, content: Content, provenance: Provenance, now_ns: int, *, readonly: bool = False
    ) -> Sequence[Span]:
        found: list[int] = []
        for key in self.chain(content, provenance, self.longest(content)):
            if key not in self.pages:
                break
            found.append(self.pages[key])
        if not found:
            return ()
        end = len(found) * self.page_tokens
        return (Span(handle=found[-1], start=0, end=end, source_start=0, pages=(tuple(found),)),)

    def acquire(self, request_id: str, spans: Sequence[Span], now_ns: int) -> None:
        for span in spans:
            for page in span.pages[0]:
                self.use(request_id, page)

    def use(self, request_id: str, page: int) -> None:
        """The request uses a stored page until it is released."""
        self.users[page] = self.users.get(page, 0) + 1
        self.held.setdefault(request_id, []).append(page)
        self.idle.pop(page, None)

    def fork(self, request_id: str, pages: Sequence[Sequence[int]], now_ns: int) -> None:
        for page in pages[0]:
            if page in self.keys:
                self.use(request_id, page)

    def commit(
        self,
        request_id: str,
        content: Content,
        pages: Sequence[Sequence[int]],
        provenance: Provenance,
        now_ns: int,
    ) -> Commit:
        taken: list[int] = []
        keys = self.chain(content, provenance, content.length // self.page_tokens)
        for key, page in zip(keys, pages[0], strict=False):
            if key in self.pages or page in self.keys:
                continue
            self.pages[key], self.keys[page] = page, key
            taken.append(page)
            self.use(request_id, page)
        return Commit(taken=(tuple(taken),))

    def release(self, request_id: str, now_ns: int) -> None:
        for page in reversed(self.held.pop(request_id, [])):
            self.users[page] -= 1
            if not self.users[page]:
                self.idle[page] = None

    def evictable(self, pool: int) -> int:
        return len(self.idle)

    def evict(self, pool: int, n: int, now_ns: int) -> Sequence[int]:
        gone = list(self.idle)[:n]
        for page in gone:
            self.forget(page)
        return gone

    def forget(self, page: int) -> None:
        """The page holds this text no longer."""
        del self.idle[page], self.users[page], self.pages[self.keys.pop(page)]
