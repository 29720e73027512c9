"""Each import contract of ``pyproject.toml`` can fail. (That all hold is ``lint-imports``' own business.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINT = Path(sysconfig.get_path("scripts")) / "lint-imports"
TREE = ("core", "plugins", "configs", "src", "pyproject.toml")

VIOLATIONS = [
    ("The core knows no plugin and no tensor library", "core/plan.py", "servelab.plugins.tasks.bench"),
    ("The core knows no plugin and no tensor library", "core/metrics/__init__.py", "numpy"),
    ("Policies and descriptions run without tensor libraries", "plugins/schedulers/vllm_v1.py", "torch"),
    ("What plugin authors import needs the standard library and pluggy only", "core/context.py", "pydantic"),
    ("Families of plugins meet only through the core", "plugins/kvcache/paged.py", "servelab.plugins.quant"),
    ("Test suites are not part of a run", "plugins/tasks/bench.py", "servelab.core.testing"),
    ("Test suites are not part of a run", "core/registry.py", "servelab.core.testing"),
]


@pytest.mark.parametrize(("contract", "file", "module"), VIOLATIONS)
def test_contract_can_fail(contract: str, file: str, module: str, tmp_path: Path) -> None:
    for name in TREE:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
            )
        else:
            shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / file).open("a", encoding="utf-8") as out:
        out.write(f"\n\ndef _violation():\n    import {module}\n")
    done = subprocess.run(
        [str(LINT), "--no-cache"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [line.removesuffix(" BROKEN") for line in done.stdout.splitlines() if line.endswith(" BROKEN")]
    assert contract in broken, done.stdout


def test_every_contract_is_tried() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    assert {contract["name"] for contract in linter["contracts"]} == {name for name, _, _ in VIOLATIONS}


def test_every_family_is_under_contract() -> None:
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (contract,) = (c for c in linter["contracts"] if c["type"] == "independence")
    folders = {f"servelab.plugins.{path.parent.name}" for path in (ROOT / "plugins").glob("*/__init__.py")}
    assert folders == set(contract["modules"])
