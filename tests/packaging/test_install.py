"""What a user installs: the wheel, the console script, ``run.py`` uninstalled, a stranger's package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Command = Callable[..., "subprocess.CompletedProcess[str]"]
SHORT = ("+experiment=scripted", "observers=[]", "workload.num_requests=3", "hydra.run.dir=out")


def test_wheel_has_the_tree_and_nothing_else(servelab_wheel: Path, repository: Path) -> None:
    found = set(zipfile.ZipFile(servelab_wheel).namelist())
    wanted = {
        f"servelab/{path.relative_to(repository).as_posix()}"
        for folder, pattern in (("core", "*.py"), ("plugins", "*.py"), ("configs", "*.yaml"))
        for path in (repository / folder).rglob(pattern)
    }
    assert wanted - found == set()
    assert {"servelab/__init__.py", "servelab/py.typed"} <= found
    assert {name.split("/")[0] for name in found} == {"servelab", "servelab-0.1.0.dist-info"}
    code = {name for name in found if name.endswith((".py", ".yaml")) and name != "servelab/__init__.py"}
    assert code - wanted <= {"servelab/configs/__init__.py"}


@pytest.mark.slow
def test_wheel_of_the_sdist_is_the_same(servelab_wheel: Path, tmp_path: Path) -> None:
    """``python -m build`` makes the wheel from the sdist, which has real files instead of links."""
    source = servelab_wheel.parent / next(p.name for p in servelab_wheel.parent.iterdir() if p.is_dir())
    done = _run(sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path / "dist", cwd=source)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert set(zipfile.ZipFile(wheel).namelist()) == set(zipfile.ZipFile(servelab_wheel).namelist())
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"run.py", "constraints.txt", "LICENSE", "tests/conftest.py", "src/servelab/core/api.py"} <= names
    assert not any(name.startswith("core/") for name in names)


def test_console_script_of_the_wheel_in_an_empty_folder(
    servelab_wheel: Path, fresh_env: Callable[[], Path], pip: Callable[..., None], tmp_path: Path
) -> None:
    python = fresh_env()
    pip("install", "--no-deps", "--no-index", "--ignore-installed", str(servelab_wheel), python=python)
    folder = tmp_path / "empty"
    folder.mkdir()
    done = _run(python.parent / "servelab", *SHORT, "observers=[report]", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "request throughput" in done.stdout and "servelab 0.1.0 (no checkout)" in done.stdout
    env = json.loads((folder / "out" / "env.json").read_text(encoding="utf-8"))
    assert (env["commit"], env["dirty"]) == (None, None)
    where = _run(python, "-c", "import servelab.core as c; print(c.__file__)", cwd=folder)
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "env")
    assert _run(python.parent / "servelab", "--version", cwd=folder).stdout == "servelab 0.1.0\n"


def test_run_py_by_its_bare_path(run_py: Command, fresh_env: Callable[[], Path]) -> None:
    """Nothing is installed, and the folder is another one."""
    done = run_py(*SHORT, python=str(fresh_env()))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""  # no observer, no result; and logs do not go to stdout


def test_run_py_hides_the_second_names_of_the_code(run_py: Command, repository: Path, tmp_path: Path) -> None:
    script = tmp_path / "look.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(repository)!r})\n"  # what `python run.py` does by itself
        f"runpy.run_path({str(repository / 'run.py')!r})\n"
        "try:\n    import core\nexcept ImportError:\n    print('hidden')\n",
        encoding="utf-8",
    )
    assert _run(Path(sys.executable), str(script), cwd=tmp_path).stdout == "hidden\n"


@pytest.mark.parametrize("how", ["editable", "wheel"])
def test_a_strangers_package(
    how: str,
    request: pytest.FixtureRequest,
    fresh_env: Callable[[], Path],
    pip: Callable[..., None],
    run_py: Command,
    demo_source: Path,
    tmp_path: Path,
    blocking_all_but: Callable[..., None],
) -> None:
    blocking_all_but("demo")
    python = fresh_env()
    what = (str(request.getfixturevalue("demo_wheel")),) if how == "wheel" else ("-e", str(demo_source))
    pip(
        "install",
        "--no-deps",
        "--no-index",
        "--ignore-installed",
        "--no-build-isolation",
        *what,
        python=python,
    )

    done = run_py(
        "+scheduler=demo", "scheduler.chunk_tokens=64", *SHORT, "observers=[jsonl]", python=str(python)
    )
    assert done.returncode == 0, done.stderr
    first, last = _first_and_last(tmp_path / "out" / "events.jsonl")
    plugin = first["info"]["plugins"]["scheduler"]
    assert (plugin["name"], plugin["distribution"], plugin["version"]) == (
        "demo",
        "servelab-demo-ext",
        "1.2.3",
    )
    assert plugin["non_default"] == {"chunk_tokens": 64}
    assert last["status"] == "ok"

    assert re.search(r"\+scheduler= .* demo, .*vllm_v1\n", run_py("--help", python=str(python)).stdout)
    listed = json.loads(run_py("plugins", "--json", python=str(python)).stdout)
    assert ("demo", "servelab-demo-ext 1.2.3") in [(p["name"], p["provider"]) for p in listed["plugins"]]
    assert [p["problem"] for p in listed["config_packages"]] == [None]

    # one name leaves both the plugin and its YAML out
    blocked = run_py("-p", "no:demo", "+scheduler=demo", *SHORT, python=str(python))
    assert blocked.returncode == 1
    assert "unknown scheduler 'demo'" in blocked.stderr


def _run(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, check=False)


def _first_and_last(log: Path) -> tuple[dict, dict]:
    lines = log.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[1]), json.loads(lines[-1])  # line 0 is the header of the file
