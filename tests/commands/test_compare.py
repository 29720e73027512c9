"""Runs side by side: every difference is shown, and what makes figures hard to compare is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.commands.runs import serve

from servelab.core.errors import LogError, ServeLabError
from servelab.core.run_folder import RunFolder, RunFolderError
from servelab.plugins.commands.compare.command import main
from servelab.plugins.commands.compare.facts import flatten, read_run
from servelab.plugins.commands.compare.measures import measure
from servelab.plugins.commands.compare.text import WIDTH, verdict

Out = pytest.CaptureFixture[str]
REPORT = [{"name": "jsonl"}, {"name": "report"}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By what sets them apart from ``base``."""
    folder = tmp_path_factory.mktemp("runs")

    def run(name: str, **how: Any) -> Path:
        serve(
            folder / name, observers=REPORT, **{"workload": {"request_rate": 2000, "num_requests": 8}, **how}
        )
        return folder / name

    return {
        "base": run("base"),
        "small": run("small", executor={"num_kv_pages": 12}),
        "seed": run("seed", seed=3),
        "scheduler": run("scheduler", scheduler="conservative"),
        "slow": run("slow", workload={"request_rate": 10, "num_requests": 8}),
        "bounds": run("bounds", slo={"ttft_ms": 10}),
    }


def told(capsys: Out, *runs: Path, **flags: bool) -> str:
    main([*map(str, runs), *(f"--{name}" for name in flags)])
    out = capsys.readouterr().out
    if not flags.get("json"):
        assert max(map(len, out.splitlines())) <= max(WIDTH, *(len(str(run)) + 3 for run in runs))
    return out


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def edit(runs: dict[str, Path], folder: Path, change: dict[str, Any]) -> Path:
    """A copy of ``base`` whose results say something else; keys are paths joined by dots."""
    copy = Path(shutil.copytree(runs["base"], folder / "copy"))
    result = json.loads((copy / "results.json").read_text())
    for path, value in change.items():
        *parts, last = path.split(".")
        place = result
        for part in parts:
            place = place[part]
        place[last] = value
    (copy / "results.json").write_text(json.dumps(result))
    return copy


def test_one_setting(runs: dict[str, Path], capsys: Out) -> None:
    out = told(capsys, runs["base"], runs["small"])
    found = lines(out)
    assert found[0] == f"A {runs['base']}" and found[1] == f"B {runs['small']}"
    assert "WARNING" not in out
    assert "Same workload, seed, model and machine, as far as the runs state them." in found
    at = found.index("settings A B")
    assert found[at + 1 : at + 3] == ["executor.num_kv_pages 16 12", ""]
    assert "Equal: versions and machine." in found
    base, small = (json.loads((runs[name] / "results.json").read_text()) for name in ("base", "small"))
    a, b = base["servelab"]["preemptions"], small["servelab"]["preemptions"]
    assert b > a > 0
    assert f"preemptions {a} {b} +{b - a} {b / a:.3f} -" in found
    row = next(line for line in found if line.startswith("mean_e2el_ms ms "))
    assert row.split()[-2:] == ["-", "8"]  # worse, over eight requests
    assert float(row.split()[5]) == pytest.approx(small["mean_e2el_ms"] / base["mean_e2el_ms"], abs=1e-3)


@pytest.mark.parametrize(
    ("other", "warning"),
    [
        ("seed", "different seeds (0, 3): different arrivals and lengths"),
        ("slow", "not the same workload: workload.request_rate"),
        ("bounds", "different bounds: slo.ttft_ms; goodput and attainment are not comparable"),
    ],
)
def test_what_is_not_comparable_is_said(runs: dict[str, Path], capsys: Out, other: str, warning: str) -> None:
    out = told(capsys, runs["base"], runs[other])
    assert [line for line in out.splitlines() if "WARNING" in line] == [f"WARNING: {warning}"]


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            {"servelab.run.partial": True, "servelab.run.status": "interrupted"},
            "run B is PARTIAL (interrupted): its figures cover only part of its workload",
        ),
        (
            {"servelab.samples.e2el": 4},
            "latencies are of completed requests only: 8 in A, 4 in B; the others are in no percentile",
        ),
        (
            {"servelab.samples.e2el": 4, "servelab.info.settings.workload.num_requests": 4},
            "not the same workload: workload.num_requests",
        ),
        ({"servelab.info.platform": "beos-m68k"}, "different machines: platform"),
        (
            {"servelab.info.settings.clock.name": "wall"},
            "not the same ground: clock.name; times of different clocks, executors or prices",
        ),
        (
            {"servelab.info.settings.quant": {"name": "w4a8"}},
            "different quantization, and quality was measured in no run: speed alone says little",
        ),
        (
            {"servelab.info.settings.quant": {"name": "w4"}, "servelab.quality": {"w4": {"kl_mean": 0.1}}},
            "different quantization: read the quality figures beside the speed",
        ),
        ({"servelab.stamps": ["oracle: x"]}, "different stamps (A: none; B: oracle: x)"),
    ],
)  # fmt: skip
def test_warnings(
    runs: dict[str, Path], tmp_path: Path, capsys: Out, change: dict[str, Any], warning: str | None
) -> None:
    copy = edit(runs, tmp_path, change)
    found = json.loads(told(capsys, runs["base"], copy, json=True))["warnings"]
    assert found == ([] if warning is None else [warning])
    assert ("PARTIAL" in told(capsys, runs["base"], copy).splitlines()[1]) is ("run.partial" in str(change))


def test_what_ran_is_no_figure(runs: dict[str, Path]) -> None:
    base = read_run(RunFolder(runs["base"]))
    assert base.ground["plugin.scheduler"].startswith("vllm_v1 ")
    assert base.figures["servelab.kv_pages.kv.pages"] == 16
    assert not any("seed" in key or "percentile" in key for key in base.figures)


