"""When tokens came, stated once per step instead of once per token.

The requests of a batch get their tokens at the same instants, and the batch is the same for many steps but
for a few who join or leave. So a ``Track`` keeps the ends of the steps of one lane, and of each request only
from which step to which it took part. The work and the memory of a step do not depend on the size of the
batch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from servelab.core.metrics.memory import MemoryFacts

if TYPE_CHECKING:
    from servelab.core.metrics.timeline import RequestFacts

Span = tuple["array[int]", int, int]
"""Times ``ends[first:last]`` of an array that others may share: ``(ends, first, last)``; never empty."""


class Track:
    """Steps of one lane, and who gets one token in each of them."""

    __slots__ = ("ends", "members", "memory", "names", "storing")

    def __init__(self, memory: MemoryFacts) -> None:
        self.memory = memory
        """Of the engine."""
        self.ends: array[int] = array("q")
        """End of each step, ns."""
        self.members: dict[str, RequestFacts] = {}
        """Who takes part in the next step, unless the next launch says otherwise."""
        self.storing = 0
        """Members that store a token in each step: all but those whose end came before their last step."""
        self.names: list[str] | None = None
        """The members as the latest launch named them; None: some have left since."""


class Coverage:
    """How many spans cover each time: counted in one operation per span, and one per time at the end."""

    def __init__(self) -> None:
        self._changes: dict[int, tuple[array[int], array[int]]] = {}
        """By identity of the array: the array, and by how much the count changes at each of its places."""

    def add(self, ends: array[int], first: int, last: int) -> None:
        """One more span. The array must not change from now on."""
        found = self._changes.get(id(ends))
        if found is None:
            found = self._changes[id(ends)] = ends, array("q", bytes(8 * (len(ends) + 1)))
        found[1][first] += 1
        found[1][last] -= 1

    def times(self) -> Iterator[tuple[int, int]]:
        """(time, spans that cover it), those that some cover."""
        for ends, changes in self._changes.values():
            for end, count in zip(ends, accumulate(changes), strict=False):
                if count:
                    yield end, count

    def gaps(self) -> Iterator[tuple[int, int]]:
        """(time less the one before it, spans that cover the later one), those that some cover."""
        for ends, changes in self._changes.values():
            before = 0
            for end, count in zip(ends, accumulate(changes), strict=False):
                if count:
                    yield end - before, count
                before = end
