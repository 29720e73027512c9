"""Facts about the model, the device and the limits a run works within. Plain data, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """Shape of a decoder-only model, as far as policies and cost models need it."""

    name: str
    """Name shown in reports."""
    layers: int
    """Decoder layers."""
    hidden: int
    """Width of the residual stream, in elements."""
    heads: int
    """Query heads per layer."""
    kv_heads: int
    """Key and value heads per layer."""
    head_dim: int
    """Width of one head, in elements."""
    ffn: int
    """Inner width of the feed-forward network (of one expert), in elements."""
    vocab: int
    """Size of the vocabulary, in tokens."""
    max_position: int
    """Longest context in tokens."""
    dtype: str = "bfloat16"
    """Of weights, activations and KV before any quantization."""
    dtype_bytes: float = 2.0
    """Bytes per weight and per KV element before any quantization."""
    windows: tuple[int | None, ...] = ()
    """Per layer, the sliding window in tokens, or None for full attention; empty: all full."""
    experts: int = 0
    """Experts per layer; 0: a dense model."""
    experts_per_token: int = 0
    """Experts each token runs through."""
    dense_layers: tuple[int, ...] = ()
    """Layers without experts, in a model of experts."""
    dense_ffn: int = 0
    """Inner width of the feed-forward network of these layers."""

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of unquantized K and V that one token keeps in one layer."""
        return int(2 * self.kv_heads * self.head_dim * self.dtype_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareFacts:
    """Peak figures of one device. ``None`` where a profile does not state the figure."""

    name: str
    """Name shown in reports."""
    flops: float | None = None
    """Dense matrix FLOP/s at the model's dtype."""
    memory_bytes: int | None = None
    """Device memory."""
    memory_bytes_per_s: float | None = None
    """Memory bandwidth."""
    host_link_bytes_per_s: float | None = None
    """Bandwidth between device and host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the device accepts; the core refuses plans beyond these. Schedulers may be stricter."""

    max_batch_tokens: int
    """Tokens one launch may run per step, drafts included."""
    max_batch_requests: int
    """Requests one launch may name."""
    max_model_len: int
    """Prompt plus output tokens of one request."""
    lanes: int = 1
    """Batches the device runs side by side."""
    max_in_flight: int = 1
    """Launches queued per lane; 2 lets the scheduler plan one step ahead."""
