"""Which models the decoder runs, and a Hugging Face ``config.json`` in one spelling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from servelab.core.errors import nearest
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.experts import experts
from servelab.plugins.executors.checkpoint.rope import rope, ropes_by_kind
from servelab.plugins.executors.checkpoint.windows import (
    Rule,
    all_but_every_nth,
    every_layer,
    every_layer_if_used,
    never,
    upper_layers_if_used,
    windows,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gguf:
    """How a family's tensors are kept in GGUF files."""

    architecture: str
    """``general.architecture``."""
    permuted: bool = False
    """Rows of queries and keys are in llama.cpp's order, pairs side by side."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Tensors of a layer beyond those that every family has: GGUF name -> Hugging Face name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One row of ``ARCHITECTURES``."""

    model_type: str
    """``model_type`` of config.json."""
    adds: str
    """What it has beside Llama's decoder, for people."""
    gguf: Gguf | None = None
    """None: not read from GGUF files."""
    defaults: Mapping[str, Any]
    """Values transformers assumes for fields that config.json leaves out, over those of ``_DEFAULTS``."""
    traits: Mapping[str, Any] = field(default_factory=dict)
    """What is so in every model of the family, whatever config.json says, over ``_TRAITS``."""
    activation: tuple[str, str] = ("hidden_act", "silu")
    """The field that names it, and the one we run."""
    windows: Rule = never
    """Which layers have a sliding window."""
    local_rope: bool = False
    """Layers with a window have rotary embeddings of their own."""
    experts: bool = False
    refuses: tuple[str, ...] = ()
    """Fields that must be null or false."""


_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
_TRAITS: Mapping[str, Any] = {
    "qk_norm": False,
    "post_norms": False,
    "norm_offset": 0.0,
    "scaled_embedding": False,
    "query_scalar": None,
    "local_rope": None,
    "experts": 0,
    "experts_per_token": 0,
    "expert_ffn": 0,
    "dense_layers": (),
}
"""What ``DecoderConfig.of`` reads beside config.json's own fields."""
_QWEN = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama",
        adds="nothing",
        gguf=Gguf(architecture="llama", permuted=True),
        defaults={"max_position_embeddings": 2048},
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral",
        adds="a sliding window in every layer, where config.json has one",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        traits={"attention_bias": False, "mlp_bias": False},
        windows=every_layer,
        refuses=("layer_types",),
    ),
    "Qwen2ForCausalLM": Architecture(
        model_type="qwen2",
        adds="biases on queries, keys and values; sliding windows in upper layers, where switched on",
        gguf=Gguf(architecture="qwen2"),
        defaults=_QWEN,
        traits={"attention_bias": True, "output_bias": False, "mlp_bias": False},
        windows=upper_layers_if_used,
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3",
        adds="a norm on each head's queries and keys; sliding windows in upper layers, where switched on",
        gguf=Gguf(architecture="qwen3", names=_QK_NORMS),
        defaults={**_QWEN, "head_dim": 128},
        traits={"qk_norm": True, "mlp_bias": False},
        windows=upper_layers_if_used,
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text",
        adds="sliding and full layers in turn, each kind with a RoPE base of its own; norms of 1 + weight, "
        "four in a layer; a norm on each head's queries and keys; scaled embeddings; GELU (tanh); a scale of "
        "attention of its own",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
        },
        traits={
            "qk_norm": True,
            "post_norms": True,
            "norm_offset": 1.0,
            "scaled_embedding": True,
            "mlp_bias": False,
        },
        activation=("hidden_activation", "gelu_pytorch_tanh"),
        windows=all_but_every_nth,
        local_rope=True,
        refuses=("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"),
    ),
    "MixtralForCausalLM": Architecture(
        model_type="mixtral",
        adds="experts in every layer, their weights normalized over those chosen; a window as in Mistral",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        traits={"attention_bias": False, "mlp_bias": False, "norm_topk_prob": True},
        windows=every_layer,
        experts=True,
    ),
    "Qwen3MoeForCausalLM": Architecture(
        model_type="qwen3_moe",
        adds="experts, in every layer or in some; a norm on each head's queries and keys; a sliding window "
        "in every layer, where switched on",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
        },
        traits={"qk_norm": True, "mlp_bias": False},
        windows=every_layer_if_used,
        experts=True,
    ),
}
"""By the class name in ``architectures`` of config.json."""

FAMILIES_PAGE = "docs/reference/model_families.md"
_MOST_LAYERS = 10_000
"""A damaged file may state any number; what is made per layer must fit in memory."""
_MEANS_NONE = ("sliding_window", "num_key_value_heads")
"""Fields whose null is not their default: no window; as many as query heads."""
_SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "max_position": "max_position_embeddings",
}


