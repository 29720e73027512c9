"""Energy of a step: idle power, and the rest in proportion to how busy the busier resource is.

``P = idle + (peak - idle) * u`` with ``u = max(compute time, memory time) / step time``: a step costs
``(peak - idle) * max(compute time, memory time)`` beyond what idling takes in the same time. Both times are
those at the efficiencies in force. A simple model of ours: clocks, voltages and limits of power are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from servelab.core.api import HardwareFacts


@dataclass(frozen=True, slots=True)
class Power:
    """Of all devices of an instance, in watts."""

    idle_watts: float
    busy_watts: float
    """Above idle, with compute or memory busy all the time."""

    def joules(self, compute_ns: float, memory_ns: float) -> float:
        """Beyond an idle device's."""
        return self.busy_watts * max(compute_ns, memory_ns) * 1e-9


def power(hardware: HardwareFacts) -> Power | None:
    """None where the profile does not state both figures: no energy is told."""
    idle, peak = hardware.idle_watts, hardware.peak_watts
    if idle is None or peak is None:
        return None
    return Power(hardware.tp * idle, hardware.tp * (peak - idle))
