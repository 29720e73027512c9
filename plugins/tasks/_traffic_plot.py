"""A workload as a picture: rate over time, lengths, and each prompt with its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from servelab.core.metrics import Distribution
from servelab.plugins.drawing import BLUE, DASHES, DPI, INK, RED, WIDTH_IN, label, png, styled
from servelab.plugins.tasks._traffic import Traffic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOWS = 120
"""Most steps of the rate over time."""
POINTS = 4_000
"""Requests drawn as points: every k-th beyond that."""
UNITS = ((2 * 86_400, 86_400, "days"), (2 * 3_600, 3_600, "h"), (300, 60, "min"), (0, 1, "s"))
"""Time axes: from so many seconds on, one unit of so many, its name."""


def draw(traffic: Traffic, title: str) -> bytes:
    """The picture as PNG; the same bytes for the same traffic.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(dpi=DPI, figsize=(WIDTH_IN, 4.9))
        grid = figure.add_gridspec(
            2, 2, left=0.085, right=0.97, top=0.885, bottom=0.09, hspace=0.42, wspace=0.22
        )
        figure.suptitle(f"{label(title, 70)}: {len(traffic.times):,} requests", x=0.085, y=0.975, ha="left")
        _rate(figure.add_subplot(grid[0, :]), traffic)
        _lengths(figure.add_subplot(grid[1, 0]), traffic)
        _pairs(figure.add_subplot(grid[1, 1]), traffic)
        return png(figure)


def _rate(axes: Axes, traffic: Traffic) -> None:
    window_s, rates = traffic.rates(WINDOWS)
    axes.set_ylabel("requests/s")
    if not rates:
        axes.set_title("All requests arrive at time 0")
        return
    last_s = window_s * len(rates)
    size, unit = next((size, unit) for most, size, unit in UNITS if last_s >= most)
    edges = [i * window_s / size for i in range(len(rates) + 1)]
    mean = len(traffic.times) / last_s
    axes.stairs(rates, edges, color=BLUE, fill=True, alpha=0.25)
    axes.stairs(rates, edges, color=BLUE)
    axes.axhline(mean, color=INK, linestyle=DASHES[1], linewidth=0.8)
    axes.set(xlim=(0, edges[-1]), ylim=(0, None), xlabel=f"time, {unit}")
    axes.set_title(f"Arrivals in steps of {_duration(window_s)}; dashed: the mean, {mean:.3g}/s")


def _lengths(axes: Axes, traffic: Traffic) -> None:
    for values, colour, dashes in ((traffic.prompts, BLUE, DASHES[0]), (traffic.outputs, RED, DASHES[1])):
        if values:
            axes.step(*shares(values), where="post", color=colour, linestyle=dashes)
    axes.set_title(medians(traffic))
    axes.set(xscale="log", ylim=(0, 100), xlabel="at most so many tokens", ylabel="% of requests")
    _plain(axes, "x")


def medians(traffic: Traffic) -> str:
    """Those of the table, by linear interpolation."""
    columns = (("Prompt, median {:,g}", traffic.prompts), ("output, {:,g} (dashed)", traffic.outputs))
    halves = ((title, Distribution.of(values).percentile(50)) for title, values in columns)
    return "; ".join(title.format(half) for title, half in halves if half is not None) or "Lengths"


def _pairs(axes: Axes, traffic: Traffic) -> None:
    axes.set_title("Each request")
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="output tokens")
    _plain(axes, "x", "y")
    if not traffic.outputs:
        axes.text(0.5, 0.5, "only a model can tell the outputs", transform=axes.transAxes, ha="center")
        return
    every = -(-len(traffic.outputs) // POINTS)
    axes.plot(
        traffic.asked[::every],
        traffic.outputs[::every],
        linestyle="none",
        marker="o",
        markersize=1.6,
        markeredgewidth=0,
        color=BLUE,
        alpha=0.35,
    )
    if every > 1:
        axes.set_title(f"Each request (1 in {every:,})")


def _plain(axes: Axes, *which: str) -> None:
    """Numbers at the powers of ten of a logarithmic axis, not formulas."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.set_minor_formatter(NullFormatter())


def shares(values: Sequence[int]) -> tuple[list[int], list[float]]:
    """Distinct values, and the percentage of all that is at most each."""
    counts = Counter(values)
    x = sorted(counts)
    return x, [100 * n / len(values) for n in accumulate(counts[value] for value in x)]


def _duration(seconds: float) -> str:
    for most, size, unit in UNITS:
        if seconds >= most:
            return f"{seconds / size:.3g} {unit}"
    raise AssertionError("the last unit fits all")
