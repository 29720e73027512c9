"""The operation of ``w8a8``; its packing is in ``_rows``."""

from __future__ import annotations

from torch import Tensor

from servelab.plugins.quant._integers import Scratch, Tokens, held, integer_linear, quantize_tokens


class W8A8Linear:
    """``(x_q @ codes^T) * s_m * s_n + bias``."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None, scratch: Scratch) -> None:
        self._weight, self._scale, self._bias, self._scratch = codes.t(), scale, bias, scratch
        self.nbytes = held(codes, scale)

    def prepare(self, x: Tensor) -> Tokens:
        return quantize_tokens(x)

    def apply(self, prepared: Tokens) -> Tensor:
        return integer_linear(prepared, self._weight, self._scale, self._bias, self._scratch)
