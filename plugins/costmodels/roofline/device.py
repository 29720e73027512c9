"""Time of one operation on one device: the smooth roofline, and the ring that joins several devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from servelab.core.api import ConfigError, HardwareFacts, ModelFacts
from servelab.plugins.costmodels.roofline.factors import Factors, RooflineConfig, needed

Unit = Literal["16bit", "int8", "fp8"]
"""Arithmetic unit: width of the wider operand."""

FIGURES: dict[Unit, str] = {"16bit": "flops", "int8": "flops_int8", "fp8": "flops_fp8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one operation does on one device. Bytes are moved, each counted once."""

    flops: float = 0.0
    unit: Unit = "16bit"
    weight_bytes: float = 0.0
    kv_bytes: float = 0.0
    activation_bytes: float = 0.0
    network_bytes: float = 0.0
    """Message of a collective; such an operation does nothing else."""
    ring_passes: int = 2
    """How often the message goes round: 2 to sum it, 1 to gather it."""
    launches: int = 1

    @property
    def memory_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes


class Device:
    """Nanoseconds from work.

    Raises:
        ConfigError: the profile lacks the peak FLOP/s, the bandwidth, or with several devices their link.
    """

    def __init__(self, config: RooflineConfig, hardware: HardwareFacts, found: Factors) -> None:
        self.hardware, self.factors = hardware, found
        peak = needed(hardware, "flops", "compute time is FLOPs over it")
        bandwidth = needed(hardware, "memory_bytes_per_s", "memory time is bytes over it")
        self.flop_ns: dict[Unit, float] = {"16bit": 1e9 / (found.mfu * peak)}
        """Per FLOP, by unit."""
        self.byte_ns = 1e9 / (found.mbu * bandwidth)
        self.op_ns = float(found.op_ns)
        self.smoothness, self._inverse = found.smoothness, 1.0 / found.smoothness
        self.ring = ring(config, hardware)

    def has(self, unit: Unit, what: str) -> None:
        """Make ready for work at a unit.

        Raises:
            ConfigError: the profile does not state its peak: prices never fall back to another unit's.
        """
        if unit not in self.flop_ns:
            peak = needed(
                self.hardware, FIGURES[unit], f"{what} multiplies at {unit}; no other peak is taken instead"
            )
            self.flop_ns[unit] = 1e9 / (self.factors.mfu * peak)

    def smooth(self, compute: float, memory: float) -> float:
        """``(compute ** s + memory ** s) ** (1 / s)``, by the greater, so that nothing overflows."""
        low, high = (compute, memory) if compute < memory else (memory, compute)
        if low <= 0.0:
            return high
        return float(high * (1.0 + (low / high) ** self.smoothness) ** self._inverse)

    def compute_ns(self, work: Work) -> float:
        return work.flops * self.flop_ns[work.unit]

    def memory_ns(self, work: Work) -> float:
        return work.memory_bytes * self.byte_ns

    def network_ns(self, work: Work) -> float:
        if not work.network_bytes:
            return 0.0
        start, pass_ns, byte_ns = self.ring
        return start + work.ring_passes * (pass_ns + work.network_bytes * byte_ns)

    def time(self, work: Work) -> float:
        """Of one operation. Launches of a collective are in its measured start."""
        if work.network_bytes:
            return self.network_ns(work)
        return self.smooth(self.compute_ns(work), self.memory_ns(work)) + work.launches * self.op_ns


def ring(config: RooflineConfig, hardware: HardwareFacts) -> tuple[float, float, float]:
    """Start, and per time that a message goes round the instance's devices: hops, and per byte of it; in ns.

    ``a + passes (n - 1) / n * bytes / bandwidth`` as measured of all-reduces, or from the link's bandwidth
    and ``n - 1`` hops a pass.

    Raises:
        ConfigError: several devices, and the profile states neither.
    """
    n = hardware.tp
    if n == 1:
        return 0.0, 0.0, 0.0
    part = (n - 1) / n
    if found := measured_ring(hardware):
        return found[0], 0.0, part * 1e9 / found[1]
    why = (
        f"{n} devices sum their parts of every layer; no all-reduce of {n} is measured in hardware.all_reduce"
    )
    link = needed(hardware, "link_bytes_per_s", why)
    return float(config.collective_ns), (n - 1) * float(config.hop_ns), part * 1e9 / link


def measured_ring(hardware: HardwareFacts) -> tuple[float, float] | None:
    """Latency in ns and bandwidth in bytes/s of the profile's all-reduce over the instance's devices."""
    return next(((a, b) for n, a, b in hardware.all_reduce if n == hardware.tp), None)


def check_shards(model: ModelFacts, hardware: HardwareFacts) -> None:
    """Whether the devices can share the layers evenly.

    Raises:
        ConfigError: query heads do not divide among them.
    """
    if model.heads % hardware.tp:
        fits = [n for n in range(1, hardware.tp) if model.heads % n == 0]
        raise ConfigError(
            f"{hardware.tp} devices cannot share {model.heads} query heads of {model.name!r} evenly",
            where="cost 'roofline', hardware.tp",
            why="tensor parallelism gives each device whole heads",
            do=f"set hardware.tp={fits[-1]}, or another divisor of {model.heads}",
        )
