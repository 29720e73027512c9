"""What a comparison reads from a sweep's folder, and which figures it calls best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.sweeps.folders import leave, results

from servelab.core.errors import ConfigError, ServeLabError
from servelab.plugins.sweeps.results import METRICS
from servelab.plugins.sweeps.rows import Sweep, read_sweep


def best(sweep: Sweep, key: str) -> list[int]:
    return [row.number for row in sweep.rows if key in row.best]


def test_settings_that_differ_are_columns(tmp_path: Path) -> None:
    leave(tmp_path, 0, "+scheduler=a", "++workload.request_rate=2", "seed=1", found=results())
    leave(tmp_path, 2, "+scheduler=b", "++workload.request_rate=2", "seed=1", found=results())
    leave(tmp_path, 10, "+scheduler=b", "++workload.request_rate=4", "seed=1", found=results())
    sweep = read_sweep(tmp_path)
    assert sweep.axes == ["scheduler", "workload.request_rate"]
    assert sweep.common == ["seed=1"]
    assert [row.number for row in sweep.rows] == [0, 2, 10]
    assert sweep.rows[2].settings == {"scheduler": "b", "workload.request_rate": "4"}


def test_figures_are_those_of_the_results(tmp_path: Path) -> None:
    pools = [{"peak_use": 0.25}, {"peak_use": 0.75}, {"peak_use": None}]
    quality = {"w4a8": {"kl_mean": 0.02}}
    leave(tmp_path, 0, found=results(servelab__kv_pages=pools, servelab__quality=quality))
    (row,) = read_sweep(tmp_path).rows
    assert row.figures["completed"] == 3
    assert row.figures["output_throughput"] == results()["output_throughput"]
    assert row.figures["p99_ttft_ms"] == results()["p99_ttft_ms"]
    assert row.figures["servelab.preemptions"] == 1
    assert row.figures["servelab.kv_peak_use"] == 0.75
    assert row.figures["servelab.kl_mean"] == 0.02


def test_how_jobs_stand(tmp_path: Path) -> None:
    part = results()
    part["servelab"]["run"] |= {"status": "interrupted", "reason": "keyboard interrupt"}
    leave(tmp_path, 0, found=results())
    leave(tmp_path, 1, status="interrupted", found=part)
    leave(tmp_path, 2, status="failed", reason="no luck")
    leave(tmp_path, 3, status="waiting")
    leave(tmp_path, 4, status="running")
    leave(tmp_path, 5, found=part)
    rows = read_sweep(tmp_path).rows
    assert [row.status for row in rows] == ["ok", "PARTIAL", "FAILED", "not run", "PARTIAL", "PARTIAL"]
    assert rows[1].figures["completed"] == 3
    assert rows[2].reason == "no luck"
    assert all(value is None for value in rows[3].figures.values())


class TestBest:
    """Only jobs that can be compared are."""

    def two(self, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], **more: Any) -> Sweep:
        leave(tmp_path, 0, "scheduler=a", found=results(**first))
        leave(tmp_path, 1, "scheduler=b", found=results(**second), **more)
        return read_sweep(tmp_path)

    def test_the_direction_is_that_of_the_metric(self, tmp_path: Path) -> None:
        sweep = self.two(
            tmp_path,
            {"output_throughput": 10.0, "p99_ttft_ms": 5.0, "servelab__preemptions": 3},
            {"output_throughput": 11.0, "p99_ttft_ms": 6.0, "servelab__preemptions": 2},
        )
        assert best(sweep, "output_throughput") == [1]
        assert best(sweep, "p99_ttft_ms") == [0]
        assert best(sweep, "servelab.preemptions") == [1]
        assert best(sweep, "completed") == best(sweep, "servelab.kv_peak_use") == []

    def test_what_looks_alike_is_alike(self, tmp_path: Path) -> None:
        sweep = self.two(tmp_path, {"output_throughput": 10.01}, {"output_throughput": 10.02})
        assert best(sweep, "output_throughput") == []

    def test_several_may_be_best(self, tmp_path: Path) -> None:
        leave(tmp_path, 2, "scheduler=c", found=results(output_throughput=10.0))
        assert best(
            self.two(tmp_path, {"output_throughput": 10.0}, {"output_throughput": 9.0}), METRICS[1].key
        ) == [0, 2]

    @pytest.mark.parametrize(
        "other",
        [
            {"workload": {"name": "other"}},
            {"seed": 1},
            {"slo": {"ttft_ms": 5}},
            {"executor": {"name": "sim"}},
        ],
    )
    def test_another_workload_is_no_rival(self, tmp_path: Path, other: dict[str, Any]) -> None:
        sweep = self.two(tmp_path, {"output_throughput": 10.0}, {"output_throughput": 9.0}, **other)
        assert best(sweep, "output_throughput") == []
        assert sweep.workloads == 2

    def test_an_executor_of_another_size_is_a_rival(self, tmp_path: Path) -> None:
        other = {"executor": {"name": "torch", "num_kv_pages": 3}}
        sweep = self.two(tmp_path, {"output_throughput": 10.0}, {"output_throughput": 9.0}, **other)
        assert best(sweep, "output_throughput") == [0]

    def test_whoever_rejects_requests_does_not_win(self, tmp_path: Path) -> None:
        leave(tmp_path, 2, "scheduler=c", found=results(p99_ttft_ms=7.0))
        sweep = self.two(tmp_path, {"p99_ttft_ms": 1.0, "completed": 2}, {"p99_ttft_ms": 6.0})
        assert best(sweep, "p99_ttft_ms") == [1]

    @pytest.mark.parametrize("status", ["interrupted", "failed", "running"])
    def test_parts_do_not_win(self, tmp_path: Path, status: str) -> None:
        leave(tmp_path, 2, "scheduler=c", found=results(p99_ttft_ms=7.0))
        sweep = self.two(tmp_path, {"p99_ttft_ms": 6.0}, {"p99_ttft_ms": 1.0}, status=status)
        assert best(sweep, "p99_ttft_ms") == [0]

    def test_oracles_do_not_win(self, tmp_path: Path) -> None:
        leave(tmp_path, 2, "scheduler=c", found=results(p99_ttft_ms=7.0))
        oracle = {"p99_ttft_ms": 1.0, "servelab__stamps": ["oracle: pf_oracle"]}
        assert best(self.two(tmp_path, oracle, {"p99_ttft_ms": 6.0}), "p99_ttft_ms") == [1]


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ConfigError, match="there is no sweep in this folder"):
            read_sweep(folder)


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_unreadable_results_are_told(tmp_path: Path, text: str) -> None:
    folder = leave(tmp_path, 0)
    (folder / "results.json").write_text(text, encoding="utf-8")
    with pytest.raises(ServeLabError, match=r"results\.json cannot be read"):
        read_sweep(tmp_path)
