"""Plots of one run, as PNG for a paper and as SVG for the page: drawn from its timeline and its series.

matplotlib is imported when something is drawn, and only then. A figure that would be empty is left out, and
says why. On the virtual clock one seed gives one file, byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from servelab.core.metrics import Distribution, Timeline
from servelab.core.metrics.definitions import NS_PER_MS, NS_PER_S
from servelab.core.metrics.timeline import RequestFacts
from servelab.plugins import drawing
from servelab.plugins.observers.report.series import Channel, Series
from servelab.plugins.observers.report.svg import svg as to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

NAMES = ("ttft_tpot_e2e", "latency_over_time", "queue", "kv", "batch", "preemptions")
"""Figures in order, and the stems of their files."""
INSTALL = "pip install matplotlib"
MOST_POINTS = 600
"""Requests drawn as points of their own."""
MOST_STEPS = 300
"""Points of the curve of a distribution."""
MOST_CLASSES = 5
"""Request classes drawn apart; if there are more, all are drawn as one."""
MOST_POOLS = 6
MOST_LINEAR = 64
"""Tokens of a step up to which their axis is linear: prefill comes in thousands, decode in tens."""
FAR = 8
"""A bound so many times the largest value would leave the values no room on a linear axis."""
SLICES = 60
"""Of the run, for rates."""
WHOLE = ("requests", "pages", "tokens", "preemptions")
"""What comes in whole numbers."""
TIME = "time since the run started (s)"
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E latency"}


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure."""

    name: str
    """As in ``NAMES``."""
    title: str
    caption: str
    png: bytes
    """Empty if it was not asked for; likewise ``svg``."""
    svg: str


@dataclass(frozen=True, slots=True)
class Missing:
    """A figure that there is nothing for."""

    name: str
    title: str
    why: str


def unavailable() -> str:
    """Why nothing can be drawn; empty if it can. Imports matplotlib."""
    if find_spec("matplotlib") is None:
        return "matplotlib is not installed"
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:  # numpy is missing, or does not fit
        return f"matplotlib cannot be imported: {str(error).strip().rpartition(chr(10))[2]}"
    return ""


