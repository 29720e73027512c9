"""Section ``hardware``: figures of the device."""

from __future__ import annotations

from pydantic import Field, ValidationInfo, field_validator

from servelab.core.config.section import Section
from servelab.core.facts import HardwareFacts


class AllReduce(Section):
    """A measured all-reduce: ``latency + 2 (n - 1) / n * bytes / bandwidth``."""

    devices: int = Field(ge=2, description="Devices taking part, n.")
    latency_ns: float = Field(ge=0, description="Latency, in nanoseconds.")
    bytes_per_s: float = Field(gt=0, description="Bandwidth, in bytes per second.")


RATES = (
    "flops",
    "flops_int8",
    "flops_fp8",
    "memory_bytes_per_s",
    "host_link_bytes_per_s",
    "link_bytes_per_s",
    "network_bytes_per_s",
)
LEAST = 1e6
"""Whoever states less has taken TFLOP/s or GB/s for the unit, and every time would be wrong."""


class HardwareConfig(Section):
    """Figures of one device; null where a profile does not state the figure."""

    name: str = Field(description="Name shown in reports.")
    tp: int = Field(
        default=1, ge=1, description="Devices that share every layer of the model (tensor parallelism)."
    )
    flops: float | None = Field(
        default=None,
        gt=0,
        description="Dense matrix FLOP/s of one device at 16-bit floats (on a CPU: at the model's dtype).",
    )
    flops_int8: float | None = Field(
        default=None, gt=0, description="The same at 8-bit integers, both operands."
    )
    flops_fp8: float | None = Field(
        default=None, gt=0, description="The same at 8-bit floats, both operands."
    )
    memory_bytes: int | None = Field(default=None, gt=0, description="Memory of one device, in bytes.")
    memory_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Memory bandwidth of one device, in bytes per second."
    )
    host_link_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Bandwidth between device and host, one way, in bytes per second."
    )
    link_bytes_per_s: float | None = Field(
        default=None,
        gt=0,
        description="Bandwidth between devices of one instance, one way, in bytes per second.",
    )
    network_bytes_per_s: float | None = Field(
        default=None, gt=0, description="Bandwidth between instances, one way, in bytes per second."
    )
    idle_watts: float | None = Field(default=None, ge=0, description="Power of an idle device, in watts.")
    peak_watts: float | None = Field(
        default=None, gt=0, description="Power of a device at its limit, in watts."
    )
    price_per_hour: float | None = Field(default=None, ge=0, description="Of one device, in dollars.")
    mfu: float | None = Field(
        default=None, gt=0, le=1, description="Share of the peak FLOP/s that large matrix products reach."
    )
    mbu: float | None = Field(
        default=None, gt=0, le=1, description="Share of the memory bandwidth that large reads reach."
    )
    smoothness: float | None = Field(
        default=None,
        ge=1,
        allow_inf_nan=True,
        description="Exponent of the smooth maximum of compute and memory time; inf: the greater of the two.",
    )
    op_ns: int | None = Field(default=None, ge=0, description="Time of an operation besides these, in ns.")
    layer_ns: int | None = Field(
        default=None,
        ge=0,
        description="Time of a layer besides its operations, in ns (an eager host).",
    )
    step_ns: int | None = Field(
        default=None,
        ge=0,
        description="Time of a step besides its layers, in ns (scheduling, sampling).",
    )
    request_ns: int | None = Field(
        default=None, ge=0, description="Time per request of a step besides its tokens, in ns."
    )
    all_reduce: tuple[AllReduce, ...] = Field(
        default=(), description="Measured all-reduces, one entry per number of devices."
    )
    sources: dict[str, str] = Field(default={}, description="Where each figure is from, by its name.")

    @field_validator(*RATES)
    @classmethod
    def _in_units(cls, value: float | None, stated: ValidationInfo) -> float | None:
        if value is not None and value < LEAST:
            flops = str(stated.field_name).startswith("flops")
            unit = "FLOP/s: 312 TFLOP/s are 3.12e14" if flops else "bytes/s: 2,039 GB/s are 2.039e12"
            raise ValueError(f"must be at least {LEAST:g}; it is in {unit}")
        return value

    @field_validator("peak_watts")
    @classmethod
    def _above_idle(cls, peak: float | None, stated: ValidationInfo) -> float | None:
        idle = stated.data.get("idle_watts")
        if peak is not None and idle is not None and peak < idle:
            raise ValueError(f"must be at least idle_watts, {idle:g}")
        return peak

    @field_validator("all_reduce")
    @classmethod
    def _once_each(cls, measured: tuple[AllReduce, ...]) -> tuple[AllReduce, ...]:
        devices = [one.devices for one in measured]
        if twice := next((n for n in devices if devices.count(n) > 1), None):
            raise ValueError(f"two entries for {twice} devices")
        return measured

    def facts(self) -> HardwareFacts:
        """What policies and cost models are given."""
        figures = self.model_dump(exclude={"sources", "all_reduce"})
        reduces = tuple((one.devices, one.latency_ns, one.bytes_per_s) for one in self.all_reduce)
        return HardwareFacts(**figures, all_reduce=reduces)
