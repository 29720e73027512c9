"""Which models the decoder runs, and a Hugging Face ``config.json`` in one spelling."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from servelab.core.errors import nearest
from servelab.plugins.executors.checkpoint.errors import ModelError
from servelab.plugins.executors.checkpoint.rope import rope


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One row of ``ARCHITECTURES``."""

    model_type: str
    """``model_type`` of config.json."""
    gguf: str
    """``general.architecture`` of GGUF files."""
    defaults: Mapping[str, Any]
    """Values transformers assumes for fields that config.json leaves out."""
    refuse: Callable[[Mapping[str, Any]], str | None]
    """The reason why a config of this architecture is not supported, or None."""


def _refuse_llama(config: Mapping[str, Any]) -> str | None:
    if config["hidden_act"] not in ("silu", "swish"):
        return f"hidden_act is {config['hidden_act']!r}; supported: silu"
    return None


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama",
        gguf="llama",
        defaults={
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": 2048,
        },
        refuse=_refuse_llama,
    ),
}
"""By the class name in ``architectures`` of config.json."""

_SHAPE = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "max_position": "max_position_embeddings",
}


def checked(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json with its defaults filled in and ``rope`` in one spelling, see ``rope.py``.

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
    config: dict[str, Any] = {**row.defaults, **{k: v for k, v in raw.items() if v is not None}}
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        _positive(config, key, where)
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
    if reason := row.refuse(config):
        raise _unsupported(where, reason)
    config["architectures"] = [name]
    config["rope"] = rope(config, where)
    return config


def shape(config: Mapping[str, Any]) -> dict[str, int]:
    """The shape fields of the ``model`` section, from a config that is ``checked``."""
    return {field: int(config[key]) for field, key in _SHAPE.items()}


def of_gguf(architecture: object, where: str) -> str:
    """Class name of a GGUF's ``general.architecture``.

    Raises:
        ModelError: not one of ours.
    """
    known = {row.gguf: name for name, row in ARCHITECTURES.items()}
    if architecture in known:
        return known[str(architecture)]
    raise ModelError(
        f"the architecture {architecture!r} is not supported",
        where=where,
        why=nearest(str(architecture), known),
        do="use a model of a supported architecture",
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
        do="use a model of a supported architecture",
    )


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
