"""``sdpa`` against the formula, written down here in float64, over every way KV can lie in memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from servelab.core.errors import CapabilityError
from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import BatchLayout
from servelab.core.layout import KVLayout, Pool
from servelab.plugins.executors.torch.rope import RotaryEmbedding
from servelab.plugins.kernels import TABLE
from servelab.plugins.kernels.sdpa.backend import Sdpa
from servelab.plugins.kernels.sdpa.impl import SdpaImpl

INF = float("inf")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WINDOWS: list[tuple[int | None, ...]] = [(), (1, None), (3, 5), (None, 16)]
PAGES = 600


def formula(
    q: Tensor, k: Tensor, v: Tensor, at: Sequence[int], keys_at: Sequence[int], window: int | None = None
) -> tuple[Tensor, Tensor]:
    """``softmax(q k^T / sqrt(d)) v`` over keys at or before the query, and within the window; with lse."""
    q, k, v = q.double(), k.double(), v.double()
    o, lse = torch.zeros_like(q), torch.full(q.shape[:2], -INF, dtype=torch.float64)
    for i, position in enumerate(at):
        seen = [
            j for j, p in enumerate(keys_at) if p <= position and (window is None or p > position - window)
        ]
        for h in range(q.shape[1]):
            of = h // (q.shape[1] // k.shape[1])
            if seen:
                scores = k[seen, of] @ q[i, h] / q.shape[2] ** 0.5
                lse[i, h] = scores.logsumexp(0)
                o[i, h] = scores.softmax(0) @ v[seen, of]
    return o, lse


def turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Halves as complex numbers times those of the angles, in float64."""
    half = x.shape[-1] // 2
    cos, sin = (a.double()[..., half:] for a in angles)
    a, b = x.double().split(half, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@dataclass
class Segment:
    """What a test knows about stored tokens: keys before rotation."""

    pages: list[list[int]]
    """Per pool."""
    offset: int
    k: Tensor
    """``[layers, tokens, kv_heads, head_dim]``."""
    v: Tensor
    gone: list[int] = field(default_factory=list)
    """Per pool, tokens at its beginning whose pages were given up; empty: none."""

    def __len__(self) -> int:
        return self.k.shape[1]

    def slot(self, pool: int, position: int, page: int) -> tuple[int, int]:
        """Page, and place in it."""
        index, within = divmod(position - self.offset - (self.gone[pool] if self.gone else 0), page)
        return self.pages[pool][index], within

    @property
    def positions(self) -> range:
        return range(self.offset, self.offset + len(self))


@dataclass
class Step:
    """A launch that was run, and per layer the queries and what they got."""

    batch: BatchLayout
    plan: Any
    rows: list[tuple[list[Segment], list[int]]]
    q: list[Tensor]
    got: list[tuple[Tensor, Tensor]]

    def slices(self) -> list[slice]:
        return [slice(a, b) for a, b in zip(self.batch.q_indptr[:-1], self.batch.q_indptr[1:], strict=True)]


class World:
    """Buffers full of NaN, pages of which are zeroed when they are handed out; page 0 never is."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        pools: Sequence[tuple[tuple[int, ...], int, str]] = (((0, 1), 4, "post_rope"),),
        group: int = 2,
        windows: tuple[int | None, ...] = (),
        addressing: Any = "block_table",
        scattered: bool = True,
        seed: int = 0,
        head_dim: int = 8,
        pages: int = PAGES,
        evicting: bool = False,
    ) -> None:
        layers, kv = sum(len(pool[0]) for pool in pools), 2
        self.model = ModelFacts(
            name="m",
            layers=layers,
            hidden=1,
            heads=kv * group,
            kv_heads=kv,
            head_dim=head_dim,
            ffn=1,
            vocab=1,
            max_position=4096,
            dtype_bytes=dtype.itemsize,
            windows=windows,
        )
        self.layout = KVLayout(
            addressing=addressing,
            pools=tuple(
                Pool(
                    id=f"p{i}",
                    layers=of,
                    page_tokens=page,
                    bytes_per_page=page,
                    key_space=space,  # type: ignore[arg-type]
                    retention="window" if evicting and windows[of[0]] else "full",
                    window_tokens=windows[of[0]] if evicting else None,
                )
                for i, (of, page, space) in enumerate(pools)
            ),
        )
        self.dtype = dtype
        self.rotary = RotaryEmbedding({"type": "default", "theta": 50.0}, head_dim, dtype)
        self.buffers = {
            layer: {
                name: torch.full((pages, pool.page_tokens, kv, head_dim), torch.nan, dtype=dtype)
                for name in "kv"
            }
            for pool in self.layout.pools
            for layer in pool.layers
        }
        self.attention = SdpaImpl(self.layout, self.model, self.buffers, self.rotary)
        self.random = torch.Generator().manual_seed(seed)
        self.scattered, self._free = scattered, []
        for _ in self.layout.pools:
            free = list(range(1, pages))
            if scattered:
                Random(seed).shuffle(free)
            self._free.append(free)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.dtype)

    def segment(self, capacity: int, offset: int = 0) -> Segment:
        """Room for so many tokens."""
        tables: list[list[int]] = []
        for pool, free in zip(self.layout.pools, self._free, strict=True):
            n = 1 if self.layout.addressing == "contiguous_slot" else -(-capacity // pool.page_tokens)
            assert n * pool.page_tokens >= capacity
            tables.append([free.pop(0) for _ in range(n)])
            for layer in pool.layers:
                for buffer in self.buffers[layer].values():
                    buffer[tables[-1]] = 0
        m = self.model
        empty = torch.empty(m.layers, 0, m.kv_heads, m.head_dim, dtype=self.dtype)
        return Segment(tables, offset, empty, empty, [0] * len(tables))

    def evict(self, s: Segment) -> None:
        """Give up the pages that its next token does not see: NaN, until somebody else gets them."""
        for i, pool in enumerate(self.layout.pools):
            if pool.window_tokens is not None:
                count = (len(s) + 1 - pool.window_tokens - s.gone[i]) // pool.page_tokens
                for _ in range(count):
                    page = s.pages[i].pop(0)
                    s.gone[i] += pool.page_tokens
                    self._free[i].append(page)
                    for layer in pool.layers:
                        for buffer in self.buffers[layer].values():
                            buffer[page] = torch.nan

    def batch(self, rows: Sequence[tuple[Sequence[Segment], Sequence[int]]], **more: Any) -> BatchLayout:
        segments = [s for of, _ in rows for s in of]
        return BatchLayout(
            q_indptr=[0, *accumulate(len(at) for _, at in rows)],
            q_positions=[p for _, at in rows for p in at],
            seg_indptr=[0, *accumulate(len(of) for of, _ in rows)],
            seg_tokens=[len(s) for s in segments],
            seg_offset=[s.offset for s in segments],
            seg_pages=[[s.pages[i] for s in segments] for i in range(len(self.layout.pools))],
            seg_gone=[[s.gone[i] for s in segments] for i in range(len(self.layout.pools))]
            if all(s.gone for s in segments)
            else (),
            **more,
        )

    def step(
        self, *rows: tuple[Segment | list[Segment], int | list[int]], q: Tensor | None = None, **more: Any
    ) -> Step:
        """Append to the last segment of each row so many tokens (or those at given positions), then attend.

        Checks what is written, and every result against the formula.
        """
        plain: list[tuple[list[Segment], list[int]]] = []
        m = self.model
        nothing = self.randn(m.layers, 0, m.kv_heads, m.head_dim)
        captures: dict[str, list[Tensor]] = {"k": [nothing], "v": [nothing]}
        for segments, new in rows:
            segments = segments if isinstance(segments, list) else [segments]
            own = segments[-1]
            end = own.offset + len(own)
            at = list(range(end, end + new)) if isinstance(new, int) else new
            grown = max([len(own), *(p - own.offset + 1 for p in at)])
            places, stored = [p - own.offset for p in at], {}
            for name in "kv":
                fresh = self.randn(m.layers, len(at), m.kv_heads, m.head_dim)
                captures[name].append(fresh)
                whole = torch.empty(m.layers, grown, m.kv_heads, m.head_dim, dtype=self.dtype)
                whole[:, : len(own)] = getattr(own, name)
                whole[:, places] = fresh
                stored[name] = whole
            own.k, own.v = stored["k"], stored["v"]
            plain.append((segments, at))
        batch = self.batch(plain, **more)
        plan = self.attention.plan(batch, ())
        step = Step(batch, plan, plain, [], [])
        for layer in range(m.layers):
            before = {name: buffer.clone() for name, buffer in self.buffers[layer].items()}
            given = {name: torch.cat([c[layer] for c in of]) for name, of in captures.items()}
            self.attention.append(layer, given, plan)
            self._check_written(layer, before, given, step)
            n = batch.q_indptr[-1]
            step.q.append(self.randn(n, m.heads, m.head_dim) if q is None else q[layer])
            step.got.append(self.attention.run(layer, step.q[layer], plan))
            self.check(step, layer, *step.got[layer])
        return step

    def _check_written(
        self, layer: int, before: dict[str, Tensor], given: dict[str, Tensor], step: Step
    ) -> None:
        """The new tokens' slots hold their keys and values; no other slot changed."""
        (index,) = [i for i, pool in enumerate(self.layout.pools) if layer in pool.layers]
        pool = self.layout.pools[index]
        angles = self.rotary.angles(torch.tensor(step.batch.q_positions, dtype=torch.int64))
        if pool.key_space == "post_rope":
            given = {**given, "k": self.rotary.turn(given["k"], angles)}
        token = 0
        for segments, at in step.rows:
            for position in at:
                page, within = segments[-1].slot(index, position, pool.page_tokens)
                for name in "kv":
                    before[name][page, within] = given[name][token]
                token += 1
        for name in "kv":
            assert same(self.buffers[layer][name], before[name])

    def expected(
        self, step: Step, layer: int, row: int, segments: Iterable[Segment] | None = None
    ) -> tuple[Tensor, Tensor]:
        of, at = step.rows[row]
        q = step.q[layer][step.slices()[row]]
        chosen = of if segments is None else list(segments)
        keys_at = [p for s in chosen for p in s.positions]
        angles = self.rotary.angles(torch.tensor(keys_at, dtype=torch.int64))
        none = step.rows[row][0][0].k[layer, :0]
        k, v = (torch.cat([none, *(getattr(s, name)[layer] for s in chosen)]) for name in "kv")
        q = turned(q, self.rotary.angles(torch.tensor(at, dtype=torch.int64)))
        window = self.model.windows[layer] if self.model.windows else None
        return formula(q, turned(k, angles), v, at, keys_at, window)

    def check(self, step: Step, layer: int, o: Tensor, lse: Tensor) -> None:
        assert o.dtype == self.dtype and o.shape == step.q[layer].shape
        assert lse.dtype == torch.promote_types(self.dtype, torch.float32) and lse.shape == o.shape[:2]
        for row, at in enumerate(step.slices()):
            close((o[at], lse[at]), self.expected(step, layer, row), self.dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, NaN equal to itself."""
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30))


def close(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# ------------------------------------------------------------------ the grid


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("group", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
def test_launches_of_every_kind_equal_the_formula(
    dtype: torch.dtype, group: int, page: int, scattered: bool
) -> None:
    pools = [((0, 1), page, "post_rope")]
    windows = WINDOWS[(group + page) % len(WINDOWS)]
    world = World(dtype, pools=pools, group=group, windows=windows, scattered=scattered, seed=group + page)
    a, b, c, d, e = (world.segment(n) for n in (24, 5, 60, 64, 9))
    world.step((a, 1))  # alone, its first token
    world.step((a, 6), (b, 1), (c, 20))  # a chunk, a first token, a prompt
    world.step((c, 33), (a, 1), (d, 1), (b, 1))  # decodes of unlike length after a chunk
    several = world.step((b, 1), (c, 1), (a, 1), (d, 1))  # decodes only, in several paddings
    if page < 16:
        assert len(several.plan.pools[0].decodes) > 1
    world.step((c, 1))  # a decode alone
    world.step((e, 8), (d, 61))
    one = world.step((d, 1), (c, 1))  # decodes only, in one padding
    assert len(one.plan.pools[0].decodes) == 1
    world.step((e, 1), (a, 13), (b, 1), (c, 2))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_windows(dtype: torch.dtype, windows: tuple[int | None, ...]) -> None:
    for group in (1, 3):
        world = World(dtype, windows=windows, group=group, scattered=group == 1)
        a, b, c = (world.segment(60) for _ in range(3))
        world.step((a, 1), (b, 4), (c, 17), masks=("causal", "window", "window"))
        world.step((a, 18), (b, 1), (c, 1))
        for _ in range(4):
            world.step((a, 1), (b, 1), (c, 1))
        world.step((b, 1))
        world.step((b, 9))


@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("space", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("windows", [(1, None), (3, 5), (None, 16), (7, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_pages_that_fell_out_of_a_window_are_not_read(
    dtype: torch.dtype, windows: tuple[int | None, ...], page: int, space: str, scattered: bool
) -> None:
    """Chunks and decodes over what is left equal the formula over everything."""
    pools = [((0,), page, space), ((1,), page, space)]
    if windows == (7, 7):
        pools = [((0, 1), page, space)]
    world = World(dtype, pools=pools, windows=windows, evicting=True, scattered=scattered, seed=page)
    a, b, c = (world.segment(80) for _ in range(3))
    rows = {"a": a, "b": b, "c": c}
    for launch in (
        {"a": 1, "b": 21, "c": 5},
        {"a": 17, "b": 1, "c": 9},
        {"a": 1, "b": 1, "c": 1},
        {"a": 1, "b": 1},
        {"c": 1},
        {"b": 9},
        {"b": 1, "c": 30},
        *[{"a": 1, "b": 1, "c": 1}] * 18,
        {"a": 3, "c": 1},
    ):
        world.step(*((rows[name], n) for name, n in launch.items()))
        for s in rows.values():
            world.evict(s)
    assert all(max(s.gone) > 0 for s in rows.values())
    late = world.segment(40)  # in pages that others gave up
    world.step((late, 30), (a, 1))


def test_long_rows_with_a_window() -> None:
    """Whole blocks of the kernel see nothing."""
    world = World(windows=(7, None), head_dim=4, pools=[((0, 1), 16, "post_rope")])
    a, b, c = (world.segment(1300) for _ in range(3))
    n = 1250
    for s in (a, b, c):
        s.k, s.v = (world.randn(2, n, 2, 4) for _ in range(2))
    batch = world.batch([(s, range(n)) for s in ([a], [b], [c])])
    plan = world.attention.plan(batch, ())
    for layer in range(2):
        k = torch.cat([s.k[layer] for s in (a, b, c)])
        v = torch.cat([s.v[layer] for s in (a, b, c)])
        world.attention.append(layer, {"k": k, "v": v}, plan)
    world.step((a, 1), (b, 1))
    world.step((c, 40))


@pytest.mark.parametrize("group", [1, 4])
def test_contiguous_slots(group: int) -> None:
    world = World(addressing="contiguous_slot", pools=[((0, 1), 64, "post_rope")], group=group, pages=8)
    a, b, c = (world.segment(64) for _ in range(3))
    world.step((a, 9), (b, 1))
    world.step((a, 1), (b, 1), (c, 64))
    world.step((a, 1), (b, 5))
    world.step((a, 1), (b, 1))
    world.step((a, 64 - len(a)))


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
def test_rotation_when_reading_equals_rotation_when_storing(dtype: torch.dtype) -> None:
    results = []
    for space in ("post_rope", "pre_rope"):
        world = World(dtype, pools=[((0, 1), 4, space)], windows=(None, 6), seed=3)
        a, b = world.segment(30), world.segment(30)
        steps = [
            world.step((a, 9), (b, 1)),
            world.step((a, 1), (b, 1)),
            world.step((a, 7)),
            world.step((b, 1)),
        ]
        results.append([tensor for step in steps for state in step.got for tensor in state])
    for stored, read in zip(*results, strict=True):
        torch.testing.assert_close(stored, read, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_pools_differ_in_layers_page_and_key_space() -> None:
    pools = [((0, 2), 4, "post_rope"), ((3, 1), 16, "pre_rope"), ((4,), 1, "post_rope")]
    world = World(pools=pools, windows=(None, 5, None, None, 3))
    a, b, c = (world.segment(40) for _ in range(3))
    world.step((a, 9), (b, 1))
    world.step((a, 1), (b, 1))
    world.step((a, 1), (c, 12), (b, 1))
    world.step((a, 1), (c, 1), (b, 1))


def test_results_do_not_live_in_memory_that_is_used_again() -> None:
    """Batches that grow and shrink share buffers; results of earlier ones stay."""
    world = World()
    rows = [world.segment(80) for _ in range(9)]
    world.step(*((s, 3 + 7 * (i % 3)) for i, s in enumerate(rows)))
    kept = []
    for n in (2, 9, 3, 9, 2, 1, 5):
        step = world.step(*((s, 1) for s in rows[-n:]))
        kept += [(tensor, tensor.clone()) for state in step.got for tensor in state]
    assert all(torch.equal(tensor, then) for tensor, then in kept)


def test_a_launch_can_have_no_rows_and_a_row_no_queries() -> None:
    world = World()
    a, b = world.segment(8), world.segment(8)
    world.step()
    world.step((a, 3), (b, 0))
    world.step((a, 0), (b, 2))
    o, lse = world.attention.run(0, world.randn(0, 4, 8), world.attention.plan(world.batch([([a], [])])))
    assert o.shape == (0, 4, 8) and lse.shape == (0, 4)


@pytest.mark.parametrize("windows", [(), (4, None)], ids=str)
def test_selected_positions_are_written_and_seen_by_position(windows: tuple[int | None, ...]) -> None:
    """Gaps between positions: tokens are computed anew in the middle of what is stored."""
    world = World(windows=windows)
    a, b = world.segment(20), world.segment(20)
    world.step((a, 12), (b, 5))
    world.step((a, [3]), (b, [4]))
    world.step((a, [0, 5, 11]), (b, [2, 3, 5]))
    world.step((a, [0, 3]), (b, [1]))
    world.step((a, [9, 12]), (b, 1))


def test_positions_of_rows_whose_only_segment_begins_later() -> None:
    """Computed anew at a position that equals the number of stored tokens less one."""
    world = World()
    a, b = world.segment(8, 2), world.segment(8, 3)
    world.step((a, 6), (b, 7))
    world.step((a, [5]), (b, [6]))
    world.step((a, 1), (b, 1))


@given(data=st.data(), n=st.integers(1, 40), window=st.sampled_from([None, 1, 4]))
@settings(max_examples=40)
def test_chunks_in_any_split_equal_one_shot(data: st.DataObject, n: int, window: int | None) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=n)) - {n})
    world = World(seed=n, windows=(window, None), pages=60)
    q, k, v = (world.randn(2, n, heads, 8) for heads in (4, 2, 2))
    answers = []
    for ends in ([n], [*cuts, n]):
        s, at, parts = world.segment(n), 0, []
        for end in ends:
            s.k, s.v = k[:, :end], v[:, :end]
            plan = world.attention.plan(world.batch([([s], range(at, end))]))
            for layer in range(2):
                world.attention.append(layer, {"k": k[layer, at:end], "v": v[layer, at:end]}, plan)
            parts.append([world.attention.run(layer, q[layer, at:end], plan) for layer in range(2)])
            at = end
        answers.append([torch.cat([p[layer][i] for p in parts]) for layer in range(2) for i in range(2)])
    for whole, chunked in zip(*answers, strict=True):
        torch.testing.assert_close(whole, chunked, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------ whose memory is read


@pytest.mark.parametrize("page", [1, 4, 16])
@pytest.mark.parametrize("scattered", [True, False], ids=["scattered", "consecutive"])
@pytest.mark.parametrize("windows", [(), (3, 20)], ids=str)
def test_no_row_reads_the_pages_of_another(
    page: int, scattered: bool, windows: tuple[int | None, ...]
) -> None:
    """NaN in all pages a row does not own leaves its result as it was, bit by bit."""
    world = World(pools=[((0, 1), page, "post_rope")], scattered=scattered, windows=windows)
    rows = [world.segment(n) for n in (50, 7, 41, 2, 36)]
    launches = [
        world.step(*((s, n) for s, n in zip(rows, (33, 5, 40, 1, 35), strict=True))),
        world.step(*((s, 1) for s in rows)),
        world.step((rows[0], 8), *((s, 1) for s in rows[1:2])),
    ]
    launch = launches[-1]
    for step in [launches[1], launch]:
        # later tokens are stored by now: what the launch gave is computed once more
        plan = world.attention.plan(step.batch)
        again = [world.attention.run(layer, step.q[layer], plan) for layer in range(2)]
        for (segments, _), at in zip(step.rows, step.slices(), strict=True):
            saved = {i: {n: t.clone() for n, t in of.items()} for i, of in world.buffers.items()}
            for buffers in world.buffers.values():
                for buffer in buffers.values():
                    others = [i for i in range(PAGES) if i not in segments[0].pages[0]]
                    buffer[others] = torch.nan
            for layer in range(2):
                plan = world.attention.plan(step.batch)
                for alone, whole in zip(
                    world.attention.run(layer, step.q[layer], plan), again[layer], strict=True
                ):
                    assert not alone[at].isnan().any()
                    assert torch.equal(alone[at], whole[at])
            for i, of in saved.items():
                for name, tensor in of.items():
                    world.buffers[i][name].copy_(tensor)


# ------------------------------------------------------------------ segments and states


def in_segments(world: World) -> tuple[Step, list[list[Segment]]]:
    """A chunk, decodes and a first token, over one to four segments, with offsets and holes between."""
    stored = [world.segment(n, at) for n, at in ((6, 0), (4, 6), (3, 20), (9, 2), (5, 1), (1, 0))]
    world.step(*((s, n) for s, n in zip(stored, (6, 4, 3, 9, 5, 1), strict=True)))
    own = [world.segment(n, at) for n, at in ((7, 30), (2, 11), (4, 6), (3, 0))]
    rows = [
        [stored[0], stored[1], stored[2], own[0]],
        [stored[3], own[1]],
        [stored[4], own[2]],
        [own[3]],
    ]
    world.step((rows[0], 2), (rows[1], 1), (rows[2], 3))
    return world.step((rows[0], 4), (rows[1], 1), (rows[2], 1), (rows[3], 1)), rows


@pytest.mark.parametrize("space", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
def test_rows_of_several_segments(dtype: torch.dtype, windows: tuple[int | None, ...], space: str) -> None:
    in_segments(World(dtype, pools=[((0, 1), 4, space)], windows=windows))


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@given(order=st.permutations(range(8)), cuts=st.lists(st.integers(0, 8), max_size=4))
@settings(max_examples=12)
def test_partial_states_merge_to_the_whole(
    windows: tuple[int | None, ...], order: list[int], cuts: list[int]
) -> None:
    world = World(windows=windows)
    step, _ = in_segments(world)
    assert step.batch.seg_indptr[-1] == 9
    order = [*order, 8]
    ends = sorted({0, *cuts, 9})
    parts = [order[a:b] for a, b in pairwise(ends)]
    for layer in range(2):
        states = [world.attention.partial(layer, step.q[layer], step.plan, part) for part in [*parts, []]]
        for part, (o, lse) in zip([*parts, []], states, strict=True):
            assert not o.isnan().any() and not lse.isnan().any()
            for row, at in enumerate(step.slices()):
                first = step.batch.seg_indptr[row]
                own = [s for i, s in enumerate(step.rows[row][0], first) if i in part]
                close((o[at], lse[at]), world.expected(step, layer, row, own), torch.float64)
        close(world.attention.merge(states), step.got[layer], torch.float64)
        close(world.attention.merge(states[::-1]), step.got[layer], torch.float64)
        nested = world.attention.merge([world.attention.merge(states[:2]), *states[2:]])
        close(nested, step.got[layer], torch.float64)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d)[6:])
def test_states_are_wide_and_the_empty_set_is_nothing(dtype: torch.dtype) -> None:
    world = World(dtype)
    step, _ = in_segments(world)
    wide = torch.promote_types(dtype, torch.float32)
    o, lse = world.attention.partial(0, step.q[0], step.plan, [])
    assert o.dtype == lse.dtype == wide
    assert torch.equal(o, torch.zeros_like(o)) and torch.equal(lse, torch.full_like(lse, -INF))
    for states in ([(o, lse)] * 3, [(o, lse)]):
        merged = world.attention.merge(states)
        assert torch.equal(merged[0], o) and torch.equal(merged[1], lse)
    parts = [world.attention.partial(0, step.q[0], step.plan, [s]) for s in range(9)]
    assert all(o.dtype == lse.dtype == wide for o, lse in parts)
    whole = world.attention.merge([(o, lse), *parts])
    close(whole, (step.got[0][0].double(), step.got[0][1].double()), dtype)


def test_queries_that_see_nothing() -> None:
    """Before every stored key of a segment, or with all of them out of the window."""
    world = World(torch.float32, windows=(2, None), pools=[((0, 1), 4, "post_rope")])
    first, late, own = world.segment(4), world.segment(4, 30), world.segment(12, 6)
    world.step((first, 4))
    world.step((late, 4))
    step = world.step(([first, late, own], 5))
    for layer, part in ((0, [0]), (0, [1]), (1, [1]), (0, [0, 1])):
        o, lse = world.attention.partial(layer, step.q[layer], step.plan, part)
        assert torch.equal(o, torch.zeros_like(o)) and (lse == -INF).all()
    # a segment without tokens
    step = world.step(([world.segment(4, 2), own], 1))
    o, lse = world.attention.partial(0, step.q[0], step.plan, [0])
    assert torch.equal(o, torch.zeros_like(o)) and (lse == -INF).all()
    # run itself: the query stands before all there is
    lone = world.segment(4)
    world.step((lone, 4))
    lone.offset = 50
    batch = world.batch([([lone], [50])])
    plan = world.attention.plan(batch)
    moved = world.batch([([Segment(lone.pages, 51, lone.k, lone.v), lone], [50])])
    o, lse = world.attention.partial(1, world.randn(1, 4, 8), world.attention.plan(moved), [0])
    assert torch.equal(o, torch.zeros_like(o)) and (lse == -INF).all()
    o, lse = world.attention.run(1, world.randn(1, 4, 8), plan)
    assert not o.isnan().any() and lse.isfinite().all()


@pytest.mark.parametrize("mask", ["tree", "index", "none"])
def test_other_masks_are_refused(mask: Any) -> None:
    world = World()
    a, b = world.segment(4), world.segment(4)
    with pytest.raises(CapabilityError, match=rf"has no '{mask}' mask"):
        world.step((a, 2), (b, 1), masks=("causal", mask))


# ------------------------------------------------------------------ the half without torch


def backend(model: ModelFacts) -> Sdpa:
    return Sdpa(None, type("Context", (), {"model": model})())


def test_layouts_it_cannot_read_are_refused_in_a_sentence_each() -> None:
    model = World().model

    def refused(*pools: dict[str, Any], addressing: Any = "block_table") -> list[str]:
        made = tuple(
            Pool(**{"id": f"p{i}", "layers": (0, 1), "page_tokens": 4, "bytes_per_page": 4, **p})
            for i, p in enumerate(pools or ({},))
        )
        return list(backend(model).refuses(KVLayout(addressing=addressing, pools=made), model, None))

    for addressing in ("block_table", "contiguous_slot"):
        for space in ("post_rope", "pre_rope"):
            assert refused({"key_space": space}, addressing=addressing) == []
    assert refused({"layers": (1,)}, {"layers": (0,)}) == []
    for addressing in ("segments", "remote_spans"):
        assert refused(addressing=addressing) == [f"it does not read {addressing} addressing"]
    for space in ("block_local", "latent", "x", "x_delta"):
        assert refused({"key_space": space}) == [f"pool 'p0' stores keys as {space}"]
    assert refused({"codec": "int8"}) == ["pool 'p0' is encoded as 'int8', which it cannot decode"]
    for captures in (("k",), ("x",), ("k", "v", "x"), ("v", "k")):
        assert refused({"captures": captures}) == [
            f"pool 'p0' stores {', '.join(captures)} instead of k and v"
        ]
    assert refused({"retention": "repack"}) == ["pool 'p0' lets tokens go (retention 'repack')"]
    assert refused({"retention": "window", "window_tokens": 4}) == []
    assert refused({"head_group": (0,)}) == ["pool 'p0' holds some of the heads only"]
    assert refused({}, {"layers": (1,)}) == ["layer 1 is in 2 pools instead of one"]
    assert refused({"layers": (0,)}) == ["layer 1 is in 0 pools instead of one"]
    wrong = {"layers": (0,), "codec": "int8", "key_space": "x", "head_group": (0,), "captures": ("x",)}
    assert len(refused(wrong, addressing="segments")) == 6


def test_what_it_declares_is_what_it_reads() -> None:
    (spec,) = [spec for spec in TABLE if spec.name == "sdpa"]
    caps = Sdpa.caps
    spaces = caps.key_spaces - {"post_rope"}
    assert {f"kernel.{name}" for name in (*caps.addressings, *spaces)} | {"kernel.partial"} == spec.provides
    layout = World().layout
    assert backend(World().model).adapt(layout, World().model) is layout


@settings(max_examples=60)
@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 30)), max_size=4),
    window=st.none() | st.integers(1, 14),
    bits=st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)
def test_cost_counts_pairs_and_bytes(
    rows: list[tuple[int, int]], window: int | None, bits: torch.dtype
) -> None:
    world = World(bits, windows=(window, None), pages=2)
    for layer, limit in ((0, window), (1, None)):
        pairs, read = 0, 0
        for n, context in rows:
            seen = [
                {j for j in range(i + 1) if limit is None or j > i - limit}
                for i in range(context, context + n)
            ]
            pairs += sum(map(len, seen))
            read += len(set().union(*seen))
        cost = backend(world.model).cost(layer, [n for n, _ in rows], [c for _, c in rows], world.layout)
        # two products of head_dim multiply-adds per pair and head; K and V of all KV heads once
        assert cost.flops == pairs * 4 * 2 * 2 * 8
        assert cost.device_bytes == read * 2 * 2 * 8 * bits.itemsize
        assert cost.math_bits == 8 * bits.itemsize and cost.host_bytes == cost.net_bytes == 0


def test_load_builds_the_half_that_computes() -> None:
    world = World()
    made = backend(world.model).load(world.layout, world.model, "cpu", world.buffers, world.rotary)
    assert isinstance(made, SdpaImpl)
