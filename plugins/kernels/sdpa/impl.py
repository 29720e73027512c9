"""The half of ``sdpa`` with tensors. See ``backend``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

from servelab.core.errors import CapabilityError
from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import BatchLayout, Rotary, State
from servelab.core.layout import KVLayout, Pool

PADDING = 1.5
"""Rows of one query share a batch while the longest has at most so many times the pages of the shortest:
what the others are padded by costs less than one more call."""

Attend = tuple[Tensor, Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Attend:
    """PyTorch's kernel: ``q [batch, heads, tokens, dim]``; returns ``o`` alike and the natural ``lse``."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return cast("Attend", kernel(q, k, v, is_causal=causal, attn_mask=mask))


@dataclass(frozen=True, slots=True)
class Segment:
    """Stored tokens of a row, as one plan and pool sees them."""

    slots: Tensor
    """int64 ``[tokens]``: index of each token in the pool's buffers seen as ``[pages * page_tokens]``."""
    offset: int
    """View position of the first."""
    run: int | None
    """First slot, where they follow one another: the segment can be read in place."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request's queries ``first..end-1`` of the launch."""

    first: int
    end: int
    positions: Tensor
    """int64 ``[end - first]``."""
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Decodes:
    """Rows of one query each, batched: padded tables of pages."""

    queries: Tensor
    """int64 ``[rows]``: which query of the launch each row is."""
    pages: Tensor
    """int64 ``[rows * width]``, padded with the row's own first page."""
    width: int
    tokens: Tensor
    """int64 ``[rows]``: stored tokens of each row."""
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PoolPlan:
    slots: Tensor
    """int64 ``[queries]``: where each new token is stored."""
    rows: tuple[Row, ...]
    """Rows that go one by one."""
    decodes: tuple[Decodes, ...]
    """Rows that go together."""


@dataclass(frozen=True, slots=True)
class Plan:
    queries: int
    angles: Any
    pools: tuple[PoolPlan, ...]
    segments: tuple[tuple[tuple[int, Row], ...], ...]
    """Per pool: (index in the batch's segment arrays, its row with this segment alone)."""


