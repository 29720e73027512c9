"""A place where an attention backend runs: pages, rows that grow, and the formula in float64 beside them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, product
from random import Random
from typing import Any

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import BatchLayout
from servelab.core.layout import KVLayout
from servelab.core.testing.tensors import torch_or_skip

PAGES = 160
"""Of each pool."""
STALE = 100.0
"""What pages hold that were somebody else's before."""
TOLERANCE = {"float64": 1e-10, "float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}


class Turn:
    """Rotary embedding over halves, in float64."""

    def __init__(self, head_dim: int, device: str) -> None:
        torch = torch_or_skip()
        self._rates = 50.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)

    def angles(self, positions: Any) -> Any:
        turns = positions.to(self._rates.device).double()[:, None] * self._rates
        return turns.cos()[:, None], turns.sin()[:, None]

    def turn(self, x: Any, angles: Any) -> Any:
        torch, (cos, sin) = torch_or_skip(), angles
        a, b = x.double().chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


def attention(
    q: Any, k: Any, v: Any, at: Sequence[int], keys_at: Sequence[int], window: int | None
) -> tuple[Any, Any]:
    """``softmax(q k^T / sqrt(d)) v`` over keys at or before each query and within the window; with ``lse``.

    Args:
        q: ``[queries, heads, dim]``, turned.
        k: ``[tokens, kv_heads, dim]``, turned.
        v: likewise.
        at: positions of the queries.
        keys_at: positions of the keys.
        window: tokens a query sees, itself included; None: all before.
    """
    torch = torch_or_skip()
    q, k, v = (t.double().cpu() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    positions, keys = torch.tensor(list(at))[:, None], torch.tensor(list(keys_at))
    hidden = keys > positions
    if window is not None:
        hidden = hidden | (keys <= positions - window)
    scores = torch.einsum("qhd,khd->qhk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(hidden[:, None], -torch.inf)
    return torch.einsum("qhk,khd->qhd", scores.softmax(-1).nan_to_num(), v), scores.logsumexp(-1)


@dataclass(eq=False)
class Segment:
    """Stored tokens of a row, keys before rotation."""

    pages: list[list[int]]
    """Per pool."""
    offset: int
    k: Any
    """``[layers, tokens, kv_heads, dim]``."""
    v: Any
    gone: list[int]
    """Per pool, tokens at its beginning whose pages were given up."""

    def __len__(self) -> int:
        return int(self.k.shape[1])

    def slot(self, pool: int, position: int, page: int) -> tuple[int, int]:
        """Page, and place in it."""
        index, within = divmod(position - self.offset - self.gone[pool], page)
        return self.pages[pool][index], within

    @property
    def positions(self) -> range:
        return range(self.offset, self.offset + len(self))


@dataclass
class Step:
    """A launch that was run."""

    batch: BatchLayout
    plan: Any
    rows: list[tuple[list[Segment], list[int]]]
    q: list[Any] = field(default_factory=list)
    """Per layer, before rotation."""
    got: list[tuple[Any, Any]] = field(default_factory=list)
    """Per layer."""

    def slices(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.batch.q_indptr[:-1], self.batch.q_indptr[1:], strict=True)]


@dataclass(frozen=True)
class Off:
    """A result that is not the formula's."""

    row: int
    position: int
    head: int
    layer: int
    text: str

    def __str__(self) -> str:
        place = f"row {self.row}, query at position {self.position}, head {self.head}, layer {self.layer}"
        return f"{place}: {self.text}"


class World:
    """Buffers full of NaN. Pages hold stale numbers when they are handed out; page 0 never is.

    Args:
        backend: has accepted the layout.
        layout: as adapted.
        model: its shape; ``dtype`` is that of everything.
        device: where the buffers are.
        scattered: pages of a row lie anywhere; False: side by side.
        seed: of numbers and places.
    """

    def __init__(
        self,
        backend: Any,
        layout: KVLayout,
        model: ModelFacts,
        *,
        device: str = "cpu",
        scattered: bool = True,
        seed: int = 0,
    ) -> None:
        torch = torch_or_skip()
        self.layout, self.model, self.device = layout, model, device
        self.dtype = getattr(torch, model.dtype)
        self.rotary = Turn(model.head_dim, device)
        self.buffers: dict[int, dict[str, Any]] = {}
        for pool in layout.pools:
            shape = (PAGES, pool.page_tokens, model.kv_heads, model.head_dim)
            for layer in pool.layers:
                self.buffers[layer] = {
                    name: torch.full(shape, torch.nan, dtype=self.dtype, device=device) for name in "kv"
                }
        self.impl = backend.load(layout, model, device, self.buffers, self.rotary)
        self._random = torch.Generator().manual_seed(seed)
        self._free: list[list[int]] = []
        for _ in layout.pools:
            free = list(range(1, PAGES))
            if scattered:
                Random(seed).shuffle(free)
            self._free.append(free)

    def randn(self, *shape: int) -> Any:
        torch = torch_or_skip()
        drawn = torch.randn(*shape, generator=self._random, dtype=torch.float64)
        return drawn.to(self.dtype).to(self.device)

    def window(self, layer: int) -> int | None:
        return self.model.windows[layer] if self.model.windows else None

    def segment(self, capacity: int, offset: int = 0) -> Segment:
        """Room for so many tokens in every pool."""
        tables: list[list[int]] = []
        for pool, free in zip(self.layout.pools, self._free, strict=True):
            n = 1 if self.layout.addressing == "contiguous_slot" else -(-capacity // pool.page_tokens)
            tables.append([free.pop(0) for _ in range(n)])
            self.fill(pool.layers, tables[-1], STALE)
        m = self.model
        empty = self.randn(m.layers, 0, m.kv_heads, m.head_dim)
        return Segment(tables, offset, empty, empty, [0] * len(tables))

    def fill(self, layers: Iterable[int], pages: Sequence[int], value: float) -> None:
        for layer in layers:
            for buffer in self.buffers[layer].values():
                buffer[list(pages)] = value

    def evict(self, s: Segment) -> None:
        """Give up the pages of which its next token sees nothing: NaN, until somebody else gets them."""
        for i, pool in enumerate(self.layout.pools):
            if pool.window_tokens is None:
                continue
            for _ in range((len(s) + 1 - pool.window_tokens - s.gone[i]) // pool.page_tokens):
                page = s.pages[i].pop(0)
                s.gone[i] += pool.page_tokens
                self._free[i].append(page)
                self.fill(pool.layers, [page], float("nan"))

    def batch(self, rows: Sequence[tuple[Sequence[Segment], Sequence[int]]], **more: Any) -> BatchLayout:
        segments, pools = [s for of, _ in rows for s in of], range(len(self.layout.pools))
        gone = [[s.gone[i] for s in segments] for i in pools]
        return BatchLayout(
            q_indptr=[0, *accumulate(len(at) for _, at in rows)],
            q_positions=[p for _, at in rows for p in at],
            seg_indptr=[0, *accumulate(len(of) for of, _ in rows)],
            seg_tokens=[len(s) for s in segments],
            seg_offset=[s.offset for s in segments],
            seg_pages=[[list(s.pages[i]) for s in segments] for i in pools],
            seg_gone=gone if any(map(any, gone)) else (),
            **more,
        )

    def append(self, *rows: tuple[Sequence[Segment], int | Sequence[int]], **more: Any) -> Step:
        """Store so many tokens more of each row, or tokens at given positions, in its last segment."""
        m, plain = self.model, []
        nothing = self.randn(m.layers, 0, m.kv_heads, m.head_dim)
        fresh: dict[str, list[Any]] = {"k": [nothing], "v": [nothing]}
        for segments, new in rows:
            own = segments[-1]
            end = own.offset + len(own)
            at = list(range(end, end + new)) if isinstance(new, int) else list(new)
            grown = max([len(own), *(p - own.offset + 1 for p in at)])
            for name in "kv":
                drawn = self.randn(m.layers, len(at), m.kv_heads, m.head_dim)
                fresh[name].append(drawn)
                whole = self.randn(m.layers, grown, m.kv_heads, m.head_dim)
                whole[:, : len(getattr(own, name)[0])] = getattr(own, name)
                whole[:, [p - own.offset for p in at]] = drawn
                setattr(own, name, whole)
            plain.append((list(segments), at))
        batch = self.batch(plain, **more)
        step = Step(batch, self.impl.plan(batch, ()), plain)
        torch = torch_or_skip()
        for layer in range(m.layers):
            given = {name: torch.cat([part[layer] for part in parts]) for name, parts in fresh.items()}
            self.impl.append(layer, given, step.plan)
        return step

    def attend(self, step: Step) -> Step:
        """Queries of the new tokens, over all they see."""
        n, m = step.batch.q_indptr[-1], self.model
        for layer in range(m.layers):
            step.q.append(self.randn(n, m.heads, m.head_dim))
            step.got.append(self.impl.run(layer, step.q[layer], step.plan))
        return step

    def step(self, *rows: tuple[Segment, int | Sequence[int]], **more: Any) -> Step:
        """Append, then attend."""
        return self.attend(self.append(*(([s], new) for s, new in rows), **more))

    def wanted(self, step: Step, layer: int, row: int, segments: Iterable[Segment] | None = None) -> Any:
        """The formula for a row, over all its segments or some of them."""
        torch = torch_or_skip()
        of, at = step.rows[row]
        chosen = of if segments is None else list(segments)
        keys_at = [p for s in chosen for p in s.positions]
        k, v = (
            torch.cat([of[0].k[layer, :0], *(getattr(s, name)[layer] for s in chosen)]).double()
            for name in "kv"
        )
        q = self._turned(step.q[layer][step.slices()[row]].double(), at)
        return attention(q, self._turned(k, keys_at), v, at, keys_at, self.window(layer))

    def misplaced(self, step: Step) -> str | None:
        """The first new token whose value is not where its page says; None: all are there."""
        for row, (segments, at) in enumerate(step.rows):
            own = segments[-1]
            for i, pool in enumerate(self.layout.pools):
                for layer, position in product(pool.layers, at):
                    page, within = own.slot(i, position, pool.page_tokens)
                    stored = self.buffers[layer]["v"][page, within]
                    if not bool((stored == own.v[layer, position - own.offset]).all()):
                        return (
                            f"row {row}, position {position}, layer {layer}: its value is not in page {page} "
                            f"of pool {pool.id!r}, place {within}"
                        )
        return None

    def _turned(self, x: Any, positions: Sequence[int]) -> Any:
        torch = torch_or_skip()
        return self.rotary.turn(x, self.rotary.angles(torch.tensor(list(positions), dtype=torch.int64)))

    def compare(
        self, step: Step, layer: int, got: tuple[Any, Any], segments: Iterable[Segment] | None = None
    ) -> Off | None:
        """The first query whose result is not the formula's; None: all are."""
        o, lse = got
        chosen = None if segments is None else list(segments)
        for row, at in enumerate(step.slices()):
            of = None if chosen is None else [s for s in step.rows[row][0] if s in chosen]
            wanted = self.wanted(step, layer, row, of)
            if found := self._off(o[at], lse[at], wanted):
                query, head, text = found
                return Off(row, step.rows[row][1][query], head, layer, text)
        return None

    def _off(self, o: Any, lse: Any, wanted: tuple[Any, Any]) -> tuple[int, int, str] | None:
        torch, limit = torch_or_skip(), TOLERANCE[self.model.dtype]
        o, lse = o.double().cpu(), lse.double().cpu()
        off_o = ((o - wanted[0]).abs() > limit * (1 + wanted[0].abs())).any(-1) | o.isnan().any(-1)
        off_lse = ~torch.isclose(lse, wanted[1], rtol=limit, atol=limit)
        bad = (off_o | off_lse).nonzero()
        if not len(bad):
            return None
        query, head = map(int, bad[0])
        if bool(off_lse[query, head]) and not bool(off_o[query, head]):
            a, b = float(lse[query, head]), float(wanted[1][query, head])
            return query, head, f"lse is {a:.6g}, not {b:.6g}"
        if bool(o[query, head].isnan().any()):
            return query, head, "o is NaN"
        worst = int((o - wanted[0])[query, head].abs().argmax())
        a, b = float(o[query, head, worst]), float(wanted[0][query, head, worst])
        return query, head, f"o is {a:.6g} instead of {b:.6g} in dimension {worst}"
