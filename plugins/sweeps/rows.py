"""A sweep's folder as rows: per job its settings, how it ended and what it measured; and which are best."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from servelab.core.api import ConfigError
from servelab.plugins.sweeps.folder import JobState, bare, dict_of, differing, job_folders
from servelab.plugins.sweeps.results import (
    METRICS,
    Metric,
    ending,
    figure,
    read_columns,
    read_results,
    stamps,
)

SAME = ("seed", "workload", "slo", "model", "clock", "cost", "hardware", "task")
"""Sections that must be alike for figures to be compared, and the name of ``executor``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job."""

    number: int
    folder: Path
    settings: dict[str, str]
    """The settings that differ between jobs, as they were given."""
    overrides: list[str]
    status: str
    """ok, PARTIAL (ended early), FAILED, or "not run"."""
    reason: str
    figures: dict[str, float | None]
    """By the key of ``METRICS`` and of ``own`` of all jobs; None: not measured."""
    oracle: bool
    """It read what no real system knows: a bound, and no competitor."""
    basis: str
    """Equal for jobs with the same workload on the same device."""
    timed: bool
    """Its times are of the wall clock."""
    own: tuple[Metric, ...] = ()
    """What its task names for comparison."""
    best: set[str] = field(default_factory=set)
    """Keys of ``figures`` in which no job of the same workload is better."""

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def measured(self) -> bool:
        """It left results: of requests that it served, or what its task names."""
        return bool(self.figures["completed"]) or any(self.figures[m.key] is not None for m in self.own)


@dataclass(frozen=True)
class Sweep:
    """All jobs of a folder."""

    folder: Path
    rows: list[Row]
    axes: list[str]
    """The settings that differ, in the order of the command line."""
    common: list[str]
    """Overrides that all jobs share."""

    @property
    def metrics(self) -> list[Metric]:
        """Those to show: what tasks name, the usual where they name nothing, and others that some job has."""
        own = _own(self.rows)
        known = {key for row in self.rows for key, value in row.figures.items() if value is not None}
        return [*own, *(m for m in METRICS if m.key in known or (m.always and not own))]

    @property
    def named(self) -> bool:
        """Whether some task named what to compare."""
        return bool(_own(self.rows))

    @property
    def workloads(self) -> int:
        """How many different workloads were served to the end."""
        return len({row.basis for row in self.rows if row.ok})


def read_sweep(folder: Path) -> Sweep:
    """Read what the jobs of a sweep left.

    Raises:
        ConfigError: no sweep of ours ran there.
        ServeLabError: a job's file cannot be read.
    """
    jobs = list(job_folders(folder)) if folder.is_dir() else []
    if not jobs:
        raise ConfigError(
            "there is no sweep in this folder",
            where=str(folder),
            why="no job.json is in it or below it",
            do="name the folder of a sweep: hydra.sweep.dir, by default multirun/DATE/TIME",
        )
    stated = [dict_of(state.overrides) for _, state in jobs]
    axes = differing(stated)
    common = [f"{key}={value}" for key, value in stated[0].items() if key not in axes]
    rows = [
        _row(path, state, {key: one[key] for key in axes if key in one})
        for (path, state), one in zip(jobs, stated, strict=True)
    ]
    own = _own(rows)
    for row in rows:
        row.figures.update({m.key: None for m in own if m.key not in row.figures})
    _mark_best(rows, (*own, *METRICS))
    return Sweep(folder, rows, axes, common)


def _own(rows: Iterable[Row]) -> list[Metric]:
    """What the tasks of any of them name, in their order."""
    return list({m.key: m for row in rows for m in row.own}.values())


def _row(folder: Path, state: JobState, settings: dict[str, str]) -> Row:
    ran = state.status != "waiting"
    results = read_results(folder) if ran else None
    named = read_columns(folder) if ran else {}
    status: str = state.status
    reason = state.reason
    if results is not None and status == "ok":
        status, reason = ending(results)
    return Row(
        number=state.number,
        folder=folder,
        settings=settings,
        overrides=bare(state.overrides),
        status=_STATUS.get(status, "FAILED"),
        reason=reason,
        figures={m.key: None if results is None else figure(results, m) for m in METRICS}
        | {m.key: value for m, value in named.items()},
        own=tuple(named),
        oracle=results is not None and any(stamp.startswith("oracle") for stamp in stamps(results)),
        basis=_basis(state.config),
        timed=(state.config.get("clock") or {}).get("name") == "wall",
    )


_STATUS = {"ok": "ok", "interrupted": "PARTIAL", "running": "PARTIAL", "waiting": "not run"}


def _basis(config: Mapping[str, Any]) -> str:
    executor = config.get("executor") or {}
    return json.dumps([{key: config.get(key) for key in SAME}, executor.get("name")], sort_keys=True)


def _mark_best(rows: Iterable[Row], metrics: Sequence[Metric]) -> None:
    """Among jobs of one workload that ended well and completed as many requests as any of them."""
    alike: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.ok and not row.oracle:
            alike[row.basis].append(row)
    for group in alike.values():
        most = max(row.figures["completed"] or 0 for row in group)
        rivals = [row for row in group if (row.figures["completed"] or 0) == most]
        for metric in metrics:
            _mark(metric, rivals)


def _mark(metric: Metric, rivals: Sequence[Row]) -> None:
    values = [(row, row.figures[metric.key]) for row in rivals]
    known = [(row, metric.better * metric.shown(value)) for row, value in values if value is not None]
    if not metric.better or len({value for _, value in known}) < 2:
        return  # a single job, or all alike: nobody is better
    best = max(value for _, value in known)
    for row, value in known:
        if value == best:
            row.best.add(metric.key)
