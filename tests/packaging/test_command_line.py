"""The command line as a process: what it loads, prints, returns, and how sweeps end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ("observers=[]", "workload.num_requests=3", "hydra.run.dir=out")

LOOK = """
import runpy, sys
sys.argv = ["run.py", *{args!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as exc:
    assert not exc.code, exc.code
parts = {{name.split(".")[0] for name in sys.modules}}
heavy = parts & {{"torch", "triton", "numpy", "transformers"}}
loaded = [n for n in sys.modules if n.startswith("servelab.plugins.") and n.count(".") >= 3]
print("LOADED", sorted(heavy), sorted(loaded), "hydra" in parts)
"""


@pytest.mark.parametrize(
    ("args", "hydra"),
    [
        (["--help"], False),
        (["--cfg", "job"], True),
        (["-sc", "query=bash"], True),
        (["plugins"], False),
        (["plugins", "--json"], False),
        (["--version"], False),
    ],
)
def test_looking_loads_no_plugin(args: list[str], hydra: bool, repository: Path, tmp_path: Path) -> None:
    code = LOOK.format(args=args, script=str(repository / "run.py"))
    env = {**os.environ, "COMP_LINE": "run.py sched", "COMP_POINT": "12"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"LOADED [] [] {hydra}"


def test_help_lists_groups_and_examples(run_py: Command) -> None:
    text = run_py("--help").stdout
    for line in ("+scheduler=", "executor=    scripted", "python run.py plugins", "SERVELAB_TRACEBACK"):
        assert line in text


def test_plugins_and_show(run_py: Command) -> None:
    table = run_py("plugins").stdout
    assert "scheduler  vllm_v1" in table
    assert "arXiv:2309.06180" in table
    listed = json.loads(run_py("plugins", "scheduler", "--json").stdout)
    assert {p["kind"] for p in listed["plugins"]} == {"scheduler"}
    shown = run_py("show", "kvcache", "paged").stdout
    for part in (
        "PagedAttention",
        "page_tokens",
        "16",
        "deviations:",
        "+kvcache=paged",
        "kvcache.block_table",
    ):
        assert part in shown
    schema = json.loads(run_py("show", "kvcache", "paged", "--json").stdout)
    assert schema["settings"]["properties"]["page_tokens"]["default"] == 16
    wrong = run_py("show", "kvcache", "pagd")
    assert wrong.returncode == 1
    assert "did you mean 'paged'?" in wrong.stderr
    assert run_py("plugins", "kvcahce").returncode == 1


def test_results_on_stdout_and_logs_on_stderr(run_py: Command) -> None:
    done = run_py("-p", "no:nobody", *SHORT, "observers=[report]")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ServeLab run\n")
    assert "no plugin package has that name" in done.stderr
    assert "nobody" not in done.stdout


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("+scheduler=vllm_v1", "+executor=scripted"), ""),
        (("scheduler=vllm_v1", "executor=scripted"), ""),
        (("scheduler={name:vllm_v1,max_num_seqs:3}", "quant=null", "hardware=null", "slo.ttft_ms=5"), ""),
        (("shceduler=vllm_v1",), "did you mean 'scheduler'?"),
        (("scheduler=fast",), "unknown scheduler 'fast'"),
        (("router=rr",), "unknown router 'rr'"),
        (
            ("scheduler.max_num_seq=3",),
            "scheduler.max_num_seq: unknown field (got 3); did you mean 'max_num_seqs'?",
        ),
        (("seed=???",), "Missing mandatory value: seed"),
        (("executor.num_kv_pages=3",), "4096 tokens need 256 pages of 16 tokens, the pool has 3"),
    ],
)
def test_spellings_and_mistakes(run_py: Command, args: tuple[str, ...], text: str) -> None:
    done = run_py(*SHORT, *args)
    assert done.returncode == (1 if text else 0), done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_traceback_on_demand(run_py: Command) -> None:
    done = run_py(*SHORT, "executor.num_kv_pages=3", env={"SERVELAB_TRACEBACK": "1"})
    assert done.returncode == 1
    assert "core/compose.py" in done.stderr


def test_sweep_finishes_the_good_jobs(run_py: Command, tmp_path: Path) -> None:
    done = run_py(
        "-m", "seed=0,-1", "hydra/launcher=joblib", "workload.num_requests=3", "observers=[jsonl]",
        "hydra.sweep.dir=sweep", "hydra.launcher.n_jobs=2",
    )  # fmt: skip
    assert done.returncode == 1
    assert "seed: Input should be greater than or equal to 0 (got -1)" in done.stderr
    last = (tmp_path / "sweep" / "0" / "events.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(last)["status"] == "ok"
    assert not (tmp_path / "sweep" / "1" / "events.jsonl").exists()


def test_sweep_over_a_technique(run_py: Command, tmp_path: Path) -> None:
    done = run_py("-m", "scheduler=vllm_v1", "kvcache.page_tokens=8,16", *SHORT, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]


def test_interrupt_leaves_a_whole_log(repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "out" / "events.jsonl"
    process = subprocess.Popen(
        [
            sys.executable,
            str(repository / "run.py"),
            "clock=wall",
            "workload.request_rate=2",
            "hydra.run.dir=out",
        ],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while not log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "PARTIAL (interrupted" in stdout
    assert stderr == "servelab: interrupted\n"
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["status"] == "interrupted"
    assert (tmp_path / "out" / "results.json").exists()


def test_a_run_goes_on_without_a_broken_package(run_py: Command, tmp_path: Path) -> None:
    """Even one whose YAML cannot be looked for: Hydra alone would stop at it."""
    info = tmp_path / "site" / "fake_bad-0.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake-bad\nVersion: 0.9\n", encoding="utf-8")
    entries = "[servelab]\nbad = fake_bad.plugin\n[servelab.configs]\nbad = fake_bad.conf\n"
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    package = tmp_path / "site" / "fake_bad"
    package.mkdir()
    (package / "__init__.py").write_text("import sys; sys.exit('gone')\n", encoding="utf-8")
    env = {"PYTHONPATH": str(tmp_path / "site")}
    done = run_py(*SHORT, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plugin package not loaded: bad (fake-bad 0.9): ") == 2
    assert "it called sys.exit('gone')" in done.stderr
    listed = run_py("plugins", env=env)
    assert listed.returncode == 0
    assert "\nNot loaded:\n  bad (fake-bad 0.9): fake_bad.plugin: it called" in listed.stdout
    blocked = run_py("-p", "no:bad", *SHORT, env=env)
    assert (blocked.returncode, blocked.stderr) == (0, "")
