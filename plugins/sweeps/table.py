"""The comparison as text, as Markdown, as CSV and as JSON."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from servelab.plugins.sweeps.results import Metric
from servelab.plugins.sweeps.rows import Row, Sweep
from servelab.plugins.tables import aligned

SCHEMA = 1
"""Version of ``sweep.json``; raised when a key changes meaning or goes away."""
WIDTH = 100
BEST = "*"
FEW = 100
SETTING_WIDTH = 28
"""Longer values of settings are cut in the text; files have them whole."""


def text(sweep: Sweep) -> Iterator[str]:
    """Lines for a terminal: one row per job, two lines of heading."""
    metrics = sweep.metrics
    head = [
        ["", *("" for _ in sweep.axes), *_groups(metrics), ""],
        ["job", *_names(sweep.axes), *(metric.label for metric in metrics), "status"],
    ]
    body = [
        [
            str(row.number),
            *(_short(row.settings.get(axis, "-")) for axis in sweep.axes),
            *(cell(row, metric) for metric in metrics),
            row.status + (" (oracle)" if row.oracle else ""),
        ]
        for row in sweep.rows
    ]
    yield f"Sweep of {len(sweep.rows)} jobs"
    for line in wrap(f"all with: {' '.join(sweep.common) or 'the defaults'}", WIDTH - 2):
        yield f"  {line}"
    yield ""
    figures = range(1 + len(sweep.axes), len(head[0]) - 1)
    yield from (f"  {line}".rstrip() for line in aligned([*head, *body], figures))
    yield ""
    for note in notes(sweep):
        yield from (f"  {line}" for line in wrap(note, WIDTH - 2))


def markdown(sweep: Sweep) -> Iterator[str]:
    """A table to paste: best values in bold, its notes below it."""
    metrics = sweep.metrics
    yield f"| {' | '.join([*sweep.axes, *(metric.name for metric in metrics), 'status'])} |"
    yield f"|{'|'.join([':---' for _ in sweep.axes] + ['---:' for _ in metrics] + [':---'])}|"
    for row in sweep.rows:
        cells = [
            *(row.settings.get(axis, "-").replace("|", "\\|") for axis in sweep.axes),
            *(cell(row, metric, "**") for metric in metrics),
            row.status + (" (oracle)" if row.oracle else ""),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    yield f"All jobs: `{' '.join(sweep.common) or 'defaults'}`."
    for note in notes(sweep, "Bold"):
        yield ""
        yield note


def comma_separated(sweep: Sweep) -> str:
    """Full precision, one column per setting and per key of ``results.json``."""
    out = io.StringIO()
    keys = [metric.key for metric in sweep.metrics]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["job", *sweep.axes, *keys, "status", "reason"])
    for row in sweep.rows:
        figures = [row.figures[key] for key in keys]
        values = [row.settings.get(axis, "") for axis in sweep.axes]
        writer.writerow([row.number, *values, *figures, row.status, row.reason])
    return out.getvalue()


def as_json(sweep: Sweep) -> dict[str, Any]:
    """See ``docs/howto/run_a_sweep.md``."""
    groups = list(dict.fromkeys(row.basis for row in sweep.rows))
    return {
        "schema_version": SCHEMA,
        "swept": sweep.axes,
        "common": sweep.common,
        "jobs": [
            {
                "job": row.number,
                "folder": row.folder.relative_to(sweep.folder).as_posix(),
                "settings": row.settings,
                "overrides": row.overrides,
                "status": row.status,
                "reason": row.reason,
                "oracle": row.oracle,
                "workload": groups.index(row.basis),
                "results": row.figures,
                "best": sorted(row.best),
            }
            for row in sweep.rows
        ],
    }


def cell(row: Row, metric: Metric, mark: str = "") -> str:
    """A figure as shown; the best with a star after it, or between two marks."""
    value = row.figures[metric.key]
    if value is None:
        return "-"
    shown = f"{value * metric.scale:,.{metric.digits}f}"
    if metric.key not in row.best:
        return shown if mark else f"{shown} "
    return f"{mark}{shown}{mark}" if mark else f"{shown}{BEST}"


def notes(sweep: Sweep, mark: str = BEST) -> Iterator[str]:
    """What one must know to read the table."""
    served = [row for row in sweep.rows if row.figures["completed"]]
    latencies = "Latencies in milliseconds." if mark == BEST and (served or not sweep.named) else ""
    if any(row.best for row in sweep.rows):
        among = "the same workload and model" if sweep.workloads > 1 else "the workload"
        whole = f"that served {among} to the end and completed as many requests as any"
        best = whole if served else f"of {among} that ended well"
        yield f"{mark}: best of the jobs {best}. {latencies}".strip()
    elif latencies:
        yield latencies
    if any(row.timed for row in served) and len(served) > 1:
        yield "Wall clock: differences include what else the machine did; repeat with seed=0,1,2."
    tails = [row for row in served if row.figures["p99_ttft_ms"] is not None]
    if any((row.figures["completed"] or 0) < FEW for row in tails):
        yield f"p99 over fewer than {FEW} requests is about their maximum."
    if any(row.oracle for row in sweep.rows):
        yield "oracle: reads true output lengths, which no real system knows; a bound, never marked as best."
    ended = [row for row in sweep.rows if row.status in ("PARTIAL", "not run")]
    if ended:
        numbers = ", ".join(str(row.number) for row in ended)
        yield f"Not finished: {numbers}. Figures of a PARTIAL job are those of the part it served."
    silent = [str(r.number) for r in sweep.rows if r.ok and r.figures["completed"] is None and not r.own]
    if silent:
        yield f"Without results.json: {', '.join(silent)}; the observer 'report' writes it."
    failed: dict[str, list[str]] = defaultdict(list)
    for row in sweep.rows:
        if row.status == "FAILED":
            failed[row.reason].append(str(row.number))
    for reason, jobs in failed.items():
        yield f"FAILED, job{'s' if len(jobs) > 1 else ''} {', '.join(jobs)}: {reason}"


def _groups(metrics: Sequence[Metric]) -> list[str]:
    """Headings, each above the first of its neighbours only."""
    return [
        "" if i and metrics[i - 1].group == metric.group else metric.group for i, metric in enumerate(metrics)
    ]


def _names(axes: Sequence[str]) -> list[str]:
    """The last part of a setting's name, where that tells it from the others."""
    last = [axis.rpartition(".")[2] for axis in axes]
    return [name if last.count(name) == 1 else axis for name, axis in zip(last, axes, strict=True)]


def _short(value: str) -> str:
    return value if len(value) <= SETTING_WIDTH else value[: SETTING_WIDTH - 1] + "…"
