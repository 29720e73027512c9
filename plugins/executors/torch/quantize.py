"""A decoder's linears, exchanged for quantized ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from servelab.core.api import ModelFacts, PluginError
from servelab.core.families.quant import (
    LinearOp,
    LinearSite,
    QTensor,
    Quantizer,
    QuantizerImpl,
    Role,
    WeightFormat,
)
from servelab.core.sites import linear_sites
from servelab.plugins.executors.torch.decoder import Decoder
from servelab.plugins.executors.torch.linear import DenseLinear


def quantize(decoder: Decoder, quantizer: Quantizer, model: ModelFacts) -> dict[str, Any]:
    """Pack every linear that the quantizer has a format for; the plain weights are let go one by one.

    Returns:
        For the report: bytes of the linears before and after (``dense_bytes``, ``packed_bytes``), and
        ``formats``, how many linears have each.

    Raises:
        PluginError: a packed weight takes another number of bytes than its format says.
    """
    impl = quantizer.load()
    formats = Counter[str]()
    dense_bytes = packed_bytes = 0
    for holder, name, sites in _places(decoder, model):
        dense: DenseLinear = getattr(holder, name)
        wanted = [quantizer.format(site, model) for site in sites]
        formats.update("unquantized" if format is None else str(format) for format in wanted)
        if dense.weight is not decoder.embedding:  # a tied head has no bytes of its own
            dense_bytes += dense.weight.nbytes
            packed_bytes += dense.weight.nbytes if not any(wanted) else 0
        if not any(wanted):
            continue
        op, held = _packed(impl, sites, wanted, dense)
        packed_bytes += held
        setattr(holder, name, op)
    return {"dense_bytes": dense_bytes, "packed_bytes": packed_bytes, "formats": dict(formats)}


def _places(decoder: Decoder, model: ModelFacts) -> Iterator[tuple[Any, str, list[LinearSite]]]:
    """Where each linear of the decoder is held, and the sites that it joins."""
    for _, group in groupby(linear_sites(model), key=lambda site: (_module(site), _PLACES[site.role])):
        sites = list(group)
        yield _holder(decoder, sites[0]), _PLACES[sites[0].role], sites


_PLACES: dict[Role, str] = {
    "q": "qkv",
    "k": "qkv",
    "v": "qkv",
    "o": "out",
    "gate": "gate_up",
    "up": "gate_up",
    "down": "down",
    "expert_gate": "gate_up",
    "expert_up": "gate_up",
    "expert_down": "down",
    "head": "lm_head",
}


def _module(site: LinearSite) -> str:
    return site.name.rpartition(".")[0]


def _holder(decoder: Decoder, site: LinearSite) -> Any:
    """The record whose field the linear is."""
    if site.layer < 0:
        return decoder
    layer = decoder.layers[site.layer]
    if site.role in ("q", "k", "v", "o"):
        return layer
    expert = int(_module(site).rpartition(".")[2]) if site.role.startswith("expert_") else 0
    return layer.mlp.parts[expert]


def _packed(
    impl: QuantizerImpl,
    sites: Sequence[LinearSite],
    formats: Sequence[WeightFormat | None],
    dense: DenseLinear,
) -> tuple[LinearOp, int]:
    """The linear that replaces a dense one, and the bytes of its weights."""
    rows = [site.n for site in sites]
    weights: list[Tensor] = list(torch.split(dense.weight, rows))
    biases: list[Tensor] | None = None if dense.bias is None else list(torch.split(dense.bias, rows))
    parts: list[LinearOp] = []
    held = start = 0
    for format, run in groupby(formats):
        end = start + len(list(run))
        if format is None:
            bias = None if biases is None else torch.cat(biases[start:end])
            parts.append(DenseLinear(torch.cat(weights[start:end]), bias))
            held += sum(weight.nbytes for weight in weights[start:end])
        else:
            group, own = sites[start:end], biases[start:end] if biases else [None] * (end - start)
            packed = [
                impl.pack(site, weight, bias, None)
                for site, weight, bias in zip(group, weights[start:end], own, strict=True)
            ]
            held += sum(_held(site, tensor, format) for site, tensor in zip(group, packed, strict=True))
            parts.append(impl.linear(group, packed, own, "cpu"))
        start = end
    return parts[0] if len(parts) == 1 else SideBySide(parts), held


def _held(site: LinearSite, tensor: QTensor, format: WeightFormat) -> int:
    """Bytes of a packed weight, which its format must have stated."""
    held: int = sum(t.nbytes for t in (*tensor.codes, *tensor.scales, *tensor.zeros))
    if held != format.nbytes(site.n, site.k):
        raise PluginError(
            f"the packed weight of {site.name} takes {held} bytes",
            where="QuantizerImpl.pack()",
            why=f"its format {format} says {format.nbytes(site.n, site.k)}",
            do="mend the quantizer: memory and the simulator's prices follow from the format",
        )
    return held + int(sum(t.nbytes for t in (tensor.permutation, tensor.group_index) if t is not None))


class SideBySide:
    """Linears of several formats over one input, their outputs joined."""

    def __init__(self, parts: Sequence[LinearOp]) -> None:
        self._parts = parts

    def prepare(self, x: Tensor) -> list[Any]:
        return [part.prepare(x) for part in self._parts]

    def apply(self, prepared: Sequence[Any]) -> Tensor:
        """``[tokens, n]``."""
        outputs = [part.apply(one) for part, one in zip(self._parts, prepared, strict=True)]
        return torch.cat(outputs, dim=-1)
