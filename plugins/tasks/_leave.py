"""What a task of many runs leaves: a table on the terminal, ``experiment.json``, plots, and one page."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from servelab.core.environment import environment
from servelab.core.run_folder import unwritable, write_file
from servelab.core.stdout import say
from servelab.plugins.tables import aligned
from servelab.plugins.tasks._cells import Found
from servelab.plugins.tasks._rows import Row, tally

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from servelab.core.compose import Run
    from servelab.plugins.tasks._experiment import ManyRuns

EXPERIMENT_FILE = "experiment.json"
PAGE_FILE = "experiment.html"
MARKDOWN_FILE = "experiment.md"
PLOTS = "plots"
SCHEMA = 1
"""Version of ``experiment.json``; raised when a key changes meaning or goes away."""
WIDTH = 110
VERDICT = {True: "holds", False: "DOES NOT HOLD", None: "-"}
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .2rem .6rem; text-align: right; }
td:first-child, th:first-child, td:last-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
tr.false { background: #fdecea; } svg { max-width: 100%; height: auto; }"""


def leave(
    task: ManyRuns, run: Run, status: str, rows: Sequence[Row], found: Found, folder: Path | None
) -> None:
    """Write and print everything.

    Raises:
        ServeLabError: a file cannot be written.
    """
    spec = run.registry.spec("task", task.name)
    lines = list(table(task.title, status, rows, found))
    try:
        if folder is not None:
            told = {
                "schema_version": SCHEMA,
                "task": task.name,
                "title": task.title,
                "paper": str(spec.paper),
                "status": status,
                "verdict": tally(rows),
                "rows": [row.to_dict() for row in rows],
                "columns": [asdict(column) for column in task.columns(rows)],
                "deviations": list(spec.deviations),
                **task.extra(found),
                "settings": run.config.settings(),
                "cells": [_cell(one) for one in found.values()],
                "environment": environment(),
            }
            write_file(folder / EXPERIMENT_FILE, json.dumps(told, indent=2, default=str) + "\n")
            write_file(folder / MARKDOWN_FILE, "\n".join(markdown(rows)) + "\n")
            drawn = draw(task.plots(found), folder / PLOTS) if found else {}
            if drawn is None:
                lines.append("plots are left out: matplotlib is not installed")
            write_file(folder / PAGE_FILE, page(task.title, status, rows, spec.deviations, drawn or {}))
            lines.append(f"artefacts: {folder / PAGE_FILE}, {EXPERIMENT_FILE}")
    finally:  # what was measured is said even if the disk is full
        say("\n".join(lines))


def _cell(one: Any) -> dict[str, Any]:
    """A cell without its results, which are in its own file."""
    cell = one.to_dict()
    del cell["results"], cell["schema_version"]
    return dict(cell)


def number(value: float | None, spread: float | None = None) -> str:
    """Four digits, or whole thousands."""
    if value is None:
        return "-"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:,.{digits}f}"
    return text if spread is None else f"{text} ± {spread:,.{digits}f}"


def _cells_of(row: Row) -> tuple[str, ...]:
    name = f"{row.name}{f' ({row.unit})' if row.unit else ''}"
    bound = row.bound.text if row.bound else "told"
    return name, number(row.paper), number(row.ours, row.spread), bound, VERDICT[row.holds]


HEAD = ("claim", "paper", "ours", "tolerance", "verdict")


def table(title: str, status: str, rows: Sequence[Row], found: Found) -> Iterator[str]:
    """Lines for a terminal."""
    yield title + ("" if status == "ok" else f"   {status.upper()}: what was measured so far")
    yield ""
    shown = [row for row in rows if row.bound is not None] or rows
    yield from (f"  {line}" for line in aligned([HEAD, *map(_cells_of, shown)], right=(1, 2, 3)))
    yield ""
    counts = tally(rows)
    told = "" if len(shown) == len(rows) else f" (these in {EXPERIMENT_FILE})"
    yield "  " + ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in counts.items() if n) + told
    for note in dict.fromkeys(row.note for row in rows if row.note):
        yield from (f"  {line}" for line in wrap(note, WIDTH))
    cpu = sum(one.cpu_s for one in found.values())
    yield f"  {len(found)} runs, {cpu:,.0f} s of CPU time"
    failed: dict[str, list[str]] = defaultdict(list)
    for one in found.values():
        if not one.ok:
            failed[one.reason].append(one.name)
    for reason, names in failed.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        yield f"  FAILED {'; '.join(names[:3])}{more}: {reason}"


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """A table to paste."""
    yield f"| {' | '.join(HEAD)} |"
    yield "|:---|---:|---:|---:|:---|"
    for row in rows:
        yield f"| {' | '.join(_cells_of(row))} |"


def draw(plots: Mapping[str, Callable[[Axes], None]], folder: Path) -> dict[str, str] | None:
    """Draw each as ``NAME.svg`` and ``NAME.png``; the SVGs by name. None: matplotlib is not installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return None
    drawn: dict[str, str] = {}
    for name, plot in plots.items():
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        plot(axes := figure.subplots())
        axes.spines[["top", "right"]].set_visible(False)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.svg"
        try:
            with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
                figure.savefig(path, metadata={"Date": None})
            figure.savefig(path.with_suffix(".png"), dpi=120)
        except OSError as error:
            raise unwritable(path, error) from error
        drawn[name] = path.read_text(encoding="utf-8")
    return drawn


def page(
    title: str, status: str, rows: Sequence[Row], deviations: Sequence[str], drawn: Mapping[str, str]
) -> str:
    """One page of HTML, with its plots in it."""
    head = "".join(f"<th>{escape(word)}</th>" for word in (*HEAD, "set-up"))
    lines = [
        f'<tr class="{str(row.holds).lower()}">'
        + "".join(f"<td>{escape(word)}</td>" for word in (*_cells_of(row), row.setup))
        + "</tr>"
        for row in rows
    ]
    notes = dict.fromkeys(row.note for row in rows if row.note)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><meta charset="utf-8">',
            f"<title>{escape(title)}</title><style>{STYLE}</style>",
            f"<h1>{escape(title)}</h1>",
            "" if status == "ok" else f"<p><strong>{status.upper()}</strong>: what was measured so far.</p>",
            f"<table><thead><tr>{head}</tr></thead><tbody>",
            *lines,
            "</tbody></table>",
            *(f"<p>{escape(note)}</p>" for note in notes),
            *(svg[svg.index("<svg") :] for svg in drawn.values()),
            "<h2>Deviations</h2><ol>",
            *(f"<li>{escape(one)}</li>" for one in deviations),
            "</ol></html>\n",
        ]
    )
