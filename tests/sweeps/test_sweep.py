"""Whole sweeps from the command line: failures, resume, interruption, parallel jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from tests.sweeps.folders import leave

from servelab.core.errors import ConfigError
from servelab.plugins.sweeps import sweeper
from servelab.plugins.sweeps.folder import STOP_FILE, job_folders

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SWEEP = ("-m", "+experiment=scripted", "workload.num_requests=4,0", "scheduler=vllm_v1,conservative")


def states(folder: Path) -> dict[str, str]:
    return {
        path.parent.name: json.loads(path.read_text())["status"] for path in sorted(folder.glob("*/job.json"))
    }


def test_a_sweep_with_failures_and_its_resume(run_py: Command, tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / STOP_FILE).write_text("2")  # of a sweep that was killed while it ended
    done = run_py(*SWEEP, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert states(folder) == {"0": "ok", "1": "ok", "2": "failed", "3": "failed"}
    assert done.stdout.startswith("Sweep of 4 jobs\n")
    assert done.stdout.splitlines()[-1].startswith(f"artefacts: {folder}: sweep.md")
    lines = done.stderr.splitlines()
    assert "INFO servelab.sweep: job 0 (1 of 4) began: workload.num_requests=4 scheduler=vllm_v1" in lines
    assert sum("INFO servelab.sweep: job 1 (2 of 4) done in" in line for line in lines) == 1
    assert "servelab: 2 of 4 jobs failed" in lines
    assert "job 3: experiment=scripted workload.num_requests=0 scheduler=conservative" in lines
    assert lines.count("    - workload.num_requests: Input should be greater than or equal to 1 (got 0)") == 2
    assert f"  log:   {folder}/3: error.txt, and the .log beside it" in lines
    assert "Traceback" not in done.stderr and "HYDRA_FULL_ERROR" not in done.stderr
    assert (folder / "0" / "report.txt").read_text().startswith("ServeLab run\n")
    before = (folder / "0" / "events.jsonl").stat().st_mtime_ns

    other = run_py(*SWEEP, "seed=1", "hydra.sweep.dir=sweep")
    assert other.returncode == 1
    assert "job 0 of this folder has other settings; nothing was run" in other.stderr
    assert "seed: 0 there, 1 now" in other.stderr
    assert states(folder) == {"0": "ok", "1": "ok", "2": "failed", "3": "failed"}

    again = run_py(*SWEEP, "hydra.sweep.dir=sweep")
    assert again.returncode == 1
    assert again.stderr.count("skipped, finished earlier") == 2
    assert f"job 2 (3 of 4): files of an earlier try are now in {folder}/2/earlier-1" in again.stderr
    assert (folder / "0" / "events.jsonl").stat().st_mtime_ns == before
    assert [line.split()[-1] for line in again.stdout.splitlines() if line[:3].strip().isdigit()] == [
        "ok", "ok", "FAILED", "FAILED"
    ]  # fmt: skip


def test_runs_that_are_no_jobs_are_not_touched(run_py: Command, tmp_path: Path) -> None:
    old = tmp_path / "sweep" / "1"
    old.mkdir(parents=True)
    (old / "events.jsonl").write_text("mine")
    done = run_py(*SWEEP, "hydra.sweep.dir=sweep")
    assert done.returncode == 1
    assert "holds files that no sweep of ours left there; nothing was run" in done.stderr
    assert "found events.jsonl" in done.stderr
    assert states(tmp_path / "sweep") == {}
    same = run_py(*SWEEP, "hydra.sweep.dir=same", "hydra.sweep.subdir=x")
    assert "jobs 0 and 1 have the same folder; nothing was run" in same.stderr


@pytest.mark.parametrize(
    ("number", "status", "parallel"),
    [(signal.SIGINT, 130, ()), (signal.SIGTERM, 143, ()),
     (signal.SIGINT, 130, ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"))],
)  # fmt: skip
def test_interruption(
    repository: Path, tmp_path: Path, run_py: Command, number: int, status: int, parallel: tuple[str, ...]
) -> None:
    """As from a terminal, to all processes: jobs that run end as partial, none begins, a resume goes on."""
    folder, names = tmp_path / "sweep", "012" if parallel else "01"
    requests = 24 if number == signal.SIGTERM else 200  # the one that is resumed is the short one
    sweep = ("-m", "+experiment=scripted", "clock=wall", f"seed={','.join(names)}", "hydra.sweep.dir=sweep",
             f"workload.num_requests={requests}", "workload.request_rate=6", *parallel)  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(repository / "run.py"), *sweep],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    running = {"0", "1"} if parallel else {"0"}
    try:
        while process.poll() is None and not all((folder / n / "events.jsonl").exists() for n in running):
            time.sleep(0.05)
        os.killpg(process.pid, number)
        stdout, stderr = process.communicate()
    finally:
        process.kill()
    assert process.returncode == status, stderr
    assert states(folder) == {n: "interrupted" if n in running else "waiting" for n in names}
    for n in running:
        found = json.loads((folder / n / "results.json").read_text())
        assert found["servelab"]["run"]["status"] == "interrupted"
    assert "PARTIAL" in stdout and "not run" in stdout
    assert f"hydra.sweep.dir={folder} runs these and skips the others." in stderr
    assert stderr.splitlines()[-1] == f"servelab: {'terminated' if status == 143 else 'interrupted'}"
    assert "Traceback" not in stderr
    assert "once more to leave" not in stderr  # one signal reached each job once
    if number == signal.SIGTERM:
        assert run_py(*sweep).returncode == 0
        assert set(states(folder).values()) == {"ok"}


# --- trouble -----------------------------------------------------------------------------------------------


def test_one_sweep_at_a_time(tmp_path: Path) -> None:
    held = pytest.raises(ConfigError, match="another sweep is running")
    with sweeper._alone(tmp_path), held, sweeper._alone(tmp_path):
        pass
    with sweeper._alone(tmp_path):
        pass


def test_all_that_failed_are_told(tmp_path: Path) -> None:
    leave(tmp_path, 0, "seed=0")
    leave(tmp_path, 1, "+seed=1", status="running")
    crash = "servelab: bad luck\n  do:    wait\n\nTraceback (most recent call last):\n  here\n"
    (leave(tmp_path, 2, "seed=2", status="failed", reason="bad luck") / "error.txt").write_text(crash)
    leave(tmp_path, 3, "seed=3", status="waiting")
    text = sweeper._trouble(list(job_folders(tmp_path)), tmp_path)
    assert text.startswith("servelab: 2 of 4 jobs failed\n\njob 1: seed=1\n  the process that looked")
    assert "job 2: seed=2\n  bad luck\n    do:    wait\n  log: " in text
    assert "job 0" not in text and "job 3" not in text and "Traceback" not in text
    assert "3 of 4 jobs are not finished." in text
    assert sweeper._trouble(list(job_folders(tmp_path))[:1], tmp_path) == ""


# --- side by side ------------------------------------------------------------------------------------------


def limited(n_jobs: int, *overrides: str, executor: str = "torch", jobs: int = 3) -> int:
    launcher = SimpleNamespace(joblib={"n_jobs": n_jobs})
    config = OmegaConf.create({"hydra": {"overrides": {"hydra": list(overrides)}}})
    sweeper._limit_parallel(launcher, config, [{"executor": {"name": executor}}] * jobs)
    return launcher.joblib["n_jobs"]


def test_jobs_that_run_a_model_run_one_at_a_time_unless_asked(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert limited(-1) == 1
    assert "hydra.launcher.n_jobs=N runs N side by side" in caplog.text
    caplog.clear()
    assert limited(2) == 2
    assert limited(-1, "hydra.launcher.n_jobs=-1", jobs=99) == 8
    assert limited(-1, executor="scripted", jobs=99) == 8
    assert limited(-1, executor="scripted") == 3  # no worker without a job
    assert limited(-3, executor="scripted", jobs=99) == 6
    assert limited(-1, executor="unknown", jobs=99) == 8
    assert not caplog.text


def test_launchers_without_such_a_setting_are_left_alone() -> None:
    sweeper._limit_parallel(object(), OmegaConf.create({}), [{"executor": {"name": "torch"}}])


STRANGE = """
from hydra.plugins.sweeper import Sweeper

