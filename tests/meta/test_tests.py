"""No test ends early without saying so, and nothing that is committed names one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests").rglob("test_*.py"))
HOME = re.compile(r"(?<![\w.])/(?:work|root|tmp|mnt|home|Users|scratch|workspace)/\w[\w.-]*")
"""Paths that exist on the machine of whoever wrote them."""
ALLOWED = {"/home/u"}
"""Homes of nobody, in tests of paths."""
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".in", ".cfg", ""}


def _early_returns(test: ast.FunctionDef) -> list[int]:
    """Lines with ``return`` in the test itself, not in functions within it."""
    found, pending = [], list(ast.iter_child_nodes(test))
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Return):
            found.append(node.lineno)
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_no_test_returns(path: Path) -> None:
    """What cannot be tested here is skipped with its reason; what is tested is tested to the end."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tests = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    early = {test.name: lines for test in tests if (lines := _early_returns(test))}
    assert not early, f"return in a test: {early}; use pytest.skip(reason) or split the test"


def _committed() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines()]


def test_nothing_names_a_path_of_one_machine() -> None:
    found = []
    for path in _committed():
        if path.suffix not in TEXT or not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            hits = [hit for hit in HOME.findall(line) if hit not in ALLOWED]
            if hits:
                found.append(f"{path.relative_to(ROOT)}:{number}: {', '.join(hits)}")
    assert not found, "\n".join(found)
