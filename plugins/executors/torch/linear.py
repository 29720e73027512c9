"""Linear layers as ``core/families/quant.py::LinearOp`` asks: dense ones, and several over one input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from servelab.core.families.quant import LinearOp

NO_FUSION: tuple[str, list[float | None], str] = ("none", [], "")


class DenseLinear:
    """``y = x W^T + b`` with ``weight [n, k]`` and ``bias [n]``."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes

    def prepare(self, x: Tensor) -> Tensor:
        """``[tokens, k]``, unchanged."""
        return x

    def apply(self, prepared: Tensor) -> Tensor:
        """``[tokens, n]``."""
        return torch.nn.functional.linear(prepared, self.weight, self.bias)


class PackedLinear:
    """The same product with weights reordered once for oneDNN's kernels: on one thread bit by bit.

    On several, oneDNN may divide a sum among them in one form and not in the other: seldom, some elements
    differ by a rounding (never seen for SmolLM2's shapes and up to 64 tokens on two threads).

    PyTorch's own bfloat16 linear reorders them in every call: measured on two AMX cores, 1 to 32 tokens
    take half the time when they are packed beforehand (``docs/reference/benchmarks.md``).
    """

    def __init__(self, dense: DenseLinear) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(dense.weight.contiguous(), None)
        self._bias = dense.bias
        self.nbytes = dense.nbytes

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def apply(self, prepared: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(prepared, self._weight, self._bias, *NO_FUSION)
        return y


class SideBySide:
    """Linears of several formats over one input, their outputs joined."""

    def __init__(self, parts: Sequence[LinearOp]) -> None:
        self.parts = parts
        self.nbytes = sum(part.nbytes for part in parts)

    def prepare(self, x: Tensor) -> list[Any]:
        return [part.prepare(x) for part in self.parts]

    def apply(self, prepared: Sequence[Any]) -> Tensor:
        """``[tokens, n]``."""
        outputs = [part.apply(one) for part, one in zip(self.parts, prepared, strict=True)]
        return torch.cat(outputs, dim=-1)


def packed(op: LinearOp) -> LinearOp:
    """The operation with its dense weights packed; others are as they were."""
    if isinstance(op, SideBySide):
        return SideBySide([packed(part) for part in op.parts])
    return PackedLinear(op) if isinstance(op, DenseLinear) else op


def packs(dtype: torch.dtype) -> bool:
    """Whether packing weights of this dtype is possible and pays on this machine."""
    return dtype is torch.bfloat16 and torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
