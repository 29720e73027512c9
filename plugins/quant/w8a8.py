"""Round to nearest: int8 weights per output, int8 activations per token, integer products. A baseline.

Mechanism: weights as ``w8a16``. Each token of the input gets ``s_m = max(absmax_m, 1e-5) / 127`` and
``x_q = round(x / s_m)`` when it comes (dynamic), once for all linears that read it. The product is summed
exactly in int32: ``y = acc * s_m * s_n`` in float32.

Storage: codes int8 ``[n, k]``, scales float32 ``[n]``.

Source: per-token and per-channel quantization of smoothquant's ``fake_quant.py``, without its smoothing.

Deviations: 1. Activations are quantized in an operation of their own, not in the norm before it.

Faithful when: (1) the accumulator equals the exact product of integers; (2) a token's result does not
depend on its batch; (3) tokens of zeros give zeros; (4) fake quantization gives the same up to rounding.
Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from servelab.core.families.quant import QuantizerImpl, ScaleLevel, WeightFormat
from servelab.plugins.quant._describe import RoundToNearest


class W8A8(RoundToNearest):
    """Settings: ``LayersConfig``."""

    def formats(self, group: int, scale_bits: int) -> Sequence[WeightFormat]:
        scales = (ScaleLevel(group=None, bits=32),)
        return (WeightFormat(kind="int", bits=8, scales=scales, act_bits=8),)

    def load(self) -> QuantizerImpl:
        from servelab.plugins.quant._rows import RowsImpl
        from servelab.plugins.quant.w8a8_impl import W8A8Linear

        return RowsImpl(self._format, W8A8Linear)
