"""The comparison as pictures: bars per metric, lines over a numeric setting, throughput against latency.

Runs that differ in their seed only are repetitions: bars and lines show their mean, dots each of them. Jobs
that did not end well are left out, and the title says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from servelab.core.run_folder import unwritable
from servelab.plugins.sweeps.folder import AGAIN
from servelab.plugins.sweeps.results import METRICS, Metric
from servelab.plugins.sweeps.rows import Row, Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = "plots"
SEED = "seed"
DPI = 130
COLUMNS = 3
MOST_BARS, FEW_BARS = 40, 12
"""With more groups of jobs than this, bars could not be read; where lines show the same, fewer are enough."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
"""Okabe and Ito: told apart by colour-blind readers, too."""
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":")
"""With hollow markers, lines that lie on one another are seen."""


@dataclass(frozen=True)
class Group:
    """Jobs that differ in their seed only."""

    settings: dict[str, str]
    rows: list[Row]

    def label(self, without: str = "", *, keys: Sequence[str]) -> str:
        """Its settings as a reader tells it from the others."""
        shown = [(key, value) for key, value in self.settings.items() if key != without]
        return ", ".join(_worded(key, value) for key, value in shown if key in keys) or "all jobs"

    def values(self, metric: Metric) -> list[float]:
        known = [row.figures[metric.key] for row in self.rows]
        return [metric.scale * value for value in known if value is not None]


def draw(sweep: Sweep) -> list[Path]:
    """Draw what there is to draw, over the files of an earlier call; the files made.

    Raises:
        ImportError: matplotlib is not installed.
        ServeLabError: a file cannot be written.
    """
    rows = [row for row in sweep.rows if row.ok and row.measured]
    if len(rows) < 2:
        return []
    groups = _groups(rows)
    metrics = [m for m in sweep.metrics if m.better and any(any(group.values(m)) for group in groups)]
    title = f"{len(rows)} of {len(sweep.rows)} jobs" if len(rows) < len(sweep.rows) else f"{len(rows)} jobs"
    title += " (dots: each seed)" if len(groups) < len(rows) else ""
    numeric = [axis for axis in sweep.axes if axis != SEED and _is_numeric(axis, rows)]
    figures: dict[str, Figure] = {}
    if 1 < len(groups) <= (FEW_BARS if numeric else MOST_BARS):
        figures["bars"] = _bars(groups, metrics, title, sweep)
    for axis in numeric:
        figures[f"over_{axis.replace('/', '_')}"] = _lines(groups, metrics, axis, title, sweep)
    if any(row.figures["output_throughput"] for row in rows):
        figures["throughput_latency"] = _scatter(groups, numeric[:1], title, sweep)
    return [_save(figure, sweep.folder / FOLDER / f"{name}.png") for name, figure in figures.items()]


