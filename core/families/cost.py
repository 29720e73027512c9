"""Cost model: the price of a batch in time.

Intent: say how long a launch takes on some hardware, from shapes alone. The same object drives the
virtual clock, answers schedulers' what-if questions, and is held to measurements by ``task=validate``.

Capabilities: ``cost.lanes`` (prices concurrent lanes), ``cost.energy``, ``cost.quant`` (prices the formats of
a quantizer; without it, a quantized run on the virtual clock is stamped).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.engine.ledger import Transfer
    from servelab.core.events import Batch


class CostModel(Protocol):
    """Pure functions: no state that changes a price, no clock, no randomness outside the seeded generator."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        """Nanoseconds of each of the ``steps`` steps, each at least 1.

        Equal to ``steps`` single calls on batches whose starts have moved on by one token per step.
        Monotone in every token count and every context length.
        """
        ...

    def transfer_time(self, transfer: Transfer) -> int:
        """Nanoseconds of a transfer that has its link to itself, at least 1."""
        ...
