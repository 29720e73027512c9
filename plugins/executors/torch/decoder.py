"""A compact decoder of the Llama kind, for flattened batches of any lengths.

One path for prefill and decode: ``embed`` tokens, ``run`` a range of layers, ``head`` on the rows that need
logits. Keys leave it before rotation, attention belongs to a backend (``core/families/kernel.py``), every
layer's input can be watched or replaced, and a range of layers can be run by itself: the places where
techniques attach. There is no module tree: a layer is a record of its operations. Families differ in
``DecoderConfig`` alone; none is named here.

Source: LLaMA (arXiv 2302.13971), with grouped queries as in Llama 2 (arXiv 2307.09288). What others add:
Mistral 7B (arXiv 2310.06825), Mixtral (arXiv 2401.04088), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388),
Gemma 3 (arXiv 2503.19786).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, linalg

from servelab.core.families.kernel import AttentionImpl
from servelab.core.families.quant import LinearOp
from servelab.plugins.executors.torch.attention import RotaryByLayer
from servelab.plugins.executors.torch.linear import DenseLinear, packed
from servelab.plugins.executors.torch.mlp import ACTIVATIONS, GatedMlp
from servelab.plugins.executors.torch.moe import Experts, by_expert
from servelab.plugins.executors.torch.places import Places
from servelab.plugins.executors.torch.rope import RotaryEmbedding
from servelab.plugins.executors.torch.shape import DecoderConfig

Watch = Callable[[int, Tensor], Tensor | None]
"""Sees each layer's number and input ``[tokens, hidden]``; a tensor it returns takes the input's place."""


@dataclass(slots=True)
class Layer:
    """One decoder layer. Linears may be exchanged for any ``LinearOp`` of the same shape; norms that are None
    are left out.
    """

    attention_norm: Tensor
    qkv: LinearOp
    """``[tokens, hidden] -> [tokens, (heads + 2 kv_heads) * head_dim]``: queries, keys, values."""
    out: LinearOp
    mlp_norm: Tensor
    mlp: GatedMlp | Experts
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    """Of one head, ``[head_dim]``, before rotation."""
    attention_post_norm: Tensor | None = None
    mlp_post_norm: Tensor | None = None
    """On what is about to be added to the residual stream."""


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
        self.rotary = _rotary(config, dtype)
        c, places = config, Places(dtype)
        self.embedding = places.tensor("model.embed_tokens.weight", c.vocab, c.hidden)
        self.layers = [self._layer(i, places) for i in range(c.layers)]
        self.norm = self._norm_weight(places, "model.norm", c.hidden)
        table = self.embedding if c.tied else places.tensor("lm_head.weight", c.vocab, c.hidden)
        self.lm_head: LinearOp = DenseLinear(table)
        self._nbytes = places.nbytes
        places.fill(by_expert(_needed(tensors, c.tied), c))
        for layer in self.layers:
            if layer.q_norm is not None:
                layer.q_norm.mul_(c.query_scale)
        # rounded to float32 and then to the model's dtype, as transformers does
        self._embedding_scale = torch.tensor(c.embedding_scale, dtype=torch.float32).to(dtype)
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        self._split = (q, kv, kv)

    # ------------------------------------------------------------- weights

    def _layer(self, i: int, places: Places) -> Layer:
        c, name = self.config, f"model.layers.{i}"
        attention = f"{name}.self_attn"
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        before = "pre_feedforward_layernorm" if c.post_norms else "post_attention_layernorm"
        layer = Layer(
            attention_norm=self._norm_weight(places, f"{name}.input_layernorm", c.hidden),
            qkv=places.linear(
                {f"{attention}.q_proj": q, f"{attention}.k_proj": kv, f"{attention}.v_proj": kv},
                c.hidden,
                c.attention_bias,
            ),
            out=places.linear({f"{attention}.o_proj": c.hidden}, q, c.output_bias),
            mlp_norm=self._norm_weight(places, f"{name}.{before}", c.hidden),
            mlp=self._experts(f"{name}.mlp", places)
            if c.experts and i not in c.dense_layers
            else self._mlp(f"{name}.mlp", c.ffn, places),
        )
        if c.qk_norm:
            layer.q_norm = self._norm_weight(places, f"{attention}.q_norm", c.head_dim)
            layer.k_norm = self._norm_weight(places, f"{attention}.k_norm", c.head_dim)
        if c.post_norms:
            layer.attention_post_norm = self._norm_weight(
                places, f"{name}.post_attention_layernorm", c.hidden
            )
            layer.mlp_post_norm = self._norm_weight(places, f"{name}.post_feedforward_layernorm", c.hidden)
        return layer

    def _mlp(self, name: str, ffn: int, places: Places) -> GatedMlp:
        c = self.config
        return GatedMlp(
            gate_up=places.linear({f"{name}.gate_proj": ffn, f"{name}.up_proj": ffn}, c.hidden, c.mlp_bias),
            down=places.linear({f"{name}.down_proj": c.hidden}, ffn, c.mlp_bias),
            activation=ACTIVATIONS[c.activation],
        )

    def _experts(self, name: str, places: Places) -> Experts:
        c = self.config
        return Experts(
            router=places.tensor(f"{name}.gate.weight", c.experts, c.hidden),
            parts=[self._mlp(f"{name}.experts.{e}", c.expert_ffn, places) for e in range(c.experts)],
            per_token=c.experts_per_token,
            norm_topk=c.norm_topk,
        )

    def _norm_weight(self, places: Places, name: str, size: int) -> Tensor:
        """With its offset, which a narrow dtype would round, it is kept wide."""
        offset = self.config.norm_offset
        return places.tensor(f"{name}.weight", size, dtype=self._wide if offset else None, plus=offset)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as they were loaded, before packing or quantizing."""
        return self._nbytes

    def linears(self) -> Iterator[tuple[Any, str]]:
        """Every linear, as the record that holds it and its name there."""
        for layer in self.layers:
            yield from ((layer, "qkv"), (layer, "out"))
            for part in layer.mlp.parts:
                yield from ((part, "gate_up"), (part, "down"))
        yield self, "lm_head"

    def pack(self) -> None:
        """Reorder every dense weight for the CPU's matrix kernels; the plain copies are let go."""
        for holder, name in self.linears():
            setattr(holder, name, packed(getattr(holder, name)))

    # ---------------------------------------------------------- arithmetic

    def embed(self, ids: Tensor) -> Tensor:
        """int64 ``[tokens]`` -> ``[tokens, hidden]``."""
        x = self.embedding[ids]
        return x if self.config.embedding_scale == 1 else x * self._embedding_scale

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
            q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            attention.append(i, {"k": k, "v": v, "x": x}, plan)
            mixed, _ = attention.run(i, q, plan)
            out = layer.out.apply(layer.out.prepare(mixed.flatten(1)))
            x = x + self._norm(out, layer.attention_post_norm)
            x = x + self._norm(layer.mlp(self._norm(x, layer.mlp_norm)), layer.mlp_post_norm)
        return x

    def head(self, x: Tensor) -> Tensor:
        """``[rows, hidden]`` after the last layer -> logits ``[rows, vocab]``."""
        logits: Tensor = self.lm_head.apply(self.lm_head.prepare(self._norm(x, self.norm)))
        return logits

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """RMSNorm in float32 or wider; half the passes over memory that PyTorch's own takes on a CPU."""
        if weight is None:
            return x
        wide = x.to(self._wide)
        power: Tensor = linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        return (wide * power.add_(self.config.eps).rsqrt_()).mul_(weight).to(x.dtype)


def _rotary(config: DecoderConfig, dtype: torch.dtype) -> RotaryEmbedding | RotaryByLayer:
    rotary = RotaryEmbedding(config.rope, config.head_dim, dtype)
    if config.local_rope is None:
        return rotary
    local = RotaryEmbedding(config.local_rope, config.head_dim, dtype)
    return RotaryByLayer((rotary, local), [int(window is not None) for window in config.windows])


def _needed(tensors: Iterable[tuple[str, Tensor]], tied: bool) -> Iterator[tuple[str, Tensor]]:
    """Without what old tools wrote although it follows from the rest."""
    for name, tensor in tensors:
        if not (name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied)):
            yield name, tensor