def _bars(groups: Sequence[Group], metrics: Sequence[Metric], title: str, sweep: Sweep) -> Figure:
    """One panel per metric, one bar per group."""
    rows = ceil(len(metrics) / COLUMNS)
    figure = _figure(4.2 * COLUMNS, rows * (0.75 + 0.32 * len(groups)) + 0.5, title, sweep)
    labels = [group.label(keys=sweep.axes) for group in groups]
    panels = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False)
    for axes, metric in zip(panels.flat, metrics, strict=False):
        for place, group in enumerate(groups):
            values = group.values(metric)
            if not values:
                axes.text(0, place, " not measured", va="center", fontsize=8, color="0.4")
                continue
            mean = fmean(values)
            axes.barh(place, mean, height=0.7, color="0.78")
            axes.annotate(
                f"{mean:,.{metric.digits}f}", (max(values), place), (4, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
            if len(values) > 1:
                axes.plot(values, [place] * len(values), "o", color=COLOURS[0], markersize=3)
        axes.set_title(_axis_name(metric), fontsize=9)
        axes.set_yticks(range(len(groups)), labels, fontsize=8)
        axes.margins(x=0.22)
        axes.set_xlim(left=0)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels.flat[0].invert_yaxis()  # shared: the first group on top
    for axes in panels.flat[len(metrics) :]:
        axes.set_visible(False)
    return figure


def _lines(groups: Sequence[Group], metrics: Sequence[Metric], axis: str, title: str, sweep: Sweep) -> Figure:
    """One panel per metric over a numeric setting, one line per combination of the others."""
    rows = ceil(len(metrics) / COLUMNS)
    figure = _figure(4.2 * COLUMNS, 2.6 * rows + 0.9, title, sweep)
    panels = figure.subplots(rows, COLUMNS, squeeze=False)
    lines = _by_label(groups, axis, sweep.axes)
    for axes, metric in zip(panels.flat, metrics, strict=False):
        for i, (label, members) in enumerate(lines.items()):
            points = [(float(group.settings[axis]), group.values(metric)) for group in members]
            points = sorted(point for point in points if point[1])
            style = _style(i)
            axes.plot([x for x, _ in points], [fmean(ys) for _, ys in points], label=label, **style)
            for x, ys in points:
                if len(ys) > 1:
                    axes.plot([x] * len(ys), ys, ".", color=style["color"], markersize=3, alpha=0.6)
        axes.set_title(_axis_name(metric), fontsize=9)
        axes.set_xlabel(axis, fontsize=8)
        _plain(axes)
    for axes in panels.flat[len(metrics) :]:
        axes.set_visible(False)
    _legend(figure, panels.flat[0], len(lines))
    return figure


def _scatter(groups: Sequence[Group], along: Sequence[str], title: str, sweep: Sweep) -> Figure:
    """Output throughput against latencies; a line joins the values of a numeric setting."""
    by_key = {metric.key: metric for metric in METRICS}
    across = by_key["output_throughput"]
    wanted = [by_key[key] for key in ("p99_ttft_ms", "mean_ttft_ms", "mean_tpot_ms", "mean_e2el_ms")]
    known = [metric for metric in wanted if any(group.values(metric) for group in groups)]
    upright = [m for m in known if m.key != "mean_ttft_ms" or by_key["p99_ttft_ms"] not in known]
    figure = _figure(4.2 * COLUMNS, 4.4, title, sweep)
    panels = figure.subplots(1, max(len(upright), 1), squeeze=False)
    lines = _by_label(groups, along[0] if along else "", sweep.axes)
    for axes, metric in zip(panels.flat, upright, strict=False):
        for i, (label, members) in enumerate(lines.items()):
            if along:
                members = sorted(members, key=lambda group: float(group.settings[along[0]]))
            points = [
                (fmean(group.values(across)), fmean(group.values(metric)), group)
                for group in members
                if group.values(across) and group.values(metric)
            ]
            style = _style(i) | ({} if along else {"linestyle": "none", "markersize": 7})
            axes.plot([x for x, _, _ in points], [y for _, y, _ in points], label=label, **style)
            if along:
                for x, y, group in points:
                    axes.annotate(
                        group.settings[along[0]], (x, y), (3, 4), textcoords="offset points", fontsize=7
                    )
        axes.set_xlabel("output tok/s (right: more)", fontsize=8)
        axes.set_ylabel(f"{metric.name}, low: better", fontsize=8)
        axes.margins(0.12)
        _plain(axes)
    if along:
        panels.flat[0].set_title(f"numbers at points: {along[0]}", fontsize=8, loc="left")
    _legend(figure, panels.flat[0], len(lines))
    return figure


# ---------------------------------------------------------------- small parts


def _groups(rows: Iterable[Row]) -> list[Group]:
    found: dict[tuple[tuple[str, str], ...], list[Row]] = defaultdict(list)
    for row in rows:
        found[tuple((key, value) for key, value in row.settings.items() if key != SEED)].append(row)
    return [Group(dict(key), members) for key, members in found.items()]


def _by_label(groups: Sequence[Group], axis: str, keys: Sequence[str]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        found[group.label(axis, keys=keys)].append(group)
    return found


def _is_numeric(axis: str, rows: Sequence[Row]) -> bool:
    try:
        values = {float(row.settings[axis]) for row in rows}
    except (KeyError, ValueError):
        return False
    return len(values) > 1 and all(abs(value) < float("inf") for value in values)


def _style(i: int) -> dict[str, Any]:
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": DASHES[i % len(DASHES)],
        "markerfacecolor": "none",
        "markersize": 5,
    }


def _worded(key: str, value: str) -> str:
    """A name says what it is; a bare number or flag does not."""
    named = "." not in key and not value.replace(".", "").isdigit()
    return value if named else f"{key.rpartition('.')[2]}={value}"


def _axis_name(metric: Metric) -> str:
    return f"{metric.name}, {'high' if metric.better > 0 else 'low'}: better"


def _figure(width: float, height: float, title: str, sweep: Sweep) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    about = " ".join(sweep.common)
    if len(about) > 110:
        about = about[:109] + "…"
    figure.suptitle(f"{title}{': ' if about else ''}{about}", fontsize=9)
    return figure


def _legend(figure: Figure, axes: Axes, lines: int) -> None:
    if lines > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="outside lower center", ncols=min(lines, 4), fontsize=8, frameon=False
        )


def _plain(axes: Axes) -> None:
    """From zero, with room above the highest point."""
    axes.set_ylim(0, 1.08 * max(axes.get_ylim()[1], 1e-9))
    axes.grid(color="0.9", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> Path:
    try:
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise unwritable(path, error, AGAIN) from error
    return path
