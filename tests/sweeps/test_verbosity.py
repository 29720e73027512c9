"""Levels of logging on the command line."""

from __future__ import annotations

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
    assert take_level(["seed=1", *args, "-m"]) == ["seed=1", "-m", *LEVELS[level]]


def test_nothing_asked_nothing_changed() -> None:
    args = ["-m", "seed=1", "--cfg", "job", "model.name=-v", "--version"]
    assert take_level(args) == args


@pytest.mark.parametrize("args", [["-q", "-v"], ["-v", "-vv"], ["--quiet", "--verbose"]])
def test_two_levels_are_refused(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="different levels"):
        take_level(args)
