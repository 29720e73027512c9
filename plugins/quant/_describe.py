"""What the round-to-nearest quantizers have in common, free of torch: settings, choice of layers, costs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import fields

from pydantic import BaseModel, ConfigDict, Field, field_validator

from servelab.core.api import ConfigError, Context, HardwareFacts, ModelFacts
from servelab.core.families.kernel import OpCost
from servelab.core.families.quant import LinearSite, QuantCaps, Role, WeightFormat
from servelab.core.sites import linear_sites


class LayersConfig(BaseModel):
    """Settings of every round-to-nearest quantizer: which layers it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    head: bool = Field(
        False,
        description="quantize the output head too; off, as in the papers. Embeddings and norms never are",
    )
    skip: tuple[Role, ...] = Field(
        (), description="roles of linear layers that stay as they are, such as [down, o]"
    )


class GroupsConfig(LayersConfig):
    """Settings of those with groups."""

    group_size: int | tuple[int, ...] = Field(
        (128, 64, 32),
        description="inputs per scale: the first size that divides a layer's inputs, or one for all; even. "
        "128 is the papers', 64 and 32 are for layers that 128 does not divide (ours)",
    )

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.group_size,) if isinstance(self.group_size, int) else self.group_size

    @field_validator("group_size")
    @classmethod
    def _even(cls, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
        sizes = (value,) if isinstance(value, int) else value
        if not sizes or any(size < 2 or size % 2 for size in sizes):
            raise ValueError("groups have 2, 4, 6, ... inputs, since two 4-bit codes share a byte")
        return value


class RoundToNearest(ABC):
    """A quantizer without calibration. A subclass says its ``formats`` and how to ``load``."""

    caps = QuantCaps()

    def __init__(self, config: LayersConfig, context: Context) -> None:
        self.config, self._name, self._model = config, context.name, context.model

    @abstractmethod
    def formats(self, group: int, scale_bits: int) -> Sequence[WeightFormat]:
        """Those its operation runs, the configured one first; without groups, ``group`` means nothing."""

    def format(self, site: LinearSite, model: ModelFacts) -> WeightFormat | None:
        if site.role in self.config.skip or (site.role == "head" and not self.config.head):
            return None
        # scales in the model's own 16 bits, as the papers' are; wider models keep float32
        return self.formats(self._group(site), 16 if model.dtype_bytes <= 2 else 32)[0]

    def refuses(self, format: WeightFormat, n: int, k: int, hardware: HardwareFacts | None) -> str | None:
        group = next((level.group for level in format.scales if level.group), k)
        if not any(format in self.formats(group, bits) for bits in (16, 32)):
            ours = self.formats(group, 16)[0]
            pairs = [(f.name, getattr(ours, f.name), getattr(format, f.name)) for f in fields(format)]
            wrong = "; ".join(f"{name}={want!r}, not {got!r}" for name, want, got in pairs if want != got)
            return f"quant {self._name!r} runs {ours} with {wrong}"
        if k % group or (format.bits < 8 and k % 2):
            return f"{k} inputs are no multiple of " + (f"a group of {group}" if k % group else "2")
        return None

    def cost(
        self, site: LinearSite, tokens: int, model: ModelFacts, hardware: HardwareFacts | None
    ) -> OpCost:
        """Weights and scales read once; the input read as it is, or quantized first (read, written and
        read again: codes and a float32 scale per token), which linears of one input share; the output
        written. What quantizing an input computes is not counted.
        """
        format, width = self.format(site, model), model.dtype_bytes
        quantizes = format is not None and format.act_bits == 8
        inputs = tokens * site.k * width
        if quantizes:
            codes = tokens * (site.k + 4)
            inputs = codes + (inputs + codes) / (1 + len(site.shares_input))
        weights = format.nbytes(site.n, site.k) if format else site.n * site.k * width
        return OpCost(
            flops=2 * tokens * site.n * site.k,
            math_bits=8 if quantizes else int(8 * width),
            device_bytes=round(weights + inputs + tokens * site.n * width),
            launches=2 if quantizes else 1,
        )

    def _format(self, site: LinearSite) -> WeightFormat:
        """What the half with tensors packs."""
        if (format := self.format(site, self._model)) is None:
            raise ValueError(f"{site.name} stays as it is")
        return format

    def _group(self, site: LinearSite) -> int:
        """The first size that divides the inputs; all inputs for a quantizer without groups."""
        if not isinstance(self.config, GroupsConfig):
            return site.k
        sizes = self.config.sizes
        for size in sizes:
            if site.k % size == 0:
                return size
        fits = site.k & -site.k  # its largest power of two
        add = f"add a size that divides: quant.group_size={_listed((*sizes, min(fits, 128)))}; or "
        raise ConfigError(
            f"no group size divides the inputs of {site.name}",
            where=f"quant {self._name!r}, linear {site.name} ({site.role})",
            why=f"it has k={site.k} inputs, quant.group_size is {_listed(sizes)}; groups are never padded",
            do=f"{add if fits > 1 else ''}leave such layers as they are: quant.skip={self._unfit(site)}",
        )

    def _unfit(self, first: LinearSite) -> str:
        """Roles that no size fits, from the first of them on."""
        assert isinstance(self.config, GroupsConfig)
        sizes, skipped = self.config.sizes, {*self.config.skip, *(() if self.config.head else ("head",))}
        sites = (site for site in linear_sites(self._model) if site.role not in skipped)
        roles = [site.role for site in sites if all(site.k % size for size in sizes)]
        return _listed([*self.config.skip, *dict.fromkeys([first.role, *roles])])


def _listed(sizes: Sequence[object]) -> str:
    return f"[{','.join(map(str, sizes))}]"
