"""Length laws: how long prompts, outputs and caps are.

A law is a pydantic model whose ``sampler()`` turns one uniform number in [0, 1) into one whole length
(inverse transform). One number per length keeps streams aligned: request ``i`` uses the ``i``-th number of
its stream under every law, so two laws can be compared on common random numbers. Every law states the range
it cannot leave (``lowest`` to ``highest``); values outside are clipped to it, not drawn again.

In a configuration a law is a mapping with the key ``law``; a bare whole number means ``constant``.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from statistics import NormalDist
from textwrap import shorten
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

MAX_LENGTH = 100_000_000
"""Longest length any law may state."""

Sampler = Callable[[float], int]
"""Length at a uniform number in [0, 1); never decreasing, except for ``empirical`` and ``mixture``."""

_standard_normal = NormalDist().inv_cdf
_SMALLEST = 2.0**-54
"""Stands for a uniform number of exactly 0, where the normal quantile has no value."""


class _Law(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_serializer(mode="wrap")
    def _with_its_name(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Also where only what differs from defaults is asked for."""
        return {"law": getattr(self, "law", None), **dump(self)}

    @property
    def lowest(self) -> int:
        """No length is below this."""
        raise NotImplementedError  # abstract

    @property
    def highest(self) -> int:
        """No length is above this."""
        raise NotImplementedError  # abstract

    def sampler(self) -> Sampler:
        """The law as a function of one uniform number."""
        raise NotImplementedError  # abstract

    def __str__(self) -> str:
        items = self.model_dump(mode="json", exclude_none=True)
        name = items.pop("law")
        text = ", ".join(f"{key}={value}" for key, value in items.items())
        return f"{name}({shorten(text, 80, placeholder=' ...')})"


