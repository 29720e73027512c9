"""``servelab new``: for every kind, what it writes is installed, checked, tested and run as it stands."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from tests.torch.models import llama

from servelab.core.errors import PluginError
from servelab.core.families import KINDS
from servelab.plugins.commands.new.command import main
from servelab.plugins.commands.new.kinds import OFFERS

ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Pip = Callable[..., None]
WITH_TORCH = [kind for kind, offer in OFFERS.items() if offer.torch]
WITHOUT_TORCH = [kind for kind, offer in OFFERS.items() if not offer.torch]
RUFF = ("--isolated", "--line-length", "110")
MYPY = ("--strict", "--namespace-packages", "--follow-imports", "silent")


def name_of(kind: str) -> str:
    return f"fresh_{kind}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package of every kind."""
    folder = tmp_path_factory.mktemp("made")
    for kind in OFFERS:
        main([kind, name_of(kind), "--dir", str(folder / kind)])
    return folder


def test_what_they_import_exists(made: Path) -> None:
    """Also the modules of the core that are no part of ``core.api``, which move."""
    found = 0
    for file in made.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("servelab."):
                for one in node.names:
                    assert hasattr(import_module(str(node.module)), one.name), (
                        f"{file}: {node.module}.{one.name}"
                    )
                    found += 1
    assert found > 50


