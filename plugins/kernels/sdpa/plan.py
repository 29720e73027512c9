"""What ``sdpa`` works out once per launch for all layers: where tokens go, which rows go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from servelab.core.families.kernel import BatchLayout
from servelab.core.layout import Pool

PADDING = 1.5
"""Rows of one query share a batch while the longest has at most so many times the pages of the shortest:
what the others are padded by costs less than one more call."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Stored tokens of a row, as one pool holds them."""

    pages: Sequence[int]
    page: int
    """Tokens per page."""
    tokens: int
    offset: int
    """View position of the first token."""
    consecutive: bool
    """Its pages follow one another (or it is one contiguous slot): it can be read in place."""

    def slots(self, first: int, end: int) -> Sequence[int]:
        """Where the tokens at view positions ``first..end-1`` are: indices into the buffers seen as
        ``[pages * page_tokens]``.
        """
        first, end = first - self.offset, end - self.offset
        if self.consecutive:
            start = self.pages[0] * self.page if self.pages else 0
            return range(start + first, start + end)
        pages, page = self.pages, self.page
        return [pages[i // page] * page + i % page for i in range(first, end)]


@dataclass(slots=True)
class Row:
    """Queries ``first..end-1`` of the launch, which belong to one request and are attended by themselves."""

    first: int
    end: int
    positions: Sequence[int]
    """View positions of the queries."""
    segments: tuple[Segment, ...]
    first_segment: int
    """Index of its first segment in the batch's arrays."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    """By window: ``[queries, tokens]`` to add to the scores; None: nothing is hidden."""
    _slots: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(s.tokens for s in self.segments)

    @property
    def plain(self) -> bool:
        """Its tokens are at view positions that follow one another: ``_span``."""
        return len(self.segments) == 1

    @property
    def _span(self) -> tuple[int, int]:
        first = self.segments[0].offset
        return first, first + self.tokens

    @property
    def run(self) -> slice | None:
        """Its slots, where they follow one another."""
        if not self.plain or not self.segments[0].consecutive:
            return None
        slots = self.segments[0].slots(*self._span)
        return slice(slots[0], slots[0] + len(slots)) if slots else slice(0, 0)

    def slots(self) -> Tensor:
        """int64 ``[tokens]``, in view order; made once."""
        if self._slots is None:
            every = (s.slots(s.offset, s.offset + s.tokens) for s in self.segments)
            self._slots = torch.tensor(list(chain.from_iterable(every)), dtype=torch.int64)
        return self._slots

    def token_positions(self) -> Tensor:
        """int64 ``[tokens]``: view positions of what is stored."""
        every = (range(s.offset, s.offset + s.tokens) for s in self.segments)
        return torch.tensor(list(chain.from_iterable(every)), dtype=torch.int64)

    @property
    def whole(self) -> bool:
        """Its queries are all it has stored, from the first token on."""
        at = self.positions
        return self.plain and len(at) == self.tokens > 0 and (at[0], at[-1] + 1) == self._span

    @property
    def decodes(self) -> bool:
        """One query, after everything the row has stored."""
        return self.end - self.first == 1 and self.plain and self.positions[0] + 1 == self._span[1]


@dataclass(slots=True)
class Decodes:
    """Rows of one query each, batched: padded tables of pages."""

    queries: Tensor
    """int64 ``[rows]``: which query of the launch each row is."""
    pages: Tensor
    """int64 ``[rows * width]``, padded with the row's own first page."""
    tokens: Tensor
    """int64 ``[rows]``: stored tokens of each row."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """By window: ``[rows, width * page_tokens]`` to add to the scores."""


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """What one pool's layers need."""

    slots: Tensor
    """int64 ``[queries]``: where each new token is stored."""
    rows: tuple[Row, ...]
    """Rows that go one by one."""
    decodes: tuple[Decodes, ...]
    """Rows that go together."""
    every: tuple[Row, ...]

    def segments(self) -> Iterator[tuple[int, Row]]:
        """For partial results: index in the batch's segment arrays, its row with this segment alone."""
        for row in self.every:
            for s, segment in enumerate(row.segments, row.first_segment):
                yield s, Row(row.first, row.end, row.positions, (segment,), s)


@dataclass(frozen=True, slots=True)
class Plan:
    angles: Any
    pools: tuple[PoolPlan, ...]


def plan_pool(batch: BatchLayout, index: int, pool: Pool, in_slots: bool) -> PoolPlan:
    """The plan of pool ``index``.

    Args:
        in_slots: KV lies in contiguous slots: a row's only page id says where it begins.
    """
    rows = []
    for r, (first, end) in enumerate(pairwise(batch.q_indptr)):
        of_row = range(batch.seg_indptr[r], batch.seg_indptr[r + 1])
        segments = tuple(_segment(batch, index, s, pool.page_tokens, in_slots) for s in of_row)
        rows.append(Row(first, end, batch.q_positions[first:end], segments, of_row.start))
    stored = chain.from_iterable(_stored(row) for row in rows)
    together = [row for row in rows if pool.key_space == "post_rope" and not in_slots and row.decodes]
    if len(together) == 1 and together[0].run is not None:
        together = []  # read in place
    batched = {row.first for row in together}
    return PoolPlan(
        slots=torch.tensor(list(stored), dtype=torch.int64),
        rows=tuple(row for row in rows if row.first not in batched),
        decodes=_batches(together, pool.page_tokens) if together else (),
        every=tuple(rows),
    )


def _segment(batch: BatchLayout, index: int, s: int, page: int, in_slots: bool) -> Segment:
    gone = batch.seg_gone[index][s] if batch.seg_gone else 0
    pages, tokens = batch.seg_pages[index][s], batch.seg_tokens[s] - gone
    used = -(-tokens // page)  # more may be reserved
    run = in_slots or (len(pages) > 0 and list(pages[:used]) == list(range(pages[0], pages[0] + used)))
    return Segment(pages, page, tokens, batch.seg_offset[s] + gone, run)


def _stored(row: Row) -> Sequence[int]:
    """Slots of the row's new tokens, in its own segment, the last."""
    at, own = row.positions, row.segments[-1]
    if len(at) == 1 or (len(at) and at[-1] - at[0] == len(at) - 1):
        return own.slots(at[0], at[-1] + 1)
    return [own.slots(position, position + 1)[0] for position in at]


def _batches(rows: Sequence[Row], page: int) -> tuple[Decodes, ...]:
    """Decodes in batches of like length; in the launch's order where one batch takes all."""
    ordered = sorted(rows, key=lambda row: row.tokens)
    groups: list[list[Row]] = [[]]
    for row in ordered:
        if groups[-1] and -(-row.tokens // page) > PADDING * -(-groups[-1][0].tokens // page):
            groups.append([])
        groups[-1].append(row)
    if len(groups) == 1:
        groups = [list(rows)]
    return tuple(_decodes(group, page) for group in groups)


def _decodes(rows: Sequence[Row], page: int) -> Decodes:
    tables = [row.segments[0].pages[: -(-row.tokens // page)] for row in rows]
    width = max(map(len, tables))
    # padded with a page of its own: what others hold, were it NaN, must not reach it through the mask
    padded = [page_id for table in tables for page_id in (*table, *[table[0]] * (width - len(table)))]
    return Decodes(
        queries=torch.tensor([row.first for row in rows]),
        pages=torch.tensor(padded),
        tokens=torch.tensor([row.tokens for row in rows]),
    )
