"""Kernels: attention, and products with packed weights.

Intent: the arithmetic, behind a contract wide enough for exact, sparse, retrieved and distributed
attention. Two halves: this description, free of torch, accepts or refuses a KV layout and prices work in
the simulator; ``load`` imports the half that computes. Every plugin has a plain reference that runs on a
CPU.

Position is the backend's business: it gets queries and keys before rotation and applies the rotary
embedding as the pool's key space says (``post_rope``: before storing; ``pre_rope``: when reading;
``block_local``: stored at positions within the segment, the query is turned instead). A partial result is a
state ``(o, lse)``, lse natural.

What must be expressible: paged, contiguous and segmented KV, split KV and merge; shared prefixes read once;
tree masks, masks causal by original index, no mask; windows, rings and sinks; page or token selection per
head, reused over steps; eviction, at prefill end or while decoding, per head; keys rebuilt from low rank;
parts on the host or on another instance; a different set of rows per group of layers.

Capabilities: ``kernel.block_table``, ``kernel.contiguous_slot``, ``kernel.segments``,
``kernel.remote_spans`` (addressing it reads); ``kernel.pre_rope``, ``kernel.block_local``,
``kernel.latent`` (key spaces it reads beside post_rope); ``kernel.partial`` (returns states),
``kernel.host_partial`` (also over host memory), ``kernel.cascade`` (reads shared prefixes once),
``kernel.tree_mask``, ``kernel.index_mask``, ``kernel.noncausal`` (tokens see later ones),
``kernel.layer_ranges``, ``kernel.probabilities`` (returns attention mass per key), ``kernel.select`` (reads
chosen pages only), ``kernel.evicts`` (drops tokens for good), ``kernel.per_head_sets`` (kept tokens differ
by head), ``kernel.moves_keys`` (gives stored keys new positions), ``kernel.ring`` (overwrites old pages),
``kernel.whole_prompt`` (needs a prompt in one launch), ``kernel.prefill_built`` (builds an index once per
prompt), ``kernel.index_travels`` (that index can be sent to another instance), ``kernel.batch_invariant``
(a row's result does not depend on the batch),
``kernel.linear`` (has kernels for packed weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from servelab.core.layout import Addressing, KeySpace

if TYPE_CHECKING:
    from servelab.core.facts import HardwareFacts, ModelFacts
    from servelab.core.families.quant import QTensor, WeightFormat
    from servelab.core.layout import KVLayout

Mask = Literal["causal", "window", "tree", "index", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCost:
    """Work of an operation, for cost models. Bytes are moved, each counted once."""

    flops: int = 0
    math_bits: int = 16
    """Width of the wider operand the arithmetic unit sees."""
    device_bytes: int = 0
    host_bytes: int = 0
    net_bytes: int = 0
    launches: int = 1

    def __post_init__(self) -> None:
        if min(self.flops, self.device_bytes, self.host_bytes, self.net_bytes) < 0:
            raise ValueError(f"an operation cannot cost less than nothing: {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCaps:
    """What a backend reads. Anything else in a layout is refused by name."""

    addressings: frozenset[Addressing]
    key_spaces: frozenset[KeySpace] = frozenset({"post_rope"})
    codecs: frozenset[str] = frozenset({"none"})
    masks: frozenset[Mask] = frozenset({"causal"})
    head_groups: bool = False
    """Pools that hold some of the heads."""
    page_tokens: tuple[int, ...] = ()
    """Page sizes it runs; empty: any."""
    devices: frozenset[str] = frozenset({"cpu"})
    returns_lse: bool = True
    batch_invariant: bool = False
    graph_safe: bool = False
    """``plan`` writes to fixed addresses, so a captured launch can be replayed."""
    build: Literal["none", "last_chunk", "whole_prompt"] = "none"
    """Its index is built at prefill end from stored KV, or needs the prompt in one launch."""


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Rows whose first ``segments`` segments are the same pages."""

    rows: tuple[int, ...]
    segments: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchLayout:
    """One launch as arrays over its rows (requests). Segments of a row are in view order, its own last."""

    q_indptr: Sequence[int]
    """``[rows + 1]``: query tokens ``q_indptr[i]..q_indptr[i+1]-1`` belong to row i."""
    q_positions: Sequence[int]
    """``[q_indptr[-1]]``: position in the row's view; gaps mean selective recompute (masks go by position).
    """
    seg_indptr: Sequence[int]
    """``[rows + 1]`` into the segment arrays."""
    seg_tokens: Sequence[int]
    """Tokens each segment holds after this launch's append."""
    seg_offset: Sequence[int]
    """View position of each segment's first token; may change from step to step while its pages do not."""
    seg_pages: Sequence[Sequence[Sequence[int]]]
    """``[pool][segment]``: page ids, or one slot id with contiguous slots."""
    seg_gone: Sequence[Sequence[int]] = ()
    """``[pool][segment]``: tokens at its beginning that fell out of the pool's window; its pages hold those
    after them. Empty: everything is there."""
    seg_instance: Sequence[int] = ()
    """Instance that holds each segment (remote spans); empty: all here."""
    masks: Sequence[Mask] = ()
    """Per row; empty: causal."""
    trees: Mapping[int, Sequence[int]] = field(default_factory=dict)
    """Row -> parent of each query token (index within the row, -1: the context)."""
    shared: tuple[SharedPrefix, ...] = ()

    def __post_init__(self) -> None:
        if len(self.q_indptr) != len(self.seg_indptr):
            raise ValueError(
                f"{len(self.q_indptr) - 1} rows of queries, {len(self.seg_indptr) - 1} of segments"
            )
        if self.q_indptr[-1] != len(self.q_positions):
            raise ValueError(f"{self.q_indptr[-1]} query tokens have {len(self.q_positions)} positions")
        segments = self.seg_indptr[-1]
        sizes = {len(self.seg_tokens), len(self.seg_offset), *(len(p) for p in self.seg_pages)}
        sizes.update(map(len, self.seg_gone))
        if self.seg_instance:
            sizes.add(len(self.seg_instance))
        if sizes != {segments}:
            raise ValueError(f"segment arrays of lengths {sorted(sizes)} for {segments} segments")
        for row, parents in self.trees.items():
            if len(parents) != self.q_indptr[row + 1] - self.q_indptr[row]:
                raise ValueError(f"row {row}: a tree of {len(parents)} nodes for another number of queries")


