"""The garbage collector during a simulated run, and after it."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from servelab.core.engine.state import Request
from servelab.core.testing.fakes import Fcfs, Rig, make_engine
from servelab.plugins.tasks import _collector as collector


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    yield
    assert gc.get_threshold() == before
    assert bool(gc.get_freeze_count()) == bool(frozen)


def test_looks_seldom_and_at_less() -> None:
    first, *others = gc.get_threshold()
    with collector.seldom():
        assert gc.get_threshold() == (max(first, collector.YOUNG), *others)
        assert gc.get_freeze_count() > 1000


def test_all_is_as_before_after_an_error() -> None:
    with pytest.raises(KeyError), collector.seldom():
        raise KeyError("x")
    assert not gc.get_freeze_count()


def test_who_froze_before_finds_it_frozen() -> None:
    gc.freeze()
    try:
        with collector.seldom():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_a_collector_that_never_looks_is_left_alone() -> None:
    before = gc.get_threshold()
    gc.set_threshold(0, *before[1:])
    try:
        with collector.seldom():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)


def test_one_that_looks_even_less_too() -> None:
    before = gc.get_threshold()
    gc.set_threshold(10 * collector.YOUNG, *before[1:])
    try:
        with collector.seldom():
            assert gc.get_threshold()[0] == 10 * collector.YOUNG
    finally:
        gc.set_threshold(*before)


def test_a_process_of_the_command_line_looks_for_no_garbage_at_its_end() -> None:
    run = str(Path(__file__).resolve().parents[2] / "run.py")
    code = (
        "import atexit, gc, runpy, sys\n"
        "atexit.register(lambda: print('left alone:', gc.get_freeze_count() > 1000))\n"  # called last
        f"sys.argv = [{run!r}, '--version']\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "left alone: True"


def test_requests_that_have_ended_wait_for_no_collector() -> None:
    rig = Rig(make_engine(Fcfs()))

    def left() -> set[str]:
        # not isinstance: it reads attributes, and some objects of libraries warn when they are read
        ids = {x.id for x in gc.get_objects() if type(x) is Request}
        return {id for id in ids if id.startswith("freed-")}  # other tests may have left some of theirs

    gc.disable()
    try:
        for k in range(3):
            rig.arrive(f"freed-{k}", prompt=6, output=3)
        assert left() == {"freed-0", "freed-1", "freed-2"}
        while rig.engine.requests:
            rig.finish()
        rig.arrive("freed-3", prompt=6, output=3)
        rig.batches.clear()  # the rig remembers them, drivers do not
        assert left() == {"freed-3"}
    finally:
        gc.enable()
