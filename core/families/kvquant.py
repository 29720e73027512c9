"""KV codec: the form in which KV is stored.

Intent: fewer bytes per cached token. Two halves: this description, free of torch, gives bytes and cost;
``load`` imports the half that encodes and decodes. Pages are opaque bytes; K and V, layers and heads may
differ.

What must be expressible: quantization before or after rotation, per token or per channel, with tokens at
the start or the end kept exact; codebooks and sparse outliers; layer inputs or latents instead of K and V,
which must be multiplied by weights when read; differences between layers, which need all layers before
them; exact folds into the projections; in-page statistics that belong to the attention backend.

Capabilities: ``kvquant.representation`` (owns the stored form), ``kvquant.tiered`` (encodes only a tier
that the owner of the form leaves to it), ``kvquant.pre_rope``, ``kvquant.post_rope`` (keys before or after
rotation), ``kvquant.rerotate`` (can move encoded keys), ``kvquant.rematerializes`` (reading needs model
weights), ``kvquant.cross_layer`` (a page needs those of earlier layers), ``kvquant.stash`` (its running
state can be parked between layer ranges), ``kvquant.calibrated``, ``kvquant.gradients``,
``kvquant.transform`` (exact folds).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from servelab.core.layout import KeySpace

if TYPE_CHECKING:
    from servelab.core.facts import ModelFacts
    from servelab.core.families.kernel import OpCost
    from servelab.core.families.quant import Recorder


@dataclass(frozen=True, kw_only=True, slots=True)
class KVFormat:
    """Stored form of one layer."""

    codec: str
    """Name that attention backends list in ``AttentionCaps.codecs``."""
    key_space: KeySpace = "post_rope"
    captures: tuple[str, ...] = ("k", "v")
    """What it encodes: ``k``, ``v`` (``k`` before rotation for pre_rope), or ``x``, the layer's input."""
    group_tokens: int = 1
    """Tokens encoded together; the unfinished group stays exact. Divides the page."""
    exact_head_tokens: int = 0
    """First tokens of a request that stay exact (sinks)."""
    exact_tail_tokens: int = 0
    """Most recent tokens that stay exact."""

    def __post_init__(self) -> None:
        if self.group_tokens < 1 or self.exact_head_tokens < 0 or self.exact_tail_tokens < 0:
            raise ValueError(f"token counts of {self.codec!r} are negative or zero: {self}")
        stored = "x" if self.key_space in ("x", "x_delta") else "k"
        if self.key_space != "latent" and stored not in self.captures:
            raise ValueError(
                f"key space {self.key_space!r} is encoded from {stored!r}, not from {self.captures}"
            )


class KVCodecImpl(Protocol):
    """The half with tensors; may import torch. ``page`` bytes are uint8 ``[pages, bytes_per_page]``."""

    def transform(self, graph: Any) -> None:
        """Exact folds; runs after those of a quantizer."""
        ...

    def calibrate(self, graph: Any, batches: Iterable[Any], recorder: Recorder) -> Any:
        """Returns the state that ``bind`` gets."""
        ...

    def bind(self, graph: Any, state: Any, device: str) -> None:
        """Weights it multiplies by when reading, and its tables. Called once."""
        ...

    def encode(self, layer: int, captures: Mapping[str, Any], pages: Any, slots: Any) -> None:
        """Write tokens ``[tokens, heads, dim]`` (``x``: ``[tokens, hidden]``) to ``slots`` int64
        ``[tokens]``.
        """
        ...

    def decode(self, layer: int, pages: Any, slots: Any) -> tuple[Any, Any]:
        """``(k, v)`` of the slots, each ``[tokens, heads, dim]``, keys in the format's key space.

        Called in ascending layers within a launch; with ``needs_layers`` it keeps a running state meanwhile.
        """
        ...


class MovableCodecImpl(KVCodecImpl, Protocol):
    """With ``kvquant.rerotate``."""

    def rerotate(self, layer: int, pages: Any, slots: Any, delta: int) -> None:
        """Move keys by ``delta`` positions in place."""
        ...


class KVCodec(Protocol):
    """The torch-free half."""

    def format(self, layer: int, model: ModelFacts) -> KVFormat: ...

    def bytes_per_page(self, layer: int, page_tokens: int, kv_heads: int, model: ModelFacts) -> int:
        """All of one layer's page: codes, scales, zeros, outliers, padding."""
        ...

    def needs_layers(self, layer: int) -> Sequence[int]:
        """Layers whose pages of the same tokens must be there to read this one; empty for most."""
        ...

    def scratch_bytes(self, tokens: int, model: ModelFacts) -> int:
        """Working memory of a launch that reads ``tokens`` tokens, beside the pages."""
        ...

    def cost(self, layer: int, new_tokens: int, read_tokens: int, model: ModelFacts) -> OpCost:
        """Encoding and decoding beyond the bytes of pages: products, tables, accumulators."""
        ...

    def load(self) -> KVCodecImpl:
        """Import and build the other half."""
        ...
