"""``servelab doctor``: each thing that can be wrong around a run is found, named, and has a remedy."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from packaging.requirements import Requirement
from tests.packaging.strangers import SCHEDULERS, install

from servelab.core.findings import Finding
from servelab.core.registry import Registry
from servelab.plugins.commands.doctor import command
from servelab.plugins.commands.doctor.configs import config_findings, default_model
from servelab.plugins.commands.doctor.here import environment_findings, folder_findings, plot_findings
from servelab.plugins.commands.doctor.libraries import Wanted, library_findings, read_wanted
from servelab.plugins.commands.doctor.packages import package_findings, plugin_findings
from servelab.plugins.executors.torch import diagnose

Command = Callable[..., "subprocess.CompletedProcess[str]"]


def found(findings: Iterable[Finding], check: str) -> Finding:
    every = list(findings)
    (one,) = (finding for finding in every if finding.check == check)
    return one


def test_the_whole_table(run_py: Command, tmp_path: Path) -> None:
    done = run_py("doctor", env={"SERVELAB_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    for check in ("servelab", "Python", "libraries", "torch", "GPU", "memory", "disk", "plugins", "plots"):
        assert any(line.startswith(f"ok    {check}: ") for line in lines), check
    assert "warn  model smollm2_135m: not in the cache ~/cache yet" in lines
    assert (
        "      do: the first run fetches and converts it; without network: model=local model.path=..."
        in lines
    )
    assert lines[-1].endswith("0 fail: everything works that is not marked warn")
    assert not (tmp_path / "cache").exists(), "it only looks"
    assert not (tmp_path / "outputs").exists()


def test_the_table_for_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """And a check that raises is a finding: the doctor is asked when things are broken."""

    def explodes() -> Iterable[Finding]:
        yield Finding("first", "ok", "fine")
        raise RuntimeError("boom")

    for name in ("library_findings", "plot_findings", "folder_findings", "environment_findings"):
        monkeypatch.setattr(command, name, lambda: ())
    monkeypatch.setattr(command, "plugin_findings", lambda registry, online: ())
    monkeypatch.setattr(command, "folder_findings", explodes)
    with pytest.raises(SystemExit) as ended:
        command.main(["--json"])
    assert ended.value.code == 1
    result = json.loads(capsys.readouterr().out)
    assert result["schema_version"] == 1
    assert result["counts"] == {"ok": 2, "warn": 0, "fail": 1}
    assert set(result["findings"][0]) == {"check", "state", "about", "do"}
    last = result["findings"][-1]
    assert (last["check"], last["state"]) == ("folders", "fail")
    assert "RuntimeError: boom" in last["about"]


# ---------------------------------------------------------------- libraries


def test_libraries_are_held_against_what_is_wanted() -> None:
    wanted = Wanted(
        ">=3.99",
        (Requirement("pluggy>=99"), Requirement("no-such-library"), Requirement("pydantic>=2")),
        {
            "run": (Requirement("numpy>=1"), Requirement("no-such-torch")),
            "test": (Requirement("pytest>=8"),),
            "own": (Requirement("pytest<1"),),
            "docs": (),
        },
        {"pytest": "1.0", "pluggy": "1.0", "not-installed": "3"},
    )
    results = {f.check: f for f in library_findings(wanted)}
    assert {check: f.state for check, f in results.items()} == {
        "servelab": "ok",
        "Python": "fail",
        "libraries": "fail",
        "extra run": "warn",
        "extra test": "ok",
        "extra own": "fail",
        "constraints": "warn",
    }
    assert "no-such-library is not installed; pluggy" in results["libraries"].about
    assert (
        results["extra run"].about == "not installed: no-such-torch. Off: running models, and plots of tasks"
    )
    assert results["extra run"].do == 'in the checkout: pip install -c constraints.txt -e ".[run]"'
    assert "pytest" in results["constraints"].about and "not-installed" not in results["constraints"].about
    assert all(f.do for f in results.values() if f.state != "ok")


def test_what_is_wanted_is_what_the_project_says(repository: Path) -> None:
    wanted = read_wanted()
    assert wanted.checkout
    assert wanted.python == ">=3.11"
    assert {r.name for r in wanted.base} >= {"hydra-core", "pluggy", "pydantic"}
    assert "torch" in {r.name for r in wanted.extras["run"]}
    assert "servelab" not in {r.name for r in wanted.extras["test"]}
    assert wanted.tested["torch"]


def test_an_installed_servelab_reads_its_metadata(
    servelab_wheel: Path, fresh_env: Callable[[], Path], pip: Callable[..., None], tmp_path: Path
) -> None:
    python = fresh_env()
    pip("install", "--no-deps", "--no-index", "--ignore-installed", str(servelab_wheel), python=python)
    folder = tmp_path / "empty"
    folder.mkdir()
    env = {**os.environ, "SERVELAB_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [python.parent / "servelab", "doctor"],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok    servelab: 0.1.0, installed" in done.stdout
    assert "ok    extra run: gguf" in done.stdout
    made = subprocess.run(  # the templates are in the wheel
        [python.parent / "servelab", "new", "cost", "mine"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (folder / "servelab-mine" / "src" / "servelab_mine" / "cost.py").is_file()


# ------------------------------------------------------- packages and YAML


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking_all_but: Callable[..., None]) -> Path:
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    blocking_all_but("yaml_one", "yaml_two", "lone", "quiet")
    return site


def _yaml(site: Path, package: str, files: dict[str, str]) -> None:
    (site / f"{package}_conf").mkdir()
    for path, text in files.items():
        file = site / f"{package}_conf" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    install(site, package.replace("_", "-"), {"servelab.configs": {package: f"{package}_conf"}}, "1.0")


def test_yaml_of_strangers(site: Path) -> None:
    _yaml(
        site,
        "yaml_one",
        {
            "scheduler/typo.yaml": "name: vllm_v2",
            "scheduler/nameless.yaml": "max_num_seqs: 3",
            "scheduler/torn.yaml": "name: [",
            "scheduler/vllm_v1.yaml": "name: vllm_v1",
            "hydra/launcher/mine.yaml": "x: 1",
            "config.yaml": "seed: 7",
            "experiment/mine.yaml": "seed: 7",
            "scheduler/fast.yaml": "name: vllm_v1\nmax_num_seqs: 2",
        },
    )
    _yaml(site, "yaml_two", {"experiment/mine.yaml": "seed: 8"})
    findings = [f for f in config_findings(Registry.load()) if f.check.startswith("YAML of")]
    assert all(f.do for f in findings)
    said = {f.about.split(" ")[0]: f for f in findings if f.check == "YAML of yaml_one"}
    assert {path: f.state for path, f in said.items()} == {
        "scheduler/typo.yaml": "fail",
        "scheduler/nameless.yaml": "fail",
        "scheduler/torn.yaml": "fail",
        "scheduler/vllm_v1.yaml": "warn",
        "hydra/launcher/mine.yaml": "warn",
        "config.yaml": "warn",
    }
    assert "nobody provides" in said["scheduler/typo.yaml"].about
    assert "did you mean 'vllm_v1'" in said["scheduler/typo.yaml"].do
    assert said["scheduler/nameless.yaml"].do == "write: name: nameless"
    assert "never read: ServeLab itself" in said["scheduler/vllm_v1.yaml"].about
    (two,) = (f for f in findings if f.check == "YAML of yaml_two")
    assert (two.state, "package yaml_one has a file of that name" in two.about) == ("warn", True)


def test_a_package_without_yaml(site: Path) -> None:
    (site / "lone_module.py").write_text(
        SCHEDULERS + "return [PluginSpec(name='lone', factory='lone_module:F')]\nclass F: ...", "utf-8"
    )
    install(site, "lone", {"servelab": {"lone": "lone_module"}}, "1.0")
    (site / "quiet_conf").mkdir()
    install(site, "quiet", {"servelab.configs": {"quiet": "quiet_conf"}}, "1.0")
    registry = Registry.load()
    findings = list(config_findings(registry))
    lone = found(findings, "scheduler lone")
    assert (lone.state, lone.about) == ("fail", "no YAML names it: +scheduler=lone is not understood")
    assert "entry point 'lone' of servelab.configs" in lone.do
    assert "holds no YAML" in found(findings, "YAML of quiet").about
    assert found(package_findings(registry), "package lone").about == "lone 1.0: scheduler lone (API 1)"
    assert os.environ["SERVELAB_BLOCK"] == "" or "lone" not in os.environ["SERVELAB_BLOCK"]


def test_a_plugin_that_examines_the_machine_itself(site: Path) -> None:
    code = """return [
        PluginSpec(name='lone', factory='looking_module:F', diagnose='looking_module:look'),
        PluginSpec(name='ill', factory='looking_module:F', diagnose='looking_module:nothing'),
    ]