@pytest.fixture(scope="module")
def site(made: Path, tmp_path_factory: pytest.TempPathFactory, module_pip: Pip) -> Path:
    """All of them installed, as pip installs them."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("sources")
    for kind in OFFERS:  # pip leaves folders behind where it builds
        subprocess.run(["cp", "-r", str(made / kind), str(source / kind)], check=True)
    packages = [str(source / kind) for kind in OFFERS]
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    module_pip("install", *options, *packages)
    return target


@pytest.fixture
def env(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT / "src")])}


def _run(*command: object, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ----------------------------------------------------------------- the files


def test_ruff_finds_nothing(made: Path) -> None:
    """Settings of suites are plain dictionaries on the class: RUF012 would want each annotated."""
    ruff = (sys.executable, "-m", "ruff")
    for kind in OFFERS:  # in its own folder, as an author would: what is first-party depends on that
        rules = ("--select", "E,F,I,UP,B,SIM,RUF", "--ignore", "RUF012")
        _run(*ruff, "check", "--no-cache", *RUFF, *rules, ".", cwd=made / kind)
        _run(*ruff, "format", "--no-cache", "--check", *RUFF, ".", cwd=made / kind)


@pytest.mark.slow
def test_mypy_finds_nothing(made: Path, tmp_path: Path) -> None:
    sources = [made / kind / "src" / f"servelab_{name_of(kind)}" for kind in OFFERS]
    path = os.pathsep.join(str(folder) for folder in [ROOT / "src", *(source.parent for source in sources)])
    _run(
        sys.executable, "-m", "mypy", *MYPY, "--cache-dir", tmp_path / "cache", *sources,
        cwd=tmp_path, env={"MYPYPATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("kind", OFFERS)
def test_what_is_written(made: Path, kind: str) -> None:
    folder, name = made / kind, name_of(kind)
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    entries = project["project"]["entry-points"]
    assert entries["servelab"] == {name: f"servelab_{name}.plugin"}
    conf = folder / "src" / f"servelab_{name}" / "conf" / kind / f"{name}.yaml"
    if kind == "observer":  # chosen by a list: no group of Hydra's, so no YAML
        assert set(entries) == {"servelab"}
        assert not conf.parent.parent.exists()
    else:
        assert entries["servelab.configs"] == {name: f"servelab_{name}.conf"}
        assert yaml.safe_load(conf.read_text(encoding="utf-8")) == {"name": name}
    assert not list(folder.rglob("LICEN*"))
    texts = {path: path.read_text(encoding="utf-8") for path in folder.rglob("*") if path.is_file()}
    for path, text in texts.items():
        assert "$" not in text, path
        assert max(map(len, text.splitlines())) <= 120, path
    assert "YOUR IDEA" in texts[folder / "src" / f"servelab_{name}" / f"{kind}.py"]
    readme = texts[folder / "README.md"]
    assert f"servelab {OFFERS[kind].run.format(name=name)}" in readme
    suite = texts[folder / "tests" / f"test_{name}.py"]
    assert f"({OFFERS[kind].suite}):\n    plugin = " in suite


def test_every_kind_that_has_a_suite_can_be_made() -> None:
    from servelab.core.testing import SUITES

    assert {kind: suite.__name__ for kind, suite in SUITES.items()} == {
        kind: offer.suite for kind, offer in OFFERS.items()
    }
    assert list(OFFERS) == [kind for kind in KINDS if kind in OFFERS]


# ------------------------------------------------- installed, tested, listed


def _pytest(kinds: list[str], made: Path, tmp_path: Path, env: dict[str, str]) -> None:
    tests = [made / kind / "tests" for kind in kinds]
    _run(
        sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider", "--rootdir", made,
        "--import-mode", "importlib", *tests, cwd=tmp_path, env=env,
    )  # fmt: skip


def test_their_tests_pass_without_torch(made: Path, tmp_path: Path, env: dict[str, str]) -> None:
    """The suite of each kind, and its own test."""
    _pytest(WITHOUT_TORCH, made, tmp_path, env)


def test_their_tests_pass_with_torch(made: Path, tmp_path: Path, env: dict[str, str]) -> None:
    _pytest(WITH_TORCH, made, tmp_path, env)


def test_they_are_listed_with_their_package(run_py: Command, env: dict[str, str]) -> None:
    listed = json.loads(run_py("plugins", "--json", env=env).stdout)
    found = {(p["kind"], p["name"]): (p["provider"], p["disabled"]) for p in listed["plugins"]}
    for kind in OFFERS:
        provider = f"servelab-fresh-{kind} 0.1.0"
        assert found[kind, name_of(kind)] == (provider, None)
    assert listed["broken"] == []
    shown = run_py("show", "scheduler", "fresh_scheduler", env=env).stdout
    assert "requests that run at the same time, at most" in shown


def test_seven_of_them_are_one_run(run_py: Command, env: dict[str, str], tmp_path: Path) -> None:
    """Everything that decides in this run but the task is generated."""
    chosen = [f"+{kind}={name_of(kind)}" for kind in ("scheduler", "kvcache", "prefix", "cost")]
    chosen += [f"{kind}={name_of(kind)}" for kind in ("workload", "executor")]
    done = run_py(
        "+experiment=scripted", *chosen, "observers=[jsonl,fresh_observer]", "executor.num_kv_pages=40",
        "workload.num_requests=24", "engine.checks=full", "engine.max_model_len=256", "hydra.run.dir=out",
        env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out" / "fresh_observer.json").read_text(encoding="utf-8"))
    assert (counts["status"], counts["arrived"], counts["finished"]) == ("ok", 24, 24)
    assert counts["preempted"] > 0  # 40 pages are few for bursts of 8
    first = json.loads((tmp_path / "out" / "events.jsonl").read_text(encoding="utf-8").splitlines()[1])
    plugins = first["info"]["plugins"]
    for kind in ("scheduler", "kvcache", "prefix", "cost", "workload", "executor"):
        assert plugins[kind]["distribution"] == f"servelab-fresh-{kind}"


@pytest.mark.parametrize("kind", WITHOUT_TORCH)
def test_the_run_that_is_suggested(kind: str, made: Path, env: dict[str, str], tmp_path: Path) -> None:
    """As the README and the last lines of the command say it, through a shell."""
    command = f"{sys.executable} {ROOT / 'run.py'} {OFFERS[kind].run.format(name=name_of(kind))}"
    out = _run("sh", "-c", command, cwd=tmp_path, env=env)
    assert "request throughput" in out


def test_a_tiny_model_runs_with_quantizer_and_kernel(
    run_py: Command, env: dict[str, str], tmp_path: Path
) -> None:
    """The other two compute with torch: the suggested run, on a model of three layers."""
    folder = tmp_path / "tiny"
    llama(3).save_pretrained(folder)
    _tokenizer(folder)
    done = run_py(
        "model=local", f"model.path={folder}", "workload=synthetic", "workload.with_prompt_ids=true",
        "workload.num_requests=3", "workload.prompt_length={law: constant, value: 9}",
        "workload.output_length={law: constant, value: 4}", "executor.num_kv_pages=32",
        "+quant=fresh_quant", "+kernel=fresh_kernel", "kernel.query_block=4", "quality.max_tokens=0",
        "engine.max_model_len=64", "observers=[report]", env=env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "3 completed" in done.stdout


def _tokenizer(folder: Path) -> None:
    import tokenizers
    from tokenizers import models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w96", unk_token="w0").save_pretrained(folder)


# ------------------------------------------------------------- the command


def test_the_command_says_what_to_do_next(run_py: Command, tmp_path: Path) -> None:
    done = run_py("new", "scheduler", "mine", "--package", "lab_ideas")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "scheduler 'mine' is in lab-ideas:"
    steps = [line.strip().partition("   #")[0] for line in lines[lines.index("Next:") + 1 :]][:5]
    assert steps == [
        "cd lab-ideas",
        'pip install -e ".[test]"',
        "pytest",
        "servelab plugins scheduler",
        "servelab +experiment=scripted +scheduler=mine",
    ]
    written = {p.relative_to(tmp_path / "lab-ideas").as_posix() for p in _files(tmp_path / "lab-ideas")}
    assert written == {line.strip() for line in lines[1 : lines.index("")]}
    assert "lab_ideas.scheduler:Mine" in (tmp_path / "lab-ideas/src/lab_ideas/plugin.py").read_text("utf-8")
    again = run_py("new", "scheduler", "mine", "--package", "lab_ideas")
    assert (again.returncode, again.stdout) == (1, "")
    assert "lab-ideas exists already" in again.stderr


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_kinds_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[::2]] == list(OFFERS)
    assert all("starts as:" in line for line in lines[1::2])


@pytest.mark.parametrize(
    ("args", "what", "do"),
    [
        ([], "what is to be made?", "servelab new scheduler my_idea"),
        (["kernel"], "what is to be made?", "servelab new kernel my_idea"),
        (["schedulr", "x"], "no 'schedulr'", "did you mean 'scheduler'"),
        (["spec", "x"], "'spec' is a kind of plugin, but", "known: cost, executor"),
        (["scheduler", "vllm_v1"], "exists already", "'my_vllm_v1'"),
        (["scheduler", "none"], "'none'", "choose another"),
        (["scheduler", "My-Idea"], "'My-Idea' cannot be", "servelab new scheduler my_idea"),
        (["scheduler", "2fast"], "'2fast' cannot be", "servelab new scheduler my_2fast"),
        (["scheduler", "class"], "'class' cannot be", "servelab new scheduler my_class"),
        (["scheduler", "x", "--package", "a.b"], "'a.b' cannot be", "--package a_b"),
        (["scheduler", "x", "--package", "json"], "a module 'json' already", "--package json_scheduler"),
        (["scheduler", "x", "--package", "servelab"], "a module 'servelab'", "--package servelab_scheduler"),
    ],
)
def test_names_that_cannot_be(
    args: list[str], what: str, do: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError) as error:
        main(args)
    assert what in error.value.what
    assert do in error.value.do
    assert list(tmp_path.iterdir()) == []


def test_a_name_whose_package_is_installed(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError, match="module 'servelab_fresh_cost' already"):
        main(["cost", "other", "--package", "servelab_fresh_cost"])
    with pytest.raises(PluginError, match="a plugin package 'fresh_cost' is installed already"):
        main(["scheduler", "y", "--package", "fresh_cost"])
    with pytest.raises(PluginError, match="scheduler 'fresh_scheduler' exists already") as error:
        main(["scheduler", "fresh_scheduler"])
    assert "servelab-fresh-scheduler 0.1.0" in error.value.why


def test_nothing_half_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up in the middle; a folder that is there is not touched; a link is not followed."""
    from servelab.plugins.commands.new import write

    monkeypatch.chdir(tmp_path)
    real = Path.write_text

    def full(self: Path, *args: str, **kwargs: str) -> int:
        if self.name == "scheduler.py":
            raise OSError(28, "No space left on device", str(self))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(write.Path, "write_text", full)
        with pytest.raises(PluginError, match="could not be written") as error:
            main(["scheduler", "x"])
    assert error.value.why == "No space left on device"
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "there").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for there in ("there", "dangling"):
        with pytest.raises(PluginError, match=f"{there} exists already"):
            main(["scheduler", "x", "--dir", there])
    assert list((tmp_path / "there").iterdir()) == []
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(PluginError, match="could not be written"):
        main(["scheduler", "x", "--dir", "file/below"])


def test_a_folder_deep_down(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "with space"
    main(["cost", "x", "--dir", str(target)])
    assert (target / "pyproject.toml").is_file()
    assert target.stat().st_mode & 0o077, "readable as other folders are"
