"""Cost model: the price of a batch in time.

Intent: say how long a launch takes on some hardware, from shapes alone. The same object drives the
virtual clock, answers schedulers' what-if questions, and is held to measurements by ``task=validate``.

Capabilities: ``cost.lanes`` (``LaneModel``; without it, a run with several lanes is stamped),
``cost.energy`` (``EnergyModel``, where the device's power is known), ``cost.quant`` (prices the formats of a
quantizer; without it, a quantized run on the virtual clock is stamped).

A cost model may have ``describe() -> dict``, in JSON types: the figures it prices with and where each is
from. Runs and reports show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from servelab.core.engine.swap import Transfer
    from servelab.core.events import Batch


class CostModel(Protocol):
    """Pure functions: no state that changes a price, no clock, no randomness outside the seeded generator."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        """Nanoseconds of each of the ``steps`` steps with the devices to itself, each at least 1.

        Equal to ``steps`` single calls on batches whose starts have moved on by one token per step.
        Monotone in every token count, drafts included, and every context length. The order of the requests
        does not matter.
        """
        ...

    def transfer_time(self, transfer: Transfer) -> int:
        """Nanoseconds of a transfer that has its link to itself, at least 1."""
        ...


class LaneModel(CostModel, Protocol):
    """With ``cost.lanes``: how far launches of several lanes slow each other down.

    Prices and schedulers' what-if questions stay those of a batch alone; the driver slows down what overlaps
    (``servelab.core.engine.sharing``).
    """

    def busy(self, batch: Batch) -> Mapping[str, int]:
        """Nanoseconds for which the first step keeps each resource of the devices busy, by its name.

        Each from 0 to the step's price, at least one above 0 where tokens run; the same names for every
        batch. The order of the requests does not matter.
        """
        ...


class EnergyModel(CostModel, Protocol):
    """With ``cost.energy``."""

    idle_watts: float | None
    """Power of all devices of the instance while they do nothing; None: not known, and nothing is told."""
    peak_watts: float | None
    """Power of all of them at most, however many launches run side by side; None: likewise."""

    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        """Joules of each step, as in ``price``, beyond what idle devices take."""
        ...


class Meter(Protocol):
    """An ``EnergyModel`` whose devices' power is known."""

    idle_watts: float
    peak_watts: float

    def energy(self, batch: Batch, steps: int) -> Sequence[float]: ...


def lane_model_of(cost: Any) -> LaneModel | None:
    """The cost model itself, if it prices lanes together."""
    return cost if hasattr(cost, "busy") else None


def meter_of(cost: Any) -> Meter | None:
    """The cost model itself, if it knows energy."""
    return None if getattr(cost, "idle_watts", None) is None else cost