class F: ...
def look(model, online):
    from servelab.core.api import Finding
    yield Finding("lone disk", "warn", f"slow for {model.name}, online {online}", "buy another")
"""
    (site / "looking_module.py").write_text(SCHEDULERS + code, "utf-8")
    install(site, "lone", {"servelab": {"lone": "looking_module"}}, "1.0")
    registry = Registry.load()
    registry.specs = {key: spec for key, spec in registry.specs.items() if key[1] in ("lone", "ill")}
    findings = list(plugin_findings(registry, online=True))
    assert found(findings, "lone disk").about == "slow for smollm2_135m, online True"
    ill = found(findings, "scheduler ill")
    assert (ill.state, ill.do) == ("fail", "tell the authors of lone 1.0")


def test_packages_left_out(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "lone", {"servelab": {"lone": "never_imported"}}, "1.0")
    monkeypatch.setenv("SERVELAB_BLOCK", f"lone,nobody,{os.environ['SERVELAB_BLOCK']}")
    about = found(package_findings(Registry.load()), "package lone")
    assert (about.state, about.about) == ("warn", "left out on request (lone 1.0)")
    said = {f.about for f in environment_findings()}
    assert {"lone is left out of every run", "no package is called 'nobody'"} <= said


# -------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise ImportError('libcudart.so.99: no such file')", "libcudart.so.99"),
        ("import os; os.abort()", "the process ended with -6"),
    ],
)
def test_a_torch_that_does_not_import(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried in a process of its own, so not even a crash ends the doctor."""
    (tmp_path / "torch.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (torch,) = diagnose._torch()
    assert (torch.check, torch.state, said in torch.about) == ("torch", "fail", True)


def _model_folder(cache: Path) -> Path:
    """Where the default model would be."""
    from servelab.plugins.executors.checkpoint.wheel import _name

    model = default_model()
    return cache / "models" / _name(model.wheel or "", model.wheel_sha256 or "", model.wheel_member)


def test_the_model_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from safetensors.torch import save_file

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SERVELAB_CACHE", str(tmp_path / "cache"))
    model, folder = default_model(), _model_folder(tmp_path / "cache")

    def look() -> Finding:
        return found(diagnose.diagnose(model, False), "model smollm2_135m")

    monkeypatch.setattr(diagnose, "_torch", lambda: ())
    assert look().state == "warn"
    assert "disk" in {f.check for f in diagnose.diagnose(model, False)}

    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(1000)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "provenance.json").write_text(
        json.dumps({"wheel_sha256": model.wheel_sha256}), encoding="utf-8"
    )
    fine = look()
    shown = folder.relative_to(tmp_path).as_posix()
    assert (fine.state, fine.about) == ("ok", f"1 tensors, 0 MB in ~/{shown}, wheel as pinned")

    (folder / "provenance.json").write_text(json.dumps({"wheel_sha256": "0" * 64}), encoding="utf-8")
    other = look()
    assert (other.state, "made from another wheel: SHA-256 000000000000" in other.about) == ("fail", True)
    (folder / "provenance.json").write_text(
        json.dumps({"wheel_sha256": model.wheel_sha256}), encoding="utf-8"
    )
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    torn = look()
    assert (torn.state, "damaged" in torn.about) == ("fail", True)
    assert torn.do == f"delete ~/{shown}; the next run makes it again"