class Counts(Sweeper):
    def __init__(self, unit="jobs", params=None):
        self.unit, self.params = unit, params
    def setup(self, *, hydra_context, task_function, config):
        self.config = config
    def sweep(self, arguments):
        print(arguments, self.unit, type(self.params).__name__, self.config.seed)
"""


def test_the_configuration_names_a_sweeper_of_any_package(run_py: Command, tmp_path: Path) -> None:
    (tmp_path / "strange.py").write_text(STRANGE)
    (tmp_path / "hydra" / "sweeper").mkdir(parents=True)
    file = tmp_path / "hydra" / "sweeper" / "strange.yaml"
    file.write_text("_target_: strange.Counts\nunit: runs\nparams: {a: 1}\n")
    args = ("-m", f"--config-dir={tmp_path}", "hydra/sweeper=strange", "seed=3,4", "hydra.sweep.dir=sweep")
    done = run_py(*args, env={"PYTHONPATH": str(tmp_path)})
    assert (done.stdout, done.returncode) == ("['seed=3,4'] runs dict 0\n", 0), done.stderr

    file.write_text("_target_: strange.Nobody\n")
    done = run_py(*args, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "Error locating target 'strange.Nobody'" in done.stderr


def test_hydras_own_sweeper_can_be_chosen(run_py: Command, tmp_path: Path) -> None:
    job = ("-m", "+experiment=scripted", "workload.num_requests=2", "observers=[]", "seed=0,1")
    done = run_py(*job, "hydra/sweeper=basic", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
