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
from servelab.plugins.executors.torch.linear import DenseLinear, SideBySide


def quantize(decoder: Decoder, quantizer: Quantizer, model: ModelFacts) -> dict[str, Any]:
    """Pack every linear that the quantizer has a format for; the plain weights are let go one by one.

    Returns:
        For the report: bytes of the linears before and after (``dense_bytes``, ``packed_bytes``), of a
        quantized head whose table stays because it is also the embedding (``tied_head_bytes``), and
        ``formats``, how many linears have each.

    Raises:
        PluginError: a packed weight takes another number of bytes than its format says.
    """
    impl = quantizer.load()
    formats = Counter[str]()
    dense_bytes = packed_bytes = tied_head_bytes = 0
    for holder, name, sites in _places(decoder, model):
        dense: DenseLinear = getattr(holder, name)
        wanted = [quantizer.format(site, model) for site in sites]
        formats.update("unquantized" if format is None else str(format) for format in wanted)
        op = _packed(impl, sites, wanted, dense) if any(wanted) else dense
        setattr(holder, name, op)
        if dense.weight is not decoder.embedding:
            dense_bytes += dense.nbytes
            packed_bytes += op.nbytes
        elif op is not dense:
            tied_head_bytes = op.nbytes
    return {
        "dense_bytes": dense_bytes,
        "packed_bytes": packed_bytes,
        "tied_head_bytes": tied_head_bytes,
        "formats": dict(formats),
    }


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
) -> LinearOp:
    """The linear that replaces a dense one."""
    rows = [site.n for site in sites]
    weights: list[Tensor] = list(torch.split(dense.weight, rows))
    biases: list[Tensor] | None = None if dense.bias is None else list(torch.split(dense.bias, rows))
    parts: list[LinearOp] = []
    start = 0
    for format, run in groupby(formats):
        end = start + len(list(run))
        if format is None:
            bias = None if biases is None else torch.cat(biases[start:end])
            parts.append(DenseLinear(torch.cat(weights[start:end]), bias))
        else:
            group, own = sites[start:end], biases[start:end] if biases else [None] * (end - start)
            packed = [
                impl.pack(site, weight, bias, None)
                for site, weight, bias in zip(group, weights[start:end], own, strict=True)
            ]
            for site, tensor in zip(group, packed, strict=True):
                _check(site, tensor, format)
            parts.append(impl.linear(group, packed, own, "cpu"))
        start = end
    return parts[0] if len(parts) == 1 else SideBySide(parts)


def _check(site: LinearSite, tensor: QTensor, format: WeightFormat) -> None:
    """A packed weight takes the bytes that its format states."""
    held: int = sum(t.nbytes for t in (*tensor.codes, *tensor.scales, *tensor.zeros))
    if held != format.nbytes(site.n, site.k):
        raise PluginError(
            f"the packed weight of {site.name} takes {held} bytes",
            where="QuantizerImpl.pack()",
            why=f"its format {format} says {format.nbytes(site.n, site.k)}",
            do="mend the quantizer: prices of memory and bandwidth follow from the format",
        )
