"""The half of ``w4a8`` with tensors. See ``w4a8``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from servelab.core.families.quant import LinearSite, QTensor, WeightFormat
from servelab.plugins.quant._integers import (
    Scratch,
    Tokens,
    beside,
    biases_beside,
    held,
    integer_linear,
    quantize_rows,
    quantize_tokens,
    scale_dtype,
    whole,
)

PROTECTIVE = 119
"""Largest int8 code of the first level: then ``(w4 - z) s2`` fits int8 (deepcompressor ``data/range.py``)."""


def second_level(codes: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of int8 codes ``[n, k]``: 4-bit codes ``[n, k]``, scales and zeros ``[n, groups]``, all int8."""
    grouped = codes.float().view(len(codes), -1, group)  # integers this small are exact
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).round().clamp(min=1)
    zero = (-low / scale).round().clamp(0, 15)
    small = whole((grouped / scale[..., None]).round() + zero[..., None], 0, 15, torch.int8)
    return small.flatten(1), scale.to(torch.int8), zero.to(torch.int8)


def pack_rows(codes: Tensor) -> Tensor:
    """Packing ``rows``: of codes 0..15 ``[n, k]``, byte ``[row, j]`` of ``[n, k / 2]`` holds that of input
    ``j`` in its low bits and that of input ``j + k / 2`` in its high bits.
    """
    low, high = codes.to(torch.uint8).chunk(2, 1)
    return low | (high << 4)


class W4A8Impl:
    def __init__(self, format: Callable[[LinearSite], WeightFormat]) -> None:
        self._format, self._scratch = format, Scratch()

    def pack(self, site: LinearSite, weight: Tensor, bias: Tensor | None, state: None) -> QTensor:
        format = self._format(site)
        group = format.scales[1].group
        assert group is not None
        codes, scale = quantize_rows(weight, PROTECTIVE, scale_dtype(weight))
        small, group_scale, zero = second_level(codes, group)
        return QTensor(
            format=format,
            shape=(site.n, site.k),
            codes=(pack_rows(small),),
            scales=(scale, group_scale),
            zeros=(zero,),
            packing="rows",
        )

    def linear(
        self,
        sites: Sequence[LinearSite],
        tensors: Sequence[QTensor],
        biases: Sequence[Tensor | None],
        device: str,
    ) -> W4A8Linear:
        return W4A8Linear(
            beside([t.codes[0] for t in tensors], 0, device),
            beside([t.scales[0] for t in tensors], 0, device),
            beside([t.scales[1] for t in tensors], 0, device),
            beside([t.zeros[0] for t in tensors], 0, device),
            biases_beside(biases, [site.n for site in sites], device),
            self._scratch,
        )


class W4A8Linear:
    """``(x_q @ ((w4 - z) s2)^T) * s_m * s1 + bias``; all in brackets is integer.

    Weights are unpacked as the paper's kernel does it in registers: subtraction after multiplication, so that
    one multiplication of a wider integer scales several codes. Their products stay below 256 since s2 is at
    most 16 (a range of 238 in 15 steps), so nothing carries from one byte to the next; subtracting z s2 in
    bytes, modulo 256, gives what fits int8.
    """

    def __init__(
        self,
        packed: Tensor,
        scale: Tensor,
        group_scale: Tensor,
        zero: Tensor,
        bias: Tensor | None,
        scratch: Scratch,
    ) -> None:
        self._packed, self._scale, self._bias, self._scratch = packed, scale, bias, scratch
        self._group_scale, self._shift = group_scale[..., None], (zero * group_scale)[..., None]
        self.nbytes = held(packed, scale, group_scale, zero)
        half, group = packed.shape[1], 2 * packed.shape[1] // group_scale.shape[1]
        # the widest integers whose codes are of one half, and of one group
        self._eight, self._four = half % 8 == 0, group % 4 == 0

    def prepare(self, x: Tensor) -> Tokens:
        return quantize_tokens(x)

    def apply(self, prepared: Tokens) -> Tensor:
        return integer_linear(prepared, self.weight().t(), self._scale, self._bias, self._scratch)

    def weight(self) -> Tensor:
        """``(w4 - z) s2``, int8 ``[n, k]``, in memory that the next operation writes to."""
        packed, groups = self._packed, self._shift.shape[1]
        n, half = packed.shape
        out = self._scratch("int8", (n, 2 * half), torch.int8, packed.device)
        wide, mask = (torch.int64, 0x0F0F0F0F0F0F0F0F) if self._eight else (torch.uint8, 0x0F)
        pairs, codes = packed.view(wide), out.view(wide)
        low, high = codes.chunk(2, 1)
        torch.bitwise_and(pairs, mask, out=low)
        torch.bitwise_right_shift(pairs, 4, out=high)
        if self._eight:  # bits of the neighbour came along
            high.bitwise_and_(mask)
        wide = torch.int32 if self._four else torch.int8
        out.view(wide).view(n, groups, -1).mul_(self._group_scale.to(wide))
        out.view(n, groups, -1).sub_(self._shift)
        return out
