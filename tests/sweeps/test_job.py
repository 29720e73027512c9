"""One job of a sweep: whatever it does, it is noted in its folder and harms nobody."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

from servelab.core import processes
from servelab.core.errors import ConfigError
from servelab.core.interrupt import Terminated
from servelab.plugins.sweeps import job as module
from servelab.plugins.sweeps.folder import EARLIER, STOP_FILE, JobState, job_folders, put_aside, read_state
from servelab.plugins.sweeps.job import Job

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="jobs of a test cannot be spawned, only forked"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have left threads behind, with which jobs would be spawned."""
    monkeypatch.setattr(processes.threading, "active_count", lambda: 1)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of job 3, which Hydra is about to run."""
    before = dict(Singleton._instances)
    found = tmp_path / "3"
    found.mkdir()
    new(found)
    runtime = {"runtime": {"output_dir": str(found)}, "job": {"num": 3, "name": "servelab"}}
    HydraConfig.instance().cfg = OmegaConf.create({"hydra": runtime})  # type: ignore[assignment]
    yield found
    Singleton._instances = before


def new(folder: Path, **fields: Any) -> None:
    state = {"number": 3, "overrides": ["seed=1"], "config": {}, "servelab": "0", **fields}
    JobState(**state).write(folder)


def run(folder: Path, task: Callable[[DictConfig], Any]) -> JobState:
    Job(task, folder.parent, total=4, process=os.getpid())(OmegaConf.create({}))
    state = read_state(folder)
    assert state is not None
    return state


def good(cfg: DictConfig) -> None:
    print("a report")
    Path(HydraConfig.get().runtime.output_dir, "results.json").write_text("{}")


def test_a_good_job(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = run(folder, good)
    assert (state.status, state.reason) == ("ok", "")
    assert state.files == ["report.txt", "results.json"]
    assert state.finished(folder)
    assert (folder / "report.txt").read_text() == "a report\n"
    assert "a report" not in capfd.readouterr().out


def test_signals_of_the_terminal_do_not_reach_it(folder: Path) -> None:
    """Only those that the sweep hands on: in a group of its own."""

    def task(cfg: DictConfig) -> None:
        print(os.getpgrp() == os.getpid(), signal.getsignal(signal.SIGTTOU) is signal.SIG_IGN)

    run(folder, task)
    assert (folder / "report.txt").read_text() == "True True\n"


def _raises(error: BaseException) -> Callable[[DictConfig], Any]:
    def task(cfg: DictConfig) -> None:
        raise error

    return task


def _killed(cfg: DictConfig) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("task", "status", "reason"),
    [
        (_raises(CompactHydraException("servelab: no luck\n  why:   none left")), "failed", "no luck"),
        (_raises(CompactHydraException("servelab: 1 problem:\n  - seed: x")), "failed", "1 problem: seed: x"),
        (_raises(ValueError("odd")), "failed", "ValueError: odd"),
        (_raises(SystemExit(3)), "failed", "SystemExit: 3"),
        (_raises(KeyboardInterrupt()), "interrupted", "keyboard interrupt"),
        (_raises(Terminated("SIGTERM")), "interrupted", "SIGTERM"),
        (_killed, "failed", "the job's process was ended by SIGKILL"),
        (lambda cfg: os._exit(3), "failed", "the job's process left with status 3 before the job was over"),
    ],
)  # fmt: skip
def test_every_end_is_noted(folder: Path, task: Any, status: str, reason: str) -> None:
    state = run(folder, task)
    assert (state.status, state.reason) == (status, reason)
    assert not state.finished(folder)
    if status == "failed":
        assert reason.partition(":")[0] in (folder / "error.txt").read_text()


def test_a_crash_leaves_its_traceback(folder: Path) -> None:
    run(folder, _raises(ValueError("odd")))
    assert "Traceback (most recent call last)" in (folder / "error.txt").read_text()


def test_a_finished_job_is_skipped(folder: Path) -> None:
    run(folder, good)
    before = (folder / "job.json").read_bytes()
    assert run(folder, _raises(ValueError("ran again"))).status == "ok"
    assert (folder / "job.json").read_bytes() == before


def test_a_job_that_lost_a_file_runs_again(folder: Path) -> None:
    run(folder, good)
    (folder / "results.json").unlink()
    assert run(folder, good).files == ["report.txt", "results.json"]
    assert (folder / f"{EARLIER}1" / "report.txt").exists()


def test_earlier_tries_are_kept(folder: Path) -> None:
    (folder / "servelab.log").write_text("written meanwhile")
    for i in range(3):
        (folder / "events.jsonl").write_text(str(i)) if i else None
        run(folder, _raises(ValueError(f"try {i}")))
    kept = {path.name: (path / "error.txt").read_text()[:17] for path in folder.glob(f"{EARLIER}*")}
    assert kept == {f"{EARLIER}1": "ValueError: try 0", f"{EARLIER}2": "ValueError: try 1"}
    assert (folder / "servelab.log").exists()
    assert not (folder / "events.jsonl").exists()
    assert put_aside(folder, "servelab.log") == folder / f"{EARLIER}3"
    assert put_aside(folder, "servelab.log") is None


def test_files_that_cannot_be_put_aside_fail_the_job_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(folder, _raises(ValueError("first")))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "not allowed")))
    state = run(folder, good)
    assert (state.status, state.reason) == ("failed", "the files of an earlier try cannot be put aside")
    assert "why:   not allowed" in (folder / "error.txt").read_text()


def test_files_of_a_job_that_waits_are_left_to_whoever_refuses_them(folder: Path) -> None:
    (folder / "events.jsonl").write_text("another run")
    run(folder, good)
    assert (folder / "events.jsonl").read_text() == "another run"


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
def test_a_sweep_that_is_ended_ends_its_job(folder: Path, number: int, error: type[BaseException]) -> None:
    """The job's process gets the signal itself, once; no further job begins."""

    def task(cfg: DictConfig) -> None:
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(Terminated("SIGTERM")))
        (folder.parent / STOP_FILE).write_text(str(int(number)))
        threading.Event().wait()

    with pytest.raises(error) as raised:
        run(folder, task)
    assert raised.type is error
    state = read_state(folder)
    assert state is not None and state.status == "interrupted"
    with pytest.raises(error):
        run(folder, good)
    assert not (folder / "results.json").exists()


