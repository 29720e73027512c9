"""The plots: what they show, that they are reproducible, and that no data and no name trips them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.metrics.logs import (
    MS,
    POOL,
    admitted,
    arrived,
    ended,
    finished,
    preempted,
    started,
    step,
    three_requests,
)

from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.records import PagesEvicted, Record, RequestPreempted, TransferStarted
from servelab.plugins import drawing
from servelab.plugins.observers.report import plots
from servelab.plugins.observers.report.plots import NAMES, Missing, Plot
from servelab.plugins.observers.report.series import Series
from servelab.plugins.observers.report.svg import short_path

SVG = "{http://www.w3.org/2000/svg}"


def drawn(records: list[Record], **options: bool) -> dict[str, Plot | Missing]:
    timeline, series = Timeline().feed_all(records), Series().feed_all(records)
    return {one.name: one for one in plots.draw(timeline, series, **options)}


@pytest.fixture(scope="module")
def three() -> dict[str, Plot]:
    found = drawn(three_requests())
    assert all(isinstance(one, Plot) for one in found.values())
    return found  # type: ignore[return-value]


@pytest.fixture
def styled() -> Iterator[None]:
    with drawing.styled():
        yield


def test_all_figures_in_order_and_in_both_formats(three: dict[str, Plot]) -> None:
    assert tuple(three) == NAMES
    for one in three.values():
        assert one.png.startswith(b"\x89PNG")
        assert int.from_bytes(one.png[16:20], "big") == drawing.WIDTH_IN * drawing.DPI
        assert ElementTree.fromstring(one.svg).tag == f"{SVG}svg"
        assert one.caption.endswith(".")


def test_one_seed_gives_one_file_byte_by_byte(three: dict[str, Plot]) -> None:
    assert drawn(three_requests()) == three


def test_the_caller_s_matplotlib_is_left_alone() -> None:
    before = dict(matplotlib.rcParams)
    drawn([started(), arrived(1, "a")], png=False)
    assert dict(matplotlib.rcParams) == before


def test_only_what_is_asked_for_is_drawn() -> None:
    found = drawn([started(), arrived(1, "a")], svg=False)["queue"]
    assert isinstance(found, Plot) and found.png and not found.svg


def test_ids_are_unique_over_all_figures_and_every_reference_leads_to_one(three: dict[str, Plot]) -> None:
    roots = [ElementTree.fromstring(one.svg) for one in three.values()]
    ids = [element.get("id") for root in roots for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    text = "".join(one.svg for one in three.values())
    references = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text)) | set(
        re.findall(r'labelledby="(\S+)"', text)
    )
    assert references == set(ids)


def test_svg_fetches_nothing_and_takes_the_page_s_ink(three: dict[str, Plot]) -> None:
    for one in three.values():
        text = one.svg.replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text and "<style" not in text and "metadata" not in text
        assert "currentColor" in text and drawing.INK not in text
    assert [one.text for one in ElementTree.fromstring(three["kv"].svg).iter(f"{SVG}text")].count(
        "Pool full"
    ) == 1


def test_percentiles_and_bounds_are_where_the_results_have_them(styled: None) -> None:
    records = three_requests()
    timeline = Timeline().feed_all(records)
    figure, caption = plots._distributions(plots.by_class(timeline))  # type: ignore[misc]
    result = summarize(timeline)
    axes = figure.axes[0]
    marks = next(line for line in axes.lines if line.get_marker() == "o")
    assert list(marks.get_ydata()) == [50, 90, 99]
    assert [marks.get_xdata()[0], marks.get_xdata()[2]] == [result["median_ttft_ms"], result["p99_ttft_ms"]]
    curve = axes.lines[0]
    assert list(curve.get_xdata()) == [60, 110, 110]
    assert list(curve.get_ydata()) == [0, 50, 100]
    bounds = [
        line.get_xdata()[0]
        for line in axes.lines
        if line.get_linestyle() == "--" and len(line.get_xdata()) == 2
    ]
    assert sorted(bounds) == [60, 150]
    assert "SLO" in caption
    assert axes.get_xlabel() == "TTFT (ms), 3 requests"
    assert figure.axes[1].get_xlabel() == "TPOT (ms), 2 requests"


def many(n: int, gap: float = 10.0, **slo: float) -> list[Record]:
    """Requests one after another; the one in the middle is slow."""
    records: list[Record] = [started()]
    for i in range(n):
        name, t = f"r{i}", i * gap
        first = t + (900 if i == n // 2 + 3 else 1 + i % 7)
        records += [
            arrived(t, name, **slo),
            admitted(t, name),
            step(t, [first], {name: (9, 1)}),
            step(first, [first + 1], {name: (1, 1)}),
            finished(first + 1, name, 2),
        ]
    return [*records, ended(n * gap + 1000)]


def test_a_long_run_stays_light_and_keeps_its_slowest_request(styled: None) -> None:
    records = many(5000)
    made = drawn(records, png=False)
    sizes = {name: len(one.svg) for name, one in made.items() if isinstance(one, Plot)}
    assert sum(sizes.values()) < 300_000
    figure, caption = plots._over_time(plots.by_class(Timeline().feed_all(records)))  # type: ignore[misc]
    points = next(line for line in figure.axes[0].lines if line.get_marker() == "o")
    assert max(points.get_ydata()) == 900
    assert 500 <= len(points.get_ydata()) <= plots.MOST_POINTS
    assert figure.axes[0].get_yscale() == "log"
    assert figure.axes[1].get_yscale() == "linear"
    assert "5,000 requests about 600" in caption


def test_a_long_curve_keeps_both_ends_and_percentiles_are_of_all(styled: None) -> None:
    timeline = Timeline().feed_all(many(3000))
    figure, _ = plots._distributions(plots.by_class(timeline))  # type: ignore[misc]
    result = summarize(timeline, SummaryOptions(percentiles=(90, 99)))
    for axes, metric in zip(figure.axes, ("ttft", "tpot", "e2el"), strict=True):
        values = [getattr(facts, f"{metric}_ns") for facts in timeline.requests.values()]
        curve = axes.lines[0]
        assert len(curve.get_xdata()) == plots.MOST_STEPS
        assert curve.get_xdata()[0] == pytest.approx(min(values) / 1e6)
        assert curve.get_xdata()[-1] == pytest.approx(max(values) / 1e6)
        marks = next(line for line in axes.lines if line.get_marker() == "o")
        exact = [result[f"{name}_{metric}_ms"] for name in ("median", "p90", "p99")]
        assert list(marks.get_xdata()) == pytest.approx(exact)


@given(st.lists(st.integers(0, 10**9), min_size=20, max_size=300), st.integers(1, 40))
def test_thinning_keeps_order_number_and_the_largest(values: list[int], most: int) -> None:
    samples = [(i, float(value)) for i, value in enumerate(values)]
    kept = list(plots.thinned(samples, most))
    assert kept == sorted(kept, key=lambda one: one[0])
    assert set(kept) <= set(samples) and len(kept) == len(set(kept))
    assert len(kept) <= max(most, 1)
    if most >= 2:
        assert max(value for _, value in kept) == max(values)


@pytest.mark.parametrize(
    ("values", "bounds", "scale"),
    [
        ([5, 499], [], "linear"),
        ([5, 500], [], "log"),
        ([5, 6], [47], "linear"),
        ([5, 6], [48], "log"),
        ([0, 500], [5000], "linear"),
    ],
)
def test_axes_are_logarithmic_where_values_are_far_apart(
    styled: None, values: list[float], bounds: list[float], scale: str
) -> None:
    _, (axes,) = drawing.figure()
    plots._range(axes, values, bounds)
    assert axes.get_xscale() == scale
    if scale == "linear":
        assert axes.get_xlim()[0] == 0 and axes.get_xlim()[1] > max(values + bounds)


def test_nothing_completed_is_said() -> None:
    found = drawn([started(), arrived(0, "a"), admitted(1, "a"), step(1, [9], {"a": (4, 0)}), ended(9)])
    whys = {name: one.why for name, one in found.items() if isinstance(one, Missing)}
    assert whys == {
        "ttft_tpot_e2e": "no request completed",
        "latency_over_time": "no request completed",
        "preemptions": "no request was preempted",
    }
    assert {name for name, one in found.items() if isinstance(one, Plot)} == {"queue", "kv", "batch"}


def test_a_run_without_a_request_or_without_time_has_no_plot() -> None:
    assert {type(one) for one in drawn([started(), ended(1)]).values()} == {Missing}
    assert {type(one) for one in drawn([started(), arrived(0, "a"), ended(0)]).values()} == {Missing}


def test_one_request_of_one_token_has_no_tpot() -> None:
    records = [
        started(),
        arrived(0, "a"),
        admitted(0, "a"),
        step(0, [5], {"a": (4, 1)}),
        finished(5, "a", 1),
        ended(5),
    ]
    text = drawn(records, png=False)["ttft_tpot_e2e"].svg  # type: ignore[union-attr]
    assert "no completed request has one" in text
    assert "1 request<" in text and "1 requests" not in text


NAMES_OF_CLASSES = ("$\\bad{$", "_hidden", "a\x00b\x1b[31m\ud800", "<b>&\"'", "名" * 300)


def test_names_from_a_run_trip_nothing(styled: None) -> None:
    records: list[Record] = [started(kv={"pools": [{**POOL, "id": "_$x$<i>\x00"}]})]
    for i, name in enumerate(NAMES_OF_CLASSES):
        one = arrived(i, f"r{i}", ttft=100)
        one.request_class = name
        records += [one, admitted(i, f"r{i}")]
    batch = {f"r{i}": (4, 1) for i in range(5)}
    records += [step(10, [20], batch), *(finished(20, name, 1) for name in batch)]
    records += [
        RequestPreempted(t_ns=20 * MS, request="r0", mode="_$m<", reason="", lost_tokens=1),
        ended(20),
    ]
    made = drawn(records)
    for one in made.values():
        assert isinstance(one, Plot)
        ElementTree.fromstring(one.svg)
    figure, _ = plots._distributions(plots.by_class(Timeline().feed_all(records)))  # type: ignore[misc]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 10  # a curve and a bound of each class
    assert max(map(len, labels)) < 50
    modes = [text.text or "" for text in ElementTree.fromstring(made["preemptions"].svg).iter(f"{SVG}text")]  # type: ignore[union-attr]
    assert any("_$m<" in one for one in modes)


def test_many_classes_are_drawn_as_one() -> None:
    timeline = Timeline()
    timeline.feed(started())
    for i in range(plots.MOST_CLASSES + 1):
        one = arrived(i, f"r{i}")
        one.request_class = f"c{i}"
        timeline.feed(one)
    assert [group.label for group in plots.by_class(timeline)] == ["6 classes"]


def test_pools_watermark_and_evictions(styled: None) -> None:
    pools = [POOL, {**POOL, "id": "window_64", "pages": 50, "window_tokens": 64}]
    records = [
        started(kv={"pools": pools}, settings={"kvcache": {"watermark": 0.1}}),
        arrived(0, "a"),
        admitted(0, "a"),
        step(0, [10], {"a": (10, 1)}, free=(60, 20)),
        PagesEvicted(t_ns=10 * MS, pool=0, pages=3),
        step(10, [20], {"a": (1, 1)}, free=(50, 10)),
    ]
    series = Series().feed_all(records)
    figure, caption = plots._kv(series, records[0].info)  # type: ignore[misc, attr-defined]
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "Pool full",
        "Pool window_64 (window 64)",
        "Pages evicted from the prefix store so far, all pools",
    ]
    limits = [line.get_ydata()[0] for axes in panels[:2] for line in axes.lines]
    assert limits == [100, 90, 50, 45]
    assert "below the watermark" in caption


def test_preemptions_by_mode_and_what_was_moved(styled: None) -> None:
    records = [
        started(),
        *(arrived(0, name) for name in "abc"),
        *(admitted(0, name) for name in "abc"),
        preempted(5, "a", 7),
        RequestPreempted(t_ns=6 * MS, request="b", mode="swap", reason="", lost_tokens=0),
        TransferStarted(t_ns=6 * MS, transfer=1, request="b", direction="out", pages=1, bytes=2**20),
        RequestPreempted(t_ns=9 * MS, request="c", mode="swap", reason="", lost_tokens=0),
    ]
    figure, _ = plots._preemptions(Series().feed_all(records))  # type: ignore[misc]
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Preemptions so far", "Tokens to be computed again, so far", "KV moved so far"]
    ends = {one.get_label(): one.get_data().values[-1] for axes in figure.axes for one in axes.patches}
    assert ends["recompute"] == 1 and ends["swap"] == 2 and ends["out of the device"] == 1
    assert 7 in ends.values()


# ---------------------------------------------------------------- paths


def walk(path: str) -> list[tuple[float, float]]:
    """Where an SVG path goes."""
    x = y = 0.0
    points = []
    for command, rest in re.findall(r"([MLHVz])([^MLHVz]*)", path):
        numbers = [float(word) for word in rest.split()]
        if command in "ML":
            x, y = numbers
        elif command == "H":
            (x,) = numbers
        elif command == "V":
            (y,) = numbers
        if command != "z":
            points.append((x, y))
    return points


def corners(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Without repetitions, and without points on the way in one direction along x."""
    out: list[tuple[float, float]] = []
    for point in points:
        if out and out[-1] == point:
            continue
        level = len(out) > 1 and out[-1][1] == out[-2][1] == point[1]
        if level and (out[-1][0] > out[-2][0]) == (point[0] > out[-1][0]):
            out[-1] = point
        else:
            out.append(point)
    return out


