"""The ``config.json`` that a GGUF's metadata amounts to."""

from __future__ import annotations

import math
import struct
from typing import Any

from servelab.plugins.executors.checkpoint.architectures import ARCHITECTURES, of_gguf
from servelab.plugins.executors.checkpoint.errors import ModelError, library
from servelab.plugins.executors.checkpoint.gguf_file import GgufFile

_QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
_MLP_BIASES = ("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What every released Llama 3.x has beside its factor."""


def config_of(gguf: GgufFile) -> dict[str, Any]:
    """Fields of config.json, not ``checked`` yet.

    Raises:
        ModelError: the architecture is unknown, metadata are missing, or say what we do not support.
    """
    where = str(gguf.path)
    meta = gguf.metadata
    arch = meta.get("general.architecture")
    name = of_gguf(arch, where)

    def get(key: str, default: Any = None) -> Any:
        value = meta.get(f"{arch}.{key}", default)
        return _shortest(value) if isinstance(value, float) else value

    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise _unsupported(where, "it holds no token_embd.weight")
    if get("expert_count", 0):
        raise _unsupported(where, f"it has {get('expert_count')} experts per layer")
    heads, hidden = get("attention.head_count"), get("embedding_length")
    if isinstance(heads, list) or isinstance(get("attention.head_count_kv"), list):
        raise _unsupported(where, "its layers have different numbers of heads")
    head_dim = get("attention.key_length") or (hidden // heads if heads and hidden else None)
    rotated = get("rope.dimension_count")
    if rotated and rotated != head_dim:
        raise _unsupported(where, f"{rotated} of the {head_dim} elements of a head are rotated")
    if (window := get("attention.sliding_window")) and window < (get("context_length") or 0):
        raise _unsupported(where, f"it has a sliding window of {window} tokens, but not in which layers")
    # a family without biases after attention has three, any other four
    traits = ARCHITECTURES[name].traits
    biases = _QKV_BIASES if traits.get("output_bias") is False else (*_QKV_BIASES, "attn_output.bias")
    biased = _biased(gguf, biases, where)
    if biased is not traits.get("attention_bias", biased):
        raise _unsupported(where, f"{', '.join(biases)} are missing")
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": ARCHITECTURES[name].model_type,
        "num_hidden_layers": get("block_count"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get("feed_forward_length"),
        "vocab_size": embedding.shape[0],
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": biased,
        "mlp_bias": _biased(gguf, _MLP_BIASES, where),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(gguf, get, head_dim, where),
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in config.items() if value is not None}


def quantization_of(gguf: GgufFile) -> str:
    """The element type that holds most of the weights, such as ``Q4_1``."""
    nbytes: dict[int, int] = {}
    for tensor in gguf.tensors.values():
        nbytes[tensor.type] = nbytes.get(tensor.type, 0) + tensor.nbytes
    largest = max(nbytes, key=lambda kind: nbytes[kind], default=None)
    return next((gguf.type_name(t) for t in gguf.tensors.values() if t.type == largest), "none")


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-05 for a float32 that reads 9.999999747378752e-06 in float64."""
    for digits in range(6, 10):
        short = float(f"{value:.{digits}g}")
        if math.isfinite(value) and struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return value


def _biased(gguf: GgufFile, names: tuple[str, ...], where: str) -> bool:
    present = [name for name in names if f"blk.0.{name}" in gguf.tensors]
    if present and len(present) != len(names):
        raise _unsupported(where, f"only {', '.join(present)} of {', '.join(names)} are there")
    return bool(present)


def _scaling(gguf: GgufFile, get: Any, head_dim: int | None, where: str) -> dict[str, Any] | None:
    kind = get("rope.scaling.type") or "none"
    if "rope_freqs.weight" in gguf.tensors:
        if kind != "none":
            raise _unsupported(where, f"it has both rope_freqs.weight and rope scaling {kind!r}")
        return _llama3(gguf, float(get("rope.freq_base", 10000.0)), where)
    factor = get("rope.scaling.factor") or get("rope.scale_linear")
    if kind == "none":
        return {"rope_type": "linear", "factor": factor} if factor and factor != 1.0 else None
    scaling = {"rope_type": kind, "factor": factor}
    if original := get("rope.scaling.original_context_length"):
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3(gguf: GgufFile, theta: float, where: str) -> dict[str, Any]:
    """The llama3 parameters whose factors, one per frequency, ``rope_freqs.weight`` states.

    The file states the factors only; they are accepted where the parameters of the released models give them.
    """
    numpy = library("numpy", why="GGUF files hold tensors")
    tensor = gguf.tensors["rope_freqs.weight"]
    with gguf.path.open("rb") as file:
        file.seek(tensor.offset)
        stated = numpy.frombuffer(file.read(tensor.nbytes), dtype="<f4")
    factor = round(float(stated.max()), 4)
    frequencies = theta ** -(numpy.arange(len(stated)) / len(stated))
    wavelengths = 2 * math.pi / frequencies
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = (_LLAMA3["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    smooth = numpy.clip(smooth, 0, 1)
    meant = 1 / ((1 - smooth) / factor + smooth)
    if not numpy.allclose(stated, meant, rtol=1e-4):
        raise _unsupported(where, "the factors in rope_freqs.weight are not those of Llama 3.x")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _unsupported(where: str, why: str) -> ModelError:
    return ModelError(
        "this GGUF is not supported",
        where=where,
        why=why,
        do="use the model's Hugging Face folder, or another model",
    )
