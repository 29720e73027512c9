"""What the suites of quantizers, kernels, workloads and observers rest on."""

from __future__ import annotations

import gc
import os
import sys
import time
from pathlib import Path

import pytest

from servelab.core.families.quant import ScaleLevel, WeightFormat
from servelab.core.metrics import Timeline
from servelab.core.records import RECORDS, RunFinished, RunStarted
from servelab.core.testing import ConformanceError, suite_of
from servelab.core.testing.linears import floor_db
from servelab.core.testing.quant import QuantSuite
from servelab.core.testing.recorded import cut, steps, whole
from servelab.core.testing.tensors import check_describes_without_tensors
from servelab.core.testing.traps import forbidden_calls
from servelab.core.testing.workload import _rank_correlation
from servelab.core.testing.written import files_written


def _format(bits: float, group: int | None = None, act: int = 16) -> WeightFormat:
    return WeightFormat(kind="int", bits=bits, scales=(ScaleLevel(group=group),), act_bits=act)


def test_recorded_runs_have_every_sort_of_record() -> None:
    assert {x.ev for log in whole() for x in log.records} == set(RECORDS)


def test_recorded_runs_are_logs() -> None:
    for log in (*whole(), *cut()):
        assert isinstance(log.records[-1], RunFinished), log.name
        if len(log.records) > 1:
            assert isinstance(log.records[0], RunStarted), log.name
        timeline = Timeline().feed_all(log.records)
        assert all(facts.outcome is not None for facts in timeline.requests.values()), log.name
    assert len(list(steps(10))) == 52


def test_writing_is_noticed_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("read").write_text("x", encoding="utf-8")
    with files_written() as written:
        Path("read").read_text(encoding="utf-8")
        Path("a").write_text("x", encoding="utf-8")
        os.close(os.open("b", os.O_WRONLY | os.O_CREAT))
        Path("c").mkdir()
        Path("a").rename("d")
        with Path("read").open("a", encoding="utf-8"):
            pass
        with open(os.devnull, "w", encoding="utf-8"):
            pass
    Path("after").touch()
    assert sorted({path.name for path in written}) == ["a", "b", "c", "d", "read"]
    assert all(path.parent == tmp_path for path in written)


def test_more_bits_are_due_more_decibels() -> None:
    assert floor_db(_format(8), 256) - floor_db(_format(4), 256) == pytest.approx(4 * 6.02)
    assert floor_db(_format(4, 32), 256) > floor_db(_format(4, 128), 256) > floor_db(_format(4), 256)
    assert floor_db(_format(8, act=8), 256) < floor_db(_format(8), 256)
    assert floor_db(_format(4, act=8), 256) == pytest.approx(floor_db(_format(4), 256), abs=0.1)


def test_a_module_that_imports_tensors_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    (tmp_path / "heavy_description.py").write_text("import numpy\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    suite = suite_of(QuantSuite, "w8a8")()
    with pytest.raises(ConformanceError, match="importing heavy_description imports numpy"):
        check_describes_without_tensors(suite, ["heavy_description"], lambda: None)


def test_ranks() -> None:
    assert _rank_correlation([1, 2, 3, 4], [10, 20, 30, 400]) == pytest.approx(1)
    assert _rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert _rank_correlation([5, 5, 5], [1, 2, 3]) == 0
    assert abs(_rank_correlation([1, 1, 2, 2], [1, 2, 1, 2])) < 1e-12


def test_what_others_do_when_garbage_is_collected_is_not_the_policys() -> None:
    """Hypothesis reads a clock then."""
    found: list[str] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        time.perf_counter()

    gc.callbacks.append(watch)
    try:
        with forbidden_calls(found.append):
            rings: list[list[object]] = [[] for _ in range(20_000)]
            for ring in rings:
                ring.append(ring)
            del rings
        assert not found
        assert gc.isenabled()
        with forbidden_calls(found.append):
            time.perf_counter()
        assert found == ["time.perf_counter"]
    finally:
        gc.callbacks.remove(watch)
