"""The page: everything on it, nothing injected, nothing fetched; and made again from a run's files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.metrics.logs import POOL, arrived, ended, started, three_requests
from tests.observers.test_jsonl import context
from tests.observers.test_report import PLUGINS

from servelab.core.bus import Bus
from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.records import QualityMeasured, Record
from servelab.plugins.observers.jsonl import JsonlConfig, JsonlObserver
from servelab.plugins.observers.report import command, facts, html, plots
from servelab.plugins.observers.report.observer import ReportConfig, ReportObserver
from servelab.plugins.observers.report.page import paper, render_page, write_artefacts, write_page
from servelab.plugins.observers.report.series import Series

EVIL = "<script>alert(1)</script>\"'&<img src=x onerror=alert(1)>\x00\x1b\ud800]]>--><!--"
VOID = {"meta"}
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "footer", "h1", "h2", "p", "span"),
    *(
        "dl",
        "div",
        "dt",
        "dd",
        "small",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "a",
        "b",
        "code",
    ),
    *("figure", "figcaption", "details", "summary", "ul", "li"),
    *("svg", "g", "path", "use", "defs", "rect", "text", "clippath"),
}
NONE = facts.NONE


class Reader(HTMLParser):
    """The elements of a page; fails where they do not nest."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.attributes |= found.keys()
        self.ids += [value for key, value in attrs if key == "id" and value]
        self.links += [value for key, value in attrs if key in ("href", "src") and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def page_of(
    records: Iterable[Record], info: dict[str, Any] | None = None, *, drawn: bool = False, **options: Any
) -> Reader:
    records = list(records)
    timeline = Timeline().feed_all(records)
    figures = plots.draw(timeline, Series().feed_all(records), png=False) if drawn else []
    result = summarize(timeline, SummaryOptions(percentiles=(50, 90, 99.9)))
    return read(render_page(result, timeline.info if info is None else info, figures, **options))


def run(records: list[Record], folder: Path, **settings: Any) -> None:
    bus = Bus(
        [
            JsonlObserver(JsonlConfig(), context(folder)),
            ReportObserver(ReportConfig(**settings), context(folder)),
        ]
    )
    for record in records:
        bus.emit(record)


def stated(**more: Any) -> list[Record]:
    records = three_requests()
    records[0] = started(
        plugins=PLUGINS, stamps=["oracle: scheduler fcfs"], settings={"seed": 7, "x": {"y": None}}, **more
    )
    return records


# ---------------------------------------------------------------- what is on it


def test_everything_of_a_run_is_on_its_page() -> None:
    page = page_of(stated(), drawn=True, files=["results.json", "plots/kv.png", "a b#c.txt"])
    for expected in (
        "ServeLab run · fcfs · tiny",
        "clock virtual; seed 7; stamps oracle: scheduler fcfs",
        "latency unit mean std p50 p90 p99.9 samples",
        "TTFT: arrival to first token ms 93.33",
        "output throughput 42.9 tokens/s",
        "SLO attainment all bounds % TTFT % TPOT % goodput req/s judged all 66.7 100.0 66.7 9.524 3",
        "KV pool pages peak",
        "full 100 40 40.0 16.0 16.0",
        "kvcache paged",
        "page_tokens=16",
        "name value seed 7 x.y null",
        "preemptions 1 20 tokens recomputed",
        "results.json : every figure",
        *(f"{title}." for title in ("Latency over time", "Queue", "KV memory", "Preemptions")),
    ):
        assert expected in page.text, expected
    assert "PARTIAL" not in page.text
    assert "https://arxiv.org/abs/2309.06180" in page.links
    assert "a%20b%23c.txt" in page.links


def test_a_partial_run_says_so_first_with_its_reason() -> None:
    page = page_of([started(), arrived(0, "a", ttft=5), ended(3, "interrupted", f"stopped {EVIL}")])
    partial = page.text.index("PARTIAL (interrupted: stopped <script>")
    assert partial < page.text.index("ServeLab run", 40)
    assert "0 of 1 requests completed" in page.text
    page = page_of(
        [started(workload={"requests": 500}), arrived(0, "a", ttft=5), ended(3, "interrupted", "stopped")]
    )
    assert "0 of 500 requests completed" in page.text  # as in report.txt, and not of those that had come


def test_machine_and_libraries_are_shown() -> None:
    info = {"python": "3.11.7", "machine": {"cpu": "Z80", "gpus": []}, "libraries": {"torch": "2.13"}, "x": 1}
    assert (
        "python 3.11.7 machine.cpu Z80 machine.gpus [] libraries.torch 2.13"
        in page_of(three_requests(), info).text
    )


QUALITY = QualityMeasured(
    t_ns=3,
    label="w4a8",
    tokens=90,
    total=100,
    windows=1,
    kl_mean=0.125,
    kl_p99=1.5,
    kl_max=2.0,
    top1_agreement=0.93,
    perplexity=21.5,
    reference_perplexity=20.25,
    linear_bytes=2**20,
    reference_linear_bytes=2**22,
)


def test_quality_alone_has_no_empty_tables_of_latency() -> None:
    info = {
        "quality": {"corpus": {"source": "topics", "python": "3.11"}},
        "weights": {"quantization": "Q4_1"},
    }
    page = page_of([started(), QUALITY, ended(4)], info)
    assert (
        f"unquantized 4.0 {NONE} {NONE} {NONE} 20.250 90 w4a8 1.0 0.12500 1.5000 93.0 21.500 90 of 100"
        in page.text
    )
    assert "which may flatter quantizers" in page.text
    assert "Results" not in page.text and "Plots" not in page.text


def test_quality_that_was_not_measured_says_why() -> None:
    assert "Not measured: no model." in page_of(three_requests(), {"quality": {"why": "no model"}}).text


def test_plots_that_are_missing_say_why() -> None:
    assert "Left out: matplotlib is gone." in page_of(three_requests(), no_plots="matplotlib is gone").text
    page = page_of([started(), arrived(0, "a"), ended(9)], drawn=True)
    assert "Left out: Latency: how many requests stay below it: no request completed." in page.text


def test_every_figure_of_the_device_has_its_source_beside_it() -> None:
    hardware = {"name": "a100_80g", "tp": 4, "flops": 312e12, "memory_bytes": 80 * 2**30, "mfu": 0.74}
    hardware |= {"idle_watts": None, "all_reduce": [], "sources": {"flops": EVIL, "mfu": "our fit"}}
    records = three_requests()
    records[0] = started(settings={"hardware": hardware})
    page = page_of(records)
    assert "The device: 4 x a100_80g, each 312 TFLOP/s, 80 GiB; every figure with its source" in page.text
    assert "mfu 0.74 our fit" in page.text
    assert "memory_bytes 85899345920 not stated" in page.text
    assert "flops 312000000000000 <script>" in page.text
    listed = [name for name, *_ in facts.device({"settings": {"hardware": hardware}})]
    assert listed == ["flops", "memory_bytes", "mfu"]
    assert "The device" not in page_of(three_requests()).text


def test_classes_prefix_hits_cost_and_notes_are_shown() -> None:
    result = summarize(Timeline().feed_all(three_requests()))
    extra = result["servelab"]
    (only,) = extra["slo_by_class"].values()
    result["date"] = "20260131-120000"
    extra |= {
        "prefix_hit_tokens": 5,
        "prefix_hit_rate": 0.25,
        "evicted_pages": 7,
        "wall_s": 1.5,
        "peak_rss_bytes": 2**20,
        "notes": [EVIL],
        "slo_by_class": {"online": only, EVIL: only},
    }
    page = read(render_page(result, {}, []))
    for expected in (
        "ended 20260131-120000",
        "prefix hits 5 tokens 25.0 % of the prompts; 7 pages evicted",
        "real time 1.5 s",
        "memory 1.0 MiB",
        "class online 66.7 100.0 66.7 9.524 3",
        "Note: <script>",
    ):
        assert expected in page.text


# ---------------------------------------------------------------- nothing injected, nothing fetched


def evil_page() -> str:
    records = three_requests()
    records[0] = started(
        model=EVIL,
        clock=EVIL,
        seed=EVIL,
        stamps=[EVIL],
        settings={EVIL: {EVIL: [EVIL, {EVIL: EVIL}]}},
        weights={EVIL: EVIL},
        workload={EVIL: EVIL},
        kv={"pools": [{**POOL, "id": EVIL}]},
        libraries={EVIL: EVIL},
        machine={EVIL: [EVIL]},
        commit=EVIL,
        servelab=EVIL,
        quality={"why": EVIL, "corpus": {"source": EVIL}},
        plugins={
            EVIL: {
                "name": EVIL,
                "version": EVIL,
                "paper": f"{EVIL} arXiv:2309.06180",
                "non_default": {EVIL: EVIL},
            },
            "scheduler": {"name": EVIL, "deviations": [EVIL]},
        },
    )
    for record in records:
        if record.ev == "arrived":
            record.request_class = EVIL + record.request  # type: ignore[attr-defined]
    records[-1] = ended(210, "failed", EVIL)
    timeline = Timeline().feed_all(records)
    result = summarize(timeline, SummaryOptions(percentiles=(50, 99)))
    drawn = plots.draw(timeline, Series().feed_all(records), png=False)
    return render_page(
        result,
        timeline.info,
        drawn,
        files=[EVIL.replace("\ud800", "\udcff"), "javascript:alert(1)"],
    )


@pytest.fixture(scope="module")
def evil() -> str:
    return evil_page()


def test_nothing_from_a_run_becomes_markup(evil: str) -> None:
    page = read(evil)
    assert page.tags <= TAGS, page.tags - TAGS
    assert not {name for name in page.attributes if name.startswith("on")}
    assert not [
        link for link in page.links if ":" in link and not link.startswith("https://arxiv.org/abs/2309.06180")
    ]
    assert page.text.count("<script>alert(1)</script>") > 20
    evil.encode("utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f]", evil)


def test_the_page_fetches_nothing(evil: str) -> None:
    page = read(evil)
    assert not {"script", "link", "img", "iframe", "object", "image"} & page.tags
    assert "src" not in page.attributes
    style = evil[evil.index("<style>") : evil.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert set(re.findall(r"url\((.)", evil)) <= {"#"}


def test_ids_of_a_page_are_unique(evil: str) -> None:
    ids = read(evil).ids
    assert len(ids) > 10 and len(ids) == len(set(ids))


@given(st.text(), st.text())
def test_text_and_attributes_come_back_as_they_were(value: str, attribute: str) -> None:
    class One(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[Any] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [tag, dict(attrs)]

        def handle_data(self, data: str) -> None:
            self.found.append(data)

    def clean(given: str) -> str:
        return html.CONTROL.sub("\N{REPLACEMENT CHARACTER}", given)

    reader = One()
    reader.feed(html.tag("p", value, title=attribute))
    reader.close()
    assert reader.found[:2] == ["p", {"title": clean(attribute)}]
    assert "".join(reader.found[2:]) == clean(value)


def test_papers_lead_to_where_they_are() -> None:
    assert paper("T <1> (2023, arXiv:2309.06180)") == (
        'T &lt;1&gt; (2023, <a href="https://arxiv.org/abs/2309.06180">arXiv:2309.06180</a>)'
    )
    assert 'href="https://doi.org/10.1145/3669940.3707281"' in paper("P (2025, 10.1145/3669940.3707281)")
    assert paper("baseline") == "baseline"


def test_settings_read_as_in_yaml() -> None:
    nested = {"a": {"b": None, "c": True}, "d": [1.0, 2.5], "e": [{"f": "x"}, {"f": 1}], "g": {}, "h": []}
    assert [(name, facts.words(item)) for name, item in facts.flat(nested)] == [
        ("a.b", "null"),
        ("a.c", "true"),
        ("d", "1, 2.5"),
        ("e[0].f", "x"),
        ("e[1].f", "1"),
        ("g", "{}"),
        ("h", "[]"),
    ]


# ---------------------------------------------------------------- files


def artefacts(folder: Path) -> dict[str, bytes]:
    names = ["report.html", *(f"plots/{name}.png" for name in plots.NAMES)]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def test_a_run_leaves_plots_and_page_and_both_come_again_from_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(stated(), tmp_path)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == f"artefacts: {tmp_path}" and "left out" not in out
    before = artefacts(tmp_path)
    assert len(before) == 7 and len(before["report.html"]) < 300_000
    for name in before:
        (tmp_path / name).unlink()
    command.main([str(tmp_path)])
    assert artefacts(tmp_path) == before
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.html'}\n"


def test_without_matplotlib_one_line_says_so_and_the_rest_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run(stated(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "plots: left out, matplotlib is not installed (pip install matplotlib)",
        f"artefacts: {tmp_path}",
    ]
    assert list(artefacts(tmp_path)) == ["report.html"]
    page = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Left out: matplotlib is not installed." in page.text
    assert "latency unit" in page.text
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["completed"] == 3


@pytest.mark.parametrize("plotted", [True, False])
@pytest.mark.parametrize("paged", [True, False])
def test_plots_and_page_can_be_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], plotted: bool, paged: bool
) -> None:
    run([started(), arrived(1, "a"), ended(2)], tmp_path, plots=plotted, page=paged)
    made = artefacts(tmp_path)
    assert ("plots/queue.png" in made) == plotted
    assert ("report.html" in made) == paged
    assert "left out" not in capsys.readouterr().out
    if paged:
        assert ("switched off" in made["report.html"].decode()) == (not plotted)


def test_a_run_that_was_killed_still_has_a_page(tmp_path: Path) -> None:
    run(three_requests(), tmp_path, plots=False, page=False)
    (tmp_path / "results.json").unlink()
    log = tmp_path / "events.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    log.write_text("".join(lines[:-2]) + lines[-2][:20], encoding="utf-8")
    assert write_page(tmp_path) == []
    page = read((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "PARTIAL (unknown: the log has no end of run)" in page.text
    assert "2 of 3 requests completed" in page.text


def test_results_of_another_version_are_computed_anew(tmp_path: Path) -> None:
    run([started(), arrived(1, "a"), ended(2)], tmp_path, plots=False, page=False)
    (tmp_path / "results.json").write_text('{"servelab": {"schema_version": 1}}')
    (note,) = write_page(tmp_path)
    assert note == "results.json: of version 1, not 2; computed anew from the log"
    write_page(tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "0 completed, 1 unfinished" in page
    assert 'href="plots/queue.png"' in page and 'href="report.html"' not in page


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServeLabError, match="there is no run"):
        write_page(tmp_path)


def test_a_run_without_a_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ServeLabError, match=r"the run has no events\.jsonl"):
        write_page(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_results_are_refused(tmp_path: Path, content: str) -> None:
    run([started(), arrived(1, "a"), ended(2)], tmp_path, plots=False, page=False)
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ServeLabError, match=r"results\.json is not a JSON object"):
        write_page(tmp_path)


def test_a_page_that_cannot_be_written_is_an_error_and_the_report_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(PluginCallError, match=r"report\.html cannot be written"):
        run([started(), arrived(1, "a"), ended(2)], tmp_path, plots=False)
    assert "ServeLab run" in capsys.readouterr().out


def test_a_run_without_a_folder_draws_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    observer = ReportObserver(ReportConfig(), context(None))
    assert observer._series is None
    bus = Bus([observer])
    for record in three_requests():
        bus.emit(record)
    assert "artefacts: none" in capsys.readouterr().out


def test_quality_alone_does_not_ask_for_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    timeline = Timeline().feed_all([started(), QUALITY, ended(4)])
    assert write_artefacts(tmp_path, timeline, Series(), summarize(timeline)) == []
