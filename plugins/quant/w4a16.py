"""Round to nearest: 4-bit weights in groups, 16-bit activations. A baseline.

Mechanism, per group of ``g`` weights of one output (llm-awq ``awq/quantize/quantizer.py``)::

    s = max(max - min, 1e-5) / 15       z = clamp(round(-min / s), 0, 15)
    q = clamp(round(w / s) + z, 0, 15)  w ~ (q - z) s

or, with ``symmetric``, ``s = max(absmax, 1e-5) / 7``, ``q = clamp(round(w / s), -8, 7)``, stored as q + 8
(as Marlin). Codes are computed with the scale as it is stored.

Storage: codes uint8 ``[k / 2, n]`` (packing ``halves``: the byte at ``j`` holds inputs ``j`` and
``j + k / 2``), scales ``[k / g, n]``, zeros int8 ``[k / g, n]``. With outputs last, a scale is broadcast
over consecutive memory.

Deviations: 1. Scales are in the model's 16-bit dtype (bfloat16 here, float16 there), float32 for wider
models. 2. Zeros take a byte instead of 4 bits. 3. The group is the first of several sizes that divides the
inputs: papers' models divide by 128.

Faithful when: (1) codes and zeros are in 0..15; (2) where min <= 0 <= max, both come back within s / 2;
(3) a group of positive weights keeps z = 0, and loses what is above 15 s; (4) one group per row is
quantization per output. Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from servelab.core.api import Context
from servelab.core.families.quant import QuantCaps, QuantizerImpl, ScaleLevel, WeightFormat
from servelab.plugins.quant._describe import GroupsConfig, RoundToNearest


class W4A16Config(GroupsConfig):
    """Settings of ``+quant=w4a16``."""

    symmetric: bool = Field(
        False, description="no zeros, codes around 0 (Marlin); off, as llm-awq's round-to-nearest baseline"
    )


class W4A16(RoundToNearest):
    caps = QuantCaps(batch_invariant=False)  # sums are ordered by how many tokens there are

    def __init__(self, config: W4A16Config, context: Context) -> None:
        super().__init__(config, context)
        self._symmetric = config.symmetric

    def formats(self, group: int, scale_bits: int) -> Sequence[WeightFormat]:
        levels = {
            True: ScaleLevel(group=group, bits=scale_bits),
            False: ScaleLevel(group=group, bits=scale_bits, zero_bits=8, zero="int"),
        }
        return [
            WeightFormat(kind="int", bits=4, scales=(levels[symmetric],))
            for symmetric in (self._symmetric, not self._symmetric)
        ]

    def load(self) -> QuantizerImpl:
        from servelab.plugins.quant.w4a16_impl import W4A16Impl

        return W4A16Impl(self._format)
