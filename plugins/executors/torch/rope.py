"""Rotary position embedding and the ways checkpoints stretch it.

Sources: RoFormer (arXiv 2104.09864); linear interpolation (arXiv 2306.15595); YaRN (arXiv 2309.00071); the
``llama3`` rule as published with Llama 3.1 and written down in transformers' ``modeling_rope_utils``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log, pi
from typing import Any

import torch
from torch import Tensor

Angles = tuple[Tensor, Tensor]


class RotaryEmbedding:
    """Halves of a head turn against each other, as in Hugging Face checkpoints.

    Args:
        rope: ``type``, ``theta`` and what the type needs, as ``checkpoint`` normalises it.
        head_dim: width of a head, even.
        dtype: of the vectors to turn; angles are computed in float32, or float64 for float64.
    """

    def __init__(self, rope: Mapping[str, Any], head_dim: int, dtype: torch.dtype) -> None:
        self.frequencies, self.scale = frequencies(rope, head_dim)
        self._dtype = dtype
        self._wide = torch.float64 if dtype is torch.float64 else torch.float32
        self._half = head_dim // 2

    def angles(self, positions: Tensor) -> Angles:
        """``positions [tokens]`` -> cosines and signed sines ``[tokens, 1, head_dim]``."""
        turns = positions[:, None].to(self._wide) * self.frequencies.to(self._wide)
        cos, sin = (turns.cos() * self.scale).to(self._dtype), (turns.sin() * self.scale).to(self._dtype)
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def turn(self, x: Tensor, angles: Angles) -> Tensor:
        """``x [tokens, heads, head_dim]``: ``(a, b) -> (a cos - b sin, b cos + a sin)`` over its halves."""
        cos, sin = angles
        return torch.addcmul(x * cos, x.roll(self._half, -1), sin)


def frequencies(rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Radians per position, float64 ``[head_dim / 2]``, and the factor on cosines and sines.

    Raises:
        KeyError: a type that is not in ``TYPES``; checkpoints are checked before.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    base = float(rope["theta"]) ** -exponents
    return TYPES[rope["type"]](base, rope, head_dim)


def _default(base: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    return base, 1.0


def _linear(base: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    return base / rope["factor"], 1.0


def _llama3(base: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Long wavelengths are stretched, short ones kept, those between blended."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position"] * base / (2 * pi)  # over the context it was trained on
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / rope["factor"] * (1 - kept), 1.0


def _yarn(base: Tensor, rope: Mapping[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """Frequencies that turn fast are kept, slow ones stretched, by a ramp over the dimensions."""
    trained, factor, theta = rope["original_max_position"], float(rope["factor"]), float(rope["theta"])

    def dimension(turns: float) -> float:
        """Where a frequency makes so many turns over the trained context."""
        return head_dim * log(trained / (turns * 2 * pi)) / (2 * log(theta))

    low, high = dimension(rope["beta_fast"]), dimension(rope["beta_slow"])
    if rope.get("truncate", True):
        low, high = float(int(low // 1)), float(-int(-high // 1))
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float64) - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    return base / factor * stretched + base * (1 - stretched), _yarn_scale(rope, factor)


def _yarn_scale(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])

    def magnitude(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)


TYPES: dict[str, Callable[[Tensor, Mapping[str, Any], int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
