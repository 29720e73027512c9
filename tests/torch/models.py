"""Tiny random models in the forms checkpoints take, and transformers' own answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import AttentionImpl, BatchLayout
from servelab.core.layout import KVLayout, Pool
from servelab.plugins.executors.checkpoint.rope import rope
from servelab.plugins.executors.torch.decoder import Decoder, DecoderConfig

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.5,  # wide, so that logits differ and argmax has margins
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def llama(seed: int = 0, kind: str = "default", **changes: Any) -> Any:
    """A random ``LlamaForCausalLM`` in float32, evaluation mode, eager attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        **{"tie_word_embeddings": False, **TINY, **changes},
        rope_parameters=dict(ROPES[kind]),
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def normalised(model: Any) -> dict[str, Any]:
    """Its configuration as ``checkpoint`` normalises it."""
    config: dict[str, Any] = model.config.to_dict()
    return {**config, "rope": rope(config, "config.json")}


def decoder(model: Any, dtype: torch.dtype) -> Decoder:
    return Decoder(DecoderConfig.of(normalised(model)), dtype, model.state_dict().items())


def facts(d: Decoder, windows: tuple[int | None, ...] = ()) -> ModelFacts:
    c = d.config
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_position")
    return ModelFacts(
        name="tiny",
        **{name: getattr(c, name) for name in names},
        dtype_bytes=d.dtype.itemsize,
        windows=windows,
    )


def layout(model: ModelFacts, page: int, **changes: Any) -> KVLayout:
    size = page * model.layers * model.kv_bytes_per_token_layer
    pool = {"id": "kv", "layers": tuple(range(model.layers)), "page_tokens": page, "bytes_per_page": size}
    return KVLayout(addressing=changes.pop("addressing", "block_table"), pools=(Pool(**{**pool, **changes}),))


def attention(
    d: Decoder, model: ModelFacts, kv: KVLayout, pages: int
) -> tuple[AttentionImpl, Mapping[int, Mapping[str, Tensor]]]:
    from servelab.plugins.kernels.sdpa.impl import SdpaImpl

    shape = (pages, kv.pools[0].page_tokens, model.kv_heads, model.head_dim)
    buffers = {
        i: {name: torch.zeros(shape, dtype=d.dtype) for name in ("k", "v")} for i in range(model.layers)
    }
    return SdpaImpl(kv, model, buffers, d.rotary), buffers


def rows(*items: tuple[int, int, list[int]]) -> BatchLayout:
    """A launch of rows ``(start, tokens, pages)``."""
    q_indptr, positions = [0], []
    for start, n, _ in items:
        q_indptr.append(q_indptr[-1] + n)
        positions += range(start, start + n)
    return BatchLayout(
        q_indptr=q_indptr,
        q_positions=positions,
        seg_indptr=list(range(len(items) + 1)),
        seg_tokens=[start + n for start, n, _ in items],
        seg_offset=[0] * len(items),
        seg_pages=[[pages for _, _, pages in items]],
    )


def widen(model: Any) -> Any:
    """The model with every computation in float64.

    transformers computes norms, rotations and eager softmax in float32 whatever the model's dtype; these are
    replaced by the same formulas in float64, its own float32 frequencies kept.
    """
    model = model.double()
    model.set_attn_implementation("sdpa")  # its softmax keeps float64

    def norm(module: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            return module.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)

        return forward

    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = norm(module)
    rotary = model.model.rotary_emb
    inverse, scaling = rotary.inv_freq.double(), rotary.attention_scaling

    def rotate(x: Tensor, position_ids: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].double() * inverse
        angles = torch.cat((angles, angles), -1)
        return angles.cos() * scaling, angles.sin() * scaling

    rotary.forward = rotate
    return model
