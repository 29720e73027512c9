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
    shared_experts: int = 0
    """Further experts of the same width that every token runs through."""
    gated: bool = True
    """Feed-forward networks have a gate (three matrices, as in Llama); False: two matrices."""
    tied_embeddings: bool = False
    """The output head is the embedding, stored once."""
    kv_latent: int = 0
    """With latent attention (DeepSeek): elements of the latent that a token keeps instead of K and V."""
    q_latent: int = 0
    """With latent attention: width of the latent that queries come from; 0: the hidden state."""
    rope_dim: int = 0
    """With latent attention: rotated elements of a key, kept beside the latent and shared by all heads; they
    are among ``head_dim``."""
    v_dim: int = 0
    """Width of a value head where it is not ``head_dim``; 0: it is."""

    @property
    def kv_bytes_per_token_layer(self) -> int:
        """Bytes of unquantized KV that one token keeps in one layer: K and V, or the latent."""
        kept = self.kv_latent + self.rope_dim if self.kv_latent else self.kv_heads * self._k_and_v
        return int(kept * self.dtype_bytes)

    @property
    def _k_and_v(self) -> int:
        return self.head_dim + (self.v_dim or self.head_dim)


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareFacts:
    """Figures of one device, and how many of them make an instance. ``None`` where a profile does not state
    the figure.
    """

    name: str
    """Name shown in reports."""
    tp: int = 1
    """Devices that share every layer of the model (tensor parallelism)."""

    # datasheet
    flops: float | None = None
    """Dense matrix FLOP/s of one device at 16-bit floats (at the model's dtype on a CPU)."""
    flops_int8: float | None = None
    """The same at 8-bit integers, both operands."""
    flops_fp8: float | None = None
    """The same at 8-bit floats, both operands."""
    memory_bytes: int | None = None
    """Memory of one device."""
    memory_bytes_per_s: float | None = None
    """Memory bandwidth of one device."""
    host_link_bytes_per_s: float | None = None
    """Bandwidth between device and host, one way."""
    link_bytes_per_s: float | None = None
    """Bandwidth between devices of one instance, one way."""
    network_bytes_per_s: float | None = None
    """Bandwidth between instances, one way."""
    idle_watts: float | None = None
    """Power of one device that does nothing."""
    peak_watts: float | None = None
    """Power of one device at its limit."""
    price_per_hour: float | None = None
    """Of one device, in dollars."""

    # measured, or fitted on measurements
    mfu: float | None = None
    """Share of the peak FLOP/s that large matrix products reach."""
    mbu: float | None = None
    """Share of the memory bandwidth that large reads reach."""
    smoothness: float | None = None
    """Exponent of the smooth maximum of compute and memory time; infinite: the greater of the two."""
    op_ns: int | None = None
    """Time of an operation besides compute and memory (launch)."""
    layer_ns: int | None = None
    """Time of a layer besides its operations (an eager engine's host)."""
    step_ns: int | None = None
    """Time of a step besides its layers (scheduling, sampling, host)."""
    request_ns: int | None = None
    """Time per request of a step besides its tokens."""
    all_reduce: tuple[tuple[int, float, float], ...] = ()
    """Measured all-reduces: devices, latency in ns, bandwidth in bytes/s of the ring's bytes."""


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
