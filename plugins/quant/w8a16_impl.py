"""The operation of ``w8a16``; its packing is in ``_rows``."""

from __future__ import annotations

import torch
from torch import Tensor

from servelab.plugins.quant._integers import Scratch, held, rescale

FEW = 8
"""Tokens up to which PyTorch's kernel for int8 weights is taken, which reads them once per token. Measured on
AMX cores, SmolLM2's shapes: as fast as packed bfloat16 for 1 token, as slow as converting the weights at 8.
"""


class W8A16Linear:
    """``(x @ codes^T) * scale + bias``. Integers are exact in bfloat16; sums are rounded, then scaled."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self._codes, self._scale, self._bias, self._scratch = codes, scale, bias, scratch
        self.nbytes = held(codes, scale)
        # the kernel would round scales to bfloat16: it gets ones, and is exact up to its own rounding
        self._ones = torch.ones(len(codes), dtype=torch.bfloat16, device=codes.device)

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(self, prepared: Tensor) -> Tensor:
        x, codes = prepared, self._codes
        if x.dtype is torch.bfloat16 and 0 < len(x) <= FEW and not x.is_cuda:
            sums = torch._weight_int8pack_mm(x.contiguous(), codes, self._ones)
        else:  # float16 would overflow before it is scaled
            dtype = torch.float32 if x.dtype is torch.float16 else x.dtype
            weight = self._scratch("weight", tuple(codes.shape), dtype, codes.device)
            sums = x.to(dtype) @ weight.copy_(codes).t()
        return rescale(sums, None, self._scale, self._bias, x.dtype, self._scratch)
