"""Attention of requests that decode: most of what a run prices, so its constants are multiplied out once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from servelab.plugins.costmodels.roofline.device import Device
from servelab.plugins.costmodels.roofline.operations import Attention


class Decodes:
    """``Attention.decode`` of layers alike, in nanoseconds of all of them."""

    def __init__(self, one: Attention, device: Device) -> None:
        self.window = one.window
        self.compute_ns = one.count * one.pair_flops * device.flop_ns["16bit"]
        """Per key seen."""
        self.memory_ns = one.count * one.kv_bytes * device.byte_ns
        """Per key seen."""
        self.row_ns = one.count * one.query_bytes * device.byte_ns
        """Memory time per row."""
        self._smoothness = device.smoothness

    def times(self, rows: int, keys: Iterable[int]) -> list[float]:
        """For so many keys in all, step by step; the smooth maximum as in ``Device.smooth``."""
        compute_ns, memory_ns, fixed = self.compute_ns, self.memory_ns, self.row_ns * rows
        power, root, found = self._smoothness, 1.0 / self._smoothness, []
        for seen in keys:
            low, high = seen * compute_ns, seen * memory_ns + fixed
            if low > high:
                low, high = high, low
            found.append(high * (1.0 + (low / high) ** power) ** root)
        return found

    def keys(self, starts: Sequence[int], steps: int) -> Sequence[int]:
        """Keys seen in all, step by step, by rows of one query each; contexts grow by one."""
        rows, window = len(starts), self.window
        if window is None:
            first = sum(starts) + rows
            return range(first, first + steps * rows, rows)
        seen = sum([min(p + 1, window) for p in starts])
        if steps == 1:
            return (seen,)
        full = sorted([window - p - 1 for p in starts if p + 1 < window], reverse=True)  # steps until it is
        growing, found = len(full), []
        for step in range(steps):
            found.append(seen)
            while growing and full[growing - 1] <= step:
                growing -= 1
            seen += growing
        return found
