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
    integer_linear,
    pack_halves,
    quantize_rows,
    quantize_tokens,
    scale_dtype,
    unpack_halves,
    whole,
)

PROTECTIVE = 119
"""Largest int8 code of the first level: then ``(w4 - z) s2`` fits int8 (deepcompressor ``data/range.py``)."""


def second_level(codes: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of int8 codes ``[n, k]``: 4-bit codes ``[n, k]``, scales and zeros ``[groups, n]``, all int8."""
    grouped = codes.float().view(len(codes), -1, group)  # integers this small are exact
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).round().clamp(min=1)
    zero = (-low / scale).round().clamp(0, 15)
    small = whole((grouped / scale[..., None]).round() + zero[..., None], 0, 15, torch.int8)
    return small.flatten(1), scale.t().to(torch.int8).contiguous(), zero.t().to(torch.int8).contiguous()


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
            codes=(pack_halves(small),),
            scales=(scale, group_scale),
            zeros=(zero,),
            packing="halves",
        )

    def linear(
        self,
        sites: Sequence[LinearSite],
        tensors: Sequence[QTensor],
        biases: Sequence[Tensor | None],
        device: str,
    ) -> W4A8Linear:
        return W4A8Linear(
            beside([t.codes[0] for t in tensors], 1, device),
            beside([t.scales[0] for t in tensors], 0, device),
            beside([t.scales[1] for t in tensors], 1, device),
            beside([t.zeros[0] for t in tensors], 1, device),
            biases_beside(biases, [site.n for site in sites], device),
            self._scratch,
        )


class W4A8Linear:
    """``(x_q @ ((w4 - z) s2)) * s_m * s1 + bias``; all in brackets is integer."""

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
        self._group_scale, self._zero = group_scale[:, None], zero[:, None]

    def prepare(self, x: Tensor) -> Tokens:
        return quantize_tokens(x)

    def apply(self, prepared: Tokens) -> Tensor:
        return integer_linear(prepared, self.weight(), self._scale, self._bias, self._scratch)

    def weight(self) -> Tensor:
        """``(w4 - z) s2``, int8 ``[k, n]``, in memory that the next operation writes to."""
        half, n = self._packed.shape
        out = unpack_halves(
            self._packed, self._scratch("int8", (2 * half, n), torch.int8, self._packed.device)
        )
        out.view(len(self._zero), -1, n).sub_(self._zero).mul_(self._group_scale)
        return out
