"""The half of ``w4a16`` with tensors. See ``w4a16``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from servelab.core.families.quant import LinearSite, QTensor, WeightFormat
from servelab.plugins.quant._integers import (
    FLOOR,
    Scratch,
    beside,
    biases_beside,
    held,
    pack_halves,
    scale_dtype,
    unpack_halves,
    whole,
    wide,
)

FEW = 32
"""Tokens up to which PyTorch's 4-bit kernel is taken, whose time grows with them; above, weights are
dequantized first. Measured on AMX cores, SmolLM2's shapes: equally fast at about 32."""

BLOCK = 64
"""Outputs that the kernel's order puts together on processors with AVX-512."""

Groups = tuple[Tensor, Tensor, Tensor | None]
"""Codes ``[n, k]``; scales and zeros ``[groups, n]``."""


def asymmetric(weight: Tensor, group: int) -> Groups:
    grouped = wide(weight).reshape(len(weight), -1, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low).clamp(min=FLOOR) / 15).to(scale_dtype(weight))
    zero = whole(-low / scale, 0, 15, torch.int8)
    codes = whole((grouped / scale[..., None]).round() + zero[..., None], 0, 15, torch.uint8)
    return codes.flatten(1), scale.t().contiguous(), zero.t().contiguous()


def symmetric(weight: Tensor, group: int) -> Groups:
    grouped = wide(weight).reshape(len(weight), -1, group)
    scale = (grouped.abs().amax(2).clamp(min=FLOOR) / 7).to(scale_dtype(weight))
    codes = whole(grouped / scale[..., None], -8, 7, torch.int8) + 8
    return codes.flatten(1), scale.t().contiguous(), None


class W4A16Impl:
    def __init__(self, format: Callable[[LinearSite], WeightFormat]) -> None:
        self._format, self._scratch = format, Scratch()

    def pack(self, site: LinearSite, weight: Tensor, bias: Tensor | None, state: None) -> QTensor:
        format = self._format(site)
        (level,) = format.scales
        assert level.group is not None
        quantize = symmetric if level.zero == "none" else asymmetric
        codes, scale, zero = quantize(weight, level.group)
        return QTensor(
            format=format,
            shape=(site.n, site.k),
            codes=(pack_halves(codes),),
            scales=(scale,),
            zeros=() if zero is None else (zero,),
            packing="halves",
        )

    def linear(
        self,
        sites: Sequence[LinearSite],
        tensors: Sequence[QTensor],
        biases: Sequence[Tensor | None],
        device: str,
    ) -> W4A16Linear:
        return W4A16Linear(
            beside([t.codes[0] for t in tensors], 1, device),
            beside([t.scales[0] for t in tensors], 1, device),
            beside([t.zeros[0] for t in tensors], 1, device) if tensors[0].zeros else None,
            biases_beside(biases, [site.n for site in sites], device),
            self._scratch,
        )


class W4A16Linear:
    """``x @ ((codes - zero) * scale) + bias``.

    Few bfloat16 tokens go to PyTorch's 4-bit kernel, which computes ``(codes - 8) * scale + shift`` with
    ``shift = (8 - zero) * scale`` in bfloat16. Where it runs, codes are kept in its order only.
    """

    def __init__(
        self, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, scratch: Scratch
    ) -> None:
        self._scale, self._zero = scale[:, None], 8 if zero is None else zero[:, None]
        self._bias, self._scratch = bias, scratch
        self._k, self._n = 2 * len(packed), packed.shape[1]
        self._group = self._k // len(scale)
        self._packed, self._table = packed, None
        if has_kernel(self._n, self._group, scale):
            codes = unpack_halves(packed).t().int()
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self._table = torch.stack([scale, scale * (0 if zero is None else 8 - zero)], 2)
        self.nbytes = held(self._packed, scale, zero, self._table)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(self, prepared: Tensor) -> Tensor:
        x = prepared
        if self._table is not None and x.dtype is torch.bfloat16 and 0 < len(x) <= FEW:
            kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
            y: Tensor = kernel(x.contiguous(), self._packed, self._group, self._table)
        else:
            y = x @ self._weight(x.dtype)
        return (y if self._bias is None else y + self._bias).to(x.dtype)

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """Dequantized, ``[k, n]``."""
        shape, device = (self._k, self._n), self._packed.device
        integers = self._scratch("integers", shape, torch.int8, device)
        unpack = unpack_halves if self._table is None else unpack_blocks
        grouped = unpack(self._packed, integers).view(-1, self._group, self._n).sub_(self._zero)
        weight = self._scratch("weight", tuple(grouped.shape), dtype, device)
        torch.mul(grouped, self._scale.to(dtype), out=weight)
        return weight.view(shape)


def has_kernel(n: int, group: int, scale: Tensor) -> bool:
    """Whether PyTorch's kernel takes weights of this shape here, in an order that is known."""
    fits = n % BLOCK == 0 and group in (32, 64, 128, 256)  # its whole blocks, its groups
    return fits and scale.dtype is torch.bfloat16 and not scale.is_cuda and _order_is_known()


@cache
def _order_is_known() -> bool:
    codes = torch.randint(16, (2 * BLOCK, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    out = torch.empty(32, 2 * BLOCK, dtype=torch.int8)
    return torch.equal(unpack_blocks(packed, out).t(), codes)


def unpack_blocks(packed: Tensor, out: Tensor) -> Tensor:
    """Codes 0..15, int8 ``[k, n]``, of the kernel's order: for each block of 64 outputs and each input 32
    bytes, byte ``j`` with output ``j`` in its low bits and output ``j + 32`` in its high bits.

    Eight bytes at a time: runs of 32 are too short for PyTorch's loops over bytes (twice as fast).
    """
    k, n = out.shape
    pairs = packed.view(-1, k, BLOCK // 2).view(torch.int64).transpose(0, 1)
    halves = out.view(k, n // BLOCK, 2, BLOCK // 2).view(torch.int64)
    low_bits = 0x0F0F0F0F0F0F0F0F
    torch.bitwise_and(pairs, low_bits, out=halves[:, :, 0])
    torch.bitwise_right_shift(pairs, 4, out=halves[:, :, 1]).bitwise_and_(low_bits)
    return out
