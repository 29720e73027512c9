"""Builds and installs without network: the test environment's own setuptools, no dependencies."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "tests" / "plugins_pkgs" / "servelab_demo_ext"


Pip = Callable[..., None]


@pytest.fixture
def pip() -> Pip:
    return _pip


@pytest.fixture(scope="session")
def module_pip() -> Pip:
    """For fixtures that live longer than a test."""
    return _pip


@pytest.fixture
def demo_source(tmp_path: Path) -> Path:
    """A copy of the stranger's package: an editable install leaves files beside it."""
    return Path(shutil.copytree(DEMO, tmp_path / "demo-source"))


def _pip(*args: str, python: Path | None = None) -> None:
    """Run pip, on another environment if ``python`` is given."""
    target = ["--python", str(python)] if python else []
    done = subprocess.run(
        [sys.executable, "-m", "pip", *target, "--disable-pip-version-check", *args],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def build_wheel(source: Path, out: Path) -> Path:
    """The wheel of a source tree, which is copied first: building leaves folders behind."""
    copy = out / f"{source.name}-source"
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "outputs", "multirun")
    shutil.copytree(source, copy, symlinks=True, ignore=ignore)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(copy))
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def servelab_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(ROOT, tmp_path_factory.mktemp("servelab"))


@pytest.fixture(scope="session")
def demo_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(DEMO, tmp_path_factory.mktemp("demo"))


@pytest.fixture
def fresh_env(tmp_path: Path) -> Callable[[], Path]:
    """A new environment that sees the test environment's libraries, but no servelab; returns its python."""

    def create() -> Path:
        folder = tmp_path / "env"
        venv.create(folder, with_pip=False, symlinks=True)
        purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        # .pth files in a folder named by a .pth file are ignored: an editable servelab stays out of sight
        shared = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
        (purelib / "shared.pth").write_text("\n".join(shared) + "\n", encoding="utf-8")
        return folder / "bin" / "python"

    return create