class SdpaImpl:
    """Reads and writes the executor's buffers. One launch at a time."""

    def __init__(
        self,
        layout: KVLayout,
        model: ModelFacts,
        buffers: Mapping[int, Mapping[str, Tensor]],
        rotary: Rotary,
    ) -> None:
        self._layout, self._model, self._rotary = layout, model, rotary
        self._k = [buffers[layer]["k"] for layer in range(model.layers)]
        self._v = [buffers[layer]["v"] for layer in range(model.layers)]
        self._pool_of = {layer: i for i, pool in enumerate(layout.pools) for layer in pool.layers}
        self._windows = model.windows or (None,) * model.layers
        self._scratch: dict[str, Tensor] = {}

    # ---------------------------------------------------------------- plan

    def plan(self, batch: BatchLayout, layer_groups: Sequence[tuple[int, int]] = ()) -> Plan:
        for mask in batch.masks:
            if mask not in ("causal", "window"):
                raise CapabilityError(f"kernel 'sdpa' has no {mask!r} mask", do="choose another kernel")
        positions = torch.tensor(list(batch.q_positions), dtype=torch.int64)
        pools, lone = [], []
        for i, pool in enumerate(self._layout.pools):
            rows = self._rows(batch, i, pool, positions)
            slots = [_stored(row, row.segments[-1]) for row in rows]
            single = [row for row in rows if _is_decode(row)]
            batched = len(single) > 1 and pool.key_space == "post_rope" and not self._in_slots
            pools.append(
                PoolPlan(
                    slots=torch.cat(slots) if slots else positions,
                    rows=tuple(row for row in rows if not (batched and _is_decode(row))),
                    decodes=_batches(single, pool.page_tokens) if batched else (),
                )
            )
            lone.append(
                tuple(
                    (s, Row(row.first, row.end, row.positions, (row.segments[s - first],)))
                    for row, first, end in zip(rows, batch.seg_indptr[:-1], batch.seg_indptr[1:], strict=True)
                    for s in range(first, end)
                )
            )
        return Plan(len(positions), self._rotary.angles(positions), tuple(pools), tuple(lone))

    @property
    def _in_slots(self) -> bool:
        return self._layout.addressing == "contiguous_slot"

    def _rows(self, batch: BatchLayout, index: int, pool: Pool, positions: Tensor) -> list[Row]:
        rows = []
        for r in range(len(batch.q_indptr) - 1):
            first, end = batch.q_indptr[r], batch.q_indptr[r + 1]
            segments = [
                self._segment(
                    pool.page_tokens, batch.seg_pages[index][s], batch.seg_tokens[s], batch.seg_offset[s]
                )
                for s in range(batch.seg_indptr[r], batch.seg_indptr[r + 1])
            ]
            rows.append(Row(first, end, positions[first:end], tuple(segments)))
        return rows

    def _segment(self, page: int, pages: Sequence[int], tokens: int, offset: int) -> Segment:
        first = pages[0] * page if pages else 0
        if self._in_slots or _consecutive(pages):
            return Segment(torch.arange(first, first + tokens), offset, first)
        starts = torch.tensor(pages, dtype=torch.int64) * page
        slots = (starts[:, None] + torch.arange(page)).reshape(-1)[:tokens]
        return Segment(slots, offset, None)

    # ----------------------------------------------------------------- run

    def append(self, layer: int, captures: Mapping[str, Tensor], plan: Plan) -> None:
        pool = self._pool_of[layer]
        k, v = captures["k"], captures["v"]
        if self._layout.pools[pool].key_space == "post_rope":
            k = self._rotary.turn(k, plan.angles)
        slots = plan.pools[pool].slots
        self._k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self._v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def run(self, layer: int, q_pre: Tensor, plan: Plan) -> State:
        q = self._rotary.turn(q_pre, plan.angles)
        pool = plan.pools[self._pool_of[layer]]
        if not pool.rows and len(pool.decodes) == 1:  # nothing to put together
            return self._decode(layer, q, pool.decodes[0])
        o, lse = torch.empty_like(q), _lse_like(q)
        for group in pool.decodes:
            o[group.queries], lse[group.queries] = self._decode(layer, q[group.queries], group)
        for row in pool.rows:
            at = slice(row.first, row.end)
            o[at], lse[at] = self._row(layer, q[at], row)
        return o, lse

    def partial(self, layer: int, q_pre: Tensor, plan: Plan, segments: Sequence[int]) -> State:
        q = self._rotary.turn(q_pre, plan.angles)
        wide = torch.promote_types(q.dtype, torch.float32)
        states: dict[tuple[int, int], list[State]] = {}
        for index, row in plan.segments[self._pool_of[layer]]:
            if index in segments:
                o, lse = self._row(layer, q[row.first : row.end], row)
                states.setdefault((row.first, row.end), []).append((o.to(wide), lse))
        o, lse = torch.zeros_like(q, dtype=wide), _lse_like(q).fill_(-torch.inf)
        for (first, end), found in states.items():
            o[first:end], lse[first:end] = self.merge(found)
        return o, lse

    def merge(self, states: Sequence[State]) -> State:
        if len(states) == 1:
            return states[0]
        lses = torch.stack([lse for _, lse in states])
        total = lses.logsumexp(0)
        weights = (lses - total.masked_fill(total == -torch.inf, 0)).exp()  # 0, not NaN, where nobody sees
        return sum(w[..., None] * o for w, (o, _) in zip(weights, states, strict=True)), total

    def _row(self, layer: int, q: Tensor, row: Row) -> Attend:
        """One row over its segments, ``q [tokens, heads, dim]``: the formula with a mask by position."""
        if not len(q) or not any(len(s.slots) for s in row.segments):  # the kernel dies of a division by zero
            return torch.zeros_like(q), _lse_like(q).fill_(-torch.inf)
        heads = self._model.kv_heads
        k, v, positions = self._read(layer, row.segments)
        tokens, window = len(row.positions), self._windows[layer]
        group = q.shape[1] // heads
        # heads of a group share their keys: [kv_heads, group, tokens, dim] against keys of stride 0
        q = q.view(tokens, heads, group, -1).permute(1, 2, 0, 3)
        k = k.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        v = v.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        start = int(row.positions[0])
        whole = positions is None and start + tokens == k.shape[2] and window is None
        if whole and tokens == 1:
            o, lse = _attend(q, k, v)
        elif whole and start == 0 and int(row.positions[-1]) == tokens - 1:
            o, lse = _attend(q, k, v, causal=True)
        else:
            at = torch.arange(k.shape[2]) if positions is None else positions
            hidden = at > row.positions[:, None]
            if window is not None:
                hidden |= at <= row.positions[:, None] - window
            mask = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
            o, lse = _attend(q, k, v, mask[None, None])
            lse = lse.masked_fill(hidden.all(1), -torch.inf)  # the kernel says 0 there
        return o.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    def _read(self, layer: int, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, turned, and values ``[tokens, kv_heads, dim]``, and view positions (None: 0, 1, 2, ...)."""
        k, v = self._k[layer].flatten(0, 1), self._v[layer].flatten(0, 1)
        plain = len(segments) == 1 and segments[0].offset == 0
        if plain and segments[0].run is not None:
            at = slice(segments[0].run, segments[0].run + len(segments[0].slots))
            k, v = k[at], v[at]
        else:
            slots = torch.cat([s.slots for s in segments])
            k, v = k.index_select(0, slots), v.index_select(0, slots)
        positions = torch.cat([torch.arange(s.offset, s.offset + len(s.slots)) for s in segments])
        if self._layout.pools[self._pool_of[layer]].key_space == "pre_rope":
            k = self._rotary.turn(k, self._rotary.angles(positions))
        return k, v, None if plain else positions

    def _decode(self, layer: int, q: Tensor, group: Decodes) -> Attend:
        """Rows of one query, ``q [rows, heads, dim]``: queries of a KV head side by side, keys read once."""
        rows, heads, dim = len(q), self._model.kv_heads, q.shape[-1]
        shape = (rows, -1, heads, self._k[layer].shape[-1])
        k = self._gather("k", self._k[layer], group.pages).view(shape).transpose(1, 2)
        v = self._gather("v", self._v[layer], group.pages).view(shape).transpose(1, 2)
        window = self._windows[layer]
        key = window, q.dtype
        if key not in group.masks:
            at = torch.arange(k.shape[2])
            hidden = at >= group.tokens[:, None]
            if window is not None:
                hidden |= at < group.tokens[:, None] - window
            group.masks[key] = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        per_head = q.view(rows, heads, -1, dim)
        mask = group.masks[key][:, None, None].expand(-1, 1, per_head.shape[2], -1)
        o, lse = _attend(per_head, k, v, mask)
        return o.reshape(rows, -1, dim), lse.reshape(rows, -1)

    def _gather(self, name: str, buffer: Tensor, pages: Tensor) -> Tensor:
        """Whole pages into a buffer that the next layer uses again: it stays in the processor's cache."""
        needed = len(pages) * buffer[0].numel()
        scratch = self._scratch.get(name)
        if scratch is None or scratch.numel() < needed:
            scratch = self._scratch[name] = buffer.new_empty(needed * 5 // 4)
        out = scratch[:needed].view(len(pages), *buffer.shape[1:])
        return torch.index_select(buffer, 0, pages, out=out)


def _lse_like(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


def _consecutive(pages: Sequence[int]) -> bool:
    return all(b - a == 1 for a, b in pairwise(pages))


def _is_decode(row: Row) -> bool:
    """One query, after everything the row has stored."""
    if row.end - row.first != 1 or len(row.segments) != 1 or row.segments[0].offset:
        return False
    return int(row.positions[0]) == len(row.segments[0].slots) - 1


def _stored(row: Row, own: Segment) -> Tensor:
    """Slots of the row's new tokens, in its own segment."""
    return own.slots[row.positions - own.offset]


def _batches(rows: Sequence[Row], page: int) -> tuple[Decodes, ...]:
    """Decodes in batches of like length; in the launch's order where one batch takes all."""
    widths = {row.first: -(-len(row.segments[0].slots) // page) for row in rows}
    ordered = sorted(rows, key=lambda row: widths[row.first])
    groups: list[list[Row]] = [[]]
    for row in ordered:
        if groups[-1] and widths[row.first] > PADDING * widths[groups[-1][0].first]:
            groups.append([])
        groups[-1].append(row)
    if len(groups) == 1:
        groups = [list(rows)]
    return tuple(_decodes(group, page) for group in groups)


def _decodes(rows: Sequence[Row], page: int) -> Decodes:
    tables = [(row.segments[0].slots[::page] // page).tolist() for row in rows]
    width = max(map(len, tables))
    # padded with a page of its own: what others hold, were it NaN, must not reach it through the mask
    padded = [page_id for table in tables for page_id in (*table, *[table[0]] * (width - len(table)))]
    return Decodes(
        queries=torch.tensor([row.first for row in rows]),
        pages=torch.tensor(padded),
        width=width,
        tokens=torch.tensor([len(row.segments[0].slots) for row in rows]),
    )