def draw(timeline: Timeline, series: Series, *, png: bool = True, svg: bool = True) -> list[Plot | Missing]:
    """All figures of a run, in the order of ``NAMES``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    groups = by_class(timeline)
    figures: dict[str, tuple[str, Callable[[], tuple[Figure, str] | str]]] = {
        "ttft_tpot_e2e": ("Latency: how many requests stay below it", lambda: _distributions(groups)),
        "latency_over_time": ("Latency over time", lambda: _over_time(groups)),
        "queue": ("Queue", lambda: _queue(series)),
        "kv": ("KV memory", lambda: _kv(series, timeline.info)),
        "batch": ("Batch composition and throughput", lambda: _batch(series)),
        "preemptions": ("Preemptions", lambda: _preemptions(series)),
    }
    made: list[Plot | Missing] = []
    with drawing.styled():
        for i, (name, (title, make)) in enumerate(figures.items()):
            drawn = make()
            if isinstance(drawn, str):
                made.append(Missing(name, title, drawn))
                continue
            figure, caption = drawn
            image = drawing.png(figure) if png else b""
            made.append(Plot(name, title, caption, image, to_svg(figure, f"f{i}", title) if svg else ""))
    return made


# ---------------------------------------------------------------- requests


@dataclass(frozen=True, slots=True)
class Group:
    """Completed requests that are drawn alike."""

    label: str
    color: str
    dash: Any
    facts: list[RequestFacts]
    bounds: dict[str, list[float]]
    """Stated bounds by metric, ns, each once; of all requests of the class, completed or not."""

    def samples(self, metric: str) -> list[tuple[int, float]]:
        """(arrival, value), ns, of the requests that have the metric, by arrival."""
        if metric == "ttft":
            return [(f.arrival_ns, ttft) for f in self.facts if (ttft := f.ttft_ns) is not None]
        if metric == "tpot":
            return [(f.arrival_ns, f.tpot_ns) for f in self.facts if f.output_tokens > 1]
        return [(f.arrival_ns, e2el) for f in self.facts if (e2el := f.e2el_ns) is not None]


def by_class(timeline: Timeline) -> list[Group]:
    """Completed requests by class in order of name; all in one group if there are too many classes."""
    found: dict[str, list[RequestFacts]] = {}
    for facts in timeline.requests.values():
        found.setdefault(facts.request_class, []).append(facts)
    if len(found) > MOST_CLASSES:
        found = {f"{len(found)} classes": list(timeline.requests.values())}
    return [
        Group(
            drawing.label(name),
            drawing.PALETTE[i],
            drawing.DASHES[i],
            [one for one in found[name] if one.outcome == "completed"],
            {
                metric: sorted({one.bounds[metric] for one in found[name] if metric in one.bounds})
                for metric in METRICS
            },
        )
        for i, name in enumerate(sorted(found))
    ]


def _distributions(groups: Sequence[Group]) -> tuple[Figure, str] | str:
    if not any(group.facts for group in groups):
        return "no request completed"
    several = len(groups) > 1
    figure, panels = drawing.figure(1, 3, sharey=True)
    handles: dict[str, Any] = {}
    for axes, (metric, name) in zip(panels, METRICS.items(), strict=True):
        samples = {group.label: sorted(value for _, value in group.samples(metric)) for group in groups}
        everything = Distribution.of(value for values in samples.values() for value in values)
        if not everything.count:
            _nothing(axes, name, f"{name} (ms)")
            continue
        bounds = [bound for group in groups for bound in group.bounds[metric]]
        scale, unit = _unit([everything.values[-1], *bounds])
        for group in groups:
            if values := samples[group.label]:
                line = _ecdf(axes, group, values, scale)
                if several:
                    handles[f"{group.label} ({len(group.facts):,})"] = line
            for bound in group.bounds[metric]:
                _bound(axes.axvline, bound / scale, group, several, handles)
        marks = {f"p{q}": (everything.percentile(q) or 0) / scale for q in (50, 90, 99)}
        axes.plot(
            list(marks.values()), [50, 90, 99], ls="none", marker="o", ms=3.2, color=drawing.INK, zorder=4
        )
        words = ", ".join(f"{q} {_short(value)}" for q, value in marks.items())
        axes.set_title(name, pad=15)
        axes.text(0, 1.03, f"{words} {unit}", transform=axes.transAxes, fontsize=7)
        _range(axes, [one / scale for one in everything.values], [bound / scale for bound in bounds])
        axes.set_xlabel(f"{name} ({unit}), {_requests(everything.count)}")
    panels[0].set_ylabel("requests at or below (%)")
    panels[0].set_ylim(0, 103)
    panels[0].set_yticks([0, 25, 50, 75, 90, 100])
    _legend(figure, handles)
    drawing.fit(figure, 1.55, columns=3, top=0.45)
    caption = (
        "Distributions over completed requests: time to first token, mean time per output token after it "
        "(requests of more than one token), and time from arrival to last token. Between samples a line, as "
        "percentiles are interpolated; dots mark the 50th, 90th and 99th of all."
    )
    return figure, caption + _slo_words(groups)


def _ecdf(axes: Axes, group: Group, samples: Sequence[float], scale: float) -> Any:
    """The sorted samples from 0 to 100 %; of many, some at equal ranks, with the first and the last."""
    n = len(samples)
    ranks = range(n) if n <= MOST_STEPS else [i * (n - 1) // (MOST_STEPS - 1) for i in range(MOST_STEPS)]
    values = [samples[rank] / scale for rank in ranks]
    shares = [100 * rank / (n - 1) for rank in ranks] if n > 1 else [0, 100]
    return axes.plot(values * (1 if n > 1 else 2), shares, color=group.color, ls=group.dash, zorder=3)[0]


def _bound(line: Callable[..., Any], at: float, group: Group, several: bool, handles: dict[str, Any]) -> None:
    """A bound that requests state, across the panel."""
    drawn = line(at, color=group.color if several else drawing.RED, lw=1, ls=(0, (2, 1.5)), zorder=1)
    handles[f"SLO, {group.label}" if several else "SLO"] = drawn


def _over_time(groups: Sequence[Group]) -> tuple[Figure, str] | str:
    total = sum(len(group.facts) for group in groups)
    if not total:
        return "no request completed"
    figure, panels = drawing.figure(2, sharex=True)
    handles: dict[str, Any] = {}
    for axes, metric in zip(panels, ("ttft", "tpot"), strict=True):
        name = METRICS[metric]
        samples = {group.label: group.samples(metric) for group in groups}
        values = [value for some in samples.values() for _, value in some]
        axes.set_title(name)
        if not values:
            _nothing(axes, name)
            continue
        bounds = [bound for group in groups for bound in group.bounds[metric]]
        scale, unit = _unit([*values, *bounds])
        for group in groups:
            shown = thinned(samples[group.label], max(1, MOST_POINTS * len(group.facts) // total))
            (points,) = axes.plot(
                [t / NS_PER_S for t, _ in shown],
                [value / scale for _, value in shown],
                ls="none",
                marker="o",
                ms=4 if total < 20 else 2.6 if total < 200 else 1.8,
                mew=0,
                alpha=0.75 if total < 200 else 0.55,
                color=group.color,
            )
            if len(groups) > 1:
                handles[group.label] = points
            for bound in group.bounds[metric]:
                _bound(axes.axhline, bound / scale, group, len(groups) > 1, handles)
        everything = sorted(pair for some in samples.values() for pair in some)
        if len(everything) >= 2 * SLICES:
            at, medians = moving_median(everything)
            (line,) = axes.plot(
                [t / NS_PER_S for t in at], [value / scale for value in medians], color=drawing.INK, lw=1
            )
            handles["median of neighbours"] = line
        _range(axes, [one / scale for one in values], [bound / scale for bound in bounds], along="y")
        axes.set_ylabel(f"{name} ({unit})")
    latest = max(one.arrival_ns for group in groups for one in group.facts)
    panels[-1].set_xlim(0, 1.02 * latest / NS_PER_S or 1)
    panels[-1].set_xlabel("arrival of the request, since the run started (s)")
    _legend(figure, handles, panels[0])
    drawing.fit(figure, 1.2, 2)
    caption = "Each point is a completed request, at its arrival."
    if total > MOST_POINTS:
        caption += (
            f" Of {total:,} requests about {MOST_POINTS} are shown, among them the slowest of each part of "
            "the run; the line is of all."
        )
    return figure, caption + _slo_words(groups)


def thinned(samples: Sequence[tuple[int, float]], most: int) -> Sequence[tuple[int, float]]:
    """About ``most`` of the samples: most of them every so many one, the others the largest of each part."""
    n = len(samples)
    if n <= most:
        return samples
    parts = max(1, most // 6)
    kept = {i * n // (most - parts) for i in range(most - parts)}
    for k in range(parts):
        kept.add(max(range(k * n // parts, (k + 1) * n // parts), key=lambda i: samples[i][1]))
    return [samples[i] for i in sorted(kept)]


def moving_median(samples: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Of ``SLICES`` equally large groups of neighbours: mean time and median value."""
    times, medians = [], []
    n = len(samples)
    for i in range(SLICES):
        part = samples[i * n // SLICES : (i + 1) * n // SLICES]
        times.append(sum(t for t, _ in part) / len(part))
        medians.append(Distribution.of(value for _, value in part).percentile(50) or 0)
    return times, medians


def _slo_words(groups: Sequence[Group]) -> str:
    stated = any(bounds for group in groups for bounds in group.bounds.values())
    return " Dashed lines are the bounds that requests state (SLO)." if stated else ""


# ---------------------------------------------------------------- the engine over time


def _queue(series: Series) -> tuple[Figure, str] | str:
    if not sum(series.arrived.sums):
        return "no request arrived"
    if not series.last_ns:
        return "no time passed"
    figure, (upper, lower) = drawing.figure(2, sharex=True)
    lines = {
        "running": (series.running, drawing.BLUE, "solid"),
        "waiting": (series.waiting, drawing.RED, "dashed"),
        "paused or swapped out": (series.away, drawing.PURPLE, "dashdot"),
    }
    for name, (channel, color, dash) in lines.items():
        if name in ("running", "waiting") or max(series.peaks(channel), default=0):
            _band(upper, series, channel, series.level(channel), name, color, dash)
    upper.set_title("Requests waiting and running")
    upper.set_ylabel("requests")
    for name, counts, color, dash in (
        ("arrived", series.arrived, drawing.INK, "dashed"),
        ("completed", series.completed, drawing.GREEN, "solid"),
    ):
        _stairs(lower, series.upto(counts), series.edges_s, color, linestyle=dash, label=name)
    lower.set_title("Requests so far")
    lower.set_ylabel("requests")
    _time((upper, lower), series)
    _beside(upper, lower)
    drawing.fit(figure, 1.2, 2)
    return figure, (
        "Lines are means over time, bands reach up to the most at one time. "
        "The gap between the lower lines: requests in the system, and those that ended without completing."
    )


def _kv(series: Series, info: Mapping[str, Any]) -> tuple[Figure, str] | str:
    if not series.engines or not series.last_ns:
        return "nothing ran"
    if not series.pools:
        return "the run does not state the pages of its pools"
    shown = series.pools[:MOST_POOLS]
    evicted = bool(sum(series.evicted.sums))
    rows = len(shown) + evicted
    figure, panels = drawing.figure(rows, sharex=True)
    share = ((info.get("settings") or {}).get("kvcache") or {}).get("watermark") or 0
    for i, (axes, pool) in enumerate(zip(panels, shown, strict=False)):
        pages = pool["pages"]
        _band(axes, series, series.kv[i], series.pages(i), "in use", drawing.BLUE, "solid")
        axes.axhline(pages, color=drawing.INK, lw=1, ls=(0, (4, 2)), label=f"pool, {pages:,}")
        if int(share * pages):
            limit = pages - int(share * pages)
            axes.axhline(limit, color=drawing.RED, lw=1, ls="dotted", label=f"watermark, {limit:,}")
        axes.set_ylim(0, 1.08 * pages)
        axes.set_title(_pool_title(pool))
        axes.set_ylabel("pages")
        axes.secondary_yaxis("right", functions=_share_of(pages)).set_ylabel("% of the pool")
    if evicted:
        _stairs(panels[-1], series.upto(series.evicted), series.edges_s, drawing.RED, label="evicted")
        panels[-1].set_title("Pages evicted from the prefix store so far, all pools")
        panels[-1].set_ylabel("pages")
    _time(panels, series)
    _beside(*panels)
    drawing.fit(figure, 1.2, rows, right=0.62)
    caption = "Pages in use when launches end: mean over time" + (
        f" and over {len(series.engines)} engines, band up to the fullest engine's most."
        if len(series.engines) > 1
        else ", band up to the most."
    )
    sizes = sorted({pool["page_tokens"] for pool in shown if pool.get("page_tokens")})
    if sizes:
        caption += f" A page holds {' or '.join(map(str, sizes))} tokens."
    caption += " Pages that a prefix store could give up count as free."
    if int(share * max(pool["pages"] for pool in shown)):
        caption += " While others run, requests are admitted only below the watermark."
    if len(series.pools) > len(shown):
        caption += f" {len(series.pools) - len(shown)} more pools are not shown."
    return figure, caption


def _pool_title(pool: Mapping[str, Any]) -> str:
    title = f"Pool {drawing.label(pool.get('id', '?'), 20)}"
    return title + (f" (window {pool['window_tokens']:,})" if pool.get("window_tokens") else "")


def _share_of(pages: int) -> tuple[Any, Any]:
    return (lambda used: 100 * used / pages), (lambda share: share * pages / 100)


def _batch(series: Series) -> tuple[Figure, str] | str:
    if not series.engines or not series.last_ns:
        return "nothing ran"
    figure, (tokens, requests, rate) = drawing.figure(3, sharex=True)
    edges, prefill = series.edges_s, series.per_step(series.prefill)
    total = series.per_step(series.tokens)
    decode = [all_ - some for all_, some in zip(total, prefill, strict=True)]
    _area(tokens, prefill, edges, 0, drawing.ORANGE, alpha=0.65, label="prefill")
    _stairs(tokens, decode, edges, drawing.BLUE, label="decode")
    if max(total) >= MOST_LINEAR:
        tokens.set_yscale("symlog", linthresh=1, linscale=0.3)
        tokens.autoscale_view()  # its margin is one of this scale
        tokens.yaxis.set_major_formatter(_commas())
        tokens.set_ylim(bottom=0)
    tokens.set_title("Tokens per step")
    tokens.set_ylabel("tokens")
    _band(requests, series, series.batch, series.per_step(series.batch), "batch", drawing.GREEN, "solid")
    requests.set_title("Requests per step")
    requests.set_ylabel("requests")
    borders, rates = series.rate(series.emitted, SLICES)
    _stairs(rate, rates, borders, drawing.PURPLE)
    rate.set_title("Output throughput")
    rate.set_ylabel("tokens/s")
    _time((tokens, requests, rate), series)
    _beside(tokens)
    drawing.fit(figure, 1.15, 3)
    return figure, (
        "Means over the time in which steps ran (0 where none did); the band is up to the largest batch. "
        "Prefill: tokens of requests that have not emitted one since they were admitted. "
        "Output tokens are spread over the step that brings them."
    )


def _preemptions(series: Series) -> tuple[Figure, str] | str:
    if not series.preempted or not series.last_ns:
        return "no request was preempted"
    panels_of: list[tuple[str, str, dict[str, list[float]]]] = [
        (
            "Preemptions so far",
            "preemptions",
            {mode: [*map(float, series.upto(c))] for mode, c in sorted(series.preempted.items())},
        )
    ]
    if sum(series.lost.sums):
        lost = [*map(float, series.upto(series.lost))]
        panels_of.append(("Tokens to be computed again, so far", "tokens", {"": lost}))
    if series.moved:
        moved = {
            f"{way} of the device" if way == "out" else f"{way} to the device": [
                n / 2**20 for n in series.upto(c)
            ]
            for way, c in sorted(series.moved.items())
        }
        panels_of.append(("KV moved so far", "MiB", moved))
    figure, panels = drawing.figure(len(panels_of), sharex=True)
    for axes, (title, unit, lines) in zip(panels, panels_of, strict=True):
        for i, (name, values) in enumerate(lines.items()):
            _stairs(
                axes,
                values,
                series.edges_s,
                drawing.PALETTE[1 if not name else i % 6],
                linestyle=drawing.DASHES[i % 6],
                label=drawing.label(name) if name else None,
            )
        axes.set_title(title)
        axes.set_ylabel(unit)
    _time(panels, series)
    _beside(*panels)
    drawing.fit(figure, 1.15, len(panels_of))
    return figure, "Running requests taken off the device, by mode, from the start of the run."


# ---------------------------------------------------------------- pieces


def _band(
    axes: Axes, series: Series, channel: Channel, means: Sequence[float], name: str, color: str, dash: Any
) -> None:
    """A line of means and a band up to the largest values."""
    edges, peaks = series.edges_s, series.peaks(channel)
    _area(axes, peaks, edges, means, color, alpha=0.25)
    _stairs(axes, means, edges, color, linestyle=dash, label=name)


def _stairs(axes: Axes, values: Sequence[float], edges: Sequence[float], color: str, **look: Any) -> None:
    """A line of one value between every two edges."""
    _steps(
        axes, values, edges, None, min(values), **look | {"edgecolor": color, "fill": False, "linewidth": 1.2}
    )


def _area(
    axes: Axes,
    tops: Sequence[float],
    edges: Sequence[float],
    bottoms: Sequence[float] | float,
    color: str,
    **look: Any,
) -> None:
    """What lies between two such lines."""
    lowest = bottoms if isinstance(bottoms, (int, float)) else min(bottoms)
    _steps(axes, tops, edges, bottoms, lowest, **look | {"facecolor": color, "linewidth": 0})


def _steps(
    axes: Axes, values: Sequence[float], edges: Sequence[float], baseline: Any, lowest: float, **look: Any
) -> None:
    """As ``axes.stairs``, which takes longer to find out what space that needs than to draw it."""
    from matplotlib.patches import StepPatch

    steps = StepPatch(values, edges, baseline=baseline, **look)
    if baseline is not None:
        steps.sticky_edges.y.append(lowest)  # no margin below an area
    axes.add_artist(steps)
    axes.update_datalim([(edges[0], lowest), (edges[-1], max(values))])
    axes.autoscale_view()


def _time(panels: Sequence[Axes], series: Series) -> None:
    """The shared time axis, labelled once."""
    panels[-1].set_xlim(0, series.last_ns / NS_PER_S or 1)
    panels[-1].set_xlabel(TIME)
    for axes in panels:
        if axes.get_yscale() == "linear":
            _counted(axes)
            axes.set_ylim(bottom=0)


def _counted(axes: Axes) -> None:
    """Few ticks, with commas."""
    from matplotlib.ticker import MaxNLocator

    whole = axes.get_ylabel() in WHOLE
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10], integer=whole))
    axes.yaxis.set_major_formatter(_commas())