def test_a_job_that_takes_its_time_to_end_is_told_once(folder: Path) -> None:
    def task(cfg: DictConfig) -> None:
        told = []
        signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
        (folder.parent / STOP_FILE).write_text(str(int(signal.SIGINT)))
        while not told:
            threading.Event().wait(0.01)
        threading.Event().wait(4 * module.POLL_S)
        print("told", len(told))

    with pytest.raises(KeyboardInterrupt):
        run(folder, task)
    assert (folder / "report.txt").read_text() == "told 1\n"


def test_a_job_that_ends_before_it_can_say_so_is_interrupted(folder: Path) -> None:
    def task(cfg: DictConfig) -> None:
        (folder.parent / STOP_FILE).write_text(str(int(signal.SIGTERM)))
        threading.Event().wait()  # SIGTERM has its usual effect here

    with pytest.raises(Terminated):
        run(folder, task)
    state = read_state(folder)
    assert state is not None and state.status == "interrupted"


def test_other_processes_of_a_launcher_do_not_raise(folder: Path) -> None:
    (folder.parent / STOP_FILE).write_text("2")
    before = signal.getsignal(signal.SIGINT)
    try:
        Job(good, folder.parent, total=4, process=os.getpid() + 1)(OmegaConf.create({}))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (folder / "results.json").exists()


def test_the_outlook(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number, wall_s in ((0, 10.0), (1, 30.0)):
        other = folder.parent / str(number)
        new(other, number=number, status="ok", wall_s=wall_s)
    with caplog.at_level("INFO"):
        run(folder, good)
    assert "job 3 (4 of 4) done in" in caplog.text
    assert "; 1 left, about 13." in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"number": 1, "x": 2}'])
def test_a_job_file_that_is_not_ours_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(ConfigError, match=r"job\.json cannot be read"):
        list(job_folders(tmp_path))


def test_a_job_that_cannot_start_leaves_signals_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.threading, "active_count", lambda: 2)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises((AttributeError, TypeError, PicklingError)):  # a lambda cannot be spawned
        run(folder, lambda cfg: None)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