class _Clipped(_Law):
    """Base of laws with tails: they must say where the tails end."""

    min: int = Field(default=1, ge=1, le=MAX_LENGTH, description="Shorter values become this.")
    max: int = Field(ge=1, le=MAX_LENGTH, description="Longer values become this.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.min, self.max)
        return self

    @property
    def lowest(self) -> int:
        return self.min

    @property
    def highest(self) -> int:
        return self.max


class Constant(_Law):
    """Always the same."""

    law: Literal["constant"] = "constant"
    value: int = Field(ge=1, le=MAX_LENGTH, description="The length.")

    @property
    def lowest(self) -> int:
        return self.value

    @property
    def highest(self) -> int:
        return self.value

    def sampler(self) -> Sampler:
        value = self.value
        return lambda u: value


class Uniform(_Law):
    """Whole numbers from ``min`` to ``max``, both included, all equally likely."""

    law: Literal["uniform"] = "uniform"
    min: int = Field(ge=1, le=MAX_LENGTH, description="Shortest length.")
    max: int = Field(ge=1, le=MAX_LENGTH, description="Longest length.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.min, self.max)
        return self

    @property
    def lowest(self) -> int:
        return self.min

    @property
    def highest(self) -> int:
        return self.max

    def sampler(self) -> Sampler:
        low, values = self.min, self.max - self.min + 1
        return lambda u: low + int(u * values)


class Normal(_Clipped):
    """Normal, rounded to the nearest whole number, clipped."""

    law: Literal["normal"] = "normal"
    mean: float = Field(gt=0, le=MAX_LENGTH, allow_inf_nan=False, description="Mean before clipping.")
    std: float = Field(
        ge=0, le=MAX_LENGTH, allow_inf_nan=False, description="Standard deviation before clipping."
    )

    def sampler(self) -> Sampler:
        mean, std, low, high = self.mean, self.std, self.min, self.max

        def length(u: float) -> int:
            return _nearest(mean + std * _standard_normal(u or _SMALLEST), low, high)

        return length


class LogNormal(_Clipped):
    """Log-normal ``ln(mu, sigma)``, rounded to the nearest whole number, clipped."""

    law: Literal["lognormal"] = "lognormal"
    mu: float | None = Field(
        default=None, ge=-20, le=20, description="Mean of the logarithm; or give ``median``."
    )
    median: float | None = Field(
        default=None, gt=0, le=MAX_LENGTH, description="Median before clipping, exp(mu); or give ``mu``."
    )
    sigma: float = Field(ge=0, le=10, description="Standard deviation of the logarithm.")

    @model_validator(mode="after")
    def _one_location(self) -> Self:
        if (self.mu is None) == (self.median is None):
            raise ValueError("lognormal needs exactly one of mu and median: median = exp(mu)")
        return self

    @property
    def location(self) -> float:
        """``mu``, whichever way it was given."""
        if self.mu is not None:
            return self.mu
        assert self.median is not None
        return math.log(self.median)

    def sampler(self) -> Sampler:
        mu, sigma, low, high = self.location, self.sigma, self.min, self.max

        def length(u: float) -> int:
            return _nearest(math.exp(mu + sigma * _standard_normal(u or _SMALLEST)), low, high)

        return length


class Zipf(_Clipped):
    """Bounded power law with a stated mean: rank ``k`` of ``1 .. 2*mean - 1`` has weight ``k**-alpha``,
    and its length is ``k`` scaled so that the mean rank becomes ``mean``, rounded up, clipped.

    Rounding up adds less than one token to the mean; clipping at ``max`` lowers it.
    """

    law: Literal["zipf"] = "zipf"
    mean: int = Field(ge=1, le=1_000_000, description="Mean before rounding and clipping.")
    alpha: float = Field(gt=0, le=20, description="Exponent; larger: most are short and a few very long.")

    def sampler(self) -> Sampler:
        weights = [rank**-self.alpha for rank in range(1, 2 * self.mean)]
        scale = self.mean * sum(weights) / sum(rank * w for rank, w in enumerate(weights, 1))
        lengths = [min(max(math.ceil(rank * scale), self.min), self.max) for rank in range(1, 2 * self.mean)]
        return _from_table(lengths, weights)


class Empirical(_Law):
    """One of the listed lengths, all equally likely; list a length twice to make it twice as likely."""

    law: Literal["empirical"] = "empirical"
    values: tuple[Annotated[int, Field(ge=1, le=MAX_LENGTH)], ...] = Field(
        min_length=1, description="Observed lengths."
    )
    min: int = Field(default=1, ge=1, le=MAX_LENGTH, description="Shorter values become this.")
    max: int = Field(default=MAX_LENGTH, ge=1, le=MAX_LENGTH, description="Longer values become this.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_order(self.min, self.max)
        return self

    @property
    def lowest(self) -> int:
        return min(self._clipped())

    @property
    def highest(self) -> int:
        return max(self._clipped())

    def _clipped(self) -> list[int]:
        return [min(max(value, self.min), self.max) for value in self.values]

    def sampler(self) -> Sampler:
        values = self._clipped()
        return lambda u: values[int(u * len(values))]


class Quantiles(_Law):
    """Lengths by their published percentiles; between two of them the logarithm grows evenly."""

    law: Literal["quantiles"] = "quantiles"
    levels: tuple[Annotated[float, Field(ge=0, le=100)], ...] = Field(
        min_length=2, description="Percentages, from 0 to 100, rising."
    )
    values: tuple[Annotated[int, Field(ge=1, le=MAX_LENGTH)], ...] = Field(
        min_length=2, description="The length that so many percent do not exceed; as many as levels."
    )

    @model_validator(mode="after")
    def _a_law(self) -> Self:
        if len(self.levels) != len(self.values):
            raise ValueError(f"{len(self.levels)} levels and {len(self.values)} values: state one for each")
        if self.levels[0] != 0 or self.levels[-1] != 100:
            raise ValueError(
                f"levels go from {self.levels[0]:g} to {self.levels[-1]:g}: begin with 0 and end with 100, "
                "the shortest and the longest length"
            )
        if any(a >= b for a, b in pairwise(self.levels)) or any(a > b for a, b in pairwise(self.values)):
            raise ValueError("levels must rise and values must not fall")
        return self

    @property
    def lowest(self) -> int:
        return self.values[0]

    @property
    def highest(self) -> int:
        return self.values[-1]

    def sampler(self) -> Sampler:
        levels, logs = [level / 100 for level in self.levels], [math.log(value) for value in self.values]
        slopes = [(b - a) / (q - p) for (a, b), (p, q) in zip(pairwise(logs), pairwise(levels), strict=True)]
        low, high = self.lowest, self.highest

        def length(u: float) -> int:
            i = bisect_right(levels, u) - 1
            return _nearest(math.exp(logs[i] + (u - levels[i]) * slopes[i]), low, high)

        return length


class Part(BaseModel):
    """One component of a mixture."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weight: float = Field(
        gt=0, le=1e9, description="Its share is this over the sum of all weights; need not sum to 1."
    )
    length: LengthLaw = Field(description="Law of this component.")


class Mixture(_Law):
    """Each length comes from one of several laws, chosen by weight."""

    law: Literal["mixture"] = "mixture"
    parts: tuple[Part, ...] = Field(min_length=1, description="The components.")

    @property
    def lowest(self) -> int:
        return min(part.length.lowest for part in self.parts)

    @property
    def highest(self) -> int:
        return max(part.length.highest for part in self.parts)

    def sampler(self) -> Sampler:
        samplers = [part.length.sampler() for part in self.parts]
        ends, starts = _shares([part.weight for part in self.parts])
        below_one = math.nextafter(1.0, 0.0)

        def length(u: float) -> int:
            i = bisect_right(ends, u)
            # what is left of u inside the chosen share is again uniform
            return samplers[i](min((u - starts[i]) / (ends[i] - starts[i]), below_one))

        return length


def _shorthand(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"law": "constant", "value": value}
    return value


LengthLaw = Annotated[
    Annotated[
        Constant | Uniform | Normal | LogNormal | Zipf | Empirical | Quantiles | Mixture,
        Field(
            discriminator="law",
            title="a length law (constant, uniform, normal, lognormal, zipf, empirical, quantiles, mixture) "
            "or a whole number",
        ),
    ],
    BeforeValidator(_shorthand),
]
"""Any law; a bare whole number means ``constant``."""

Part.model_rebuild()
Mixture.model_rebuild()


def chooser(weights: Sequence[float]) -> Sampler:
    """An index drawn in proportion to its weight, as a function of one uniform number."""
    return _from_table(list(range(len(weights))), weights)


def _from_table(values: Sequence[int], weights: Sequence[float]) -> Sampler:
    ends, _ = _shares(weights)
    return lambda u: values[bisect_right(ends, u)]


def _shares(weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """Where each weight's share of [0, 1) ends and starts. The last end is exactly 1."""
    cumulative = list(accumulate(weights))
    ends = [c / cumulative[-1] for c in cumulative]
    return ends, [0.0, *ends[:-1]]


def _nearest(value: float, low: int, high: int) -> int:
    return int(min(max(value, low), high) + 0.5)


def _check_order(low: int, high: int) -> None:
    if low > high:
        raise ValueError(f"min {low} is above max {high}: swap them or widen the range")
