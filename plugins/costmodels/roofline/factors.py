"""Factors of the roofline: what a device reaches of its datasheet, and what a step costs besides."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import ConfigError, HardwareFacts


class RooflineConfig(BaseModel):
    """Settings of ``+cost=roofline``. What is null is the device profile's (hardware.*); where that states
    nothing either, it is the datasheet's bound: all of the peak, no overhead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mfu: float | None = Field(
        None, gt=0, le=1, description="share of the peak FLOP/s that an operation reaches; bound: 1"
    )
    mbu: float | None = Field(
        None, gt=0, le=1, description="share of the memory bandwidth that an operation reaches; bound: 1"
    )
    smoothness: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=True,
        description="exponent of the smooth maximum of compute and memory time; bound: inf, the greater",
    )
    op_ns: int | None = Field(None, ge=0, description="time of an operation besides these, ns; bound: 0")
    layer_ns: int | None = Field(
        None, ge=0, description="time of a layer besides its operations, ns; bound: 0"
    )
    step_ns: int | None = Field(None, ge=0, description="time of a step besides its layers, ns; bound: 0")
    request_ns: int | None = Field(
        None, ge=0, description="time per request of a step besides its tokens, ns; bound: 0"
    )
    collective_ns: int = Field(
        5_000, ge=0, description="start of an all-reduce that the profile has not measured, ns (GenZ: 5 us)"
    )
    hop_ns: int = Field(
        1_900, ge=0, description="time per hop of such an all-reduce, 2 (n - 1) of them, ns (GenZ: 1.9 us)"
    )
    transfer_ns: int = Field(
        10_000, ge=0, description="start of a transfer between tiers or instances, ns (ours: one launch)"
    )
    disk_bytes_per_s: float | None = Field(
        None, gt=0, description="disk that load_time reads weights from, bytes/s; null: not stated"
    )


BOUNDS: dict[str, float | int] = {
    "mfu": 1.0,
    "mbu": 1.0,
    "smoothness": inf,
    "op_ns": 0,
    "layer_ns": 0,
    "step_ns": 0,
    "request_ns": 0,
}
"""Factors of a perfect device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Factors:
    """Factors in force, each with its origin: ``settings``, ``profile`` or ``bound``."""

    mfu: float
    mbu: float
    smoothness: float
    op_ns: int
    layer_ns: int
    step_ns: int
    request_ns: int
    origin: dict[str, str]

    def describe(self) -> dict[str, Any]:
        """For the run's information, in JSON types: ``{mfu: {value: 0.741, from: profile}, ...}``."""
        values = {name: getattr(self, name) for name in BOUNDS}
        return {
            name: {"value": str(value) if value == inf else value, "from": self.origin[name]}
            for name, value in values.items()
        }


def factors(config: RooflineConfig, hardware: HardwareFacts) -> Factors:
    """The settings', else the profile's, else those of a perfect device."""
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for name, bound in BOUNDS.items():
        for source, value in (("settings", getattr(config, name)), ("profile", getattr(hardware, name))):
            if value is not None:
                values[name], origin[name] = value, source
                break
        else:
            values[name], origin[name] = bound, "bound"
    return Factors(**values, origin=origin)


def needed(hardware: HardwareFacts, figure: str, why: str) -> float:
    """A figure of the profile that a price cannot do without.

    Raises:
        ConfigError: the profile does not state it.
    """
    value = getattr(hardware, figure)
    if value is None:
        raise ConfigError(
            f"the profile of {hardware.name} does not state {figure}",
            where="cost 'roofline'",
            why=why,
            do=f"state hardware.{figure}, or choose a device whose profile has it",
        )
    return float(value)
