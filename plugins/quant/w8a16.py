"""Round to nearest: int8 weights with one scale per output, 16-bit activations. A baseline.

Mechanism: ``s_n = max(absmax_n, 1e-5) / 127``, ``q = round(w / s_n)``. The product is computed with the
integers; its columns are multiplied by ``s_n`` afterwards, since a scale per output commutes with the sum.

Storage: codes int8 ``[n, k]``, scales float32 ``[n]``: 1 byte per weight and 4 per output.

Deviations: none (the textbook formula; the floor is smoothquant's ``fake_quant.py``).

Faithful when: (1) no weight is off by more than ``s_n / 2``; (2) scaling after the sum equals the product
with dequantized weights; (3) zeros stay zeros, without NaN; (4) quantizing what was dequantized changes
nothing. Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from servelab.core.families.quant import QuantCaps, QuantizerImpl, ScaleLevel, WeightFormat
from servelab.plugins.quant._describe import RoundToNearest


class W8A16(RoundToNearest):
    """Settings: ``LayersConfig``."""

    caps = QuantCaps(batch_invariant=False)  # sums are ordered by how many tokens there are

    def formats(self, group: int, scale_bits: int) -> Sequence[WeightFormat]:
        return (WeightFormat(kind="int", bits=8, scales=(ScaleLevel(group=None, bits=32),)),)

    def load(self) -> QuantizerImpl:
        from servelab.plugins.quant._rows import RowsImpl
        from servelab.plugins.quant.w8a16_impl import W8A16Linear

        return RowsImpl(self._format, W8A16Linear)
