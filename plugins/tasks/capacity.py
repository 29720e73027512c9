"""Capacity: the highest request rate at which a service level objective holds.

Source: the capacity search of Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
Sarathi-Serve", OSDI 2024, arXiv 2403.02310 (microsoft/sarathi-serve, ``sarathi/benchmark/capacity_search``),
as a method for any scheduler, workload and objective.

Mechanism: for each seed the rate is doubled from ``lo`` until a run fails, then bisected on a log scale until
the bracket is ``rel_tol`` wide. The same seeds are used at every rate and, from one command to the next, for
every scheduler (common random numbers: with ``synthetic`` a rate only stretches the gaps). A rate passes when
every criterion holds over the whole run. Capacity is the highest rate that passed; mean and 95 % confidence
interval over the seeds. Two further rates, 20 % below and 25 % above, are probed to see whether rates are in
order; those that are not are told.

Deviations:
1. The released search looks for the rate on a fixed grid of one trace; here each seed is a trace of its own.
2. Scheduling delay is the time until a request's first launch begins (``queueing_ms``).

Faithful when: with a planted threshold the capacity is at most ``rel_tol`` below it, and never above.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from servelab.core.api import ConfigError, Context
from servelab.plugins.tasks._cells import Cell, Found
from servelab.plugins.tasks._experiment import ManyRuns, ManyRunsConfig
from servelab.plugins.tasks._rows import Column, Row, measured
from servelab.plugins.tasks._search import Criteria, Range, Search

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from servelab.core.compose import Run

ATTAINMENT = 0.99
_SAME = ("duration", "total_input_tokens", "total_output_tokens", "mean_e2el_ms")
"""Figures of ``results.json`` that runs of other traffic do not have in common."""


class CapacityConfig(ManyRunsConfig):
    """Settings of ``task=capacity``."""

    lo: float = Field(0.5, gt=0, allow_inf_nan=False, description="lowest rate, requests/s; it must pass")
    hi: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="highest rate, requests/s; it must fail. null: lo doubled up to 12 times",
    )
    rel_tol: float = Field(
        0.05, ge=1e-4, lt=10, description="width of the final bracket, as a share of its lower end"
    )
    seeds: int = Field(3, ge=1, le=1000, description="seeds, from the run's own upwards")
    at_most: dict[str, float] = Field(
        default={},
        description="largest values of figures of results.json, such as {p99_itl_ms: 100, "
        "median_queueing_ms: 2000}; percentiles 50, 90 and 99 are there",
    )
    attainment: float | None = Field(
        None,
        ge=0,
        le=1,
        description="least share of requests within the run's slo; null: 0.99 where it states bounds; 0: the "
        "slo does not count",
    )
    completed: float = Field(1.0, gt=0, le=1, description="least share of requests that complete")
    setting: str = Field(
        "workload.request_rate", description="the setting that is searched: any positive number"
    )
    checks: bool = Field(True, description="probe a rate below and one above the bracket, to see the order")

    @model_validator(mode="after")
    def _range(self) -> Self:
        if self.hi is not None and self.hi <= self.lo:
            raise ValueError(f"hi={self.hi:g} must be above lo={self.lo:g}")
        if bad := [key for key, bound in self.at_most.items() if not bound > 0]:
            raise ValueError(f"at_most: bounds must be above 0 ({', '.join(bad)})")
        return self


class Capacity(ManyRuns):
    """Keeps no state between runs."""

    title = "Capacity"

    def __init__(self, config: CapacityConfig, context: Context) -> None:
        super().__init__(config, context)
        self._config, self._seed = config, context.seed
        self.searches: list[Search] = []

    def prepare(self, run: Run) -> None:
        config, attainment = self._config, self._config.attainment
        if attainment is None and _states_bounds(run):
            attainment = ATTAINMENT
        if not attainment and not config.at_most:
            raise ConfigError(
                "nothing says which rate is too high",
                where="slo, task.at_most",
                why="slo states no bound that counts, and task.at_most is empty",
                do="set slo=strict (or bounds of your own), or task.at_most='{p99_itl_ms: 100}'",
            )
        criteria = Criteria(config.at_most, attainment or None, config.completed)
        self.searches = [
            Search(
                label="capacity",
                changes={},
                seed=seed,
                where=Range(config.lo, config.hi, config.rel_tol, checks=config.checks),
                criteria=criteria,
                setting=config.setting,
            )
            for seed in range(self._seed, self._seed + config.seeds)
        ]

    def cells(self, found: Found) -> Sequence[Cell]:
        return [cell for search in self.searches for cell in search.wanted(found)]

    def left(self, found: Found) -> float:
        return sum(search.left(found) for search in self.searches)

    def rows(self, found: Found) -> Sequence[Row]:
        ends = [search.capacity(found) for search in self.searches]
        got = dict(measured([end for end in ends if end is not None]))
        if self._one_traffic(found):
            got["spread"] = None  # no sample of several
        setting = self.searches[0].setting
        unit = "requests/s" if setting == "workload.request_rate" else setting
        return [
            Row(
                name="capacity",
                unit=unit,
                setup=self.searches[0].criteria.text,
                note=self._notes(found),
                **got,
            )
        ]

    def columns(self, rows: Sequence[Row]) -> Sequence[Column]:
        return [Column(row.name, row.unit, row.ours, 1) for row in rows]

    def _notes(self, found: Found) -> str:
        notes = [f"Holds: {self.searches[0].criteria.text}."]
        if self._one_traffic(found):
            notes.append(
                "Every seed measured the same: the traffic does not depend on it, so there is no confidence "
                "interval, and task.seeds=1 is enough."
            )
        for search in self.searches:
            for low, high in search.to_dict(found)["non_monotone"]:
                notes.append(f"Seed {search.seed}: {low:.4g} failed though {high:.4g} passed.")
        return " ".join(notes)

    def _one_traffic(self, found: Found) -> bool:
        """Whether runs of all seeds at one rate are the same, as where a trace is replayed."""
        probes = [search.probes(found) for search in self.searches]
        rates = set[float]().union(*probes)
        alike = [[one[rate].results for one in probes if rate in one] for rate in sorted(rates)]
        alike = [results for results in alike if len(results) == len(self.searches)]
        figures = [[[results[key] for key in _SAME] for results in at_rate] for at_rate in alike]
        return len(probes) > 1 and bool(figures) and all(one == at[0] for at in figures for one in at)

    def extra(self, found: Found) -> Mapping[str, Any]:
        return {"searches": [search.to_dict(found) for search in self.searches]}

    def complain(self, found: Found) -> None:
        complain(self.searches, found)

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        return {"probes": lambda axes: plot_probes(axes, self.searches, found)}


def complain(searches: Sequence[Search], found: Found) -> None:
    """Searches whose range holds no capacity.

    Raises:
        ConfigError: of the first, naming them all.
    """
    for status, rate, what, do in (
        ("below", "low", "even the lowest rate fails", "lower task.lo, or loosen the objective"),
        (
            "above",
            "high",
            "even the highest rate passes",
            "raise task.hi, serve more requests, or bound the delay as well: "
            "task.at_most='{median_queueing_ms: 2000}'",
        ),
    ):
        ends = [(search, search.step(found)) for search in searches]
        if out := [search for search, step in ends if step.status == status]:
            raise ConfigError(
                what,
                where=", ".join(f"{search.label} seed {search.seed}" for search in out[:8]),
                why=_why(out[0], found, getattr(out[0].where, rate)),
                do=do,
            )


def _why(search: Search, found: Found, rate: float | None) -> str:
    probes = search.probes(found)
    rate = max(probes) if rate is None and probes else rate
    if rate not in probes:
        return f"its run at {rate:g} failed" if rate is not None else search.criteria.text
    loads = search.criteria.loads(probes[rate].results)
    judged = {key: load for key, load in loads.items() if key != "completed" or load > 1} or loads
    worst = max(judged, key=judged.__getitem__)
    return f"at {rate:g}, {search.criteria.said(worst, probes[rate].results)}"


def plot_probes(axes: Axes, searches: Sequence[Search], found: Found) -> None:
    """Of every probe the criterion nearest to its bound, or furthest beyond it, over the rate."""
    colors: dict[str, str] = {}
    for search in searches:
        color = colors.setdefault(search.label, f"C{len(colors) % 10}")
        new = not axes.get_legend_handles_labels()[1].count(search.label)
        points = sorted(
            (rate, max(search.criteria.loads(one.results).values()))
            for rate, one in search.probes(found).items()
        )
        points = [(rate, min(load, 100.0)) for rate, load in points]
        if points:
            axes.plot(
                *zip(*points, strict=True), "o-", color=color, alpha=0.6, markersize=4, linewidth=1,
                label=search.label if new else None,
            )  # fmt: skip
    axes.axhline(1, color="0.6", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="rate, requests/s", ylabel="worst criterion over its bound")
    axes.legend(frameon=False)


def _states_bounds(run: Run) -> bool:
    slo = run.config.slo
    classes = run.config.workload.settings().get("classes") or ()
    stated = [slo.bounds(), *(one.bounds() for one in slo.classes.values())]
    return any(stated) or any(key.endswith("_ms") and one[key] for one in classes for key in one)