@given(st.lists(st.tuples(st.integers(-2, 2), st.integers(-2, 2)), min_size=25, max_size=60))
def test_short_paths_go_where_the_long_ones_went(points: list[tuple[int, int]]) -> None:
    exact = [(x / 10, y / 10) for x, y in points]
    path = " \n".join(f"{'L' if i else 'M'} {x:.6f} {y:.6f}" for i, (x, y) in enumerate(exact)) + " \nz"
    short = short_path(path)
    assert corners(walk(short)) == corners(exact)
    assert len(short) < len(path)
    assert short.endswith("z")


def test_paths_with_curves_stay() -> None:
    path = "M 0 0 \n" + "C 0.123456 1 2 3 4 5 \n" * 30
    assert short_path(path) == " ".join(path.split())


# ---------------------------------------------------------------- imports


def test_matplotlib_is_imported_at_the_end_only_and_never_pyplot() -> None:
    program = """
import sys
from tests.metrics.logs import three_requests
from servelab.core.metrics import Timeline
from servelab.plugins.observers.report.observer import ReportObserver
from servelab.plugins.observers.report import plots
from servelab.plugins.observers.report.series import Series
timeline, series = Timeline().feed_all(three_requests()), Series().feed_all(three_requests())
print("matplotlib" in sys.modules, "numpy" in sys.modules)
plots.draw(timeline, series)
print("matplotlib.pyplot" in sys.modules)
"""
    path = [*sys.path]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == ["False", "False", "False"], run.stderr


