"""What is compared of a run: its settings, what it ran on, and its figures, each flat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from servelab.core.errors import LogError, ServeLabError
from servelab.core.logs import EVENTS_FILE
from servelab.core.metrics import Timeline, summarize
from servelab.core.run_folder import RESULTS_FILE, RunFolder

NOT_FIGURES = frozenset({"info", "plugins", "stamps", "samples", "schema_version", "run", "seed", "notes"})
"""Keys of ``servelab`` that say what ran, or how much is behind a figure."""
ECHOES = frozenset({"num_prompts", "request_rate", "burstiness", "max_concurrency"})
"""Flat keys that repeat settings."""
IDENTITY = (
    "servelab",
    "commit",
    "dirty",
    "python",
    "platform",
    "libraries",
    "machine",
    "weights",
    "tokenizer",
)
"""Keys of the run's info that say what it ran on."""


@dataclass(slots=True)
class RunFacts:
    """One run. Keys are flat, their parts joined by dots; lists of mappings go by ``pool`` or ``name``."""

    folder: str
    schema: object
    """Version of the keys of its results."""
    settings: dict[str, Any]
    ground: dict[str, Any]
    """Versions of plugins and libraries, commit, machine."""
    figures: dict[str, float]
    samples: dict[str, int]
    status: str
    partial: bool
    stamps: list[str]
    from_log: bool = False
    """Its figures were computed from its event log, as it has no results."""


def read_run(run: RunFolder) -> RunFacts:
    """The facts of a run.

    Raises:
        ServeLabError: it has neither results nor an event log, or they cannot be read.
    """
    from_log = not run.has(RESULTS_FILE) and run.has(EVENTS_FILE)
    if from_log:
        timeline = Timeline().feed_all(run.events())
        result = summarize(timeline)
    else:
        result = run.results()
    extra = result.get("servelab")
    if not isinstance(extra, dict):
        raise LogError(
            f"{RESULTS_FILE} is not ServeLab's",
            where=str(run),
            why="it has no 'servelab'",
            do="compare folders of runs",
        )
    info = extra.get("info") or {}
    state = extra.get("run") or {}
    return RunFacts(
        folder=str(run),
        schema=extra.get("schema_version"),
        settings=dict(flatten(info.get("settings") or {})),
        ground=_ground(info, extra),
        figures=dict(_figures(result)),
        samples={k: v for k, v in (extra.get("samples") or {}).items() if isinstance(v, int)},
        status=str(state.get("status", "unknown")),
        partial=bool(state.get("partial", True)),
        stamps=[str(stamp) for stamp in extra.get("stamps") or ()],
        from_log=from_log,
    )


def check_comparable(runs: list[RunFacts]) -> None:
    """Refuse results whose keys may mean different things.

    Raises:
        ServeLabError: their schema versions differ.
    """
    versions = {run.schema for run in runs}
    if len(versions) > 1:
        raise ServeLabError(
            "the runs cannot be compared: their results are of different versions",
            where="; ".join(f"{run.folder}: schema_version {run.schema}" for run in runs),
            why="a key may have changed its name or its meaning",
            do="run them again with one version of ServeLab",
        )


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists; empty ones are leaves."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        for index, item in enumerate(value):
            name = item.get("pool", item.get("name", item.get("instance", index)))
            yield from flatten(item, f"{prefix}.{name}")
    else:
        yield prefix, value


def _ground(info: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in IDENTITY:
        if info.get(key) is not None:
            found.update(flatten(info[key], key))
    for kind, stated in (extra.get("plugins") or {}).items():
        ones = stated if isinstance(stated, list) else [stated]
        found[f"plugin.{kind}"] = ", ".join(f"{one.get('name')} {one.get('version') or ''}" for one in ones)
    return found


def _figures(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    extra = {key: value for key, value in result["servelab"].items() if key not in NOT_FIGURES}
    flat = {key: value for key, value in result.items() if key != "servelab" and key not in ECHOES}
    for key, value in flatten({**flat, "servelab": extra}):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value
