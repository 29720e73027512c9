"""What a page shows of a command's output is what the command prints."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```console\n\$ python (run\.py [^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LEFT_OUT = "..."

SHOWN = [
    pytest.param(command, shown, id=f"{page.stem}-{i}")
    for page in sorted((ROOT / "docs").rglob("*.md"))
    for i, (command, shown) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("command", "shown"), SHOWN)
def test_output_is_as_shown(command: str, shown: str, tmp_path: Path) -> None:
    """Every line of the block, in order; ``...`` stands for lines that are left out."""
    _, *words = shlex.split(command)
    ended = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    printed = iter(ended.stdout.splitlines())
    for line in shown.splitlines():
        assert line == LEFT_OUT or line in printed, f"the page says {line!r}; printed is:\n{ended.stdout}"


def test_blocks_are_found() -> None:
    assert len(SHOWN) >= 2
