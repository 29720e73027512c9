"""What several folders of tests share. Tests never read the network and write only below ``tmp_path``."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's own settings do not reach the tests."""
    for name in ("SERVELAB_BLOCK", "SERVELAB_TRACEBACK", "HYDRA_FULL_ERROR", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def repository() -> Path:
    return ROOT


@pytest.fixture
def run_py(tmp_path: Path) -> Command:
    """``python run.py ARGS`` in an empty folder, as a user would type it; returns the finished process."""

    def call(
        *args: str, python: str = sys.executable, env: Mapping[str, str] | None = None, cwd: Path = tmp_path
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, str(ROOT / "run.py"), *args],
            cwd=cwd,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    return call
