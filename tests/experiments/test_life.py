"""What a task of many runs does when runs fail, when it is interrupted, and when it is taken up again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import ROOT, Command
from tests.experiments.conftest import Do

from servelab.core.errors import ServeLabError
from servelab.plugins.tasks import pastfuture_toy as toy

SMALL = {"name": "pastfuture_toy", "requests": 20, "scale": 32, "laws": ["D3"]}


def test_a_run_that_fails_is_told_and_the_rest_is_there(
    do: Do, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = toy.POLICIES
    broken = toy.Policy("oracle", {"name": "nobody"}, toy.POLICIES[0].paper)
    monkeypatch.setattr(toy, "POLICIES", (broken, *whole[1:]))
    with pytest.raises(ServeLabError, match=r"1 of 10 runs failed(.|\n)*D3 oracle seed 0(.|\n)*nobody"):
        do(SMALL)
    told = json.loads((tmp_path / "run" / "experiment.json").read_text())
    rows = {(row["name"], row["unit"]): row for row in told["rows"]}
    assert rows["D3 oracle", "% KV use"]["ours"] is None
    assert rows["D3 evictions of oracle", "%"]["holds"] is None
    assert rows["D3 aggressive 99 %", "% KV use"]["ours"] > 10
    assert [one["status"] for one in told["cells"]].count("failed") == 1
    assert "FAILED D3 oracle seed 0" in capsys.readouterr().out
    # mended, only what is missing is measured
    monkeypatch.setattr(toy, "POLICIES", whole)
    again = do({**SMALL, "resume": str(tmp_path / "run")}, "again")
    assert again["status"] == "ok" and len(again["cells"]) == 10


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, run_py: Command) -> None:
    words = ["+experiment=pastfuture_toy", "task.requests=20", "task.scale=32", "task.processes=2"]
    folder = tmp_path / "first"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *words, "task.seeds=50", f"hydra.run.dir={folder}"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    while len(list(folder.glob("cells/*.json"))) < 3 and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert "INTERRUPTED" in out
    told = json.loads((folder / "experiment.json").read_text())
    assert told["status"] == "interrupted" and 3 <= len(told["cells"]) < 1500
    kept = {one["key"] for one in told["cells"]}
    assert kept == {path.stem for path in folder.glob("cells/*.json")}
    more = run_py(*words, "task.laws=[D1]", f"task.resume={folder}", f"hydra.run.dir={tmp_path / 'second'}")
    assert more.returncode == 0, more.stderr
    told = json.loads((tmp_path / "second" / "experiment.json").read_text())
    assert told["status"] == "ok" and len(kept & {one["key"] for one in told["cells"]}) >= 3
    assert more.stderr.count("taken from the earlier run") == len(
        kept & {one["key"] for one in told["cells"]}
    )


def test_a_reader_that_has_gone_ends_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    words = ["+experiment=pastfuture_toy", "task.requests=20", "task.scale=32", "task.laws=[D3]"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, f"hydra.run.dir={tmp_path / 'run'}"],
        cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    os.close(writer)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "experiment.html").exists()
