"""The half of ``w8a8`` with tensors. See ``w8a8``."""

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
)


class W8A8Impl:
    def __init__(self, format: Callable[[LinearSite], WeightFormat]) -> None:
        self._format, self._scratch = format, Scratch()

    def pack(self, site: LinearSite, weight: Tensor, bias: Tensor | None, state: None) -> QTensor:
        codes, scale = quantize_rows(weight, 127, torch.float32)
        return QTensor(format=self._format(site), shape=(site.n, site.k), codes=(codes,), scales=(scale,))

    def linear(
        self,
        sites: Sequence[LinearSite],
        tensors: Sequence[QTensor],
        biases: Sequence[Tensor | None],
        device: str,
    ) -> W8A8Linear:
        return W8A8Linear(
            beside([t.codes[0] for t in tensors], 0, device),
            beside([t.scales[0] for t in tensors], 0, device),
            biases_beside(biases, [site.n for site in sites], device),
            self._scratch,
        )


class W8A8Linear:
    """``(x_q @ codes^T) * s_m * s_n + bias``."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self._weight, self._scale, self._bias, self._scratch = codes.t(), scale, bias, scratch
        self.nbytes = held(codes, scale)

    def prepare(self, x: Tensor) -> Tokens:
        return quantize_tokens(x)

    def apply(self, prepared: Tokens) -> Tensor:
        return integer_linear(prepared, self._weight, self._scale, self._bias, self._scratch)
