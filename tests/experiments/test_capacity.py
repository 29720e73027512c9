"""``task=capacity`` on queues whose capacity is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.experiments.conftest import Do

from servelab.core.errors import ConfigError

# D/D/1: arrivals every 1/rate, one request at a time, one step of 10 ms each: nobody waits up to 100 a
# second, and beyond it the last of n waits (n - 1) (10 ms - 1/rate).
QUEUE: dict[str, Any] = {
    "scheduler": {"name": "vllm_v1", "max_num_seqs": 1},
    "workload": {
        "name": "synthetic",
        "num_requests": 300,
        "request_rate": 1,
        "process": "constant",
        "prompt_length": 8,
        "output_length": 1,
        "max_new_tokens": 1,
    },
}
TASK: dict[str, Any] = {
    "name": "capacity",
    "lo": 40,
    "at_most": {"p99_queueing_ms": 1.0},
    "rel_tol": 0.05,
    "seeds": 2,
}


def test_a_queue_without_chance_has_its_exact_capacity(do: Do, tmp_path: Path) -> None:
    told = do(TASK, **QUEUE)
    (row,) = told["rows"]
    assert 95.0 <= row["ours"] <= 100.3  # 1 ms of waiting is allowed
    assert row["seeds"] == 2 and row["holds"] is None
    assert row["spread"] is None and "Every seed measured the same" in row["note"], "no chance, no interval"
    assert told["status"] == "ok" and told["task"] == "capacity"
    assert told["columns"] == [
        {"name": "capacity", "label": row["unit"], "value": row["ours"], "better": 1, "digits": 3}
    ], "what a sweep shows"
    assert "p99_queueing_ms <= 1" in row["setup"]
    for search in told["searches"]:
        assert search["status"] == "found" and search["non_monotone"] == []
        assert search["failed"] <= search["passed"] * 1.05
        holds = {probe["rate"]: probe["holds"] for probe in search["probes"]}
        assert all(ok == (rate <= search["passed"]) for rate, ok in holds.items())
        assert min(holds) == 40 and max(holds) == 160
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert {"experiment.json", "experiment.html", "experiment.md", "probes.svg", "probes.png"} <= files


def test_seeds_that_differ_have_an_interval(do: Do) -> None:
    chance = {**QUEUE, "workload": {**QUEUE["workload"], "process": "poisson"}}
    (row,) = do({**TASK, "lo": 5, "at_most": {"p99_queueing_ms": 100.0}}, **chance)["rows"]
    assert row["spread"] is not None and "Every seed" not in row["note"]


def test_taken_up_again_it_measures_nothing_twice(do: Do, tmp_path: Path) -> None:
    task = {**TASK, "seeds": 1}
    first = do(task, "first", **QUEUE)
    again = do({**task, "resume": str(tmp_path / "first"), "processes": 2}, "again", **QUEUE)
    assert again["rows"] == first["rows"] and again["searches"] == first["searches"]
    wall = {one["name"]: one["wall_s"] for one in first["cells"]}
    assert {one["name"]: one["wall_s"] for one in again["cells"]} == wall


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"lo": 150},
            "even the lowest rate fails(.|\n)*at 150, p99_queueing_ms is [0-9.]*, and at most 1 is allowed",
        ),
        ({"hi": 80}, "even the highest rate passes(.|\n)*raise task.hi"),
        ({"at_most": {"p99_waiting_ms": 1.0}}, "no figure 'p99_waiting_ms'(.|\n)*p99_queueing_ms"),
    ],
)
def test_a_range_without_a_capacity_is_refused(do: Do, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        do({**TASK, **change, "seeds": 1}, **QUEUE)


def test_without_an_objective_nothing_is_searched(raw: dict[str, Any], do: Do, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing says which rate is too high"):
        do({"name": "capacity"}, **QUEUE)
    assert not (tmp_path / "run" / "cells").exists()


def test_the_slo_of_the_run_is_the_default_objective(do: Do) -> None:
    """TTFT is the wait and one step: 12 ms allow 2 ms of waiting to 99 % of the requests."""
    told = do(
        {"name": "capacity", "lo": 40, "seeds": 1, "rel_tol": 0.05, "checks": False},
        slo={"ttft_ms": 12.0},
        **QUEUE,
    )
    (row,) = told["rows"]
    assert 95.0 <= row["ours"] <= 100.6 and "slo_attainment >= 0.99" in row["setup"]


def test_another_setting_can_be_searched(do: Do) -> None:
    """The share of clients that give up at once is the share of requests that do not complete."""
    queue = json.loads(json.dumps(QUEUE))
    queue["workload"] |= {"num_requests": 200, "request_rate": 50, "patience_ms": 1}
    task = {**TASK, "setting": "workload.cancel_fraction", "lo": 0.01, "hi": 0.9, "seeds": 1, "checks": False}
    told = do({**task, "completed": 0.75, "rel_tol": 0.1}, **queue)
    (row,) = told["rows"]
    assert row["unit"] == "workload.cancel_fraction" and 0.15 < row["ours"] < 0.35


def test_slo_and_other_bounds_hold_together(do: Do) -> None:
    """The slo allows 2 ms of waiting, ``at_most`` 200: the slo decides, unless it is told not to count."""
    task = {**TASK, "seeds": 1, "checks": False, "at_most": {"p99_queueing_ms": 200.0}}
    both = do(task, "both", slo={"ttft_ms": 12.0}, **QUEUE)["rows"][0]
    one = do({**task, "attainment": 0}, "one", slo={"ttft_ms": 12.0}, **QUEUE)["rows"][0]
    assert "slo_attainment" in both["setup"] and "slo_attainment" not in one["setup"]
    assert both["ours"] <= 100.1 and one["ours"] > 101
