"""The half of ``sdpa`` with tensors. See ``backend``; ``plan`` is what it works out once per launch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from servelab.core.errors import CapabilityError
from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import BatchLayout, Rotary, State
from servelab.core.layout import KVLayout
from servelab.plugins.kernels.sdpa.plan import Decodes, Plan, Row, plan_pool

Attend = tuple[Tensor, Tensor]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Attend:
    """PyTorch's kernel: ``q [batch, heads, tokens, dim]``; returns ``o`` alike and the natural ``lse``."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return cast("Attend", kernel(q, k, v, is_causal=causal, attn_mask=mask))


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

    def plan(self, batch: BatchLayout, layer_groups: Sequence[tuple[int, int]] = ()) -> Plan:
        for mask in batch.masks:
            if mask not in ("causal", "window"):
                raise CapabilityError(f"kernel 'sdpa' has no {mask!r} mask", do="choose another kernel")
        in_slots = self._layout.addressing == "contiguous_slot"
        return Plan(
            self._rotary.angles(torch.tensor(batch.q_positions, dtype=torch.int64)),
            tuple(plan_pool(batch, i, pool, in_slots) for i, pool in enumerate(self._layout.pools)),
        )

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
        for index, row in plan.pools[self._pool_of[layer]].segments():
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

    # --------------------------------------------------- rows by themselves

    def _row(self, layer: int, q: Tensor, row: Row) -> Attend:
        """One row over its segments, ``q [tokens, heads, dim]``: the formula with a mask by position."""
        if not len(q) or not row.tokens:  # the kernel dies of a division by zero
            return torch.zeros_like(q), _lse_like(q).fill_(-torch.inf)
        heads, tokens = self._model.kv_heads, len(q)
        k, v = self._read(layer, row)
        group = q.shape[1] // heads
        # heads of a group share their keys: [kv_heads, group, tokens, dim] against keys of stride 0
        q = q.view(tokens, heads, group, -1).permute(1, 2, 0, 3)
        k = k.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        v = v.transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        window = self._windows[layer]
        if window is None and row.whole:
            o, lse = _attend(q, k, v, causal=True)
        else:
            mask = self._mask(row, window, q.dtype)
            o, lse = _attend(q, k, v, None if mask is None else mask[None, None])
            if mask is not None:  # of a row that sees nothing the kernel says 0
                lse = lse.masked_fill((mask == -torch.inf).all(1), -torch.inf)
        return o.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2)

    @staticmethod
    def _mask(row: Row, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window not in row.masks:
            at, queries = row.token_positions(), torch.tensor(row.positions)[:, None]
            hidden = at > queries
            if window is not None:
                hidden |= at <= queries - window
            shown = torch.zeros(hidden.shape, dtype=dtype)
            row.masks[window] = shown.masked_fill_(hidden, -torch.inf) if hidden.any() else None
        return row.masks[window]

    def _read(self, layer: int, row: Row) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values ``[tokens, kv_heads, dim]``."""
        k, v = self._k[layer].flatten(0, 1), self._v[layer].flatten(0, 1)
        if (run := row.run) is not None:
            k, v = k[run], v[run]
        else:
            k, v = k.index_select(0, row.slots()), v.index_select(0, row.slots())
        if self._layout.pools[self._pool_of[layer]].key_space == "pre_rope":
            k = self._rotary.turn(k, self._rotary.angles(row.token_positions()))
        return k, v

    # ------------------------------------------------------- rows together

    def _decode(self, layer: int, q: Tensor, group: Decodes) -> Attend:
        """Rows of one query, ``q [rows, heads, dim]``: queries of a KV head side by side, keys read once."""
        rows, heads, dim = len(q), self._model.kv_heads, q.shape[-1]
        shape = (rows, -1, heads, self._k[layer].shape[-1])
        k = self._gather("k", self._k[layer], group.pages).view(shape).transpose(1, 2)
        v = self._gather("v", self._v[layer], group.pages).view(shape).transpose(1, 2)
        window = self._windows[layer]
        if window not in group.masks:
            at = torch.arange(k.shape[2])
            hidden = at >= group.tokens[:, None]
            if window is not None:
                hidden |= at < group.tokens[:, None] - window
            group.masks[window] = torch.zeros(hidden.shape, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
        per_head = q.view(rows, heads, -1, dim)
        mask = group.masks[window][:, None, None].expand(-1, 1, per_head.shape[2], -1)
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
