"""Tensors of a GGUF, dequantized, under their Hugging Face names and in their Hugging Face order of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from servelab.plugins.executors.checkpoint.architectures import ARCHITECTURES, of_gguf
from servelab.plugins.executors.checkpoint.errors import ModelError, library
from servelab.plugins.executors.checkpoint.gguf_file import GgufFile, GgufTensor

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NOT_WEIGHTS = {"rope_freqs.weight"}
"""Read into the configuration instead."""
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def named(gguf: GgufFile) -> dict[str, GgufTensor]:
    """Hugging Face name -> tensor, in the file's order.

    Raises:
        ModelError: the file holds a tensor we do not know.
    """
    row = ARCHITECTURES[of_gguf(gguf.metadata.get("general.architecture"), str(gguf.path))].gguf
    parts = {**_LAYER, **(row.names if row else {})}
    found: dict[str, GgufTensor] = {}
    for tensor in gguf.tensors.values():
        if tensor.name not in _NOT_WEIGHTS:
            found[_hf_name(tensor.name, parts, gguf)] = tensor
    return found


def dequantized(gguf: GgufFile, config: Mapping[str, Any]) -> Iterator[tuple[str, NDArray[float32]]]:
    """Every tensor as float32, one at a time, each writable and its own copy.

    Args:
        gguf: the file.
        config: ``checked``.
    """
    row = ARCHITECTURES[config["architectures"][0]].gguf
    permuted = row is not None and row.permuted
    numpy = library("numpy", why="GGUF files hold tensors")
    gguf_library = library("gguf", why="GGUF files hold quantized tensors")
    # mapped, not read: the pages of a tensor can be dropped as soon as it is converted
    data = numpy.memmap(gguf.path, mode="r", dtype=numpy.uint8)
    for name, tensor in named(gguf).items():
        raw = data[tensor.offset : tensor.offset + tensor.nbytes]
        kind = gguf_library.GGMLQuantizationType(tensor.type)
        try:
            if kind.name == "F32":
                values = raw.view("<f4").reshape(tensor.shape)
            elif kind.name == "F16":
                values = raw.view("<f2").reshape(tensor.shape).astype(numpy.float32)
            else:
                rows = raw.reshape(*tensor.shape[:-1], -1)
                values = gguf_library.quants.dequantize(rows, kind).reshape(tensor.shape)
        except NotImplementedError as exc:  # how the gguf library refuses a quantization
            raise ModelError(
                f"the quantization {kind.name} cannot be read",
                where=f"{gguf.path}: {tensor.name}",
                why=str(exc),
                do="use another quantization of the model, or its Hugging Face folder",
            ) from exc
        if permuted and "self_attn.q_proj" in name:
            values = _unpermuted(values, config["num_attention_heads"])
        elif permuted and "self_attn.k_proj" in name:
            values = _unpermuted(values, config["num_key_value_heads"])
        yield name, numpy.array(values, dtype=numpy.float32, order="C", copy=not values.flags.writeable)


def _unpermuted(values: NDArray[float32], heads: int) -> NDArray[float32]:
    """Rows of each head from llama.cpp's order (pairs side by side) back to Hugging Face's (halves)."""
    half = values.shape[0] // heads // 2
    split = values.reshape(heads, half, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


def _hf_name(name: str, parts: Mapping[str, str], gguf: GgufFile) -> str:
    if name in _TOP:
        return _TOP[name]
    match = _BLOCK.fullmatch(name)
    if match and match[2] in parts:
        return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"
    raise ModelError(
        f"the tensor {name!r} is not known",
        where=str(gguf.path),
        why="no part of the supported architectures has this name",
        do="use the model's Hugging Face folder",
    )