@dataclass(frozen=True, slots=True)
class Kept:
    """Tokens that survive an eviction, by index within the row. The ledger may trim the rest."""

    row: int
    tokens: tuple[tuple[int, ...], ...]
    """Per KV head of the pool, ascending, all of one length; a single tuple: the same for all heads."""


State = tuple[Any, Any]
"""``(o [tokens, heads, head_dim], lse [tokens, heads])``, float32 or wider; the empty set is ``(0, -inf)``.
``run`` gives ``o`` in the dtype of its queries."""


class Rotary(Protocol):
    """The model's rotary embedding, whatever its variant; given to backends, which decide when to turn."""

    def angles(self, positions: Any) -> Any:
        """Cosines and sines for integer positions ``[tokens]``; computed once per launch."""
        ...

    def turn(self, x: Any, angles: Any) -> Any:
        """``x [tokens, heads, head_dim]``, each token turned by its angles; a new tensor."""
        ...


class AttentionImpl(Protocol):
    """The half with tensors. ``q_pre`` and captures are ``[tokens, heads, dim]``, before rotation."""

    def plan(self, batch: BatchLayout, layer_groups: Sequence[tuple[int, int]]) -> Any:
        """Once per launch, on the CPU. Several groups: several row sets in one launch, one batch each."""
        ...

    def append(self, layer: int, captures: Mapping[str, Any], plan: Any) -> None:
        """Store new tokens and update in-page statistics; captures are what the pools asked for."""
        ...

    def run(self, layer: int, q_pre: Any, plan: Any) -> State:
        """Attention of all rows over all they see. Rows that see nothing give ``(0, -inf)``."""
        ...

    def partial(self, layer: int, q_pre: Any, plan: Any, segments: Sequence[int]) -> State:
        """Attention over some segments only, here, on the host, or asked of another instance."""
        ...

    def merge(self, states: Sequence[State]) -> State:
        """The state over the union of disjoint sets; order does not matter up to rounding."""
        ...


class SelectingAttention(AttentionImpl, Protocol):
    """With ``kernel.select`` or ``kernel.evicts``."""

    def select(self, layer: int, q_pre: Any, plan: Any) -> Sequence[Kept]:
        """Before ``run``: choose what to read (kept in the plan) and return what is dropped for good, if
        any.
        """
        ...


class PromptAttention(AttentionImpl, Protocol):
    """With ``kernel.prefill_built``, or where prompts are pruned once."""

    def prefill_end(self, layer: int, row: int, captures: Mapping[str, Any]) -> Kept | None:
        """The row's prompt is complete in this layer; with ``q_tail`` of its last queries. Build, prune or
        pass.
        """
        ...


class MassAttention(AttentionImpl, Protocol):
    """With ``kernel.probabilities``."""

    def attention_mass(self, layer: int, plan: Any) -> Sequence[Any]:
        """Per row float32 ``[heads, tokens]``: probabilities of the last ``run``, summed over its queries."""
        ...


class LinearKernel(Protocol):
    """Runs packed weights."""

    def refuses(self, format: WeightFormat, n: int, k: int, hardware: HardwareFacts | None) -> str | None:
        """Why it cannot, or None."""
        ...

    def repack(self, tensor: QTensor) -> QTensor:
        """Its own order of the same codes; exact and reversible."""
        ...

    def gemm(self, prepared: Any, tensor: QTensor) -> Any:
        """``[tokens, k] -> [tokens, n]``."""
        ...


class AttentionBackend(Protocol):
    """The torch-free half. ``LinearBackend`` adds packed weights."""

    caps: AttentionCaps

    def adapt(self, layout: KVLayout, model: ModelFacts) -> KVLayout:
        """The layout it would like: pools split by head group, rings, room for in-page statistics."""
        ...

    def refuses(self, layout: KVLayout, model: ModelFacts, hardware: HardwareFacts | None) -> Sequence[str]:
        """Each capability it lacks for this layout, as a sentence; empty: accepted."""
        ...

    def cost(self, layer: int, q_tokens: Sequence[int], contexts: Sequence[int], layout: KVLayout) -> OpCost:
        """One layer for rows of ``q_tokens`` new tokens after ``contexts`` stored ones, bytes read as it
        reads them.
        """
        ...

    def load(
        self,
        layout: KVLayout,
        model: ModelFacts,
        device: str,
        buffers: Mapping[int, Mapping[str, Any]],
        rotary: Rotary,
    ) -> AttentionImpl:
        """Import and build the other half.

        Args:
            layout: frozen; accepted by ``refuses``.
            model: its shape.
            device: where the buffers are.
            buffers: layer -> capture -> ``[pages, page_tokens, kv_heads, width]``, owned by the executor,
                zeroed; the page ids of the layer's pool index the first axis.
            rotary: the model's rotary embedding.
        """
        ...


class LinearBackend(AttentionBackend, Protocol):
    """With ``kernel.linear``."""

    def linear_kernels(self) -> Sequence[str]:
        """Import paths of its ``LinearKernel``s, best first."""
        ...
