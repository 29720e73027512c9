"""A compact decoder of the Llama family, for flattened batches of any lengths.

One path for prefill and decode: ``embed`` tokens, ``run`` a range of layers, ``head`` on the rows that need
logits. Keys leave it before rotation, attention belongs to a backend (``core/families/kernel.py``), every
layer's input can be watched or replaced, and a range of layers can be run by itself: the places where
techniques attach. There is no module tree: a layer is a record of its operations.

Source: LLaMA (arXiv 2302.13971), with grouped queries as in Llama 2 (arXiv 2307.09288).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, linalg
from torch.nn.functional import silu

from servelab.core.families.kernel import AttentionImpl
from servelab.core.families.quant import LinearOp
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.torch.linear import DenseLinear, PackedLinear
from servelab.plugins.executors.torch.rope import RotaryEmbedding

Watch = Callable[[int, Tensor], Tensor | None]
"""Sees each layer's number and input ``[tokens, hidden]``; a tensor it returns takes the input's place."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Shape and constants of a decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_position: int
    eps: float
    rope: Mapping[str, Any]
    tied: bool
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's normalised configuration, in Hugging Face names."""
        heads = config["num_attention_heads"]
        return cls(
            layers=config["num_hidden_layers"],
            hidden=config["hidden_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            max_position=config["max_position_embeddings"],
            eps=config["rms_norm_eps"],
            rope=config["rope"],
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
        )


@dataclass(slots=True)
class Layer:
    """One decoder layer. Linears may be exchanged for any ``LinearOp`` of the same shape."""

    attention_norm: Tensor
    qkv: LinearOp
    """``[tokens, hidden] -> [tokens, (heads + 2 kv_heads) * head_dim]``: queries, keys, values."""
    out: LinearOp
    mlp_norm: Tensor
    gate_up: LinearOp
    """``[tokens, hidden] -> [tokens, 2 ffn]``: gate, up."""
    down: LinearOp


class Decoder:
    """Weights and arithmetic; no state between calls.

    Args:
        config: its shape.
        dtype: of weights and activations. Norms and rotations are computed in float32, or in float64 for
            float64.
        tensors: (name, tensor) pairs in Hugging Face names, in any order; each is copied and let go.

    Raises:
        ModelError: a tensor is missing, has another shape, or belongs to no part of this model.
    """

    def __init__(
        self, config: DecoderConfig, dtype: torch.dtype, tensors: Iterable[tuple[str, Tensor]]
    ) -> None:
        self.config, self.dtype = config, dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, dtype)
        self._places: dict[str, Tensor] = {}
        c = config
        self.embedding = self._place("model.embed_tokens.weight", c.vocab, c.hidden)
        self.layers = [self._layer(f"model.layers.{i}") for i in range(c.layers)]
        self.norm = self._place("model.norm.weight", c.hidden)
        table = self.embedding if c.tied else self._place("lm_head.weight", c.vocab, c.hidden)
        self.lm_head: LinearOp = DenseLinear(table)
        self._fill(tensors)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._split = (q, kv, kv)

    # ------------------------------------------------------------- weights

    def _layer(self, name: str) -> Layer:
        c, attention, mlp = self.config, f"{name}.self_attn", f"{name}.mlp"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        biased = c.attention_bias
        return Layer(
            attention_norm=self._place(f"{name}.input_layernorm.weight", c.hidden),
            qkv=self._linear(
                {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv},
                c.hidden,
                biased,
            ),
            out=self._linear({f"{attention}.o_proj": c.hidden}, q, biased),
            mlp_norm=self._place(f"{name}.post_attention_layernorm.weight", c.hidden),
            gate_up=self._linear({f"{mlp}.gate_proj": c.ffn, f"{mlp}.up_proj": c.ffn}, c.hidden, c.mlp_bias),
            down=self._linear({f"{mlp}.down_proj": c.hidden}, c.ffn, c.mlp_bias),
        )

    def _place(self, name: str, *shape: int) -> Tensor:
        """Room for a tensor of the checkpoint."""
        self._places[name] = torch.empty(shape, dtype=self.dtype)
        return self._places[name]

    def _linear(self, parts: Mapping[str, int], k: int, biased: bool) -> DenseLinear:
        """One linear whose rows are those of several in the checkpoint."""
        weight = torch.empty(sum(parts.values()), k, dtype=self.dtype)
        bias = torch.empty(len(weight), dtype=self.dtype) if biased else None
        start = 0
        for name, rows in parts.items():
            self._places[f"{name}.weight"] = weight[start : start + rows]
            if bias is not None:
                self._places[f"{name}.bias"] = bias[start : start + rows]
            start += rows
        return DenseLinear(weight, bias)

    def _fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        places, self._places = self._places, {}
        self._nbytes = sum(place.nbytes for place in places.values())
        for name, tensor in tensors:
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and self.config.tied):
                continue  # written by old tools; both follow from the rest
            place = places.pop(name, None)
            if place is None:
                raise ModelError(
                    f"the checkpoint holds {name!r}, which this model has no place for",
                    why="it is not of the architecture its config.json names, or the tensor is there twice",
                    do="take a checkpoint of a supported architecture",
                )
            if place.shape != tensor.shape:
                raise ModelError(
                    f"tensor {name!r} is {list(tensor.shape)}",
                    why=f"by config.json it must be {list(place.shape)}",
                    do="config.json and weights are of different models: fetch both again",
                )
            place.copy_(tensor)
        if places:
            shown = ", ".join(sorted(places)[:3])
            raise ModelError(
                f"{len(places)} tensors are missing in the checkpoint",
                why=f"not found: {shown}{', ...' if len(places) > 3 else ''}",
                do="fetch the weights again; adapters and partial checkpoints cannot be served alone",
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they were loaded, before packing or quantizing."""
        return self._nbytes

    def pack(self) -> None:
        """Reorder every dense weight for the CPU's matrix kernels; the plain copies are let go."""
        for layer in self.layers:
            layer.qkv, layer.out = _packed(layer.qkv), _packed(layer.out)
            layer.gate_up, layer.down = _packed(layer.gate_up), _packed(layer.down)
        self.lm_head = _packed(self.lm_head)

    # ---------------------------------------------------------- arithmetic

    def embed(self, ids: Tensor) -> Tensor:
        """int64 ``[tokens]`` -> ``[tokens, hidden]``."""
        return self.embedding[ids]

    def run(
        self,
        x: Tensor,
        attention: AttentionImpl,
        plan: Any,
        layers: tuple[int, int] | None = None,
        watch: Watch | None = None,
    ) -> Tensor:
        """Layers ``first..end-1`` (default: all) over ``x [tokens, hidden]``.

        ``attention`` stores the new keys (before rotation), values and layer inputs as its pools ask, and
        answers the queries (before rotation); ``plan`` is what it planned for these tokens.
        """
        config = self.config
        for i in range(*(layers or (0, config.layers))):
            layer = self.layers[i]
            if watch is not None and (other := watch(i, x)) is not None:
                x = other
            inner = layer.qkv.prepare(self._norm(x, layer.attention_norm))
            q, k, v = (
                part.unflatten(-1, (-1, config.head_dim))
                for part in layer.qkv.apply(inner).split(self._split, -1)
            )
            attention.append(i, {"k": k, "v": v, "x": x}, plan)
            mixed, _ = attention.run(i, q, plan)
            x = x + layer.out.apply(layer.out.prepare(mixed.flatten(1)))
            inner = layer.gate_up.prepare(self._norm(x, layer.mlp_norm))
            gate, up = layer.gate_up.apply(inner).chunk(2, -1)
            x = x + layer.down.apply(layer.down.prepare(silu(gate) * up))
        return x

    def head(self, x: Tensor) -> Tensor:
        """``[rows, hidden]`` after the last layer -> logits ``[rows, vocab]``."""
        logits: Tensor = self.lm_head.apply(self.lm_head.prepare(self._norm(x, self.norm)))
        return logits

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32 or wider; half the passes over memory that PyTorch's own takes on a CPU."""
        wide = x.to(self._wide)
        power: Tensor = linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (wide * power.add_(self.config.eps).rsqrt_()).mul_(weight).to(x.dtype)


def _packed(op: LinearOp) -> LinearOp:
    return PackedLinear(op) if isinstance(op, DenseLinear) else op
