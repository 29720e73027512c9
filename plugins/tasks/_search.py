"""The highest rate at which something holds: doubling to a bracket, then bisection on a log scale.

A search is a function of the verdicts known so far, so that it can be taken up again, and held to an exact
law by tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from servelab.core.api import ConfigError
from servelab.core.errors import nearest
from servelab.plugins.tasks._cells import Cell, CellResult, Found

Lookup = Callable[[float], bool | None]
"""Whether a rate passed; None: not probed."""


@dataclass(frozen=True)
class Range:
    """Where to look."""

    low: float
    """Probed first; must pass."""
    high: float | None = None
    """Highest rate probed; None: doubled until one fails."""
    rel_tol: float = 0.05
    """The bracket ends at most this share above its lower end."""
    doublings: int = 12
    """At most so many without ``high``."""
    checks: bool = True
    """Probe one rate below and one above the bracket as well: rates need not be monotone."""


@dataclass(frozen=True)
class Step:
    """How far a search is."""

    wanted: float | None
    """The next rate to probe; None: the search is over."""
    status: Literal["open", "found", "below", "above"]
    """below: even the lowest rate fails; above: even the highest passes."""
    passed: float | None = None
    """Highest rate of the bracket that passed."""
    failed: float | None = None
    """Lowest rate of the bracket that failed."""


def walk(where: Range, lookup: Lookup) -> Step:
    """Where a search stands, by the verdicts known so far."""
    passed = where.low
    if (verdict := lookup(passed)) is not True:
        return Step(None, "below", failed=passed) if verdict is False else Step(passed, "open")
    top = where.low * 2.0**where.doublings if where.high is None else where.high
    while True:
        if passed >= top:
            return Step(None, "above", passed)
        failed = min(2 * passed, top)
        if (verdict := lookup(failed)) is None:
            return Step(failed, "open", passed)
        if verdict is False:
            break
        passed = failed
    while failed > passed * (1 + where.rel_tol):
        middle = rounded(math.sqrt(passed * failed))
        if (verdict := lookup(middle)) is None:
            return Step(middle, "open", passed, failed)
        passed, failed = (middle, failed) if verdict else (passed, middle)
    for rate in (rounded(0.8 * passed), rounded(1.25 * failed)) if where.checks else ():
        if where.low <= rate <= top and lookup(rate) is None:
            return Step(rate, "open", passed, failed)
    return Step(None, "found", passed, failed)


def rounded(rate: float) -> float:
    """Six digits: rates are read by people."""
    return float(f"{rate:.6g}")


def probes_left(where: Range, step: Step) -> int:
    """About how many probes are still wanted; doublings are guessed."""
    if step.status != "open":
        return 0
    width = math.log(step.failed / step.passed) if step.passed and step.failed else math.log(2)
    halvings = max(0, math.ceil(math.log2(width / math.log1p(where.rel_tol))))
    return halvings + (0 if step.failed else 3) + 2 * where.checks


def disorder(verdicts: Mapping[float, bool]) -> list[tuple[float, float]]:
    """Pairs of a rate that failed and a higher one that passed: the highest of these for each."""
    best = max((rate for rate, ok in verdicts.items() if ok), default=-math.inf)
    return sorted((rate, best) for rate, ok in verdicts.items() if not ok and rate < best)


@dataclass(frozen=True)
class Criteria:
    """What must hold at a rate."""

    at_most: Mapping[str, float]
    """Key of ``results.json`` (its own, or of its ``servelab`` part) -> largest value."""
    attainment: float | None = None
    """Least share of judged requests that meet all their bounds."""
    completed: float = 1.0
    """Least share of requests that completed."""

    @property
    def text(self) -> str:
        parts = [f"{key} <= {value:g}" for key, value in self.at_most.items()]
        parts += [f"slo_attainment >= {self.attainment:g}"] if self.attainment is not None else []
        return ", ".join([*parts, f"completed >= {100 * self.completed:g} % of the requests"])

    def loads(self, results: Mapping[str, Any]) -> dict[str, float]:
        """Per criterion, what came out over what is allowed: at most 1 where it holds.

        Raises:
            ConfigError: a figure that the run does not have.
        """
        ours = results["servelab"]
        arrived = ours["requests"]["arrived"]
        share = results["completed"] / arrived if arrived else 0.0
        loads = {"completed": self.completed / share if share else math.inf}
        if share < self.completed:
            return loads  # figures are of the completed ones only
        for key, bound in self.at_most.items():
            loads[key] = _number(results, key) / bound
        if self.attainment is not None:
            met = ours["slo_attainment"]
            if met is None:
                raise ConfigError(
                    "no request states a bound, so none can meet it",
                    where="slo",
                    why=f"the capacity asks for slo_attainment >= {self.attainment:g}",
                    do="set slo=strict or bounds of your own, or task.at_most='{p99_itl_ms: 100}'",
                )
            loads["slo_attainment"] = self.attainment / met if met else math.inf
        return loads

    def said(self, key: str, results: Mapping[str, Any]) -> str:
        """What came out for one criterion, and what it asks for."""
        if key in self.at_most:
            return f"{key} is {_number(results, key):.6g}, and at most {self.at_most[key]:g} is allowed"
        ours = results["servelab"]
        if key == "slo_attainment":
            met = ours["slo_attainment"]
            return f"slo_attainment is {met:.4g}, and at least {self.attainment:g} is asked for"
        arrived, asked = ours["requests"]["arrived"], 100 * self.completed
        return (
            f"{results['completed']} of {arrived} requests complete, and at least {asked:g} % are asked for"
        )

    def hold(self, results: Mapping[str, Any]) -> bool:
        return all(load <= 1 for load in self.loads(results).values())


def _number(results: Mapping[str, Any], key: str) -> float:
    for place in (results, results["servelab"]):
        value = place.get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return value
    known = [k for place in (results, results["servelab"]) for k, v in place.items() if isinstance(v, float)]
    raise ConfigError(f"a run has no figure {key!r}", where=f"task.at_most: {key}", do=nearest(key, known))


@dataclass(frozen=True, kw_only=True)
class Search:
    """One search: a configuration, a seed, a range and what must hold."""

    label: str
    changes: Mapping[str, Any]
    seed: int
    where: Range
    criteria: Criteria
    setting: str = "workload.request_rate"

    def name(self, rate: float) -> str:
        return f"{self.label} seed {self.seed} at {rate!r}"

    def cell(self, rate: float) -> Cell:
        changes = {**self.changes, "seed": self.seed, self.setting: rate}
        return Cell(name=self.name(rate), changes=changes)

    def probes(self, found: Found) -> dict[float, CellResult]:
        """Rate -> result of every rate probed, failed runs left out."""
        mine = [one for name, one in found.items() if name.startswith(f"{self.label} seed {self.seed} at ")]
        return {float(one.changes[self.setting]): one for one in mine if one.ok}

    def step(self, found: Found) -> Step:
        """Where it stands. A run that failed stands for a rate that did: the task tells it."""

        def lookup(rate: float) -> bool | None:
            one = found.get(self.name(rate))
            return None if one is None else one.ok and self.criteria.hold(one.results)

        return walk(self.where, lookup)

    def wanted(self, found: Found) -> Sequence[Cell]:
        rate = self.step(found).wanted
        return [] if rate is None else [self.cell(rate)]

    def left(self, found: Found) -> int:
        """About how many of its runs are still to come."""
        return probes_left(self.where, self.step(found))

    def capacity(self, found: Found) -> float | None:
        """Highest rate of the bracket that passed, once the search is over."""
        step = self.step(found)
        return step.passed if step.status == "found" else None

    def to_dict(self, found: Found) -> dict[str, Any]:
        step, probes = self.step(found), self.probes(found)
        verdicts = {rate: self.criteria.hold(one.results) for rate, one in probes.items()}
        return {
            "label": self.label,
            "seed": self.seed,
            "criteria": self.criteria.text,
            "status": step.status,
            "passed": step.passed,
            "failed": step.failed,
            "non_monotone": disorder(verdicts),
            "probes": [
                {"rate": rate, "holds": verdicts[rate], "loads": self._loads(one), "key": one.key}
                for rate, one in sorted(probes.items())
            ],
        }

    def _loads(self, one: CellResult) -> dict[str, float | None]:
        loads = self.criteria.loads(one.results)
        return {key: load if math.isfinite(load) else None for key, load in loads.items()}