def test_another_machine_and_commit(runs: dict[str, Path], tmp_path: Path, capsys: Out) -> None:
    info = {"servelab.info.commit": "abc", "servelab.info.machine": {"cpu": "fast"}}
    out = lines(told(capsys, runs["base"], edit(runs, tmp_path, info)))
    assert any(line.startswith("commit ") and line.endswith(" abc") for line in out)
    assert any(line.startswith("WARNING: different machines: ") and "machine.cpu" in line for line in out)


def test_three_runs(runs: dict[str, Path], capsys: Out) -> None:
    found = lines(told(capsys, runs["base"], runs["small"], runs["scheduler"]))
    assert "scheduler.name vllm_v1 vllm_v1 conservative" in found
    assert "figure unit A B B/A C C/A" in found
    assert "samples of ttft 8 8 8" in found


def test_many_runs_take_several_tables(runs: dict[str, Path], capsys: Out) -> None:
    found = lines(told(capsys, *runs.values()))
    heads = [line for line in found if line.startswith("figure unit")]
    assert heads == ["figure unit A B B/A C C/A", "figure unit A D D/A E E/A", "figure unit A F F/A"]


def test_all_shows_what_is_equal(runs: dict[str, Path], capsys: Out) -> None:
    short, long = (lines(told(capsys, runs["base"], runs["small"], **flag)) for flag in ({}, {"all": True}))
    assert "seed 0 0" in long and "seed 0 0" not in short
    assert any(line.startswith("std_ttft_ms ms") for line in long)
    assert not any(line.startswith("std_ttft_ms ms") for line in short)


def test_for_machines(runs: dict[str, Path], capsys: Out) -> None:
    found = json.loads(told(capsys, runs["base"], runs["small"], json=True))
    assert found["settings"] == {"executor.num_kv_pages": [16, 12]}
    assert [run["label"] for run in found["runs"]] == ["A", "B"]
    duration = found["figures"]["duration"]
    a, b = duration["values"]
    assert (duration["unit"], duration["better"]) == ("s", "less")
    assert duration["difference"] == [0, b - a] and duration["ratio"] == [1, b / a]


def test_a_run_without_results_is_read_from_its_log(
    runs: dict[str, Path], tmp_path: Path, capsys: Out
) -> None:
    killed = Path(shutil.copytree(runs["base"], tmp_path / "killed"))
    (killed / "results.json").unlink()
    log = killed / "events.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    out = told(capsys, runs["base"], killed)
    assert "WARNING: run B is PARTIAL (unknown)" in out
    assert "WARNING: run B has no results.json: its figures are computed from its event log" in out
    assert next(line for line in lines(out) if line.startswith("mean_ttft_ms")).split()[4:7] == [
        "0",
        "1.000",
        "=",
    ]


def test_other_versions_are_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    copy = edit(runs, tmp_path, {"servelab.schema_version": 99})
    with pytest.raises(ServeLabError, match="results are of different versions") as error:
        main([str(runs["base"]), str(copy)])
    assert f"{copy}: schema_version 99" in error.value.where


def test_what_cannot_be_compared(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ServeLabError, match="nothing to compare with"):
        main([str(runs["base"])])
    with pytest.raises(ServeLabError, match="cannot be compared with itself"):
        main([str(runs["base"]), str(runs["base"] / "results.json")])
    with pytest.raises(RunFolderError, match="a folder of runs") as error:
        main([str(runs["base"].parent), str(runs["base"])])
    assert str(runs["slow"]) in error.value.do
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(LogError, match=r"results\.json is not ServeLab's"):
        main([str(runs["base"]), str(tmp_path)])


@pytest.mark.parametrize(
    ("key", "base", "value", "word"),
    [
        ("mean_ttft_ms", 100, 90, "better"),
        ("mean_ttft_ms", 100, 110, "worse"),
        ("mean_ttft_ms", 100, 100.9, "close"),
        ("mean_ttft_ms", 100, 100, "equal"),
        ("mean_ttft_ms", None, 100, ""),
        ("output_throughput", 100, 110, "better"),
        ("output_throughput", 100, 90, "worse"),
        ("servelab.preemptions", 0, 3, "worse"),
        ("servelab.quality.w4a8.top1_agreement", 0.9, 0.8, "worse"),
        ("servelab.kv.kv.peak_pages", 3, 9, ""),
        ("servelab.something_new", 3, 9, ""),
    ],
)
def test_which_way_is_better(key: str, base: float | None, value: float, word: str) -> None:
    assert verdict(key, base, value) == word


def test_units_of_every_figure_of_a_run(runs: dict[str, Path], tmp_path: Path) -> None:
    """A new figure needs a line in the table; these few have no unit."""
    serve(tmp_path / "run", observers=REPORT, cluster={"instances": 2}, router={"name": "round_robin"})
    runs = {"bounds": runs["bounds"], "cluster": tmp_path / "run"}
    bare = {"servelab.preemptions", "servelab.length_capped_requests", "servelab.run.engines"}
    for key in {key for run in runs.values() for key in read_run(RunFolder(run)).figures}:
        assert measure(key).unit or key in bare or key.startswith("servelab.batch."), key


def test_flat_keys() -> None:
    nested = {"a": {"b": 1, "c": []}, "pools": [{"pool": "x", "n": 2}], "list": [1, 2], "rest": [{"n": 3}]}
    assert dict(flatten(nested)) == {
        "a.b": 1, "a.c": [], "pools.x.pool": "x", "pools.x.n": 2, "list": [1, 2], "rest.0.n": 3,
    }  # fmt: skip
