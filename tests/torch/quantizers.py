"""Quantizers for tests: plain formats, and what was asked of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from servelab.core.facts import ModelFacts
from servelab.core.families.kernel import OpCost
from servelab.core.families.quant import LinearSite, QTensor, QuantCaps, WeightFormat


class Plain:
    """Stores weights as they are, as an 8-byte float format; ``edit`` may change them."""

    caps = QuantCaps()

    def __init__(self, edit: Callable[[Tensor], Tensor] = torch.clone, left_out: Sequence[str] = ()) -> None:
        self.edit, self.left_out = edit, left_out
        self.calls: Counter[str] = Counter()
        self.fused: list[tuple[str, ...]] = []
        self.reason: str | None = None

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        if site.role in (*self.left_out, "head"):
            return None
        return WeightFormat(kind="float", bits=8 * int(model.dtype_bytes))

    def refuses(self, format: WeightFormat, n: int, k: int, hardware: object) -> str | None:
        return self.reason

    def cost(self, *args: Any) -> OpCost:
        return OpCost()

    def load(self) -> Plain:
        return self

    def pack(self, site: LinearSite, weight: Tensor, bias: Tensor | None, state: object) -> QTensor:
        assert weight.shape == (site.n, site.k) and state is None
        return QTensor(format=_of(weight), shape=(site.n, site.k), codes=(self.edit(weight),))

    def linear(
        self, sites: Sequence[LinearSite], tensors: Sequence[QTensor], biases: Sequence[Any], device: str
    ) -> _Op:
        assert device == "cpu"
        self.fused.append(tuple(site.name for site in sites))
        return _Op([t.codes[0] for t in tensors], biases, self.calls)


def _of(weight: Tensor) -> WeightFormat:
    return WeightFormat(kind="float", bits=8 * weight.element_size())


class _Op:
    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Any], calls: Counter[str]) -> None:
        self._weights, self._biases, self._calls = weights, biases, calls
        self.nbytes = sum(t.nbytes for t in weights)

    def prepare(self, x: Tensor) -> Tensor:
        self._calls["prepare"] += 1
        return x

    def apply(self, prepared: Tensor) -> Tensor:
        self._calls["apply"] += 1
        parts = zip(self._weights, self._biases, strict=True)
        return torch.cat([torch.nn.functional.linear(prepared, w, b) for w, b in parts], -1)