def checked(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json with its defaults filled in and what families say in their own words in one spelling.

    Added are ``rope`` and ``local_rope`` (``rope.py``), ``windows`` (``windows.py``), the fields of
    ``experts.py``, ``activation``, and the family's ``traits``.

    Args:
        raw: the fields of config.json.
        where: the file, for messages.

    Raises:
        ModelError: we do not support the model, or fields are missing or malformed.
    """
    name = _architecture(raw, where)
    row = ARCHITECTURES[name]
    if quantization := raw.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise _unsupported(
            where, f"its weights are quantized ({method}); float16, bfloat16 and float32 are read"
        )
    stated = {k: v for k, v in raw.items() if v is not None or k in _MEANS_NONE}
    config: dict[str, Any] = {**_DEFAULTS, **row.defaults, **stated, **row.traits}
    config = {key: value for key, value in config.items() if value is not None}
    config |= {**_TRAITS, "output_bias": config["attention_bias"], **row.traits}
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        _positive(config, key, where)
    if config["num_hidden_layers"] > _MOST_LAYERS:
        raise _malformed(where, f"num_hidden_layers is {config['num_hidden_layers']}")
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    if "head_dim" not in config:
        if config["hidden_size"] % heads:
            raise _malformed(where, f"hidden_size {config['hidden_size']} is no multiple of {heads} heads")
        config["head_dim"] = config["hidden_size"] // heads
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        _positive(config, key, where)
    if heads % config["num_key_value_heads"]:
        raise _malformed(
            where, f"{config['num_key_value_heads']} key-value heads do not divide {heads} heads"
        )
    if config["head_dim"] % 2:
        raise _malformed(where, f"head_dim is {config['head_dim']}; rotary embeddings need an even one")
    if not _number(config["rms_norm_eps"]) or not 0 < config["rms_norm_eps"] < math.inf:
        raise _malformed(where, f"rms_norm_eps is {config['rms_norm_eps']!r}")
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(config[key], bool):
            raise _malformed(where, f"{key} is {config[key]!r}; true or false is needed")
    config["activation"] = _activation(config, row, where)
    if "query_pre_attn_scalar" in row.defaults:
        config["query_scalar"] = config["query_pre_attn_scalar"]
        if not _number(config["query_scalar"]) or not 0 < config["query_scalar"] < math.inf:
            raise _malformed(where, f"query_pre_attn_scalar is {config['query_scalar']!r}")
    if refused := [key for key in row.refuses if config.get(key)]:
        raise _unsupported(where, f"{refused[0]} is {config[refused[0]]!r}; it must be null or left out")
    config["architectures"] = [name]
    try:
        config["windows"] = windows(config, row.windows)
        if row.experts:
            config.update(experts(config))
    except ValueError as exc:
        raise _malformed(where, str(exc)) from exc
    if row.local_rope:
        config["rope"], local = ropes_by_kind(config, where)
        config["local_rope"] = local if config["windows"] else None
    else:
        config["rope"] = rope(config, where)
    return config


def shape(config: Mapping[str, Any]) -> dict[str, Any]:
    """The shape fields of the ``model`` section, from a config that is ``checked``; without those of windows
    and experts where the model has none.
    """
    found: dict[str, Any] = {field: int(config[key]) for field, key in _SHAPE.items()}
    found["ffn"] = config.get("expert_ffn") or config["intermediate_size"]
    found |= {key: config[key] for key in ("windows", "experts", "experts_per_token") if config.get(key)}
    if config.get("dense_layers"):
        found |= {"dense_layers": config["dense_layers"], "dense_ffn": config["intermediate_size"]}
    if config.get("tie_word_embeddings"):
        found["tied_embeddings"] = True
    return found


def of_gguf(architecture: object, where: str) -> str:
    """Class name of a GGUF's ``general.architecture``.

    Raises:
        ModelError: not one of ours.
    """
    known = {row.gguf.architecture: name for name, row in ARCHITECTURES.items() if row.gguf}
    if architecture in known:
        return known[str(architecture)]
    met = str(architecture)
    folders = [
        name
        for name, row in ARCHITECTURES.items()
        if met == row.model_type.removesuffix("_text").replace("_", "")
    ]
    raise ModelError(
        f"the architecture {architecture!r} is not supported as GGUF",
        where=where,
        why=nearest(str(architecture), known),
        do=f"use the Hugging Face folder: {folders[0]} is read from there"
        if folders
        else f"use a model of a supported architecture, see {FAMILIES_PAGE}",
    )


def _architecture(raw: Mapping[str, Any], where: str) -> str:
    named = raw.get("architectures") or []
    if isinstance(named, list) and len(named) == 1 and str(named[0]) in ARCHITECTURES:
        return str(named[0])
    met = (
        ", ".join(map(str, named))
        if named and isinstance(named, list)
        else f"model_type {raw.get('model_type')!r}"
    )
    raise ModelError(
        f"the architecture {met} is not supported",
        where=where,
        why=nearest(met, ARCHITECTURES),
        do=f"use a model of a supported architecture; what each has is in {FAMILIES_PAGE}",
    )


def _activation(config: Mapping[str, Any], row: Architecture, where: str) -> str:
    key, ours = row.activation
    met = "silu" if config.get(key) == "swish" else config.get(key)
    if met != ours:
        raise _unsupported(where, f"{key} is {config.get(key)!r}; supported: {ours}")
    return ours


def _positive(config: Mapping[str, Any], key: str, where: str) -> None:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _malformed(
            where, f"{key} is {'missing' if value is None else repr(value)}; a positive integer is needed"
        )


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _malformed(where: str, why: str) -> ModelError:
    return ModelError("the model's configuration is malformed", where=where, why=why, do="download it again")


def _unsupported(where: str, why: str) -> ModelError:
    return ModelError(
        "this model is not supported",
        where=where,
        why=why,
        do="use another checkpoint of the model, or another model",
    )
