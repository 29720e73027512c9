"""Weights in int8 with a scale per output: what ``w8a16`` and ``w8a8`` pack alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from servelab.core.families.quant import LinearOp, LinearSite, QTensor, WeightFormat
from servelab.plugins.quant._integers import Scratch, beside, biases_beside, quantize_rows

Operation = Callable[[Tensor, Tensor, Tensor | None, Scratch], LinearOp]
"""From codes int8 ``[n, k]``, scales float32 ``[n]``, bias and scratch memory."""


class RowsImpl:
    """The half with tensors of a quantizer whose linears are ``operation``."""

    def __init__(self, format: Callable[[LinearSite], WeightFormat], operation: Operation) -> None:
        self._format, self._operation, self._scratch = format, operation, Scratch()

    def pack(self, site: LinearSite, weight: Tensor, bias: Tensor | None, state: None) -> QTensor:
        codes, scale = quantize_rows(weight, 127, torch.float32)
        return QTensor(format=self._format(site), shape=(site.n, site.k), codes=(codes,), scales=(scale,))

    def linear(
        self,
        sites: Sequence[LinearSite],
        tensors: Sequence[QTensor],
        biases: Sequence[Tensor | None],
        device: str,
    ) -> LinearOp:
        return self._operation(
            beside([t.codes[0] for t in tensors], 0, device),
            beside([t.scales[0] for t in tensors], 0, device),
            biases_beside(biases, [site.n for site in sites], device),
            self._scratch,
        )