def test_weights_are_counted_as_the_shape_says() -> None:
    """SmolLM2-135M: 134,515,008 weights with norms; those are 61 vectors of 576."""
    assert diagnose.weight_bytes(default_model(), 1) == 134_515_008 - 61 * 576
    free = diagnose.available_memory()
    assert free is None or 0 < free < 1 << 50


@pytest.mark.parametrize(("name", "state"), [("free", "warn"), ("total", "ok")])
def test_memory(name: str, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnose, "available_memory", lambda: {"free": 1 << 20, "total": 1 << 40}[name])
    assert diagnose._memory(default_model()).state == state


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"id": "x/y", "sha": "0", "siblings": [], "tags": [], "private": false, "downloads": 0}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


def test_the_hub_is_asked_only_when_told_to() -> None:
    look = (
        "from servelab.plugins.commands.doctor.configs import default_model\n"
        "from servelab.plugins.executors.torch import diagnose\n"
        "print(diagnose._hub(default_model()).state)"
    )
    server = HTTPServer(("127.0.0.1", 0), _Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        said = []
        for endpoint in (f"http://127.0.0.1:{server.server_port}", "http://127.0.0.1:1"):
            env = {**os.environ, "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_OFFLINE": "0"}
            env["PYTHONPATH"] = str(Path(diagnose.__file__).resolve().parents[3] / "src")
            done = subprocess.run(
                [sys.executable, "-c", look], env=env, capture_output=True, text=True, check=False
            )
            said.append(done.stdout.strip())
    finally:
        server.shutdown()
        server.server_close()
    assert said == ["ok", "warn"], done.stderr


def test_where_runs_write(tmp_path: Path) -> None:
    (one,) = folder_findings(tmp_path)
    assert (one.state, one.about) == ("ok", f"runs started here write below {tmp_path / 'outputs'}")
    (tmp_path / "outputs").write_text("a file in its place", encoding="utf-8")
    (one,) = folder_findings(tmp_path)
    assert (one.check, one.state) == ("outputs", "fail")
    assert "hydra.run.dir" in one.do
    assert shutil.which("sh") is None or list(tmp_path.iterdir()) == [tmp_path / "outputs"]


def test_the_environment() -> None:
    assert [f.state for f in environment_findings({})] == ["ok"]
    said = {
        f.check: f
        for f in environment_findings(
            {
                "HYDRA_FULL_ERROR": "1",
                "SERVELAB_TRACEBAK": "1",
                "SERVELAB_TRACEBACK": "0",
                "SERVELAB_CACHE": "/x",
            }
        )
    }
    assert {name: f.state for name, f in said.items()} == {
        "HYDRA_FULL_ERROR": "ok",
        "SERVELAB_CACHE": "ok",
        "SERVELAB_TRACEBAK": "warn",
    }
    assert "did you mean 'SERVELAB_TRACEBACK'" in said["SERVELAB_TRACEBAK"].do


def test_plots_with_a_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "no_such_backend")
    (plots,) = plot_findings()
    assert (plots.state, "'no_such_backend'" in plots.about) == ("fail", True)
    assert "MPLBACKEND" in plots.do
