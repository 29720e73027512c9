"""The report: what it prints, what it writes, and that it stays readable."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.metrics.logs import MS, arrived, ended, started, three_requests
from tests.observers.test_jsonl import context

from servelab.core.bus import Bus
from servelab.core.errors import ConfigError, PluginCallError
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.records import QualityBegan, Record, RequestArrived, RunFinished
from servelab.plugins.observers.report.facts import device_line
from servelab.plugins.observers.report.observer import ReportConfig, ReportObserver

LONG = "Efficient Memory Management for Large Language Model Serving with PagedAttention (2023, 2309.06180)"
PLUGINS: dict[str, Any] = {
    "scheduler": {
        "name": "fcfs",
        "version": "0.1.0",
        "paper": "baseline",
        "settings": {"budget": 2048, "order": "arrival"},
        "non_default": {"budget": 2048},
    },
    "kvcache": {"name": "paged", "paper": LONG, "non_default": {"page_tokens": 16}},
    "executor": {"name": "sim"},
    "observer": [{"name": "jsonl"}, {"name": "report"}],
}
SOFTWARE: dict[str, Any] = {
    "servelab": "0.1.0",
    "commit": "0123456789abcdef",
    "dirty": True,
    "python": "3.11.7",
    "libraries": {"torch": "2.9", "pluggy": "1.6"},
    "machine": {
        "os": "Linux 6.1",
        "cpu": "A CPU",
        "cores": 8,
        "usable_cores": 2.5,
        "memory_bytes": 16 << 30,
        "memory_limit_bytes": 4 << 30,
        "gpus": ["A GPU", "A GPU"],
        "gpu_driver": "1.2",
    },
}


def run(records: list[Record], folder: Path | None, **settings: Any) -> None:
    bus = Bus([ReportObserver(ReportConfig(**{"plots": False, **settings}), context(folder))])
    for record in records:
        bus.emit(record)


def words(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_used_folder_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("old")
    with pytest.raises(ConfigError, match="over another run"):
        ReportObserver(ReportConfig(), context(tmp_path))


def test_a_reader_that_has_gone_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    run(three_requests(), tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["completed"] == 3


def test_report_of_three_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = three_requests()
    settings = {"hardware": {"name": "l4", "tp": 2, "flops": 121e12, "memory_bytes_per_s": 3e11}}
    records[0] = started(
        plugins=PLUGINS,
        stamps=["oracle: scheduler fcfs"],
        settings=settings,
        workload={"traffic": "Burst-like"},
        **SOFTWARE,
    )
    records[-1].date, records[-1].wall_s, records[-1].peak_rss_bytes = "20260102-030405", 12.34, 100 << 20  # type: ignore[attr-defined]
    run(records, tmp_path, tbt_ms=20)
    out = capsys.readouterr().out
    lines = words(out)
    for expected in (
        "ServeLab run",
        "model tiny",
        "clock virtual",
        "executor sim",
        "traffic Burst-like",
        "seed 7",
        "stamps oracle: scheduler fcfs",
        "hardware 2 x l4, each 121 TFLOP/s, 300 GB/s",
        "machine A CPU; 8 cores, 2.5 usable; 16.0 GiB, 4.0 GiB usable; 2 x A GPU; Linux 6.1",
        "software servelab 0.1.0 (commit 0123456789ab, with changes), Python 3.11.7, torch 2.9",
        "took 12.3 s of real time, at most 100.0 MiB of memory",
        "kv pool full: 100 pages of 16 tokens, 4,096 bytes each",
        "scheduler fcfs 0.1.0 baseline budget=2048",
        "observer report - - -",
        "latency unit mean p50 p90 p99 samples",
        "TTFT (first token) ms 93.33 110.00 110.00 110.00 3",
        "TPOT (per token after it) ms 28.75 28.75 41.75 44.67 2",
        "ITL (gap between chunks) ms 23.33 10.00 50.00 77.00 6",
        "E2E (end to end) ms 140.00 160.00 192.00 199.20 3",
        "goodput 9.524 req/s requests within every stated bound",
        "SLO attainment 66.7 % 2 good of 3 judged; ttft 100.0 %, tpot 66.7 %",
        "TBT attainment 83.3 % gaps of at most 20.00 ms",
        "requests 3 3 completed (1 at their length cap)",
        "preemptions 1 20 tokens recomputed",
        "KV pool full 40 pages peak of 100 (40.0 %), mean 16.0",
    ):
        assert expected in lines
    assert lines[-1] == f"artefacts: {tmp_path}"
    assert "PARTIAL" not in out
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 100


def test_devices_of_a_cluster_are_all_told() -> None:
    device = {"hardware": {"name": "a10g", "tp": 2, "flops": 7e13}}
    assert device_line({"settings": device, "cluster": {"instances": 4}}) == (
        "4 instances of 2 x a10g, each 70 TFLOP/s"
    )
    assert device_line({"settings": device, "cluster": {"instances": 1}}) == "2 x a10g, each 70 TFLOP/s"


def test_results_file_is_the_summary(tmp_path: Path) -> None:
    run(three_requests(), tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    assert result == summarize(
        Timeline().feed_all(three_requests()), SummaryOptions(percentiles=(50, 90, 99))
    )
    assert result["servelab"]["info"]["model"] == "tiny"


def test_a_run_that_was_stopped_is_partial(capsys: pytest.CaptureFixture[str]) -> None:
    run([started(), arrived(0, "a", ttft=5), ended(3, "interrupted", "stopped by the user")], None)
    lines = words(capsys.readouterr().out)
    assert lines[0] == "ServeLab run, PARTIAL (interrupted: stopped by the user)"
    assert "requests 1 0 completed, 1 unfinished" in lines
    assert "TTFT (first token) ms - - - - 0" in lines
    assert "SLO attainment - % 0 good of 0 judged; ttft -" in lines
    assert lines[-2:] == [
        "PARTIAL: interrupted, stopped by the user; 0 of 1 requests completed, and the figures are of these",
        "artefacts: none, this run has no folder",
    ]


def test_a_comparison_that_was_stopped_is_partial_too(capsys: pytest.CaptureFixture[str]) -> None:
    began = QualityBegan(t_ns=0, labels=["w8a16"], total=9)
    run([started(workload={"requests": 64}), began, ended(0, "interrupted", "ctrl-c")], None)
    lines = words(capsys.readouterr().out)
    assert "PARTIAL: interrupted, ctrl-c; the figures are of what was read until then" in lines


def test_goodput_by_class_is_a_table_where_there_are_several(capsys: pytest.CaptureFixture[str]) -> None:
    records = three_requests()
    run(records, None)
    assert "good req/s" not in capsys.readouterr().out
    records = three_requests()
    for record in records:
        if isinstance(record, RequestArrived) and record.request == "b":
            record.request_class, record.slo_tbt_ns = "offline", 80_000_000
    run(records, None)
    lines = words(capsys.readouterr().out)
    i = lines.index("class SLO % ttft % tpot % tbt % good req/s good tok/s judged")
    assert lines[i + 1 : i + 3] == [
        "offline 0.0 100.0 0.0 100.0 0.000 0.0 1",
        "online 100.0 100.0 100.0 - 9.524 28.6 2",
    ]


def test_notes_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    records = three_requests()
    records[0] = started(settings={"slo": {"classes": {"online": {}, "offlin": {}}}})
    records.insert(1, arrived(0, "unbounded"))
    run(records, None)
    notes = [line for line in words(capsys.readouterr().out) if line.startswith("note: ")]
    assert notes == [
        "note: slo.classes.offlin bounded nothing: no request of this class arrived",
        "note: 1 of 4 requests state no bound and are not judged for goodput",
    ]


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"model": "m", "plugins": {"executor": {"name": "sim"}}, "kv": {}},
        {"model": "m", "settings": {}, "stamps": None, "kv": {"pools": [{"id": "x"}]}},
    ],
)
def test_what_a_run_does_not_say_is_left_out(
    info: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    records = three_requests()
    first = records[0]
    assert first.ev == "run_started"
    first.info = info  # type: ignore[attr-defined]
    run(records, None)
    out = capsys.readouterr().out
    assert ("model     m" in out) == bool(info)
    assert "None" not in out


def test_percentiles_are_columns(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run(three_requests(), tmp_path, percentiles=(99.9,), itl_mode="spread")
    out = words(capsys.readouterr().out)
    assert "latency unit mean p99.9 samples" in out
    assert any(line.startswith("ITL (gap, spread over tokens) ms") for line in out)
    assert "p99.9_itl_ms" in json.loads((tmp_path / "results.json").read_text())


def test_settings_are_checked() -> None:
    with pytest.raises(ValidationError):
        ReportConfig(percentile=3)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="cannot show percentile 101"):
        ReportObserver(ReportConfig(percentiles=(101,)), context(None))


def test_an_unwritable_folder_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PluginCallError, match=r"results\.json cannot be written"):
        run(three_requests(), tmp_path / "file")


def test_a_job_of_a_sweep_leaves_plots_and_page_for_later(tmp_path: Path) -> None:
    for sweep, settings, expected in (
        (True, {}, set()),
        (True, {"page": True}, {"report.html"}),
        (False, {"plots": False}, {"report.html"}),
    ):
        folder = tmp_path / f"{sweep}{len(settings)}"
        observer = ReportObserver(ReportConfig(**settings), replace(context(folder), sweep=sweep))
        for record in three_requests():
            observer.servelab_on_record(record)
        observer.servelab_on_run_finished(RunFinished(t_ns=1000 * MS, status="ok"))
        assert {path.name for path in folder.iterdir()} == {"results.json", *expected}
