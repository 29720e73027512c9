"""What every plugin of this repository must have, beyond what tests/packaging/test_tree.py asks of all."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from docs_pages.markdown import ROOT
from docs_pages.plugins import GOLDEN, IN_TREE, docstring, golden_tests, page_of

from servelab.core.spec import Paper

EACH = pytest.mark.parametrize(("kind", "name"), IN_TREE, ids=[f"{kind}-{name}" for kind, name in IN_TREE])
POLICIES = (
    "commands",
    "costmodels",
    "kvcache",
    "observers",
    "prefix",
    "quant",
    "schedulers",
    "tasks",
    "workloads",
)
"""Folders whose modules describe and decide; what computes is named ``*_impl``, or is an executor."""

TENSORS = {"_integers", "_rows"}
"""Shared halves of quantizers that compute."""


@cache
def _tests_of(path: Path) -> frozenset[str]:
    """Names of the test functions of a file, those of classes as well."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(
        n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")
    )


@EACH
def test_its_source_is_stated(kind: str, name: str) -> None:
    paper = IN_TREE[kind, name].paper
    assert paper == "baseline" or (
        isinstance(paper, Paper) and paper.title and paper.id and paper.year > 1950
    )


@EACH
def test_its_docstring_says_what_it_is(kind: str, name: str) -> None:
    text = docstring(IN_TREE[kind, name])
    assert text.partition("\n")[0].endswith("."), (
        f"{kind} {name}: the first line is not a sentence: {text[:80]!r}"
    )


@EACH
def test_it_has_a_page(kind: str, name: str) -> None:
    assert page_of(kind, name).exists()


@EACH
def test_tests_hold_it_to_its_source(kind: str, name: str) -> None:
    held = golden_tests(kind, name)
    assert held, f"tests/meta/golden.toml names no test for {kind} {name}"
    for test in held:
        path, _, function = test.partition("::")
        assert (ROOT / path).is_file(), f"{test}: there is no such file"
        assert function in _tests_of(ROOT / path), f"{test}: the file has no such test"


def test_no_test_is_listed_for_a_plugin_that_is_gone() -> None:
    assert {(kind, name) for kind, names in GOLDEN.items() for name in names} == set(IN_TREE)


def test_importing_all_policies_imports_no_tensor_library() -> None:
    modules = [
        ".".join(("servelab", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for folder in POLICIES
        for path in sorted((ROOT / "plugins" / folder).rglob("*.py"))
        if not path.stem.endswith("_impl") and path.stem not in TENSORS
    ]
    assert len(modules) > 40
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}: importlib.import_module(module)\n"
        "heavy = sorted({'torch', 'triton', 'transformers', 'numpy'} & set(sys.modules))\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
