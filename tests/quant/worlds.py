"""What the tests of quantizers share: shapes, plugins, weights, and dequantization written down plainly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.quant import LinearSite, QTensor
from servelab.core.registry import Registry

NAMES = ("w8a16", "w4a16", "w8a8", "w4a8")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROUNDING = {
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float32: 2.0**-23,
    torch.float64: 2.0**-52,
}
"""Relative error of one rounding, at most (half of the last bit, doubled for good measure)."""

SMOLLM2 = ModelFacts(
    name="smollm2",
    layers=1,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab=512,
    max_position=2048,
)

_REGISTRY = Registry.load()


def model(dtype: torch.dtype = torch.bfloat16) -> ModelFacts:
    return replace(SMOLLM2, dtype=str(dtype)[6:], dtype_bytes=float(dtype.itemsize))


def quantizer(name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    factory, config = (_REGISTRY.resolve("quant", name, part) for part in ("factory", "config"))
    context = type("Context", (), {"name": name, "model": model(dtype)})()
    return factory(config(**settings), context)


def site(n: int, k: int, **fields: Any) -> LinearSite:
    return LinearSite(**{"name": f"linear_{n}", "layer": 0, "role": "q", "n": n, "k": k, **fields})


def weights(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Bell-shaped, with rows of very different size and a few outliers."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=rng, dtype=torch.float64) * 0.05
    weight *= torch.logspace(-2, 1, n, dtype=torch.float64)[:, None]
    weight[:: max(1, n // 3), k // 2] *= 12
    return weight.to(dtype)


def inputs(tokens: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=rng, dtype=torch.float64)
    x[:, k // 3] *= 30
    return x.to(dtype)


def made(
    name: str,
    parts: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    **settings: Any,
) -> tuple[Any, list[QTensor]]:
    """The operation of linears that share their input, and copies of their packed weights."""
    impl = quantizer(name, parts[0].dtype, **settings).load()
    sites = [site(*weight.shape) for weight in parts]
    tensors = [impl.pack(s, weight, None, None) for s, weight in zip(sites, parts, strict=True)]
    again = [impl.pack(s, weight, None, None) for s, weight in zip(sites, parts, strict=True)]
    return impl.linear(sites, tensors, biases or [None] * len(parts), "cpu"), again


def run(op: Any, x: Tensor) -> Tensor:
    y: Tensor = op.apply(op.prepare(x))
    return y


def nibbles(t: QTensor) -> Tensor:
    """Codes ``[n, k]`` of packing ``halves`` or ``rows``."""
    packed = t.codes[0].long()
    if t.packing == "halves":
        return torch.cat([packed % 16, packed // 16]).t()
    return torch.cat([packed % 16, packed // 16], 1)


def per_input(t: Tensor, k: int) -> Tensor:
    """Values of groups ``[groups, n]`` at each weight, ``[n, k]``, float64."""
    return t.double().t().repeat_interleave(k // len(t), dim=1)


def dequantized(t: QTensor) -> Tensor:
    """The weight that codes, scales and zeros stand for, ``[n, k]``, float64."""
    n, k = t.shape
    if t.packing == "canonical":
        return t.codes[0].double() * t.scales[0].double()[:, None]
    codes, rows = nibbles(t).double(), t.packing == "rows"
    scale, *zeros = (part.t() if rows else part for part in (t.scales[-1], *t.zeros))
    zero = per_input(zeros[0], k) if zeros else torch.full((n, k), 8.0)
    codes = (codes - zero) * per_input(scale, k)
    return codes * t.scales[0].double()[:, None] if len(t.scales) == 2 else codes
