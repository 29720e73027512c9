"""Rounding, packing and integer products: what the halves with tensors have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-5
"""Smallest range that is divided into steps, so that zeros are no division by zero (llm-awq
``awq/quantize/quantizer.py``, smoothquant ``fake_quant.py``)."""


def wide(t: Tensor) -> Tensor:
    """In float32 or wider: what everything but products is computed in."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def whole(t: Tensor, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """Rounded half to even, and NaN to 0: of integers that come from NaN, the scale is NaN."""
    return t.round().nan_to_num().clamp(low, high).to(dtype)


def quantize_rows(weight: Tensor, limit: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale per output: ``s = absmax / limit``, codes ``-limit..limit``.

    Returns codes int8 ``[n, k]`` and scales ``[n]``.
    """
    weight = wide(weight)
    scale = (weight.abs().amax(1).clamp(min=FLOOR) / limit).to(scale_dtype)
    return whole(weight / scale[:, None], -limit, limit, torch.int8), scale


@dataclass(frozen=True, slots=True)
class Tokens:
    """Quantized activations of one input, shared by all linears that read it."""

    codes: Tensor
    """int8 ``[tokens, k]``."""
    scale: Tensor
    """``[tokens, 1]``, float32 or wider."""
    dtype: torch.dtype
    """Of the input."""


def quantize_tokens(x: Tensor) -> Tokens:
    """Symmetric, one scale per token: ``s = max(absmax, 1e-5) / 127``.

    A token with NaN or infinity has codes that are defined, and a scale that leaves no output finite.
    """
    scale = wide(x.abs().amax(1, keepdim=True)).clamp_(min=FLOOR).div_(127)
    return Tokens(x.div(scale).round_().nan_to_num_().to(torch.int8), scale, x.dtype)


def pack_halves(codes: Tensor) -> Tensor:
    """Packing ``halves``: of codes 0..15 ``[n, k]``, byte ``[j, row]`` of ``[k / 2, n]`` holds that of input
    ``j`` in its low bits and that of input ``j + k / 2`` in its high bits. Both halves unpack to one block.
    """
    low, high = codes.to(torch.uint8).t().chunk(2)
    return (low | (high << 4)).contiguous()


def unpack_halves(packed: Tensor, out: Tensor | None = None) -> Tensor:
    """Codes 0..15, int8 ``[k, n]``; ``out`` is such a tensor to be written."""
    half, n = packed.shape
    if out is None:
        out = packed.new_empty((2 * half, n), dtype=torch.int8)
    codes = out.view(torch.uint8)
    torch.bitwise_and(packed, 15, out=codes[:half])
    torch.bitwise_right_shift(packed, 4, out=codes[half:])
    return out


def beside(tensors: Sequence[Tensor], outputs: int, device: str) -> Tensor:
    """Tensors of several linears as one; ``outputs`` is their dimension of outputs."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), outputs)).to(device)


def biases_beside(biases: Sequence[Tensor | None], sizes: Sequence[int], device: str) -> Tensor | None:
    """Biases of several linears as one, zeros for those without; None if none has any."""
    if all(bias is None for bias in biases):
        return None
    parts = [
        torch.zeros(n, device=device) if bias is None else wide(bias).to(device)
        for bias, n in zip(biases, sizes, strict=True)
    ]
    return beside(parts, 0, device)


def held(*tensors: Tensor | None) -> int:
    """Bytes of what an operation keeps."""
    return sum(int(t.nbytes) for t in tensors if t is not None)


class Scratch:
    """Blocks of memory that all operations of a model write to in turn, one operation at a time.

    One block per use and dtype, as large as the largest request so far: it does not grow with the number
    of layers, and no call pays for fresh pages.
    """

    def __init__(self) -> None:
        self._blocks: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        needed, key = torch.Size(shape).numel(), (use, dtype, device)
        block = self._blocks.get(key)
        if block is None or block.numel() < needed:
            block = self._blocks[key] = torch.empty(needed, dtype=dtype, device=device)
        return block[:needed].view(shape)


def scale_dtype(weight: Tensor) -> torch.dtype:
    """Scales of 16-bit weights are of their dtype, others float32."""
    return weight.dtype if weight.dtype.itemsize == 2 else torch.float32


def integer_linear(x: Tokens, weight: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """``(x @ weight) * x.scale * scale + bias`` with ``weight`` int8 ``[k, n]``, ``scale [n]``.

    The sum is exact in int32 (for k below 2^31 / 128^2), the rest float32, or float64 for float64 inputs.
    """
    shape = len(x.codes), weight.shape[1]
    sums = integer_product(x.codes, weight, scratch("sums", shape, torch.int32, weight.device))
    return rescale(sums, x.scale, scale, bias, x.dtype, scratch)


BLOCK = 64
"""Tokens whose sums are scaled together, so that they stay in the processor's cache: measured on one AMX
core, 512 tokens of 3072 outputs take half the time of all at once; 32 and 64 are equally fast."""


def rescale(
    sums: Tensor,
    token_scale: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scratch: Scratch,
) -> Tensor:
    """``sums * token_scale * scale + bias`` in float32 or wider, then in ``dtype``: new memory."""
    tokens, n = sums.shape
    wider, device = torch.promote_types(dtype, torch.float32), sums.device
    y, scale = torch.empty((tokens, n), dtype=dtype, device=device), scale.to(wider)
    block = scratch("scaled", (min(tokens, BLOCK), n), wider, device)
    for first in range(0, tokens, BLOCK):
        at = slice(first, first + BLOCK)
        part = block[: len(y[at])].copy_(sums[at])
        if token_scale is not None:
            part.mul_(token_scale[at])
        part.mul_(scale)
        if bias is not None:
            part.add_(bias)
        y[at] = part
    return y


def integer_product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``x [tokens, k] @ weight [k, n]`` of int8 in int32.

    cuBLAS wants more than 16 tokens, and all sizes in multiples of 8: tokens are padded there (untested).
    """
    if not x.is_cuda:
        return torch._int_mm(x, weight, out=out)
    padded = x.new_zeros((max(24, -(-len(x) // 8) * 8), x.shape[1]))
    padded[: len(x)] = x
    return out.copy_(torch._int_mm(padded, weight)[: len(x)])
