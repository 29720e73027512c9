"""Rows of an experiment: what a paper says beside what came out, and whether it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip
"""97.5 % quantiles of Student's t for 1 to 20 degrees of freedom (any table of it); beyond them 2.086, which
makes intervals a little too wide."""


@dataclass(frozen=True)
class Bound:
    """What holds: a value from ``low`` to ``high``, both included."""

    text: str
    """The tolerance, as stated in the table."""
    low: float = -math.inf
    high: float = math.inf

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


def within(paper: float, points: float, unit: str = "") -> Bound:
    """At most so far from the paper's value, in its own unit."""
    return Bound(f"± {points:g}{f' {unit}' if unit else ''}", paper - points, paper + points)


def relative(paper: float, share: float) -> Bound:
    """At most this share of the paper's value away from it."""
    return Bound(f"± {100 * share:g} %", paper * (1 - share), paper * (1 + share))


def at_least(value: float) -> Bound:
    """The value or more."""
    return Bound(f"at least {value:g}", low=value)


def at_most(value: float) -> Bound:
    """The value or less."""
    return Bound(f"at most {value:g}", high=value)


def below(value: float) -> Bound:
    """Less than the value."""
    return Bound(f"below {value:g}", high=math.nextafter(value, -math.inf))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim."""

    name: str
    unit: str = ""
    paper: float | None = None
    """None: the claim has no single value there; ``bound`` says what it asks for."""
    ours: float | None = None
    """Mean over the seeds; None: not measured."""
    spread: float | None = None
    """Half of the 95 % confidence interval of ``ours`` over the seeds; None: one seed."""
    seeds: int = 1
    bound: Bound | None = None
    """None: told, and not judged."""
    setup: str = ""
    """What was run, as far as it is this row's own."""
    note: str = ""

    @property
    def holds(self) -> bool | None:
        """By the mean; None: not measured, or not judged."""
        return None if self.ours is None or self.bound is None else self.bound.holds(self.ours)

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "paper": self.paper,
            "ours": self.ours,
            "spread": self.spread,
            "seeds": self.seeds,
            "tolerance": None if self.bound is None else self.bound.text,
            "holds": self.holds,
            "setup": self.setup,
            "note": self.note,
        }


@dataclass(frozen=True)
class Column:
    """One figure of a run as a sweep over such runs shows it."""

    name: str
    label: str
    """Below the name: what is counted, or its unit."""
    value: float | None
    """None: not measured."""
    better: int = 0
    """1: higher is better, -1: lower is; 0: neither."""
    digits: int = 3


def mean_and_spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The mean, and half of its 95 % confidence interval (Student's t); None where there are too few."""
    if not values:
        return None, None
    if len(values) == 1:
        return values[0], None
    t = STUDENT_T[min(len(values) - 1, len(STUDENT_T)) - 1]
    return fmean(values), t * stdev(values) / math.sqrt(len(values))


def measured(values: Sequence[float]) -> Mapping[str, Any]:
    """The fields of a row that come from one value per seed."""
    mean, spread = mean_and_spread(values)
    return {"ours": mean, "spread": spread, "seeds": len(values)}


def tally(rows: Sequence[Row]) -> dict[str, int]:
    """How many rows hold, do not, were not measured, and are only told."""
    judged = [row for row in rows if row.bound is not None]
    return {
        "hold": sum(row.holds is True for row in judged),
        "do_not_hold": sum(row.holds is False for row in judged),
        "not_measured": sum(row.holds is None for row in judged),
        "told": len(rows) - len(judged),
    }
