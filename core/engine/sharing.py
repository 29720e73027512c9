"""Lanes: launches that overlap share the devices of their instance.

Processor sharing (Kleinrock, "Time-shared systems: a theoretical treatment", Journal of the ACM 14(2), 1967)
of several resources: a launch that takes t alone and keeps a resource busy for b of it loads it with b / t.
While launches overlap, all run slower alike, by the sum of their loads on the fullest resource, but never
faster than alone. So the fullest resource works all the time and no other has too much to do; together they
take at least what each resource needs for all of them and at most the sum of their prices; and one more
never lets another end earlier. Max-min fair speeds, as transfers have on their links, would be the same ones
wherever every launch uses the fullest resource, as batches do; where one does not, they break the last rule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import fsum
from typing import NamedTuple


@dataclass(frozen=True, slots=True)
class Use:
    """What one step does to the devices while it runs alone."""

    loads: Mapping[str, float]
    """Of each resource, the part of the time in which it is busy."""
    watts: float
    """Beyond those of idle devices."""


class Pace(NamedTuple):
    """How launches run side by side."""

    slower: float = 1.0
    """Times as long as alone."""
    power: float = 1.0
    """Part of their energy that the devices draw: less than 1 where the sum is beyond their power."""


ALONE = Pace()


def pace(uses: Collection[Use], most_watts: float | None) -> Pace:
    """Of launches that run at the same time.

    Args:
        uses: of each; their order does not matter.
        most_watts: that the devices draw at most beyond idling; None: not known.
    """
    if len(uses) < 2:
        return ALONE
    loads: dict[str, list[float]] = {}
    for use in uses:
        for name, load in use.loads.items():
            loads.setdefault(name, []).append(load)
    slower = max([1.0, *map(fsum, loads.values())])
    watts = fsum(use.watts for use in uses) / slower
    return Pace(slower, most_watts / watts if most_watts is not None and watts > most_watts else 1.0)
