"""What a decoder is made of, as numbers and switches: all that tells one model family from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape and constants of a decoder. The defaults are Llama's."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Inner width of a dense feed-forward network."""
    vocab: int
    max_position: int
    eps: float
    rope: Mapping[str, Any]
    tied: bool
    attention_bias: bool = False
    """Of queries, keys and values."""
    output_bias: bool = False
    """Of the projection after attention."""
    mlp_bias: bool = False
    activation: str = "silu"
    qk_norm: bool = False
    """Queries and keys are normed head by head, before rotation."""
    query_scale: float = 1.0
    """On queries, beside the ``head_dim ** -0.5`` of every attention; folded into their norm."""
    norm_offset: float = 0.0
    """Added to the weights of every norm, which are stored without it."""
    post_norms: bool = False
    """What attention and the feed-forward network return is normed before it is added."""
    embedding_scale: float = 1.0
    windows: tuple[int | None, ...] = ()
    """Per layer, tokens it sees; None: all. Empty: every layer sees all."""
    local_rope: Mapping[str, Any] | None = None
    """Of layers with a window, where it is another than ``rope``."""
    experts: int = 0
    experts_per_token: int = 0
    expert_ffn: int = 0
    norm_topk: bool = True
    """The weights of a token's experts add up to 1."""
    dense_layers: frozenset[int] = frozenset()
    """Layers without experts, in a model of experts."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's normalised configuration, see ``checkpoint/architectures.py``."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        biased = bool(config.get("attention_bias", False))
        scalar = config.get("query_scalar")
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            max_position=config["max_position_embeddings"],
            eps=config["rms_norm_eps"],
            rope=config["rope"],
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=biased,
            output_bias=bool(config.get("output_bias", biased)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            activation=config.get("activation", "silu"),
            qk_norm=bool(config.get("qk_norm", False)),
            query_scale=(head_dim / scalar) ** 0.5 if scalar else 1.0,
            norm_offset=config.get("norm_offset", 0.0),
            post_norms=bool(config.get("post_norms", False)),
            embedding_scale=hidden**0.5 if config.get("scaled_embedding") else 1.0,
            windows=tuple(config.get("windows", ())),
            local_rope=config.get("local_rope"),
            experts=config.get("experts", 0),
            experts_per_token=config.get("experts_per_token", 0),
            expert_ffn=config.get("expert_ffn", 0),
            norm_topk=bool(config.get("norm_topk_prob", True)),
            dense_layers=frozenset(config.get("dense_layers", ())),
        )
