"""The tutorial is carried out: its code, its numbers, and what it says the suite says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from servelab.plugins.commands.new.command import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/tutorials/first_scheduler.md"
Command = Callable[..., "subprocess.CompletedProcess[str]"]


def _block(beginning: str) -> str:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (block,) = (
        block for block in blocks if block.startswith(beginning) and "return view.waiting" not in block
    )
    return block


def _inner(block: str, depth: int) -> str:
    return "".join(" " * depth + line if line.strip() else line for line in block.splitlines(keepends=True))


class Package:
    """``servelab-patient``, as the reader has it after each step."""

    def __init__(self, folder: Path) -> None:
        main(["scheduler", "patient", "--dir", str(folder)])
        self.folder = folder
        self.source = folder / "src" / "servelab_patient" / "scheduler.py"
        self.test = folder / "tests" / "test_patient.py"

    def order(self, block: str) -> None:
        text = self.source.read_text(encoding="utf-8")
        begin, end = text.index("    def order("), text.index("    def victim(")
        self.source.write_text(f"{text[:begin]}{_inner(block, 4)}\n{text[end:]}", encoding="utf-8")

    def add(self, before: str, block: str, depth: int) -> None:
        text = self.source.read_text(encoding="utf-8")
        assert text.count(before) == 1
        self.source.write_text(text.replace(before, _inner(block, depth) + before), encoding="utf-8")

    def pytest(self, only: str) -> str:
        """Its tests, with the package where ``pip install -e`` would put it."""
        site = self.folder / "src" / "servelab_patient-0.1.0.dist-info"
        site.mkdir(exist_ok=True)
        (site / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: servelab-patient\nVersion: 0.1.0\n", "utf-8"
        )
        (site / "entry_points.txt").write_text(
            "[servelab]\npatient = servelab_patient.plugin\n"
            "[servelab.configs]\npatient = servelab_patient.conf\n",
            encoding="utf-8",
        )
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", only],
            cwd=self.folder, env={**os.environ, **self.env}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return done.stdout + done.stderr

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join([str(self.folder / "src"), str(ROOT / "src")])}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("tutorial") / "servelab-patient")


def test_step_3_the_suite_refuses_the_first_idea(package: Package, tmp_path: Path) -> None:
    copy = Package(tmp_path / "servelab-patient")
    copy.order(_block('def order(self, view: StepView) -> Iterable[RequestView]:\n    """The shortest'))
    said = copy.pytest("starvation or first")
    assert "2 failed" in said
    shown = PAGE.read_text(encoding="utf-8").partition("```text\n")[2].partition("```")[0]
    (what,) = re.findall(r"ConformanceError: (scheduler 'patient': .*)", said)[:1]
    # which request and how often are the suite's own affair
    assert re.sub(r"\d+", "0", what) in re.sub(r"\d+", "0", " ".join(shown.split()))
    assert "let age count in its order" in said


def test_steps_4_to_6(package: Package, run_py: Command, tmp_path: Path) -> None:
    page = PAGE.read_text(encoding="utf-8")
    package.order(_block('def order(self, view: StepView) -> Iterable[RequestView]:\n    """Groups'))
    package.add("\n\nclass Patient:", _block("group: int"), 4)
    package.add("        self._tokens = min(", _block("self._group"), 8)
    text = package.source.read_text(encoding="utf-8")
    text = text.replace("import Context, ", "import Context, Record, RequestArrived, RequestFinished, ")
    package.source.write_text(text, encoding="utf-8")
    test = package.test.read_text(encoding="utf-8")
    begin = test.index("def test_who")
    package.test.write_text(test[:begin] + _block("def test_the_shortest"), encoding="utf-8")
    assert "3 passed" in package.pytest("starvation or legal or shortest")

    setup = re.search(r'^BUSY="(.*)"\nMORE="(.*)"$', page, re.MULTILINE)
    assert setup is not None
    args = [*setup[1].split(), *setup[2].split()]
    for group in (1, 32):
        done = run_py(
            *args, f"scheduler.group={group}", f"hydra.run.dir=outputs/group{group}", env=package.env
        )
        assert done.returncode == 0, done.stderr
    compared = run_py("compare", "outputs/group1", "outputs/group32").stdout
    explained = run_py("explain", "outputs/group32", "r4").stdout
    found = [line.split() for line in compared.splitlines()]  # columns are as wide as the machine's memory
    for line in _shown(page, "  settings "):
        assert line.split() in found
    for line in _shown(page, "r4 of outputs/group32"):
        assert line in explained.splitlines()
    shutil.rmtree(tmp_path / "outputs")


def _shown(page: str, beginning: str) -> list[str]:
    """Lines of the output that a block shows, without the command."""
    (block,) = (
        b for b in re.findall(r"^```\w+\n(.*?)^```", page, re.MULTILINE | re.DOTALL) if beginning in b
    )
    return [line for line in block.splitlines() if line.strip() and not line.startswith("$ ")]