def value(number: float) -> Any:
    return plots._short(number)


def test_three_digits() -> None:
    assert [value(x) for x in (0.01234, 5.2, 99.94, 99.96, 1234.5)] == [
        "0.0123",
        "5.20",
        "99.9",
        "100",
        "1,234",
    ]


def test_ticks_are_short() -> None:
    ticks = [plots._tick(x) for x in (0, 0.5, 250, 99_000, 150_000, 2_500_000, 3e10)]
    assert ticks == ["0", "0.5", "250", "99,000", "150k", "2.5M", "30G"]


@pytest.mark.parametrize("baseline", [None, 0, [1.0, 0.5, 2.0]])
def test_steps_take_the_room_that_matplotlib_gives_its_stairs(baseline: Any) -> None:
    from matplotlib.figure import Figure

    values, edges = [3.0, 1.0, 7.0], [0.5, 1.0, 2.0, 4.0]
    ours, theirs = Figure().subplots(1, 2)
    if baseline is None:
        plots._stairs(ours, values, edges, "red", label="a line")
    else:
        plots._area(ours, values, edges, baseline, "red", label="a line")
    theirs.stairs(values, edges, baseline=baseline, fill=baseline is not None)
    assert ours.dataLim.extents.tolist() == theirs.dataLim.extents.tolist()
    assert (ours.get_xlim(), ours.get_ylim()) == (theirs.get_xlim(), theirs.get_ylim())
    assert ours.get_legend_handles_labels()[1] == ["a line"]
