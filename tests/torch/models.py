"""Tiny random models in the forms checkpoints take, and transformers' own answers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import AttentionImpl, BatchLayout
from servelab.core.layout import KVLayout, Pool
from servelab.plugins.executors.checkpoint.architectures import checked
from servelab.plugins.executors.torch.attention import Kernel, RotaryByLayer
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.shape import DecoderConfig

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


FULL, SLIDING = "full_attention", "sliding_attention"
DEFAULT = {"rope_parameters": ROPES["default"]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mistral, no window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"sliding_window": None}),
    "qwen2, upper windows": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "qwen3, windows by layer": (
        "Qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "attention_bias": True,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "num_hidden_layers": 4,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, window": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 1, "sliding_window": 9}),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3_moe, every second layer": (
        "Qwen3Moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
}
"""Tiny models of every family but Llama: transformers' prefix, and settings beside ``TINY``. Windows are
shorter than the prompts of tests."""


def family(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random model of ``FAMILIES``, as ``made``."""
    prefix, settings = FAMILIES[name]
    return made(prefix, seed, **{**DEFAULT, **settings, **changes})


def llama(seed: int = 0, kind: str = "default", **changes: Any) -> Any:
    """A random ``LlamaForCausalLM``, as ``made``."""
    return made("Llama", seed, rope_parameters=ROPES[kind], **changes)


def made(prefix: str, seed: int, **settings: Any) -> Any:
    """A random model in float32, evaluation mode, eager attention and experts."""
    import transformers

    torch.manual_seed(seed)
    text = "Text" if prefix == "Gemma3" else ""
    config = getattr(transformers, f"{prefix}{text}Config")(
        **{"tie_word_embeddings": False, **TINY, **deepcopy(settings)}, attn_implementation="eager"
    )
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # neutral ones would hide a norm that is left out
                parameter.uniform_(-0.5, 0.5).add_(0 if prefix == "Gemma3" else 1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def normalised(model: Any) -> dict[str, Any]:
    """Its configuration as ``checkpoint`` normalises it."""
    return checked({**model.config.to_dict(), "architectures": [type(model).__name__]}, "config.json")


def decoder(model: Any, dtype: torch.dtype) -> Decoder:
    return Decoder(DecoderConfig.of(normalised(model)), dtype, model.state_dict().items())


def facts(d: Decoder, windows: tuple[int | None, ...] = ()) -> ModelFacts:
    c = d.config
    names = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "max_position")
    return ModelFacts(
        name="tiny",
        **{name: getattr(c, name) for name in (*names, "experts", "experts_per_token")},
        ffn=c.expert_ffn or c.ffn,
        dense_layers=tuple(sorted(c.dense_layers)),
        dense_ffn=c.ffn if c.dense_layers else 0,
        dtype_bytes=d.dtype.itemsize,
        windows=windows or c.windows,
        tied_embeddings=c.tied,
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
    backend: Any = SimpleNamespace(load=lambda kv, model, device, *rest: SdpaImpl(kv, model, *rest))
    return Kernel(backend).load(kv, model, "cpu", buffers, d.rotary), buffers


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

    transformers computes norms, rotations, routers and eager softmax in float32 whatever the model's dtype;
    these are replaced by the same formulas in float64, its own float32 frequencies kept.
    """
    model = model.double()
    model.set_attn_implementation("sdpa")  # its softmax keeps float64
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = _norm(module, kind)
        elif kind.endswith("TopKRouter"):
            module.forward = _router(module)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = _rotation(module)
    return model


def _norm(module: Any, kind: str) -> Any:
    eps = module.eps if kind.startswith("Gemma") else module.variance_epsilon

    def forward(x: Tensor) -> Tensor:
        weight = 1 + module.weight if kind.startswith("Gemma") else module.weight
        return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    return forward


def _router(module: Any) -> Any:
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(x.reshape(-1, x.shape[-1]), module.weight)
        top, chosen = logits.softmax(-1).topk(module.top_k, -1)
        if getattr(module, "norm_topk_prob", True):
            top = top / top.sum(-1, keepdim=True)
        return logits, top, chosen

    return forward


def _rotation(module: Any) -> Any:
    def forward(x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, Tensor]:
        prefix = f"{layer_type}_" if layer_type else ""
        angles = position_ids[..., None].double() * getattr(module, f"{prefix}inv_freq").double()
        angles, scale = torch.cat((angles, angles), -1), getattr(module, f"{prefix}attention_scaling")
        return angles.cos() * scale, angles.sin() * scale

    return forward


def exact(model: Any) -> tuple[Any, Decoder]:
    """transformers' model and ours, all in float64 with its float32 frequencies."""
    model = widen(model)
    d, theirs = decoder(model, torch.float64), model.model.rotary_emb
    if isinstance(d.rotary, RotaryByLayer):
        for ours, kind in zip(d.rotary.kinds, (FULL, SLIDING), strict=True):
            ours.frequencies = getattr(theirs, f"{kind}_inv_freq").double()
    else:
        d.rotary.frequencies = theirs.inv_freq.double()
    return model, d
