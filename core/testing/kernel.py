"""Conformance of attention backends: everything they claim to read, against the formula in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise, product
from random import Random
from typing import Any, ClassVar

import pytest

from servelab.core.errors import ServeLabError
from servelab.core.facts import ModelFacts
from servelab.core.layout import KVLayout, Pool
from servelab.core.testing.attention import Segment, Step, World
from servelab.core.testing.suite import PluginSuite
from servelab.core.testing.tensors import check_describes_without_tensors, modules_of, torch_or_skip

FORMULA = (
    "run: attention of all rows over all they see: softmax(q k^T / sqrt(d)) v, causal, within the window"
)
CLAIMS = {
    "kernel.block_table": ("addressings", "block_table"),
    "kernel.contiguous_slot": ("addressings", "contiguous_slot"),
    "kernel.segments": ("addressings", "segments"),
    "kernel.remote_spans": ("addressings", "remote_spans"),
    "kernel.pre_rope": ("key_spaces", "pre_rope"),
    "kernel.block_local": ("key_spaces", "block_local"),
    "kernel.latent": ("key_spaces", "latent"),
    "kernel.tree_mask": ("masks", "tree"),
    "kernel.index_mask": ("masks", "index"),
    "kernel.noncausal": ("masks", "none"),
}
"""Capability of the spec -> where ``caps`` says the same."""
SLOT = 64
"""Tokens of a contiguous slot."""


class KernelSuite(PluginSuite):
    """What is true of every attention backend.

    Results are compared with the formula, so a backend that reads chosen pages only, or drops tokens, is
    held to the rest: layouts, appending, costs.
    """

    kind: ClassVar[str] = "kernel"
    contract: ClassVar[str] = "servelab/core/families/kernel.py"
    dtypes: ClassVar[tuple[str, ...]] = ("float64", "float32", "bfloat16")
    """Of queries and KV that it runs; the first in most checks."""
    device: ClassVar[str] = "cpu"

    # ------------------------------------------------------- without tensors

    def test_describing_needs_no_tensors(self) -> None:
        """Building it, adapting and refusing layouts and pricing import no tensor library."""

        def describe() -> None:
            model = _model()
            backend = self.make(model=model)
            layout = backend.adapt(_layout(model), model)
            backend.refuses(layout, model, None)
            backend.cost(0, [1, 5], [3, 0], layout)

        check_describes_without_tensors(self, modules_of(self), describe)

    def test_capabilities_agree(self) -> None:
        """The spec's capabilities and ``caps`` say the same."""
        caps = self.make().caps
        for capability, (name, value) in CLAIMS.items():
            if (value in getattr(caps, name)) != self.provides(capability):
                declared = "declares" if self.provides(capability) else "does not declare"
                self.fail(
                    f"{self.name} {declared} {capability!r}; caps.{name} is {sorted(getattr(caps, name))}",
                    rule="a spec declares what the plugin can do; caps are what a backend reads",
                    do=f"make 'provides' of the spec and caps.{name} agree",
                )

    def test_layouts_are_accepted_or_refused(self) -> None:
        """It refuses with a sentence what caps do not name, and accepts what they do."""
        model = _model()
        backend = self.make(model=model)
        caps, sizes = backend.caps, self._page_sizes(backend)
        plain = self._layouts(backend, model)
        for layout, what in plain:
            if reasons := list(backend.refuses(backend.adapt(layout, model), model, None)):
                self.fail(
                    f"{self.name} refuses {what}, which its caps name: {'; '.join(map(str, reasons))}",
                    rule="refuses: each capability it lacks for this layout; empty: accepted",
                    do="accept what caps name, or leave it out of caps",
                )
        foreign: list[tuple[KVLayout, str]] = []
        base = _layout(model, page=sizes[0])
        pool = base.pools[0]
        for addressing in ("block_table", "contiguous_slot", "segments", "remote_spans"):
            if addressing not in caps.addressings:
                foreign.append((replace(base, addressing=addressing), f"{addressing} addressing"))
        for space in ("post_rope", "pre_rope", "block_local", "latent", "x", "x_delta"):
            if space not in caps.key_spaces:
                changed = replace(pool, key_space=space)
                foreign.append((replace(base, pools=(changed,)), f"key space {space}"))
        changes: list[tuple[dict[str, Any], str]] = [({"codec": "nobodys"}, "the codec 'nobodys'")]
        if not caps.head_groups:
            changes.append(({"head_group": (0,)}, "a pool of one KV head of two"))
        if caps.page_tokens:
            changes.append(({"page_tokens": max(caps.page_tokens) + 1}, "a page size of none of its own"))
        for change, what in changes:
            foreign.append((replace(base, pools=(replace(pool, **change),)), what))
        for layout, what in foreign:
            adapted = backend.adapt(layout, model)
            reasons = backend.refuses(adapted, model, None)
            if isinstance(reasons, str) or not all(isinstance(r, str) and r.strip() for r in reasons):
                self.fail(
                    f"{self.name}: refuses() of {what} is {reasons!r:.80}",
                    rule="refuses: each capability it lacks for this layout, as a sentence",
                    do="return a list of sentences",
                )
            if not reasons and adapted == layout:
                self.fail(
                    f"{self.name} accepts {what}, which its caps do not name",
                    rule="caps: what a backend reads. Anything else in a layout is refused by name",
                    do="name what is lacking in refuses()",
                )

    def test_cost_counts_pairs_and_bytes(self) -> None:
        """Operations are at least those of the pairs that see each other, bytes at least the KV they see;
        neither much more than if each query read for itself, nor less for more work.
        """
        model = replace(_model(layers=2), windows=(None, 5))
        backend = self.make(model=model)
        layout = backend.adapt(_layout(model), model)
        approximate = self.provides("kernel.select") or self.provides("kernel.evicts")
        page = max(pool.page_tokens for pool in layout.pools)
        cases = [([1], [0]), ([1], [400]), ([7], [3]), ([1, 1, 4], [20, 2, 0]), ([], []), ([0], [6])]
        for layer, (new, stored) in product(range(2), cases):
            window, cost = model.windows[layer], backend.cost(layer, new, stored, layout)
            pairs = seen = most = 0
            for n, context in zip(new, stored, strict=True):
                keys: set[int] = set()
                for position in range(context, context + n):
                    first = 0 if window is None else max(0, position - window + 1)
                    keys.update(range(first, position + 1))
                    pairs += position + 1 - first
                seen += len(keys)
                most += n * (min(context + n, (window or context) + n) + 2 * page)  # whole pages, both ends
            flops, unit = 4 * model.heads * model.head_dim, model.kv_bytes_per_token_layer
            what = (
                f"{self.name}: layer {layer} (window {window}), {new} new tokens after {stored} stored, costs"
            )
            if approximate:
                pairs = seen = 0
            if not flops * pairs <= cost.flops <= 2 * flops * most:
                self.fail(
                    f"{what} {cost.flops} operations; {pairs} pairs of query and key see each other, "
                    f"{flops} operations each",
                    rule="cost: one layer for rows of q_tokens new tokens after contexts stored ones",
                    do="count 4 heads head_dim for each pair that the causal mask and the window leave",
                )
            if not seen * unit <= cost.device_bytes <= most * unit:
                self.fail(
                    f"{what} {cost.device_bytes} bytes; {seen} tokens are seen, of {unit} bytes each",
                    rule="cost: bytes read as it reads them; OpCost: bytes are moved, each counted once",
                    do="count the K and V of the tokens that the rows see in this layer",
                )
        before = None
        for context in (0, 1, 16, 17, 100):
            one = backend.cost(0, [2], [context], layout)
            if before is not None and (one.flops < before.flops or one.device_bytes < before.device_bytes):
                self.fail(
                    f"{self.name}: two tokens after {context} stored ones cost less than after fewer",
                    rule="cost: one layer for rows of q_tokens new tokens after contexts stored ones",
                    do="make cost() grow with the context",
                )
            before = one

    # --------------------------------------------------------------- results

    def test_prefill(self) -> None:
        """Whole prompts of many lengths, alone and together."""
        for dtype in self.dtypes:
            world = self._world(dtype=dtype)
            rows = [world.segment(n) for n in (1, 2, 5, 16, 33)]
            self._launch(world, *((s, n) for s, n in zip(rows, (1, 2, 5, 16, 33), strict=True)))
            alone = world.segment(21)
            self._launch(world, (alone, 21))

    def test_decode(self) -> None:
        """One query per row, rows of equal and of very unlike lengths, alone and together."""
        for dtype in self.dtypes:
            world = self._world(dtype=dtype)
            rows = [world.segment(70) for _ in range(6)]
            self._launch(world, *((s, n) for s, n in zip(rows, (1, 2, 15, 16, 17, 60), strict=True)))
            for _ in range(4):
                self._launch(world, *((s, 1) for s in rows))
            self._launch(world, (rows[3], 1))
            self._launch(world, (rows[5], 1), (rows[0], 1))

    def test_mixed_batches(self) -> None:
        """Chunks, decodes and first tokens in one launch, in any order."""
        for dtype in self.dtypes:
            world = self._world(dtype=dtype)
            a, b, c, d = (world.segment(60) for _ in range(4))
            self._launch(world, (a, 1))
            self._launch(world, (a, 6), (b, 1), (c, 20))
            self._launch(world, (c, 7), (a, 1), (d, 1), (b, 1))
            self._launch(world, (b, 1), (c, 1), (a, 1), (d, 9))
            self._launch(world, (d, 2), (a, 13), (b, 1), (c, 2))

    def test_chunks_in_any_split(self) -> None:
        """A prompt in chunks gives what it gives in one launch, wherever it is cut."""
        random = Random(7)
        for n in (1, 2, 5, 17, 40):
            for _ in range(4):
                cuts = sorted(random.sample(range(1, n), random.randrange(min(n, 6))) if n > 1 else [])
                world = self._world(seed=n)
                s = world.segment(n)
                for start, end in pairwise([0, *cuts, n]):
                    self._launch(
                        world,
                        (s, end - start),
                        what=f"a prompt of {n} tokens cut at {cuts}",
                        do="the causal mask is aligned to the end: queries see what was stored before them",
                    )

    def test_heads_share_their_kv_head(self) -> None:
        """Any number of query heads per KV head: head h reads KV head h // group."""
        for kv_heads, group in ((1, 1), (2, 1), (2, 2), (1, 4), (2, 3), (3, 2)):
            world = self._world(model=_model(kv_heads=kv_heads, group=group))
            a, b = world.segment(30), world.segment(30)
            for rows in (((a, 9), (b, 1)), ((a, 1), (b, 1)), ((a, 1),), ((b, 4), (a, 1))):
                self._launch(
                    world,
                    *rows,
                    what=f"{kv_heads * group} heads over {kv_heads} KV heads",
                    do="query head h belongs to KV head h // (heads // kv_heads)",
                )

    def test_page_sizes(self) -> None:
        """Every page size it claims (or 1, 3, 4, 16), rows that end at, before and after a page's end."""
        self._needs("addressings", "block_table")
        for page, scattered in product(self._page_sizes(self.make()), (True, False)):
            world = self._world(page=page, scattered=scattered)
            rows = [world.segment(2 * page + 6) for _ in range(3)]
            lengths = (page, max(1, page - 1), page + 1)
            where = "scattered" if scattered else "consecutive"
            for new in (lengths, (1, 1, 1), (1, 1, 1), (3, 1, 2)):
                self._launch(
                    world,
                    *zip(rows, new, strict=True),
                    what=f"{where} pages of {page} tokens",
                    do="token i of a row is in its page i // page_tokens, at place i % page_tokens",
                )

    def test_contiguous_slots(self) -> None:
        """Rows in one slot each, up to its last place."""
        self._needs("addressings", "contiguous_slot")
        world = self._world(addressing="contiguous_slot", page=SLOT)
        a, b, c = (world.segment(SLOT) for _ in range(3))
        for rows in (
            ((a, 9), (b, 1)),
            ((a, 1), (b, 1), (c, SLOT)),
            ((a, 1), (b, 5)),
            ((a, SLOT - 11), (b, 1)),
        ):
            self._launch(
                world,
                *rows,
                what="contiguous slots",
                do="seg_pages holds one slot id: the row's tokens follow one another from its first place",
            )

    def test_windows(self) -> None:
        """Layers with sliding windows of different sizes: a query sees itself and window - 1 before it."""
        self._needs("masks", "window")
        for windows in ((1, None), (3, 5), (None, 16)):
            world = self._world(model=replace(_model(layers=2), windows=windows))
            a, b, c = (world.segment(60) for _ in range(3))
            launches = [((a, 1), (b, 4), (c, 17)), ((a, 18), (b, 1), (c, 1)), *[((a, 1), (b, 1), (c, 1))] * 3]
            for rows in (*launches, ((b, 1),), ((b, 9),)):
                self._launch(
                    world,
                    *rows,
                    what=f"layers with windows {windows}",
                    do="of a window w, hide keys at or before position - w; each layer has its own",
                )

    def test_pages_that_left_the_window(self) -> None:
        """Pages before the window are given back and hold NaN: ``seg_gone`` says how many tokens went."""
        self._needs("masks", "window")
        self._needs("addressings", "block_table")
        sizes = self._page_sizes(self.make())
        cases = product(((1, None), (3, 5)), {sizes[0], sizes[-1]}, self._spaces())
        for windows, page, space in cases:
            model = replace(_model(layers=2), windows=windows)
            pools = tuple(
                _pool(
                    f"p{layer}",
                    (layer,),
                    page,
                    key_space=space,
                    retention="window" if window else "full",
                    window_tokens=window,
                )
                for layer, window in enumerate(windows)
            )
            layout = KVLayout(addressing="block_table", pools=pools)
            if self.make(model=model).refuses(layout, model, None):
                pytest.skip(f"{self.name} reads no pool that gives pages back")
            world = self._world(model=model, layout=layout)
            a, b = world.segment(50), world.segment(50)
            for rows in (((a, 1), (b, 21)), ((a, 17), (b, 1)), *[((a, 1), (b, 1))] * 4, ((b, 6),)):
                self._launch(
                    world,
                    *rows,
                    what=f"window pools {windows} in pages of {page} that were given back",
                    do="the first stored token of a segment is at seg_offset + seg_gone, in its first page",
                )
                for s in (a, b):
                    world.evict(s)

    def test_key_spaces(self) -> None:
        """Each key space it claims gives the same results."""
        for space, dtype in product(self._spaces(), self.dtypes):
            world = self._world(dtype=dtype, space=space)
            a, b = world.segment(30), world.segment(30)
            for rows in (((a, 9), (b, 1)), ((a, 1), (b, 1)), ((a, 7),), ((b, 1),), ((b, 12), (a, 1))):
                self._launch(
                    world,
                    *rows,
                    what=f"keys stored as {space}",
                    do="turn keys once: before storing (post_rope), or when reading, at their own positions "
                    "(pre_rope); turn queries always",
                )

    def test_pools_of_their_own(self) -> None:
        """Layers in pools of different page sizes and key spaces: each layer reads its own pool's pages."""
        self._needs("addressings", "block_table")
        sizes, spaces = self._page_sizes(self.make()), self._spaces()
        pools = (
            _pool("a", (0, 2), sizes[0], key_space=spaces[0]),
            _pool("b", (3, 1), sizes[-1], key_space=spaces[-1]),
        )
        layout = KVLayout(addressing="block_table", pools=pools)
        world = self._world(model=_model(layers=4), layout=layout)
        a, b, c = (world.segment(30) for _ in range(3))
        for rows in (((a, 9), (b, 1)), ((a, 1), (b, 1)), ((a, 1), (c, 12), (b, 1)), ((c, 1), (a, 3))):
            self._launch(
                world,
                *rows,
                what="two pools of other layers, pages and key spaces",
                do="take seg_pages, page size and key space of the pool that has the layer",
            )

    def test_positions_with_gaps(self) -> None:
        """Tokens computed anew amid what is stored are written to and masked by their positions."""
        world = self._world()
        a, b = world.segment(24), world.segment(24)
        self._launch(world, (a, 12), (b, 5))
        for rows in (((a, [3]), (b, [4])), ((a, [0, 5, 11]), (b, [2, 3])), ((a, [9, 12]), (b, 1))):
            self._launch(
                world,
                *rows,
                what="tokens at positions with gaps between them",
                do="store and mask by q_positions, not by the order of the queries",
            )

    def test_lse_is_natural(self) -> None:
        """The second half of a state is ``log(sum(exp(scores)))``, base e."""
        world = self._world()
        step = self._attend(world, (world.segment(12), 12))
        for layer in range(world.model.layers):
            (_, got), (_, wanted) = step.got[layer], world.wanted(step, layer, 0)
            got, limit = got.double().cpu(), 1e-3
            if bool((got - wanted).abs().max() < limit):
                continue
            shared = got / wanted
            two = bool(((shared - 1 / math.log(2)).abs() < limit).all())
            self.fail(
                f"{self.name}: lse of a query is {float(got[5, 0]):.6g} instead of {float(wanted[5, 0]):.6g}"
                + (": it is in base 2" if two else ""),
                rule="a partial result is a state (o, lse), lse natural",
                do="multiply by ln 2 what a kernel gives in base 2; include the scale 1 / sqrt(head_dim)",
            )

    def test_rows_that_see_nothing(self) -> None:
        """``(0, -inf)`` for a query before everything stored; launches without rows, rows without queries."""
        world = self._world()
        late = world.segment(12, offset=6)
        self._launch(world, (late, 5))
        batch = world.batch([([late], [2])])
        step = Step(batch, world.impl.plan(batch, ()), [([late], [2])])
        world.attend(step)
        for o, lse in step.got:
            if bool(o.any()) or not bool((lse == -math.inf).all()) or bool(o.isnan().any()):
                self.fail(
                    f"{self.name}: a query at position 2, before all stored tokens (6 to 10), gives o of up "
                    f"to {float(o.abs().max()):.3g} and lse {float(lse.flatten()[0]):.3g}",
                    rule="rows that see nothing give (0, -inf)",
                    do="where all keys of a query are hidden, give 0 and -inf instead of softmax of nothing",
                )
        self._launch(world)
        a, b = world.segment(8), world.segment(8)
        self._launch(world, (a, 3), (b, 0))
        self._launch(world, (a, 0), (b, 2))

    # --------------------------------------------------------- whose memory

    def test_append_writes_its_slots_only(self) -> None:
        """New tokens are stored where they belong, and no other place changes."""
        torch = torch_or_skip()
        for addressing in self._addressings():
            world = self._world(addressing=addressing, page=SLOT if addressing == "contiguous_slot" else None)
            a, b = world.segment(20), world.segment(20)
            world.append(([a], 6), ([b], 1))
            for new_a, new_b in ((1, 1), (5, 3), ([2, 4], 1)):
                before = {
                    layer: {name: buffer.clone() for name, buffer in of.items()}
                    for layer, of in world.buffers.items()
                }
                step = world.append(([a], new_a), ([b], new_b))
                for index, pool in enumerate(world.layout.pools):
                    mine = {s.slot(index, p, pool.page_tokens) for (s,), at in step.rows for p in at}
                    for layer, name in product(pool.layers, "kv"):
                        now, was = world.buffers[layer][name], before[layer][name]
                        changed = (now != was) & ~(now.isnan() & was.isnan())
                        places = {tuple(map(int, x)) for x in changed.flatten(2).any(2).nonzero()}
                        if places == mine and bool(torch.isfinite(now[tuple(zip(*mine, strict=True))]).all()):
                            continue
                        extra, lacking = sorted(places - mine), sorted(mine - places)
                        self.fail(
                            f"{self.name}: append() of {name} in layer {layer} writes to places "
                            f"(page, token) {extra[:4]}, which are not the new tokens', not to {lacking[:4]}",
                            rule="append: store new tokens",
                            do="store each token at its position's page and place, and nothing else",
                        )

    def test_foreign_pages_are_not_read(self) -> None:
        """NaN in all pages of other rows, and in free ones, reaches nobody."""
        world = self._world()
        rows = [world.segment(n) for n in (50, 7, 41, 2, 36)]
        self._launch(world, *((s, n) for s, n in zip(rows, (33, 5, 40, 1, 35), strict=True)))
        together = self._attend(world, *((s, 1) for s in rows))
        for r, s in enumerate(rows):
            kept = {layer: {n: b.clone() for n, b in of.items()} for layer, of in world.buffers.items()}
            for other in rows:
                if other is not s:
                    for index, pool in enumerate(world.layout.pools):
                        world.fill(pool.layers, other.pages[index], math.nan)
            plan = world.impl.plan(together.batch, ())
            for layer in range(world.model.layers):
                at = together.slices()[r]
                o, lse = world.impl.run(layer, together.q[layer], plan)
                wanted = world.wanted(together, layer, r)
                if found := world._off(o[at], lse[at], wanted):
                    self.fail(
                        f"{self.name}: row {r} of {len(rows)} is changed by NaN in the pages of the others: "
                        f"{found[2]}",
                        rule="a row reads its own pages",
                        do="pad tables with the row's own page; hide with -inf, since NaN times 0 is NaN",
                    )
            for layer, of in world.buffers.items():
                for name, buffer in of.items():
                    buffer.copy_(kept[layer][name])

    # ------------------------------------------------------ states and merges

    def test_partial_states_merge_to_the_whole(self) -> None:
        """States over some segments, merged in any order, give attention over all of them."""
        self.needs("kernel.partial")
        random = Random(3)
        for dtype, space in product(self.dtypes, self._spaces()):
            world = self._world(dtype=dtype, space=space)
            parts = [world.segment(12, offset) for offset in (0, 7, 12)]
            other = [world.segment(9)]
            self._launch(world, (parts[0], 7))
            self._launch(world, (parts[1], 5))
            step = world.append((parts, 6), (other, 4))
            world.attend(step)
            if off := next(
                filter(None, (world.compare(step, i, got) for i, got in enumerate(step.got))), None
            ):
                self.fail(
                    f"{self.name}: a row of three segments: {off}",
                    rule=FORMULA,
                    do="read all segments of a row, each from its seg_offset on",
                )
            for layer in range(world.model.layers):
                states = [world.impl.partial(layer, step.q[layer], step.plan, [i]) for i in range(4)]
                for i, (state, s) in enumerate(zip(states, [*parts, *other], strict=True)):
                    if off := world.compare(step, layer, state, [s]):
                        self.fail(
                            f"{self.name}: partial() over segment {i} alone: {off}",
                            rule="partial: attention over some segments only; the empty set is (0, -inf)",
                            do="rows of which no segment is asked give (0, -inf); masks go by position",
                        )
                for _ in range(4):
                    random.shuffle(states)
                    if off := world.compare(step, layer, world.impl.merge(states)):
                        self.fail(
                            f"{self.name}: merged states of the segments: {off}",
                            rule="merge: the state over the union of disjoint sets; order does not matter",
                            do="weight each o by exp(lse - logsumexp of all), 0 where nobody sees anything",
                        )
                some = world.impl.merge([states[0], world.impl.merge(states[1:3])])
                if off := world.compare(step, layer, world.impl.merge([some, states[3]])):
                    self.fail(
                        f"{self.name}: merging what is merged: {off}",
                        rule="merge: the state over the union of disjoint sets; order does not matter",
                        do="return the merged lse beside the merged o",
                    )

    # ----------------------------------------------------------- good manners

    def test_masks_it_lacks_are_refused(self) -> None:
        """A launch with a mask that caps do not name is refused in ``plan``."""
        world = self._world()
        masks = self.make().caps.masks
        s = world.segment(8)
        self._launch(world, (s, 4))
        for mask in ("tree", "index", "none"):
            if mask in masks:
                continue
            trees = {0: [-1]} if mask == "tree" else {}
            try:
                world.impl.plan(world.batch([([s], [4])], masks=(mask,), trees=trees), ())
            except ServeLabError:
                continue
            self.fail(
                f"{self.name} takes a launch with the mask {mask!r}, which its caps do not name",
                rule="caps.masks: anything else is refused by name",
                do="raise CapabilityError in plan() for masks it does not have",
            )

    def test_what_is_given_is_left_alone(self) -> None:
        """Queries and captures are not changed, ``run`` writes to no page, and results are the caller's."""
        world = self._world()
        rows = [world.segment(40) for _ in range(4)]
        kept: list[tuple[Any, Any]] = []
        for new in ((9, 1, 20, 3), (1, 1, 1, 1), (1, 7, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1)):
            step = world.append(*(([s], n) for s, n in zip(rows, new, strict=True)))
            before = [buffer.clone() for of in world.buffers.values() for buffer in of.values()]
            world.attend(step)
            after = [buffer for of in world.buffers.values() for buffer in of.values()]
            if any(
                bool(((a != b) & ~(a.isnan() & b.isnan())).any()) for a, b in zip(after, before, strict=True)
            ):
                self.fail(
                    f"{self.name}: run() changes stored KV",
                    rule="append stores; run reads",
                    do="work on copies of what is read",
                )
            for layer, q in enumerate(step.q):
                given = q.clone()
                world.impl.run(layer, q, step.plan)
                if not bool((q == given).all()):
                    self.fail(
                        f"{self.name}: run() changes the queries it is given",
                        rule="q_pre are before rotation, and the caller's",
                        do="turn into a new tensor",
                    )
            kept += [(tensor, tensor.clone()) for state in step.got for tensor in state]
        if any(not bool((tensor == then).all()) for tensor, then in kept):
            self.fail(
                f"{self.name}: results of a launch changed during later ones",
                rule="run gives a state; it is the caller's",
                do="return new memory; scratch memory is for what is between",
            )

    def test_the_same_every_time(self) -> None:
        """Equal launches give equal results, bit by bit."""
        results: list[list[Any]] = []
        for _ in range(2):
            world = self._world(seed=5)
            a, b, c = (world.segment(40) for _ in range(3))
            steps = [
                world.step((a, 20), (b, 3)),
                world.step((a, 1), (b, 1), (c, 7)),
                world.step((a, 1), (b, 1)),
            ]
            results.append([t for step in steps for state in step.got for t in state])
        if any(not bool((x == y).all()) for x, y in zip(*results, strict=True)):
            self.fail(
                f"{self.name}: the same launches give different results",
                rule="one seed gives one run",
                do="sum in a fixed order (no atomics), and let no result depend on where memory lies",
            )

    def test_rows_do_not_depend_on_the_batch(self) -> None:
        """With ``kernel.batch_invariant``: a row by itself gives the same, bit by bit."""
        declared = self.make().caps.batch_invariant
        if declared != self.provides("kernel.batch_invariant"):
            self.fail(
                f"{self.name}: caps.batch_invariant is {declared}, the spec says otherwise",
                rule="kernel.batch_invariant: a row's result does not depend on the batch",
                do="make both say the same",
            )
        if not declared:
            pytest.skip(f"{self.name} does not declare 'kernel.batch_invariant'")
        world = self._world()
        rows = [world.segment(40) for _ in range(4)]
        world.step(*((s, n) for s, n in zip(rows, (30, 3, 16, 1), strict=True)))
        step = world.step(*((s, n) for s, n in zip(rows, (1, 1, 5, 1), strict=True)))
        for r, at in enumerate(step.slices()):
            batch = world.batch([step.rows[r]])
            plan = world.impl.plan(batch, ())
            for layer in range(world.model.layers):
                alone = world.impl.run(layer, step.q[layer][at], plan)
                if any(not bool((x == y[at]).all()) for x, y in zip(alone, step.got[layer], strict=True)):
                    self.fail(
                        f"{self.name}: row {r} of a launch gives other bits when it is alone",
                        rule="kernel.batch_invariant: a row's result does not depend on the batch",
                        do="split keys by position, never by how many rows there are; or do not declare it",
                    )

    # ------------------------------------------------------------- what is used

    def _page_sizes(self, backend: Any) -> Sequence[int]:
        return backend.caps.page_tokens or (1, 3, 4, 16)

    def _addressings(self) -> list[str]:
        caps = self.make().caps
        found = [a for a in ("block_table", "contiguous_slot", "segments") if a in caps.addressings]
        return found or pytest.skip(f"{self.name} reads {sorted(caps.addressings)} only")

    def _spaces(self) -> list[str]:
        caps = self.make().caps
        found = [space for space in ("post_rope", "pre_rope") if space in caps.key_spaces]
        return found or pytest.skip(f"{self.name} reads keys as {sorted(caps.key_spaces)} only")

    def _needs(self, name: str, value: str) -> None:
        if value not in getattr(self.make().caps, name):
            pytest.skip(f"{self.name} has no {value!r} in caps.{name}")

    def _layouts(self, backend: Any, model: ModelFacts) -> list[tuple[KVLayout, str]]:
        """What caps name, combined."""
        caps, found = backend.caps, []
        for addressing, space in product(self._addressings(), ("post_rope", "pre_rope")):
            if space not in caps.key_spaces:
                continue
            sizes = (SLOT,) if addressing == "contiguous_slot" else self._page_sizes(backend)
            for page in sizes:
                what = f"{addressing} addressing with keys as {space} in pages of {page}"
                found.append((_layout(model, page=page, space=space, addressing=addressing), what))
        return found

    def _world(
        self,
        *,
        dtype: str | None = None,
        model: ModelFacts | None = None,
        layout: KVLayout | None = None,
        addressing: str | None = None,
        page: int | None = None,
        space: str | None = None,
        scattered: bool = True,
        seed: int = 0,
    ) -> World:
        torch, dtype = torch_or_skip(), dtype or self.dtypes[0]
        size = float(getattr(torch, dtype).itemsize)
        model = replace(model or _model(), dtype=dtype, dtype_bytes=size)
        backend = self.make(model=model)
        if layout is None:
            addressing = addressing or self._addressings()[0]
            sizes = self._page_sizes(backend)
            page = page or (SLOT if addressing == "contiguous_slot" else 4 if 4 in sizes else sizes[0])
            space = space or ("post_rope" if "post_rope" in backend.caps.key_spaces else "pre_rope")
            layout = _layout(model, page=page, space=space, addressing=addressing)
        layout = backend.adapt(layout, model)
        if reasons := list(backend.refuses(layout, model, None)):
            pytest.skip(f"{self.name} refuses this layout: {'; '.join(map(str, reasons))}")
        if any(pool.captures != ("k", "v") or pool.head_group for pool in layout.pools):
            pytest.skip(f"{self.name} stores other things than k and v of all heads")
        return World(backend, layout, model, device=self.device, scattered=scattered, seed=seed)

    def _exact(self) -> None:
        for capability in ("kernel.select", "kernel.evicts"):
            if self.provides(capability):
                pytest.skip(f"{self.name} declares {capability!r}: it does not read all that a query sees")

    def _attend(self, world: World, *rows: tuple[Segment, int | Sequence[int]]) -> Step:
        self._exact()
        return world.step(*rows)

    def _launch(
        self,
        world: World,
        *rows: tuple[Segment, int | Sequence[int]],
        what: str = "",
        do: str = "compare with softmax(q k^T / sqrt(d)) v for this row by hand",
    ) -> Step:
        """A launch whose every result is compared with the formula."""
        step = self._attend(world, *rows)
        if wrong := world.misplaced(step):
            self.fail(
                f"{self.name}: {what + '; ' if what else ''}{wrong}", rule="append: store new tokens", do=do
            )
        of = ", ".join(f"{len(at)} new of {len(s)}" for (s,), at in step.rows) or "no rows"
        for layer, (o, lse) in enumerate(step.got):
            q = step.q[layer]
            if o.shape != q.shape or o.dtype != q.dtype or lse.shape != q.shape[:2]:
                self.fail(
                    f"{self.name}: queries {tuple(q.shape)} in {q.dtype} give o {tuple(o.shape)} in "
                    f"{o.dtype} and lse {tuple(lse.shape)}",
                    rule="a state is (o [tokens, heads, head_dim], lse [tokens, heads]); run gives o in the "
                    "dtype of its queries",
                    do="return these shapes",
                )
            if lse.dtype.itemsize < 4:
                self.fail(
                    f"{self.name}: lse is in {lse.dtype}",
                    rule="lse float32 or wider",
                    do="keep lse in float32",
                )
            if off := world.compare(step, layer, (o, lse)):
                self.fail(
                    f"{self.name}: {what + '; ' if what else ''}launch of rows ({of}) in "
                    f"{world.model.dtype}: {off}",
                    rule=FORMULA,
                    do=do,
                )
        return step


def _model(*, layers: int = 2, kv_heads: int = 2, group: int = 2) -> ModelFacts:
    return ModelFacts(
        name="attention",
        layers=layers,
        hidden=kv_heads * group * 8,
        heads=kv_heads * group,
        kv_heads=kv_heads,
        head_dim=8,
        ffn=16,
        vocab=16,
        max_position=4096,
    )


def _pool(id: str, layers: tuple[int, ...], page: int, **more: Any) -> Pool:
    return Pool(id=id, layers=layers, page_tokens=page, bytes_per_page=page * len(layers) * 64, **more)


def _layout(
    model: ModelFacts, *, page: int = 4, space: Any = "post_rope", addressing: Any = "block_table"
) -> KVLayout:
    pool = _pool("kv", tuple(range(model.layers)), page, key_space=space)
    return KVLayout(addressing=addressing, pools=(pool,))
