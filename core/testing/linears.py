"""Where a quantizer runs: linears of toy models, packed, multiplied, and compared with the dense ones.

How close a product must be follows from the format alone (``floor_db``): the signal-to-noise ratio of uniform
quantization at its bits and its group, less ``MARGIN_DB``: half a bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from servelab.core.errors import ConfigError
from servelab.core.facts import ModelFacts
from servelab.core.families.quant import LinearSite, QTensor, WeightFormat
from servelab.core.sites import linear_sites
from servelab.core.testing.suite import PluginSuite
from servelab.core.testing.tensors import decibels, torch_or_skip

DENSE = ModelFacts(
    name="gqa",
    layers=2,
    hidden=128,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn=256,
    vocab=320,
    max_position=512,
    dtype="float32",
    dtype_bytes=4.0,
)
"""Grouped-query attention; every number of inputs is a multiple of 128."""
EXPERTS = replace(
    DENSE, name="moe", experts=4, experts_per_token=2, ffn=128, dense_layers=(0,), dense_ffn=256
)
ODD = replace(DENSE, name="odd", hidden=100, heads=5, kv_heads=1, head_dim=20, ffn=36, vocab=77)
"""No number of inputs is a multiple of a usual group."""
MODELS = (DENSE, EXPERTS, ODD)
ONE_BIT_DB = 6.02
MARGIN_DB = 3.0
"""What a quantizer may lose to scales that are rounded; one that wastes a bit loses twice as much."""


def floor_db(format: WeightFormat, k: int) -> float:
    """Signal-to-noise ratio in dB that a product of bell-shaped weights must reach, margin included.

    Integers: that of uniform quantization of the range that a group of normal numbers fills. Floats have
    about half their bits for the fraction; ternary weights and codebooks are held to what is usual.
    """
    group = next((level.group for level in reversed(format.scales) if level.group), k)
    weights = {
        "int": _uniform_db(format.bits, group),
        "float": ONE_BIT_DB / 2 * format.bits,
        "ternary": 3.0,
        "codebook": ONE_BIT_DB * (format.bits - 1),
    }[format.kind]
    inputs = _uniform_db(format.act_bits, k) if format.act_bits < 16 else math.inf
    return -10 * math.log10(10 ** (-weights / 10) + 10 ** (-inputs / 10))


def _uniform_db(bits: float, count: int) -> float:
    largest = math.sqrt(2 * math.log(2 * max(count, 4)))  # of so many normal numbers, about
    return ONE_BIT_DB * bits + 4.77 - 20 * math.log10(largest) - MARGIN_DB


class LinearBench(PluginSuite):
    """What the suite of quantizers works with."""

    kind: ClassVar[str] = "quant"
    contract: ClassVar[str] = "servelab/core/families/quant.py"
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float64")
    """Of weights and inputs, the first in most checks."""
    device: ClassVar[str] = "cpu"

    def state(self, impl: Any) -> Any:
        """The state given to ``pack``: with ``quant.calibrated``, override this and calibrate."""
        if self.provides("quant.calibrated") or self.provides("quant.gradients"):
            pytest.skip(f"{self.name} needs calibration: override 'state' in the suite to run this check")
        return None

    _model: ModelFacts = DENSE
    _dtype: Any = None

    def _loaded(self, dtype: str | None = None) -> tuple[Any, Any]:
        """The plugin for the dense model, and its half with tensors."""
        torch, dtype = torch_or_skip(), dtype or self.dtypes[0]
        self._dtype = getattr(torch, dtype)
        self._model = replace(DENSE, dtype=dtype, dtype_bytes=float(self._dtype.itemsize))
        quantizer = self.make(model=self._model)
        return quantizer, quantizer.load()

    def _formats(
        self, quantizer: Any, model: ModelFacts, refusable: bool = False
    ) -> Iterator[tuple[LinearSite, WeightFormat]]:
        """The linears it quantizes. ``refusable``: it may refuse sizes."""
        for site in linear_sites(model):
            try:
                format = quantizer.format(site, model)
            except ConfigError as exc:
                if refusable:
                    continue
                self.fail(
                    f"{self.name} refuses {site.name}, of {site.n} outputs and {site.k} inputs: {exc.what}",
                    rule="format: None where a linear stays as it is",
                    do="give settings that a toy model can serve in 'config' of the suite",
                    cause=exc,
                )
            if format is None:
                continue
            if not isinstance(format, WeightFormat):
                self.fail(
                    f"{self.name}: format() of {site.name} is {format!r:.60}",
                    rule="format: a WeightFormat, or None: stays as it is",
                    do="return one of the two",
                )
            yield site, format

    def _some(self, quantizer: Any) -> list[tuple[LinearSite, WeightFormat]]:
        """One linear of each shape and format."""
        found: dict[Any, tuple[LinearSite, WeightFormat]] = {}
        for site, format in self._formats(quantizer, self._model):
            found.setdefault((site.n, site.k, format), (site, format))
        if not found:
            pytest.skip(f"{self.name} quantizes no linear of a dense model with these settings")
        return list(found.values())

    def _joined(self, quantizer: Any) -> list[list[LinearSite]]:
        """Linears of the first layer that share an input and a format."""
        groups: dict[Any, list[LinearSite]] = {}
        for site, format in self._formats(quantizer, self._model):
            if site.layer == 0 and site.shares_input:
                groups.setdefault((frozenset({site.name, *site.shares_input}), format), []).append(site)
        return [sites for sites in groups.values() if len(sites) > 1]

    def _weights(self, site: LinearSite, seed: int = 0) -> Any:
        torch = torch_or_skip()
        rng = torch.Generator().manual_seed(1000 * site.n + site.k + seed)
        return (torch.randn(site.n, site.k, generator=rng, dtype=torch.float64) * 0.05).to(self._dtype)

    def _inputs(self, tokens: int, k: int) -> Any:
        torch = torch_or_skip()
        rng = torch.Generator().manual_seed(31 * tokens + k)
        return torch.randn(tokens, k, generator=rng, dtype=torch.float64).to(self._dtype)

    def _pack(
        self, impl: Any, site: LinearSite, weight: Any, bias: Any = None, format: WeightFormat | None = None
    ) -> QTensor:
        tensor = impl.pack(site, weight, bias, self.state(impl))
        if (
            not isinstance(tensor, QTensor)
            or tensor.shape != (site.n, site.k)
            or format not in (None, tensor.format)
        ):
            self.fail(
                f"{self.name}: pack() of {site.name} gives {getattr(tensor, 'format', tensor)!s:.60} "
                f"of shape {getattr(tensor, 'shape', None)}, wanted {format} of {(site.n, site.k)}",
                rule="pack: weight [n, k] in the format of its site",
                do="return a QTensor of the site's format and shape",
            )
        return tensor

    def _op(self, impl: Any, sites: Sequence[LinearSite], weights: Sequence[Any], biases: Any = None) -> Any:
        tensors = [self._pack(impl, s, w) for s, w in zip(sites, weights, strict=True)]
        return impl.linear(list(sites), tensors, biases or [None] * len(tensors), self.device)

    def _product(self, op: Any, x: Any, *sites: LinearSite) -> Any:
        """What the operation of some linears gives."""
        y = op.apply(op.prepare(x.to(self.device))).to(x.device)
        n = sum(site.n for site in sites)
        if tuple(y.shape) != (len(x), n) or y.dtype != x.dtype:
            self.fail(
                f"{self.name}: {len(x)} tokens in {x.dtype} through {sites[0].name} give {tuple(y.shape)} "
                f"in {y.dtype}",
                rule="apply: [tokens, n], in the dtype of x",
                do=f"return [{len(x)}, {n}] in {x.dtype}",
            )
        return y

    def _close(
        self,
        got: Any,
        want: Any,
        format: WeightFormat,
        site: LinearSite,
        of: str,
        *,
        rule: str = "y = x W^T, as closely as the format's bits allow",
        do: str = "compare what codes, scales and zeros stand for with the weight, output by output",
        margin: float = 0.0,
    ) -> None:
        reached, least = decibels(want, got.double() - want.double()), floor_db(format, site.k) - margin
        if not reached >= least:
            self.fail(
                f"{self.name}: {site.name} ({site.n} outputs, {site.k} inputs, {format}), {of}: signal to "
                f"noise {reached:.1f} dB, at least {least:.1f} dB are due",
                rule=rule,
                do=do,
            )

    def _same(self, got: Any, want: Any, what: str, *, rule: str, do: str) -> None:
        """Equal up to rounding of the dtype."""
        torch = torch_or_skip()
        tolerance = 32 * torch.finfo(got.dtype).eps
        # relative to the token's own size: cancellation leaves that much
        got, want = got.double(), want.double()
        largest = got.abs().maximum(want.abs()).amax(-1, keepdim=True)
        off = (got - want).abs() / largest.clamp(min=1e-30)
        if not bool((off <= tolerance).all()):
            self.fail(
                f"{what}, by up to {float(off.max()):.2g} of a token's largest output", rule=rule, do=do
            )
