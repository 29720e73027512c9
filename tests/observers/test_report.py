"""The report: what it prints, what it writes, and that it stays readable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from tests.metrics.logs import arrived, ended, started, three_requests
from tests.observers.test_jsonl import context

from servelab.core.bus import Bus
from servelab.core.errors import ConfigError, PluginCallError
from servelab.core.metrics import SummaryOptions, Timeline, summarize
from servelab.core.records import Record
from servelab.plugins.observers.report.observer import ReportConfig, ReportObserver

LONG = "Efficient Memory Management for Large Language Model Serving with PagedAttention (2023, 2309.06180)"
PLUGINS: dict[str, Any] = {
    "scheduler": {
        "name": "fcfs",
        "version": "0.1.0",
        "paper": "baseline",
        "settings": {"budget": 2048, "order": "arrival"},
        "non_default": ["budget"],
    },
    "kvcache": {"name": "paged", "paper": LONG, "non_default": {"page_tokens": 16}},
    "executor": {"name": "sim"},
    "observer": [{"name": "jsonl"}, {"name": "report"}],
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
    records[0] = started(plugins=PLUGINS, stamps=["oracle: scheduler fcfs"], run_dir="outputs/1")
    run(records, tmp_path, tbt_ms=20)
    out = capsys.readouterr().out
    lines = words(out)
    for expected in (
        "ServeLab run",
        "folder outputs/1",
        "model tiny",
        "clock virtual",
        "executor sim",
        "seed 7",
        "stamps oracle: scheduler fcfs",
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


def test_results_file_is_the_summary_and_what_ran(tmp_path: Path) -> None:
    run(three_requests(), tmp_path)
    result = json.loads((tmp_path / "results.json").read_text())
    info = result["servelab"].pop("info")
    assert info["model"] == "tiny"
    options = SummaryOptions(percentiles=(50, 90, 99))
    assert result == summarize(Timeline().feed_all(three_requests()), options)
    assert result["servelab"]["schema_version"] == 1


def test_a_run_that_was_stopped_is_partial(capsys: pytest.CaptureFixture[str]) -> None:
    run([started(), arrived(0, "a", ttft=5), ended(3, "interrupted", "stopped by the user")], None)
    lines = words(capsys.readouterr().out)
    assert lines[0] == "ServeLab run, PARTIAL (interrupted: stopped by the user)"
    assert "requests 1 0 completed, 1 unfinished" in lines
    assert "TTFT (first token) ms - - - - 0" in lines
    assert "SLO attainment - % 0 good of 0 judged; ttft -" in lines
    assert lines[-1] == "artefacts: none, this run has no folder"


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"model": {"name": "m", "layers": 2}, "plugins": [{"kind": "executor", "name": "sim"}], "kv": {}},
        {"settings": {"model": {"name": "m"}}, "stamps": None, "kv": {"pools": [{"id": "x"}]}},
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
