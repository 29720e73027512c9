"""Levels of logging on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from servelab.core.errors import ConfigError
from servelab.core.verbosity import LEVELS, take_level


@pytest.mark.parametrize(
    ("args", "level"),
    [
        (["-v"], "-v"),
        (["--verbose"], "-v"),
        (["-vv"], "-vv"),
        (["-v", "-v"], "-vv"),
        (["-q"], "-q"),
        (["--quiet"], "-q"),
        (["-q", "-q"], "-q"),
    ],
)
def test_levels_are_settings_of_hydra(args: list[str], level: str) -> None:
    assert take_level(["seed=1", *args, "-m"]) == [*LEVELS[level], "seed=1", "-m"]


def test_overrides_stay_together() -> None:
    """Hydra's parser takes overrides in one run of them: any after an option that follows some is refused."""
    assert take_level(["-m", "seed=1", "--cfg", "job", "-q"]) == [
        "-m",
        *LEVELS["-q"],
        "seed=1",
        "--cfg",
        "job",
    ]
    assert take_level(["--cfg", "job", "-v"]) == ["--cfg", "job", *LEVELS["-v"]]
    done = subprocess.run(
        [sys.executable, "run.py", "-q", "+experiment=scripted", "--cfg", "job"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "scheduler:" in done.stdout


def test_nothing_asked_nothing_changed() -> None:
    args = ["-m", "seed=1", "--cfg", "job", "model.name=-v", "--version"]
    assert take_level(args) == args


@pytest.mark.parametrize("args", [["-q", "-v"], ["-v", "-vv"], ["--quiet", "--verbose"]])
def test_two_levels_are_refused(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="different levels"):
        take_level(args)
