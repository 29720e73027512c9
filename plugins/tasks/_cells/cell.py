"""One run inside a task: what it changes in the task's own configuration, and what it measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from time import process_time
from typing import Any, Literal, Protocol

from servelab.core import __version__
from servelab.core.compose import compose
from servelab.core.config import RunConfig, validate
from servelab.core.errors import ConfigError, PluginError
from servelab.core.hookspecs import hookimpl
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.processes import in_one_line
from servelab.core.records import Record
from servelab.core.registry import Registry, import_target

CELL_SCHEMA = 1
"""Version of a cell's file; raised when what it holds changes meaning, so that old files are not reused."""
PERCENTILES = (50.0, 90.0, 99.0)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A run to be measured."""

    name: str
    """For people, and unique within the task."""
    changes: Mapping[str, Any]
    """Dotted setting -> value in JSON types, over the task's own configuration. A mapping with a ``name``
    replaces the whole section of a plugin."""
    meters: tuple[str, ...] = ()
    """``module:Class`` of what else measures, made without arguments; see ``Meter``."""
    weight: float = 1.0
    """How long it takes, relative to the others: for the estimate of the time left."""


@dataclass(frozen=True, kw_only=True)
class CellResult:
    """What became of a cell."""

    name: str
    key: str
    """Of its settings, meters and version: equal keys measure equally."""
    changes: Mapping[str, Any]
    seed: int
    status: Literal["ok", "failed"] = "ok"
    error: str = ""
    results: Mapping[str, Any] = field(default_factory=dict)
    """As ``results.json`` has it."""
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Of its meters."""
    cpu_s: float = 0.0
    wall_s: float = 0.0
    schema_version: int = CELL_SCHEMA

    @property
    def ok(self) -> bool:
        return self.status == "ok"

    @property
    def reason(self) -> str:
        """Its error in one line."""
        return in_one_line(self.error)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Found = Mapping[str, CellResult]
"""Results by the name of their cell."""


class Meter(Protocol):
    """Ends in figures. Its methods named as hooks of observers are called as these."""

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        """What it measured, in JSON types; asked once, after the run.

        Args:
            timeline: the facts of the whole run.
        """
        ...


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run with some of them changed.

    Raises:
        ConfigError: a change goes below something that is no section.
    """
    out: dict[str, Any] = deepcopy(dict(settings))
    for path, value in changes.items():
        *sections, last = path.split(".")
        at = out
        for part in sections:
            inner = at.get(part)
            if inner is None:
                inner = at[part] = {}
            if not isinstance(inner, dict):
                raise ConfigError(f"{path} cannot be changed", where=path, why=f"{part} is {inner!r:.40}")
            at = inner
        at[last] = deepcopy(value)
    return out


def base_of(config: RunConfig) -> dict[str, Any]:
    """The settings that cells change: a task's own, but served and measured without observers."""
    return {**config.settings(), "observers": [], "task": {"name": "bench"}}


def key_of(settings: Mapping[str, Any], meters: tuple[str, ...]) -> str:
    """The key of a cell; sixteen hexadecimal digits."""
    text = json.dumps([CELL_SCHEMA, __version__, settings, meters], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def measure(
    result: CellResult, settings: Mapping[str, Any], meters: tuple[str, ...], registry: Registry | None = None
) -> CellResult:
    """Compose a cell's run, serve it and summarize it.

    Args:
        result: the cell, not measured yet.
        settings: the whole of its configuration.
        meters: see ``Cell``.
        registry: where its plugins are; None: as loaded here.

    Raises:
        ServeLabError: whatever a run of its own would say.
    """
    began, registry = process_time(), registry or Registry.load()
    run = compose(validate(settings, registry), registry, sweep=True)
    facts = _Facts()
    extra = [_meter(path) for path in meters]
    watching = [one for one in extra if any(name.startswith("servelab_") for name in dir(one))]
    run.task.run(replace(run, observers=(facts, *watching)))
    figures: dict[str, Any] = {}
    for one in extra:
        figures.update(one.figures(facts.timeline))
    results = summarize(facts.timeline, SummaryOptions(percentiles=PERCENTILES))
    return replace(result, results=results, figures=figures, cpu_s=process_time() - began)


def _meter(path: str) -> Any:
    made = import_target(path)()
    if not hasattr(made, "figures"):
        raise PluginError(
            f"meter {path} has no figures()", do="give it what Meter in _cells/cell.py asks for"
        )
    return made


class _Facts:
    """Feeds a timeline. One hook per record that it needs: plans, which are many, are then not even made."""

    def __init__(self) -> None:
        self.timeline = Timeline()

    @hookimpl
    def servelab_on_run_started(self, record: Record) -> None:
        self.timeline.feed(record)

    servelab_on_request_arrived = servelab_on_request_admitted = servelab_on_run_started
    servelab_on_request_forked = servelab_on_request_preempted = servelab_on_run_started
    servelab_on_request_finished = servelab_after_step = servelab_on_run_started
    servelab_on_pages_evicted = servelab_on_run_finished = servelab_on_run_started
