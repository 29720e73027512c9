"""Cells: measured as a run of their own would be, apart from one another, once."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from servelab.core.errors import ConfigError, ServeLabError
from servelab.core.hookspecs import hookimpl
from servelab.core.metrics import Timeline
from servelab.core.records import StepDone
from servelab.plugins.tasks._cells import Cell, Found, Work
from servelab.plugins.tasks._cells.cell import changed, key_of

HERE = f"{__name__}:"


class Steps:
    """A meter."""

    def __init__(self) -> None:
        self.steps = 0

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        self.steps += len(record.ends_ns)

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        return {"steps": self.steps}


class Killed(Steps):
    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


class Leaves(Steps):
    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        os._exit(3)


class Raises(Steps):
    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        raise ZeroDivisionError("in a meter")


class Counts(Steps):
    """Leaves a mark each time that it measures."""

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        with open(os.environ["MARKS"], "a") as file:
            file.write("x")
        return super().figures(timeline)


@pytest.fixture
def marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MARKS", str(tmp_path / "marks"))
    return tmp_path / "marks"


def cells(*seeds: int, meter: type[Steps] = Steps, **changes: Any) -> list[Cell]:
    return [
        Cell(name=f"seed {seed}", changes={"seed": seed, **changes}, meters=(HERE + meter.__name__,))
        for seed in seeds
    ]


def all_of(wanted: Iterable[Cell]) -> Any:
    kept = list(wanted)
    return lambda found: kept


def test_a_cell_measures_what_a_run_would(base: dict[str, Any]) -> None:
    found = Work(base).run(all_of(cells(0)))
    one = found["seed 0"]
    assert one.ok and one.seed == 0 and one.results["completed"] == 10
    assert one.results["servelab"]["run"]["status"] == "ok"
    assert one.results["servelab"]["batch"]["steps"] == one.figures["steps"] > 10
    assert one.cpu_s > 0 and one.wall_s > 0
    # a step costs 10 ms and a request alone takes four of them
    assert one.results["median_ttft_ms"] >= 10 and one.results["p99_tpot_ms"] >= 10


def test_changes_reach_the_run(base: dict[str, Any]) -> None:
    wanted = [
        Cell(name="line", changes={"cost.step_ns": 1_000_000, "workload.num_requests": 3}),
        Cell(name="section", changes={"scheduler": {"name": "conservative", "overcommit": 1.5}}),
    ]
    found = Work(base).run(all_of(wanted))
    assert found["line"].results["completed"] == 3 and found["line"].results["median_ttft_ms"] < 3
    settings = found["section"].results["servelab"]["info"]["settings"]
    assert settings["scheduler"]["name"] == "conservative" and settings["scheduler"]["overcommit"] == 1.5


def test_a_section_is_replaced_and_a_path_is_followed() -> None:
    base = {"scheduler": {"name": "a", "x": 1}, "slo": {"ttft_ms": 5}, "prefix": None, "seed": 0}
    out = changed(base, {"scheduler": {"name": "b"}, "slo.ttft_ms": 7, "prefix.name": "hash"})
    assert out == {"scheduler": {"name": "b"}, "slo": {"ttft_ms": 7}, "prefix": {"name": "hash"}, "seed": 0}
    assert base["scheduler"] == {"name": "a", "x": 1} and base["slo"] == {"ttft_ms": 5}
    with pytest.raises(ConfigError, match=r"seed.deep cannot be changed"):
        changed(base, {"seed.deep": 1})


def test_keys_tell_settings_and_meters_apart() -> None:
    keys = {key_of({"a": 1}, ()), key_of({"a": 2}, ()), key_of({"a": 1}, ("m",))}
    assert len(keys) == 3 and key_of({"a": 1, "b": 2}, ()) == key_of({"b": 2, "a": 1}, ())


@pytest.mark.parametrize("processes", [1, 3])
def test_results_do_not_depend_on_what_runs_beside(base: dict[str, Any], processes: int) -> None:
    found = Work(base, processes=processes).run(all_of(cells(0, 1, 2)))
    alone = Work(base).run(all_of(cells(1)))
    assert {one.seed for one in found.values()} == {0, 1, 2}
    for key in ("mean_ttft_ms", "p99_e2el_ms", "duration"):
        assert found["seed 1"].results[key] == alone["seed 1"].results[key]
    assert len({one.results["mean_ttft_ms"] for one in found.values()}) == 3


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (cells(9, meter=Killed), "ended by SIGKILL"),
        (cells(9, meter=Leaves), "left with status 3"),
        (cells(9, meter=Raises), "ZeroDivisionError: in a meter"),
        (cells(9, scheduler={"name": "nobody"}), "nobody"),
        (cells(9, **{"workload.num_requests": -1}), "num_requests"),
        (cells(9, **{"executor.num_kv_pages": 1}), "KV memory cannot hold"),
        (cells(9, **{"seed.x": 1}), "cannot be changed"),
    ],
)
def test_a_cell_that_fails_takes_no_other_with_it(
    base: dict[str, Any], bad: list[Cell], says: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = Work(base, folder=tmp_path).run(all_of([*bad, *cells(0)]))
    assert found["seed 0"].ok and not found["seed 9"].ok
    assert says in found["seed 9"].error
    assert "seed 9: failed: " in caplog.text and "seed 0: done in" in caplog.text
    assert len(list((tmp_path / "cells").iterdir())) == 1  # what failed is tried again


def test_what_is_found_is_not_measured_again(base: dict[str, Any], tmp_path: Path, marks: Path) -> None:
    first = Work(base, folder=tmp_path / "a").run(all_of(cells(0, 1, meter=Counts)))
    again = Work(base, folder=tmp_path / "b", earlier=tmp_path / "a").run(
        all_of(cells(0, 1, 2, meter=Counts))
    )
    assert marks.read_text() == "xxx"
    assert json.dumps(again["seed 1"].to_dict()) == json.dumps(first["seed 1"].to_dict())
    assert len(list((tmp_path / "b" / "cells").iterdir())) == 3
    other = cells(0, meter=Counts, **{"workload.request_rate": 21.0})
    Work(base, folder=tmp_path / "c", earlier=tmp_path / "b").run(all_of(other))
    assert marks.read_text() == "xxxx"


def test_an_earlier_folder_must_hold_cells(base: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing to take up again"):
        Work(base, earlier=tmp_path)
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / "x.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        Work(base, earlier=tmp_path)


def test_proposals_follow_from_what_was_found(base: dict[str, Any]) -> None:
    """Each cell is asked for by the result of the one before."""

    def propose(found: Found) -> list[Cell]:
        return cells(*range(min(len(found) + 1, 3)))

    found = Work(base, processes=2).run(propose)
    assert list(found) == ["seed 0", "seed 1", "seed 2"]


def test_an_interruption_keeps_what_was_found_and_leaves_no_process(
    base: dict[str, Any], tmp_path: Path
) -> None:
    work = Work(base, folder=tmp_path, processes=2)

    def propose(found: Found) -> list[Cell]:
        if found:
            raise KeyboardInterrupt
        slow = Cell(name="slow", changes={"workload.num_requests": 200_000})
        return [slow, *cells(0)]

    with pytest.raises(KeyboardInterrupt):
        work.run(propose)
    assert list(work.found) == ["seed 0"] and work._running == []
    assert Work(base, earlier=tmp_path)._earlier


def test_a_full_disk_is_said(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cells").write_text("in the way")
    with pytest.raises(ServeLabError, match=r"cannot be written"):
        Work(base, folder=tmp_path).run(all_of(cells(0)))


def test_the_time_left_is_told(base: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Work(base).run(all_of(cells(0, 1)))
    first, second = (line for line in caplog.messages if "done in" in line)
    assert "left" in first and "left" not in second
