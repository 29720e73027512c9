"""The comparison as text, files and plots."""

from __future__ import annotations

import csv
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.sweeps.folders import leave, results

from servelab.core.errors import ConfigError, ServeLabError
from servelab.plugins.sweeps import plots, table
from servelab.plugins.sweeps.command import main
from servelab.plugins.sweeps.comparison import compare, summary, write
from servelab.plugins.sweeps.results import METRICS
from servelab.plugins.sweeps.rows import read_sweep


@pytest.fixture(autouse=True)
def _coarse_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "DPI", 20)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two schedulers at three rates; the last job failed."""
    numbers = iter(range(6))
    for scheduler in ("fcfs", "lifo|x"):
        for rate in (2, 4, 8):
            number = next(numbers)
            given = (f"+scheduler={scheduler}", f"++workload.request_rate={rate}", "+experiment=scripted")
            if number == 5:
                leave(tmp_path, number, *given, status="failed", reason="out of luck")
            else:
                leave(tmp_path, number, *given, found=results(output_throughput=100.0 + number))
    return tmp_path


def test_the_table(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare(sweep)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "Sweep of 6 jobs"
    assert lines[1] == "  all with: experiment=scripted"
    head = next(line for line in lines if line.startswith("  job"))
    assert head.split()[:4] == ["job", "scheduler", "request_rate", "done"]
    rows = [line for line in lines if line.strip()[:1].isdigit()]
    assert [row.split()[:5] for row in rows[:2]] == [
        ["0", "fcfs", "2", "3", "100.0"],
        ["1", "fcfs", "4", "3", "101.0"],
    ]
    assert rows[4].split()[4] == "104.0*"
    assert rows[4].endswith("ok") and rows[5].endswith("FAILED")
    assert len({row.index("ok") for row in rows[:5]} | {rows[5].index("FAILED")}) == 1
    assert "KL" not in out  # no job measured it
    assert "FAILED, job 5: out of luck" in out
    assert lines[-1] == f"artefacts: {sweep}: sweep.md, sweep.csv, sweep.json, plots/"


def test_the_files(sweep: Path) -> None:
    write(read_sweep(sweep))
    found = json.loads((sweep / "sweep.json").read_text(encoding="utf-8"))
    assert found["schema_version"] == 1
    assert found["swept"] == ["scheduler", "workload.request_rate"]
    job = found["jobs"][4]
    assert (job["job"], job["folder"], job["status"], job["workload"]) == (4, "4", "ok", 0)
    assert job["settings"] == {"scheduler": "lifo|x", "workload.request_rate": "4"}
    assert job["results"].keys() == {metric.key for metric in METRICS}
    assert "output_throughput" in job["best"]
    assert (found["jobs"][5]["status"], found["jobs"][5]["reason"]) == ("FAILED", "out of luck")

    with (sweep / "sweep.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    assert rows[4]["scheduler"] == "lifo|x"
    assert float(rows[4]["output_throughput"]) == 104.0
    assert float(rows[4]["mean_ttft_ms"]) == results()["mean_ttft_ms"]
    assert rows[5]["mean_ttft_ms"] == ""

    head, rule, *body = (sweep / "sweep.md").read_text(encoding="utf-8").splitlines()
    assert "| TTFT mean (ms) |" in head
    cells = [line.replace("\\|", "").count("|") for line in (head, rule, *body[:6])]
    assert len(set(cells)) == 1
    assert "| **104.0** |" in body[4]
    assert "| lifo\\|x | 8 | - |" in body[5]


def test_what_some_job_measured_is_a_column(tmp_path: Path) -> None:
    leave(tmp_path, 0, "quant=none", found=results(servelab__slo_attainment=0.25, p99_ttft_ms=None))
    leave(tmp_path, 1, "quant=w4a8", found=results(servelab__quality={"w4a8": {"kl_mean": 0.0123}}))
    out = "\n".join(table.text(read_sweep(tmp_path)))
    assert "met %" in out and "KL" in out and "25.0" in out and "0.0123" in out


@pytest.mark.parametrize(
    ("axes", "names"),
    [
        (("scheduler=a", "scheduler=b"), {"bars", "throughput_latency"}),
        (("workload.request_rate=1", "workload.request_rate=2"),
         {"bars", "over_workload.request_rate", "throughput_latency"}),
        (("seed=0", "seed=1"), {"throughput_latency"}),
        (("x=1", "x=auto"), {"bars", "throughput_latency"}),
    ],
)  # fmt: skip
def test_plots(tmp_path: Path, axes: tuple[str, ...], names: set[str]) -> None:
    for number, override in enumerate(axes):
        leave(tmp_path, number, override, found=results())
    compare(tmp_path)
    files = {path.stem: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert files.keys() == names
    assert all(content.startswith(b"\x89PNG") for content in files.values())


def test_what_one_must_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wall = {"clock": {"name": "wall"}}
    for number, completed in ((0, 99), (1, 100)):
        leave(tmp_path, number, f"seed={number}", found=results(completed=completed), **wall)
    out = "\n".join(table.text(read_sweep(tmp_path)))
    assert "Wall clock: differences include" in out
    assert "p99 over fewer than 100 requests is about their maximum." in out
    sure = tmp_path / "sure"
    leave(sure, 0, "seed=0", found=results(completed=100))
    leave(sure, 1, "seed=1", status="ok")
    compare(sure)
    out = capsys.readouterr().out
    assert "Wall clock" not in out and "fewer than" not in out
    assert "Without results.json: 1; the observer 'report' writes it." in out
    assert not (sure / "plots").exists()


def test_a_single_job_has_no_plot(tmp_path: Path) -> None:
    leave(tmp_path, 0, found=results())
    leave(tmp_path, 1, status="failed", reason="no")
    compare(tmp_path)
    assert not (tmp_path / "plots").exists()


def test_without_matplotlib_the_table_is_there_and_says_so(
    sweep: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.WARNING):
        compare(sweep)
    assert capsys.readouterr().out.splitlines()[-1].endswith("sweep.json")
    assert "no plots: matplotlib" in caplog.text


def test_the_command_makes_it_again(
    sweep: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(sweep)])
    assert capsys.readouterr().out.startswith("Sweep of 6 jobs\n")
    assert (sweep / "sweep.json").exists()
    for wrong in ([], ["a", "b"]):
        with pytest.raises(SystemExit):
            main(wrong)
    with pytest.raises(ConfigError, match="no sweep"):
        main([str(tmp_path_factory.mktemp("empty"))])


def test_a_job_in_a_few_words(tmp_path: Path) -> None:
    folder = leave(tmp_path, 0, found=results(output_throughput=1234.5, p99_ttft_ms=10.4))
    assert summary(folder) == "3 completed, 1,234 tok/s, p99 TTFT 10 ms"
    assert summary(leave(tmp_path, 1)) == ""


# -------------------------------------------------------------------- what a task names for comparison


def named(sweep: Path, number: int, value: float | None, **more: Any) -> None:
    """A job of a task that leaves one column, and no results.json."""
    folder = leave(sweep, number, f"+scheduler=s{number}", "task=capacity", task={"name": "capacity"}, **more)
    column = {"name": "capacity", "label": "requests/s", "value": value, "better": 1, "digits": 3}
    (folder / "experiment.json").write_text(json.dumps({"columns": [column]}), encoding="utf-8")


def test_a_tasks_own_figure_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, value in enumerate((2.5, 4.25, None)):
        named(tmp_path, number, value)
    compare(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    i = next(i for i, line in enumerate(lines) if line.startswith("  job"))
    assert lines[i - 1].split() == ["capacity"]
    assert lines[i].split() == ["job", "scheduler", "requests/s", "status"], "and none of the usual ones"
    assert [line.split() for line in lines[i + 1 : i + 4]] == [
        ["0", "s0", "2.500", "ok"],
        ["1", "s1", "4.250*", "ok"],
        ["2", "s2", "-", "ok"],
    ]
    assert not any("results.json" in line or "Latencies" in line for line in lines)
    assert (tmp_path / "sweep.md").read_text().splitlines()[
        0
    ] == "| scheduler | capacity requests/s | status |"
    told = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert [job["results"]["task.capacity"] for job in told] == [2.5, 4.25, None]
    assert [job["best"] for job in told] == [[], ["task.capacity"], []]
    assert (tmp_path / "sweep.csv").read_text().splitlines()[0] == "job,scheduler,task.capacity,status,reason"
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == ["bars.png"]
    assert summary(tmp_path / "1") == "capacity 4.250 requests/s"


def test_columns_of_different_tasks_stand_beside_the_usual(tmp_path: Path) -> None:
    leave(tmp_path, 0, "task=bench", found=results(output_throughput=100.0))
    named(tmp_path, 1, 3.0)
    sweep = read_sweep(tmp_path)
    keys = [metric.key for metric in sweep.metrics]
    assert keys[:3] == ["task.capacity", "completed", "output_throughput"]
    assert [row.figures["task.capacity"] for row in sweep.rows] == [None, 3.0]
    assert all(not row.best for row in sweep.rows), "they do not measure the same"


@pytest.mark.parametrize("content", ["{", "[]", '{"columns": [{"name": "x"}]}', '{"columns": 3}'])
def test_a_damaged_experiment_is_told_with_its_file(tmp_path: Path, content: str) -> None:
    folder = leave(tmp_path, 0)
    (folder / "experiment.json").write_text(content, encoding="utf-8")
    with pytest.raises(ServeLabError, match=r"experiment\.json cannot be read") as caught:
        read_sweep(tmp_path)
    assert caught.value.where == str(folder / "experiment.json")


def test_an_experiment_of_before_has_no_columns(tmp_path: Path) -> None:
    folder = leave(tmp_path, 0, found=results())
    (folder / "experiment.json").write_text('{"rows": []}', encoding="utf-8")
    assert not read_sweep(tmp_path).named
