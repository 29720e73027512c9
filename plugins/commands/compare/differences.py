"""What differs between runs, and what makes their figures hard to compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from servelab.plugins.commands.compare.facts import RunFacts

ABSENT = object()
"""A run does not have the key."""

CHANCE = ("seed",)
TRAFFIC = ("workload.", "model.", "engine.max_model_len")
BOUNDS = ("slo.",)
RULES = ("observers.report.itl_mode", "observers.report.rejections_are_misses", "observers.report.tbt_ms")
WHERE = ("executor.name", "clock.name", "cost.", "hardware.")
"""Prefixes of settings that decide whether figures are of one kind."""
MACHINE = ("platform", "machine.")


def table(runs: Sequence[Mapping[str, Any]], *, equal: bool) -> dict[str, list[Any]]:
    """Key -> the value of each run; only keys that differ unless ``equal``."""
    keys = dict.fromkeys(key for run in runs for key in run)
    rows = {key: [run.get(key, ABSENT) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if equal or any(value != row[0] for value in row)}


def warnings(runs: Sequence[RunFacts]) -> list[str]:
    """Why a difference of figures may come from something else; loudest first."""
    settings = table([run.settings for run in runs], equal=False)
    ground = table([run.ground for run in runs], equal=False)
    found = []
    for label, run in zip(labels(runs), runs, strict=True):
        if run.partial:
            found.append(
                f"run {label} is PARTIAL ({run.status}): its figures cover only part of its workload"
            )
        if run.from_log:
            found.append(f"run {label} has no results.json: its figures are computed from its event log")
        if not run.settings:
            found.append(f"run {label} does not state its settings, so they are not compared")
    if differ := _under(settings, TRAFFIC):
        found.append(f"not the same workload: {_named(differ)}")
    if differ := _under(settings, CHANCE):
        found.append(f"different seeds ({_values(settings[differ[0]])}): different arrivals and lengths")
    if differ := _under(settings, WHERE):
        found.append(f"not the same ground: {_named(differ)}; times of different clocks, executors or prices")
    if differ := _under(ground, MACHINE):
        found.append(f"different machines: {_named(differ)}")
    if differ := _under(settings, BOUNDS):
        found.append(f"different bounds: {_named(differ)}; goodput and attainment are not comparable")
    if differ := _under(settings, RULES):
        found.append(f"different rules of counting: {_named(differ)}")
    counts = [run.samples.get("e2el") for run in runs]
    if len(set(counts)) > 1 and not _under(settings, (*TRAFFIC, *CHANCE)):
        shown = ", ".join(f"{count} in {label}" for label, count in zip(labels(runs), counts, strict=True))
        found.append(f"latencies are of completed requests only: {shown}; the others are in no percentile")
    found += _quality(runs, settings)
    if len({tuple(run.stamps) for run in runs}) > 1:
        stamps = [
            f"{label}: {', '.join(run.stamps) or 'none'}"
            for label, run in zip(labels(runs), runs, strict=True)
        ]
        found.append(f"different stamps ({'; '.join(stamps)})")
    return found


def labels(runs: Sequence[object]) -> list[str]:
    """A, B, ... Z, then numbers."""
    return [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(runs))]


def _quality(runs: Sequence[RunFacts], settings: Mapping[str, list[Any]]) -> list[str]:
    """A faster model that answers worse is no faster model."""
    if not any(key.split(".")[0] in ("quant", "kvquant") for key in settings):
        return []
    measured = [any(key.startswith("servelab.quality.") for key in run.figures) for run in runs]
    if any(measured):
        return ["different quantization: read the quality figures beside the speed"]
    return ["different quantization, and quality was measured in no run: speed alone says little"]


def _under(rows: Mapping[str, object], prefixes: Sequence[str]) -> list[str]:
    return [key for key in rows if key.startswith(tuple(prefixes))]


def _named(keys: Sequence[str]) -> str:
    return ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")


def _values(row: Sequence[Any]) -> str:
    return ", ".join("absent" if value is ABSENT else str(value) for value in row)
