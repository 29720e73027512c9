"""Commands that the documentation shows are accepted, and how-to pages run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from servelab.core.commands import is_command
from servelab.core.config import validate
from servelab.core.overrides import check_choices, normalize
from servelab.core.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^(<!-- runs -->\n)?```(\w+)\n(.*?)^```", re.M | re.S)
THEIRS = re.compile(r"\b(newest|dialogue|slowest|mine|patient)\b|\$|<")
"""Packages that a page tells the reader to write, and variables."""
RUNNING = [p for p in PAGES if p.parent.name == "howto" and "+experiment=scripted" in p.read_text()]


def lines(block: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["python", "run.py"]:
            yield words[2:]
        elif words[:1] == ["servelab"]:
            yield words[1:]


def shown() -> list[tuple[str, list[str]]]:
    """Every command of the pages once: (page, words)."""
    found: dict[tuple[str, ...], str] = {}
    for page in PAGES:
        for _, language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
            if language in ("bash", "sh"):
                for words in lines(block):
                    if not THEIRS.search(" ".join(words)):
                        found.setdefault(tuple(words), str(page.relative_to(ROOT)))
    return [(page, list(words)) for words, page in found.items()]


SHOWN = shown()
RUNS = [(page, words) for page, words in SHOWN if not is_command(words) and "--" not in " ".join(words)]
COMMANDS = [(page, words) for page, words in SHOWN if is_command(words)]


@pytest.fixture(scope="module")
def registry() -> Iterator[Registry]:
    with initialize_config_module("servelab.configs", version_base="1.3"):
        yield Registry.load()


def _first_of_sweeps(overrides: list[str]) -> list[str]:
    """Of ``seed=0,1,2`` the first."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    kept = []
    for text, one in zip(overrides, parsed, strict=True):
        if one.is_sweep_override():
            text = f"{one.get_key_element()}={next(iter(one.sweep_string_iterator()))}"
        kept.append(text)
    return [text for text in kept if not text.startswith(("hydra.", "hydra/"))]


@pytest.mark.parametrize(("page", "words"), RUNS, ids=[" ".join(words) or "run" for _, words in RUNS])
def test_a_run_that_is_shown_is_accepted(page: str, words: list[str], registry: Registry) -> None:
    """Groups, names, fields and bounds; nothing is built."""
    overrides = check_choices(normalize([w for w in words if not w.startswith("-")]))
    config = compose("config", overrides=_first_of_sweeps(overrides))
    validate(OmegaConf.to_container(config, resolve=True), registry)  # type: ignore[arg-type]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS])
def test_a_command_that_is_shown_exists(page: str, words: list[str], registry: Registry) -> None:
    assert words[0] in registry.commands, f"{page} shows the command {words[0]!r}"


@pytest.mark.parametrize("page", RUNNING, ids=lambda p: p.stem)
def test_a_how_to_runs_as_it_stands(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its runs without a model, the commands on their folders, and the Python below ``<!-- runs -->``, in
    the order of the page and in one folder.
    """
    monkeypatch.chdir(tmp_path)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    space: dict[str, object] = {"__name__": "shown"}
    done = 0
    for marked, language, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if language == "python" and marked:
            exec(compile(block, str(page), "exec"), space)
            done += 1
        if language not in ("bash", "sh"):
            continue
        for words in lines(block):
            runs = "+experiment=scripted" in words and "-m" not in words
            asks = words[0] in ("explain", "compare") and "last" not in words
            if THEIRS.search(" ".join(words)) or not (runs or asks):
                continue
            if asks:
                Registry.load().command(words[0])(words[1:])
            else:
                command = [sys.executable, str(ROOT / "run.py"), *words]
                ended = subprocess.run(command, env=env, capture_output=True, text=True)
                assert ended.returncode == 0, f"{' '.join(words)}\n{ended.stderr}"
            done += 1
    if not done:
        pytest.skip("all it runs needs the reader's own package")
