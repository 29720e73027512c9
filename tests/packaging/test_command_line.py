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

from servelab.core.cli import _explained
from servelab.core.errors import ServeLabError
from servelab.core.logs import read_log
from servelab.core.overrides import USUAL_OBSERVERS

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SCRIPTED = "+experiment=scripted"
SHORT = (SCRIPTED, "observers=[]", "workload.num_requests=3", "hydra.run.dir=out")

LOOK = """
import runpy, sys
sys.argv = ["run.py", *{args!r}]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as exc:
    assert not exc.code, exc.code
parts = {{name.split(".")[0] for name in sys.modules}}
heavy = parts & {{"torch", "triton", "numpy", "transformers"}}
commands = "servelab.plugins.commands."  # the command that looks is one itself
loaded = [n for n in sys.modules if n.startswith("servelab.plugins.") and n.count(".") >= 3]
loaded = [n for n in loaded if not n.startswith(commands)]
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


@pytest.mark.parametrize(
    "setting", ["workload.num_requests=0", "executor.num_kv_pages=1", "workload.nonsense=1"]
)
def test_an_error_is_our_words_and_nothing_else(setting: str, run_py: Command) -> None:
    done = run_py(SCRIPTED, "observers=[]", setting)
    assert done.returncode == 1 and done.stdout == ""
    first, *more = done.stderr.rstrip().splitlines()
    assert first.startswith("servelab: ") and all(line.startswith("  ") for line in more)
    assert more[-1].startswith("  do:")


def test_help_lists_groups_and_examples(run_py: Command) -> None:
    text = run_py("--help").stdout
    assert "executor=sim model=llama2_7b hardware=a100_80g workload=burstgpt" in text
    schedulers = next(line for line in text.splitlines() if line.startswith("  +scheduler="))
    assert schedulers.endswith(", vllm_v1")
    for line in (
        "+kernel=      sdpa",
        " executor=    scripted, sim, torch",
        " model=       deepseek_v3_like, hub, llama2_13b, llama2_70b, llama2_7b, ",
        "+hardware=    a100_40g, a100_80g, ",
        "+experiment=  orca_static, ",
        "python run.py plugins",
        "SERVELAB_TRACEBACK",
    ):
        assert line in text
    examples = [line.split()[2] for line in text.splitlines() if line.startswith("  python run.py +exp")]
    assert examples == [SCRIPTED]
    assert text.index("the default run: a real model") < text.index(SCRIPTED)
    assert max(map(len, text.partition("Choices")[0].splitlines())) <= 110


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


def test_show_is_readable(run_py: Command) -> None:
    shown = run_py("show", "workload", "synthetic").stdout
    assert max(map(len, shown.splitlines())) <= 100
    assert "prompt_length       a length law (constant, uniform, normal" in shown
    assert "servelab.plugins.workloads._laws" not in shown
    assert "process             poisson | gamma | weibull | constant; default poisson" in shown


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ("engine", "max_model_len       int >= 1 or null; default null"),
        ("slo", "ttft_ms  float > 0 or null; default null"),
        ("model", "layers             int >= 1 or null; default null"),
        ("clock", "name  virtual | wall; default virtual"),
        ("hardware", "memory_bytes           int > 0 or null; default null"),
    ],
)
def test_sections_are_shown(run_py: Command, section: str, line: str) -> None:
    shown = run_py("show", section)
    assert shown.returncode == 0, shown.stderr
    assert line in shown.stdout
    assert max(map(len, shown.stdout.splitlines())) <= 100
    assert section in run_py("--help").stdout


def test_show_says_where_a_model_is(run_py: Command) -> None:
    shown = " ".join(run_py("show", "model").stdout.split())
    assert "left at null are none. set with:" in shown  # the whole sentence
    for field, about in (
        ("source none | path | wheel | hub; default none", "Where the weights are"),
        ("path str or null; default null", "With source path: a folder in Hugging Face format, or a GGUF"),
        ("repo str or null; default null", "With source hub: the repository, OWNER/NAME"),
        ("wheel str or null; default null", "With source wheel: the requirement that pins it"),
    ):
        assert f"{field} {about}" in shown


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("show", "engin"), "did you mean 'engine'?"),
        (("show", "engine", "x"), "do:    servelab show engine"),
        (("show", "scheduler"), ", vllm_v1"),
    ],
)
def test_show_says_what_it_can_show(run_py: Command, args: tuple[str, ...], text: str) -> None:
    done = run_py(*args)
    assert done.returncode == 1
    assert text in done.stderr


def test_the_usual_observers_show_no_progress_into_a_pipe(run_py: Command, tmp_path: Path) -> None:
    """Only the run card says that it was there: output and files are those of the log and the report."""
    short = [arg for arg in SHORT if not arg.startswith("observers=")]
    usual = run_py(*short)
    assert (usual.returncode, usual.stderr) == (0, "")
    first = json.loads((tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()[1])
    assert [one["name"] for one in first["info"]["plugins"]["observer"]] == list(USUAL_OBSERVERS)
    assert "progress" in USUAL_OBSERVERS
    before = run_py(*short, "observers=[jsonl,report]", "hydra.run.dir=before")

    def lines(stdout: str) -> list[str]:
        kept = stdout.splitlines()
        assert sum("observer   progress" in line for line in kept) <= 1
        own = ("  took ", "artefacts: ", "  observer   progress")  # real time differs
        return [line for line in kept if not line.startswith(own)]

    assert lines(usual.stdout) == lines(before.stdout)
    assert (tmp_path / "before" / "plan.jsonl").read_bytes() == (tmp_path / "out" / "plan.jsonl").read_bytes()
    names = [sorted(f.name for f in (tmp_path / name).iterdir()) for name in ("out", "before")]
    assert names[0] == names[1]


def test_results_on_stdout_and_logs_on_stderr(run_py: Command) -> None:
    done = run_py(*SHORT, "observers=[report]")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ServeLab run\n")


def test_levels_of_logging(run_py: Command) -> None:
    told = run_py("-v", *SHORT)
    assert told.returncode == 0
    lines = told.stderr.splitlines()
    assert any(
        line.startswith("DEBUG servelab.core.compose: scheduler vllm_v1 of servelab") for line in lines
    )
    assert any(line.startswith("DEBUG servelab.core.compose: KV pool of 512 pages: ") for line in lines)
    assert all(line.startswith("DEBUG servelab.") for line in lines)
    both = run_py("-q", "-v", *SHORT)
    assert both.returncode == 1
    assert "ask for different levels of logging" in both.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("-p", "foo"), "write -p no:foo to leave foo out; Hydra's own option is written --package"),
        (("-pfoo",), "write -p no:foo"),
        (("-p",), "-p takes no:NAME"),
        (("-p", "no:servelab.schduler"), "did you mean 'servelab.schedulers'?"),
        (("-p", "no:servelab.schedulers"), "package left out by -p no:servelab.schedulers"),
    ],
)
def test_leaving_packages_out(run_py: Command, args: tuple[str, ...], text: str) -> None:
    done = run_py(*args, *SHORT)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("args", "status"),
    [
        ("plugins", 0),
        ("--help", 0),
        ("--version", 0),
        ("--cfg job", -signal.SIGPIPE),
        (f"{SCRIPTED} hydra.run.dir=out", 0),
    ],
)
def test_a_reader_that_goes_away(repository: Path, tmp_path: Path, args: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, str(repository / "run.py"), *args.split()],
            cwd=tmp_path, stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (status, "")
    if "out" in args:
        for name in ("events.jsonl", "plan.jsonl", "results.json"):
            assert (tmp_path / "out" / name).stat().st_size


def test_a_run_again_from_its_folder(run_py: Command, tmp_path: Path) -> None:
    """Bounds from a file and by class, a plugin with settings: all of it is in the configuration it left."""
    changed = ("scheduler=pastfuture", "slo=chat", "slo.classes.online.tbt_ms=20", "prefix=hash")
    done = run_py(SCRIPTED, "workload.num_requests=8", *changed, "hydra.run.dir=out")
    assert (done.returncode, done.stderr) == (0, "")
    again = run_py("--config-dir", "out", "--config-name", "resolved_config", "hydra.run.dir=again")
    assert (again.returncode, again.stderr) == (0, "")
    for name in ("resolved_config.yaml", "plan.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name
    seeded = run_py(
        "--config-dir", "out", "--config-name", "resolved_config", "hydra.run.dir=other", "seed=1"
    )
    assert seeded.returncode == 0, seeded.stderr
    assert (tmp_path / "other" / "plan.jsonl").read_bytes() != (tmp_path / "out" / "plan.jsonl").read_bytes()
    env = json.loads((tmp_path / "out" / "env.json").read_text(encoding="utf-8"))
    assert env["overrides"][2:] == [
        "+scheduler=pastfuture",
        "slo=chat",
        "++slo.classes.online.tbt_ms=20",
        "+prefix=hash",
    ]


def test_two_runs_do_not_share_a_folder(run_py: Command, tmp_path: Path) -> None:
    short = (SCRIPTED, "workload.num_requests=3", "observers=[jsonl,report]")
    assert run_py(*short, "hydra.run.dir=out").returncode == 0
    before = (tmp_path / "out" / "events.jsonl").read_bytes()
    again = run_py(*short, "hydra.run.dir=out", "seed=1")
    assert again.returncode == 1
    assert "will not write over another run" in again.stderr
    assert (tmp_path / "out" / "events.jsonl").read_bytes() == before
    for _ in range(2):
        assert run_py(*short).returncode == 0
    (day,) = (tmp_path / "outputs").iterdir()
    names = [folder.name for folder in day.iterdir()]
    assert len(names) == 2
    assert all(len(name) == len("hh-mm-ss-ffffff") for name in names)


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
        (("seed=???",), "seed must be stated"),
        (("model=local",), "add model.path=... to the command line"),
        (("hydra.run.dir=/dev/null/out",), "/dev/null: Not a directory"),
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
        "-m", SCRIPTED, "seed=0,-1", "hydra/launcher=joblib", "workload.num_requests=3", "observers=[jsonl]",
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
    files = sorted(p.name for p in (tmp_path / "sweep").iterdir())
    assert files == [".lock", "0", "1", "multirun.yaml", "sweep.csv", "sweep.json", "sweep.md"]
    assert "Without results.json: 0, 1; the observer 'report' writes it." in done.stdout


def _wall_run(repository: Path, folder: Path, signal_number: int, at_s: float) -> tuple[int, str, str]:
    """Start a run on the wall clock, send it a signal once its log tells of that time."""
    process = subprocess.Popen(
        [
            sys.executable,
            str(repository / "run.py"),
            SCRIPTED,
            "clock=wall",
            "workload.request_rate=2",
            "hydra.run.dir=out",
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = folder / "out" / "events.jsonl"
    try:
        while process.poll() is None:
            written = log.read_text("utf-8").rpartition("\n")[0] if log.exists() else ""
            if written and json.loads(written.splitlines()[-1])["t_ns"] >= at_s * 1e9:
                break
            time.sleep(0.05)
        process.send_signal(signal_number)
        stdout, stderr = process.communicate()
    finally:
        process.kill()
    return process.returncode, stdout, stderr


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_interrupt_leaves_a_whole_log(
    repository: Path, tmp_path: Path, number: int, status: int, word: str
) -> None:
    returncode, stdout, stderr = _wall_run(repository, tmp_path, number, 0)
    assert returncode == status, stderr
    assert "PARTIAL (interrupted" in stdout
    assert stderr == f"servelab: {word}\n"
    log = tmp_path / "out" / "events.jsonl"
    assert json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["status"] == "interrupted"
    assert (tmp_path / "out" / "results.json").exists()


def test_a_killed_run_leaves_a_readable_log(repository: Path, tmp_path: Path) -> None:
    returncode, _, _ = _wall_run(repository, tmp_path, signal.SIGKILL, 1)
    assert returncode == -signal.SIGKILL
    records = list(read_log(tmp_path / "out" / "events.jsonl", allow_truncated=True))
    assert records[0].ev == "run_started"
    assert records[-1].t_ns >= 1_000_000_000


def test_a_run_goes_on_without_a_broken_package(
    run_py: Command, tmp_path: Path, blocking_all_but: Callable[..., None]
) -> None:
    """Even one whose YAML cannot be looked for: Hydra alone would stop at it."""
    blocking_all_but("bad")
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
    blocked = run_py("-p", "no:bad", *SHORT, "hydra.run.dir=blocked", env=env)
    assert (blocked.returncode, blocked.stderr) == (0, "")


def test_used_up_memory_is_no_plugins_fault() -> None:
    try:
        try:
            raise MemoryError
        except MemoryError as exc:
            raise ServeLabError("observer 'report' raised MemoryError", do="mend the plugin") from exc
    except ServeLabError as exc:
        said = str(_explained(exc))
    assert "no more memory" in said and "observer 'report'" in said and "workload.num_requests" in said
    assert "mend" not in said
    assert "no more memory" in str(_explained(MemoryError()))
    plain = ServeLabError("another")
    assert _explained(plain) is plain
