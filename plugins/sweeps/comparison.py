"""Writes the comparison of a sweep's jobs: ``sweep.json``, ``sweep.csv``, ``sweep.md`` and ``plots/`` in its
folder, and a table on stdout."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from servelab.core.run_folder import write_file
from servelab.core.stdout import say
from servelab.plugins.sweeps import plots, table
from servelab.plugins.sweeps.folder import AGAIN
from servelab.plugins.sweeps.results import METRICS, figure, read_columns, read_results
from servelab.plugins.sweeps.rows import Sweep, read_sweep

log = logging.getLogger("servelab.sweep")


def compare(folder: Path) -> None:
    """Compare the jobs of a sweep as they stand now; further calls write the files anew.

    Raises:
        ServeLabError: no sweep is there, or a file cannot be read or written.
    """
    sweep = read_sweep(folder)
    write(sweep)
    drawn = _draw(sweep)
    lines = [*table.text(sweep), "", f"artefacts: {folder}: sweep.md, sweep.csv, sweep.json{drawn}"]
    say("\n".join(lines))


def write(sweep: Sweep) -> None:
    """The files that need no plotting library.

    Raises:
        ServeLabError: a file cannot be written.
    """
    contents = {
        "sweep.json": json.dumps(table.as_json(sweep), indent=2, allow_nan=False) + "\n",
        "sweep.csv": table.comma_separated(sweep),
        "sweep.md": "\n".join(table.markdown(sweep)) + "\n",
    }
    for name, content in contents.items():
        path = sweep.folder / name
        write_file(path, content, AGAIN)


def summary(folder: Path) -> str:
    """What a job measured, in a few words, for the line that tells its end."""
    named = [
        f"{metric.group} {value:,.{metric.digits}f} {metric.label}"
        for metric, value in read_columns(folder).items()
        if value is not None
    ]
    results = read_results(folder)
    if results is None:
        return ", ".join(named)
    by_key = {metric.key: figure(results, metric) for metric in METRICS}
    parts = [
        f"{text.format(value)}"
        for key, text in (
            ("completed", "{:.0f} completed"),
            ("output_throughput", "{:,.0f} tok/s"),
            ("p99_ttft_ms", "p99 TTFT {:,.0f} ms"),
            ("servelab.kl_mean", "KL {:.4f}"),
        )
        if (value := by_key[key]) is not None
    ]
    return ", ".join([*named, *parts])


def _draw(sweep: Sweep) -> str:
    """Make the plots; what to say about them after the other files."""
    try:
        made = plots.draw(sweep)
    except ImportError as error:
        log.warning('no plots: %s is not installed; pip install -e ".[run]"', error.name)
        return ""
    return ", plots/" if made else ""
