"""QServe's W4A8 with two levels of scales, rounded to nearest: products of weights and activations are int8.

Paper: Lin et al., "QServe: W4A8KV4 Quantization and System Co-design for Efficient LLM Serving", MLSys 2025,
arXiv 2405.04532 (2024). Code: mit-han-lab/deepcompressor, mit-han-lab/omniserve.

Mechanism (progressive group quantization). First int8 per output, but only up to 119::

    s1 = max(absmax, 1e-5) / 119        w8 = clamp(round(w / s1), -119, 119)

then 4 bits per group of ``g`` of these integers, with an integer scale::

    s2 = max(1, round((max - min) / 15))        z = clamp(round(-min / s2), 0, 15)
    w4 = clamp(round(w8 / s2) + z, 0, 15)

A linear unpacks ``(w4 - z) s2``, which always fits int8 since w8 keeps to the protective range of 119,
multiplies it with int8 activations (per token, as ``w8a8``), sums in int32, and scales by ``s1 s_m`` at the
end. Rounding s2 loses range in narrow groups: in one that holds 0, w8 comes back off by 14 at worst. Groups
on one side of 0 are clamped and lose more. Both are QoQ's own.

Storage: codes uint8 ``[n, k / 2]`` (packing ``rows``: byte ``[row, j]`` has inputs ``j`` and ``j + k / 2``),
s1 ``[n]``, s2 and z int8 ``[n, k / g]``.

Deviations: 1. No rotation of block inputs, smoothing of block outputs or SmoothAttention. 2. No reordering
of channels. 3. Weights are rounded to nearest instead of by GPTQ. 4. KV is not touched (KV4 is a codec's).
5. The zero is taken before s2, as the paper writes; the released g128 configuration takes one after it.
6. s1 is in the model's 16-bit dtype (bfloat16 here, float16 there), float32 for wider models. 7. The group
is the first of several sizes that divides the inputs. 8. On a CPU weights are unpacked to memory that all
layers share, not within the product (with the paper's register-level parallelism: one multiplication scales
four codes); activations are quantized in an operation of their own, not in the norm before it.

Faithful when: (1) ``(w4 - z) s2`` is in -128..127 for any weights; (2) the accumulator equals that of fake
quantization, bit by bit; (3) the worst error of w8 over all ranges within +-119 that hold 0 is 14.
Tier: stable.
"""

from __future__ import annotations

from collections.abc import Sequence

from servelab.core.families.quant import QuantizerImpl, ScaleLevel, WeightFormat
from servelab.plugins.quant._describe import RoundToNearest


class W4A8(RoundToNearest):
    """Settings: ``GroupsConfig``."""

    def formats(self, group: int, scale_bits: int) -> Sequence[WeightFormat]:
        scales = (
            ScaleLevel(group=None, bits=scale_bits),
            ScaleLevel(group=group, bits=8, zero_bits=8, zero="int"),
        )
        return (WeightFormat(kind="int", bits=4, scales=scales, act_bits=8),)

    def load(self) -> QuantizerImpl:
        from servelab.plugins.quant.w4a8_impl import W4A8Impl

        return W4A8Impl(self._format)
