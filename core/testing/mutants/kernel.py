"""Attention backends broken on purpose. ``Plain`` is a good one: row by row, written for reading."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from servelab.core.context import Context
from servelab.core.errors import CapabilityError
from servelab.core.facts import HardwareFacts, ModelFacts
from servelab.core.families.kernel import AttentionCaps, BatchLayout, OpCost, Rotary, State
from servelab.core.layout import KVLayout
from servelab.core.spec import PluginSpec
from servelab.core.testing.attention import PAGES
from servelab.core.testing.mutants import Mutant


def _spec(name: str) -> PluginSpec:
    return PluginSpec(
        name=name,
        factory=f"{__name__}:Plain",
        summary="a toy",
        provides=frozenset({"kernel.block_table", "kernel.pre_rope", "kernel.partial"}),
    )


class Plain:
    """Takes no settings. Each part of the arithmetic is a method, so that a mutant can change one."""

    spec = _spec("plain")
    caps = AttentionCaps(
        addressings=frozenset({"block_table"}),
        key_spaces=frozenset({"post_rope", "pre_rope"}),
        masks=frozenset({"causal", "window"}),
    )

    def __init__(self, config: None, context: Context) -> None:
        self.model = context.model

    def adapt(self, layout: KVLayout, model: ModelFacts) -> KVLayout:
        return layout

    def refuses(self, layout: KVLayout, model: ModelFacts, hardware: HardwareFacts | None) -> Sequence[str]:
        reasons = []
        if layout.addressing not in self.caps.addressings:
            reasons.append(f"it does not read {layout.addressing} addressing")
        for pool in layout.pools:
            if pool.key_space not in self.caps.key_spaces or pool.codec != "none" or pool.head_group:
                reasons.append(f"pool {pool.id!r} is stored in a way it does not read")
        return reasons

    def cost(self, layer: int, q_tokens: Sequence[int], contexts: Sequence[int], layout: KVLayout) -> OpCost:
        window, pairs, seen = self.window(layer), 0, 0
        for n, context in zip(q_tokens, contexts, strict=True):
            pairs += sum(min(p + 1, window or p + 1) for p in range(context, context + n))
            seen += min(context + n, (window or context + 1) + n - 1) if n else 0
        flops = 4 * self.model.heads * self.model.head_dim * pairs
        return OpCost(flops=flops, device_bytes=seen * self.model.kv_bytes_per_token_layer)

    def window(self, layer: int) -> int | None:
        return self.model.windows[layer] if self.model.windows else None

    def load(
        self,
        layout: KVLayout,
        model: ModelFacts,
        device: str,
        buffers: Mapping[int, Mapping[str, Any]],
        rotary: Rotary,
    ) -> Any:
        self.layout, self.buffers, self.rotary = layout, buffers, rotary
        self.pool_of = {layer: i for i, pool in enumerate(layout.pools) for layer in pool.layers}
        return self

    # ------------------------------------------------------ the half with tensors

    def plan(self, batch: BatchLayout, layer_groups: Sequence[tuple[int, int]]) -> BatchLayout:
        if {*batch.masks} - self.caps.masks:
            raise CapabilityError(f"it has no masks {', '.join(batch.masks)}")
        return batch

    def append(self, layer: int, captures: Mapping[str, Any], plan: BatchLayout) -> None:
        stored = dict(captures)
        if self.layout.pools[self.pool_of[layer]].key_space == "post_rope":
            stored["k"] = self.turned(stored["k"], plan.q_positions)
        for row, end in enumerate(plan.seg_indptr[1:]):
            for token in range(plan.q_indptr[row], plan.q_indptr[row + 1]):
                at = self.place(layer, plan, end - 1, plan.q_positions[token])
                for name, tensor in stored.items():
                    self.store(self.buffers[layer][name], at, tensor[token])

    def store(self, buffer: Any, at: tuple[int, int], value: Any) -> None:
        buffer[at] = value

    def place(self, layer: int, batch: BatchLayout, segment: int, position: int) -> tuple[int, int]:
        """Page and place of a token."""
        pool = self.pool_of[layer]
        gone = batch.seg_gone[pool][segment] if batch.seg_gone else 0
        index = position - batch.seg_offset[segment] - gone
        size = self.layout.pools[pool].page_tokens
        return self.page(batch.seg_pages[pool][segment], index // size), index % size

    def page(self, pages: Sequence[int], index: int) -> int:
        return pages[index]

    def turned(self, x: Any, positions: Sequence[int]) -> Any:
        return self.rotary.turn(x, self.rotary.angles(x.double().new_tensor(list(positions))))

    def stored(self, layer: int, batch: BatchLayout, segment: int) -> list[int]:
        """View positions of what a segment holds."""
        gone = batch.seg_gone[self.pool_of[layer]][segment] if batch.seg_gone else 0
        first = batch.seg_offset[segment]
        return list(range(first + gone, first + batch.seg_tokens[segment]))

    def read(self, layer: int, batch: BatchLayout, segments: Iterable[int]) -> tuple[Any, Any, list[int]]:
        """Turned keys and values ``[tokens, kv_heads, dim]``, and their positions."""
        places, positions = [], []
        for segment in segments:
            at = self.stored(layer, batch, segment)
            places += [self.place(layer, batch, segment, position) for position in at]
            positions += at
        index = [page for page, _ in places], [within for _, within in places]
        k, v = (self.buffers[layer][name][index] for name in "kv")
        if self.layout.pools[self.pool_of[layer]].key_space == "pre_rope":
            k = self.turned(k, positions)
        return k, v, positions

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        """``[queries, keys]``; both are positions."""
        shown = keys <= queries
        return shown if window is None else shown & (keys > queries - window)

    def per_head(self, x: Any) -> Any:
        """``[tokens, kv_heads, dim]`` for each query head."""
        return x.repeat_interleave(self.model.heads // self.model.kv_heads, 1)

    def state(self, layer: int, q: Any, batch: BatchLayout, row: int, segments: Iterable[int]) -> State:
        at = list(batch.q_positions[batch.q_indptr[row] : batch.q_indptr[row + 1]])
        k, v, positions = self.read(layer, batch, segments)
        wide = q.double()
        if not at or not positions:
            return wide * 0, wide[..., 0] * 0 - math.inf
        k, v = self.per_head(k).double(), self.per_head(v).double()
        queries, keys = wide.new_tensor(at)[:, None], wide.new_tensor(positions)
        shown = self.visible(queries, keys, self.window(layer))[:, None]
        scores = (wide.transpose(0, 1) @ k.permute(1, 2, 0)).transpose(0, 1) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(~shown, -math.inf)
        weights = scores.softmax(-1).nan_to_num()
        return (weights.transpose(0, 1) @ v.transpose(0, 1)).transpose(0, 1), self.lse(scores)

    def lse(self, scores: Any) -> Any:
        return scores.logsumexp(-1)

    def partial(self, layer: int, q_pre: Any, plan: BatchLayout, segments: Sequence[int]) -> State:
        q = self.turned(q_pre, plan.q_positions)
        o, lse = q.double().clone(), q[..., 0].double().clone()
        for row in range(len(plan.q_indptr) - 1):
            at = slice(plan.q_indptr[row], plan.q_indptr[row + 1])
            of = [s for s in range(plan.seg_indptr[row], plan.seg_indptr[row + 1]) if s in segments]
            o[at], lse[at] = self.state(layer, q[at], plan, row, of)
        return o, lse

    def run(self, layer: int, q_pre: Any, plan: BatchLayout) -> State:
        o, lse = self.partial(layer, q_pre, plan, range(plan.seg_indptr[-1]))
        return o.to(q_pre.dtype), lse

    def merge(self, states: Sequence[State]) -> State:
        (o, lse), *others = states
        for more, its in others:
            total = lse.logaddexp(its)
            least = total.clamp(min=-1e300)  # of nothing at all, weights of 0
            o = o * (lse - least).exp()[..., None] + more * (its - least).exp()[..., None]
            lse = total
        return o, lse


# ------------------------------------------------------------------ broken


class LogOfTwo(Plain):
    spec = _spec("log_of_two")

    def lse(self, scores: Any) -> Any:
        return super().lse(scores) / math.log(2)


class IgnoresWindows(Plain):
    spec = _spec("ignores_windows")

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        return super().visible(queries, keys, None)


class WindowOffByOne(Plain):
    spec = _spec("window_off_by_one")

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        return super().visible(queries, keys, None if window is None else window + 1)


class ForgetsPages(Plain):
    spec = _spec("forgets_pages")

    reading = False

    def read(self, layer: int, batch: BatchLayout, segments: Iterable[int]) -> tuple[Any, Any, list[int]]:
        self.reading = True
        try:
            return super().read(layer, batch, segments)
        finally:
            self.reading = False

    def page(self, pages: Sequence[int], index: int) -> int:
        return (pages[0] + index) % PAGES if self.reading else pages[index]


class ForgetsWhatIsGone(Plain):
    spec = _spec("forgets_what_is_gone")

    def stored(self, layer: int, batch: BatchLayout, segment: int) -> list[int]:
        gone = batch.seg_gone[self.pool_of[layer]][segment] if batch.seg_gone else 0
        at = super().stored(layer, batch, segment)
        return [position - gone for position in at]

    def place(self, layer: int, batch: BatchLayout, segment: int, position: int) -> tuple[int, int]:
        gone = batch.seg_gone[self.pool_of[layer]][segment] if batch.seg_gone else 0
        last = batch.seg_offset[segment] + batch.seg_tokens[segment] - gone
        return super().place(layer, batch, segment, position + gone if position < last else position)


class FirstPoolForAll(Plain):
    """Places tokens of all layers by the pages and the page size of the first pool."""

    spec = _spec("first_pool_for_all")

    def load(
        self,
        layout: KVLayout,
        model: ModelFacts,
        device: str,
        buffers: Mapping[int, Mapping[str, Any]],
        rotary: Rotary,
    ) -> Any:
        super().load(layout, model, device, buffers, rotary)
        self.pool_of = dict.fromkeys(self.pool_of, 0)
        return self


class MaskOffByOne(Plain):
    spec = _spec("mask_off_by_one")

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        return super().visible(queries + 1, keys, window)


class MaskFromTheTop(Plain):
    spec = _spec("mask_from_the_top")

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        return super().visible(queries - queries[0] if len(queries) > 1 else queries, keys, window)


class ReadsOthersPages(Plain):
    """Pads with the pages of the first row, and hides what it read there by a weight of 0."""

    spec = _spec("reads_others_pages")

    def state(self, layer: int, q: Any, batch: BatchLayout, row: int, segments: Iterable[int]) -> State:
        o, lse = super().state(layer, q, batch, row, segments)
        padding = self.buffers[layer]["v"][batch.seg_pages[self.pool_of[layer]][0][0]]
        return o + 0 * padding.double().sum(), lse


class WrongHeads(Plain):
    spec = _spec("wrong_heads")

    def per_head(self, x: Any) -> Any:
        return x.repeat(1, self.model.heads // self.model.kv_heads, 1)


class WritesWholePages(Plain):
    spec = _spec("writes_whole_pages")

    def store(self, buffer: Any, at: tuple[int, int], value: Any) -> None:
        page, within = at
        buffer[page, within:] = value


class MergesByMean(Plain):
    spec = _spec("merges_by_mean")

    def merge(self, states: Sequence[State]) -> State:
        _, lse = super().merge(states)
        seen = sum((its > -math.inf).double() for _, its in states)
        total = sum(o for o, _ in states)
        return total / seen.clamp(min=1)[..., None], lse


class TurnsTwice(Plain):
    """Turns keys when it stores them, and again when it reads them."""

    spec = _spec("turns_twice")

    def append(self, layer: int, captures: Mapping[str, Any], plan: BatchLayout) -> None:
        if self.layout.pools[self.pool_of[layer]].key_space == "pre_rope":
            captures = {**captures, "k": self.turned(captures["k"], plan.q_positions)}
        super().append(layer, captures, plan)


class TurnsByIndex(Plain):
    """Turns keys by how many it has read before, not by where they are."""

    spec = _spec("turns_by_index")

    def read(self, layer: int, batch: BatchLayout, segments: Iterable[int]) -> tuple[Any, Any, list[int]]:
        k, v, positions = super().read(layer, batch, segments)
        if self.layout.pools[self.pool_of[layer]].key_space == "pre_rope":
            back = self.turned(k, [-position for position in positions])
            k = self.turned(back, range(len(positions)))
        return k, v, positions


class SeesSomethingInNothing(Plain):
    """Softmax over nothing but a large negative number: all keys alike."""

    spec = _spec("sees_something_in_nothing")

    def visible(self, queries: Any, keys: Any, window: int | None) -> Any:
        shown = super().visible(queries, keys, window)
        return shown | ~shown.any(-1, keepdim=True)


class AcceptsAnything(Plain):
    spec = _spec("accepts_anything")

    def refuses(self, layout: KVLayout, model: ModelFacts, hardware: HardwareFacts | None) -> Sequence[str]:
        return []


class PricesEveryPair(Plain):
    spec = _spec("prices_every_pair")

    def window(self, layer: int) -> int | None:
        return None


class TurnsQueriesInPlace(Plain):
    spec = _spec("turns_queries_in_place")

    def run(self, layer: int, q_pre: Any, plan: BatchLayout) -> State:
        state = super().run(layer, q_pre, plan)
        q_pre.copy_(self.turned(q_pre, plan.q_positions))
        return state


class ClaimsMore(Plain):
    spec = replace(_spec("claims_more"), provides=_spec("x").provides | {"kernel.contiguous_slot"})


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="kernel",
        plugin=plugin,
        original=Plain,
        check=check,
        message=message,
        breaks=breaks,
        requires=("torch",),
    )


MUTANTS = (
    _mutant(LogOfTwo, "test_lse_is_natural", "it is in base 2", "gives lse in base 2"),
    _mutant(
        IgnoresWindows,
        "test_windows",
        "hide keys at or before position - w",
        "lets layers with a window see everything",
    ),
    _mutant(
        WindowOffByOne,
        "test_windows",
        "hide keys at or before position - w",
        "lets a query see one token more than its window",
    ),
    _mutant(
        ForgetsPages,
        "test_page_sizes",
        "token i of a row is in its page i // page_tokens",
        "reads on behind the first page, as if pages were consecutive",
    ),
    _mutant(
        ForgetsWhatIsGone,
        "test_pages_that_left_the_window",
        "the first stored token of a segment is at seg_offset + seg_gone",
        "takes the first token that is left for the row's first",
    ),
    _mutant(
        FirstPoolForAll,
        "test_pools_of_their_own",
        "take seg_pages, page size and key space of the pool that has the layer",
        "takes the first pool's pages for all layers",
    ),
    _mutant(
        MaskOffByOne,
        "test_prefill",
        "compare with softmax(q k^T / sqrt(d)) v",
        "lets a query see the token after it",
    ),
    _mutant(
        MaskFromTheTop,
        "test_chunks_in_any_split",
        "the causal mask is aligned to the end",
        "aligns the causal mask of a chunk to the beginning",
    ),
    _mutant(
        ReadsOthersPages,
        "test_foreign_pages_are_not_read",
        "NaN times 0 is NaN",
        "pads with another row's page and a weight of 0",
    ),
    _mutant(
        WrongHeads,
        "test_heads_share_their_kv_head",
        "query head h belongs to KV head h // (heads // kv_heads)",
        "gives query head h the KV head h % kv_heads",
    ),
    _mutant(
        WritesWholePages,
        "test_append_writes_its_slots_only",
        "store each token at its position's page and place",
        "fills the rest of a page with the new token",
    ),
    _mutant(
        MergesByMean,
        "test_partial_states_merge_to_the_whole",
        "weight each o by exp(lse - logsumexp of all)",
        "merges states by their mean",
    ),
    _mutant(
        TurnsTwice,
        "test_key_spaces",
        "turn keys once",
        "rotates keys of a pre_rope pool when storing and when reading",
    ),
    _mutant(
        TurnsByIndex,
        "test_pages_that_left_the_window",
        "the first stored token of a segment is at seg_offset + seg_gone",
        "rotates keys by their index among those that are left",
    ),
    _mutant(
        SeesSomethingInNothing,
        "test_rows_that_see_nothing",
        "instead of softmax of nothing",
        "gives the mean of all values where nothing is seen",
    ),
    _mutant(
        AcceptsAnything,
        "test_layouts_are_accepted_or_refused",
        "name what is lacking in refuses()",
        "accepts every layout",
    ),
    _mutant(
        PricesEveryPair,
        "test_cost_counts_pairs_and_bytes",
        "that the causal mask and the window leave",
        "prices a layer with a window as full attention",
    ),
    _mutant(
        TurnsQueriesInPlace,
        "test_what_is_given_is_left_alone",
        "turn into a new tensor",
        "rotates the caller's queries in place",
    ),
    _mutant(
        ClaimsMore,
        "test_capabilities_agree",
        "make 'provides' of the spec and caps.addressings agree",
        "declares contiguous slots that its caps do not name",
    ),
)