def _commas() -> Formatter:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: _tick(value))


def _tick(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 100 * size or (abs(value) >= size > 1e3):
            return f"{value / size:.10g}{letter}"
    return f"{value:,.10g}"


def _beside(*panels: Axes) -> None:
    """Legends to the right of the title, above the data."""
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        if labels:
            axes.legend(
                lines, labels, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=len(labels), borderpad=0.2
            )


def _legend(figure: Figure, handles: Mapping[str, Any], beside: Axes | None = None) -> None:
    """One legend for all panels: beside the title of one if it is short, else below."""
    lines, labels = list(handles.values()), list(handles)
    if beside is not None and 0 < len(labels) <= 3:
        beside.legend(
            lines, labels, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=len(labels), borderpad=0.2
        )
    elif labels:
        figure.legend(
            lines,
            labels,
            loc="lower center",
            ncols=min(drawing.LEGEND_COLUMNS, len(labels)),
            markerscale=2,
            borderaxespad=0.3,
        )


def _nothing(axes: Axes, name: str, label: str = "") -> None:
    """A panel without data says so."""
    axes.set_title(name)
    axes.text(0.5, 0.5, "no completed request has one", transform=axes.transAxes, ha="center", va="center")
    axes.set_xlabel(label)


def _requests(count: int) -> str:
    return f"{count:,} request{'s' * (count != 1)}"


def _unit(values: Iterable[float]) -> tuple[float, str]:
    """The divisor of nanoseconds, and what it makes them."""
    return (NS_PER_S, "s") if max(values) >= 10 * NS_PER_S else (NS_PER_MS, "ms")


def _range(axes: Axes, values: Sequence[float], bounds: Sequence[float], along: str = "x") -> None:
    """All of the values and bounds: from 0, or logarithmic if they span two decades or bounds are far off."""
    from matplotlib.ticker import MaxNLocator, NullFormatter

    least, end = min([*values, *bounds]), max([*values, *bounds])
    axis = axes.xaxis if along == "x" else axes.yaxis
    if least > 0 and (end >= 100 * least or end >= FAR * max(values)):
        (axes.set_xscale if along == "x" else axes.set_yscale)("log")
        axis.set_minor_formatter(NullFormatter())
    elif along == "x":
        axes.set_xlim(0, 1.05 * end or 1)
        axis.set_major_locator(MaxNLocator(nbins=5))
    else:
        axes.set_ylim(0, 1.08 * end or 1)
    axis.set_major_formatter(_commas())


def _short(value: float) -> str:
    """About three digits."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
