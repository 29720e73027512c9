"""Subcommands come from tables, are loaded when called, and a bad table stops nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import pytest

from servelab.core import cli
from servelab.core.commands import check_command, is_command
from servelab.core.errors import PluginError, PluginLoadError
from servelab.core.help import list_commands, show_help
from servelab.core.overrides import ROOTS
from servelab.core.registry import Registry
from servelab.plugins.commands import TABLE

Package = Callable[..., None]
HEAD = "from servelab.core.api import hookimpl\n@hookimpl\ndef servelab_commands():\n    "


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """The command line in this process; returns its status."""
    monkeypatch.setattr(sys, "argv", ["servelab", *args])
    try:
        cli.main()
    except SystemExit as error:
        return int(error.code or 0)
    return 0


@pytest.mark.parametrize("name", TABLE)
def test_every_command_of_ours_is_a_function_with_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = Registry.load().command(name)
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert f"usage: servelab {name}" in capsys.readouterr().out
    module = importlib.import_module(TABLE[name][0].partition(":")[0])
    assert (module.__doc__ or "").startswith(f"``servelab {name}")


def test_no_command_is_a_section() -> None:
    """``servelab NAME`` and ``servelab NAME=...`` are not one letter apart."""
    assert not Registry.load().commands.keys() & ROOTS


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["explain", "x"], True), (["explian"], True), (["seed=1"], False), (["+scheduler=x"], False),
        (["-m", "seed=1"], False), (["~quant"], False), (["--help"], False), ([], False), (["Model"], False),
    ],
)  # fmt: skip
def test_what_is_a_command(args: list[str], expected: bool) -> None:
    assert is_command(args) is expected


def test_help_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(list_commands()) == sorted(TABLE)
    show_help()
    text = capsys.readouterr().out
    width = max(map(len, list_commands()))
    for name, (_, summary) in TABLE.items():
        assert f"\n  {name:<{width}}  {summary}\n" in text


def test_help_of_a_command_is_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: servelab explain")


def test_an_unknown_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "explian", "last") == 1
    error = capsys.readouterr().err
    assert "unknown command 'explian'" in error
    known = ", ".join(sorted(TABLE))
    assert f"did you mean 'explain'? known: {known}" in error


def test_errors_of_a_command_are_shown_as_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", "no/such/run", "r1") == 1
    assert capsys.readouterr().err.startswith("servelab: there is no run\n  where: no/such/run\n")


def test_a_strangers_command(
    package: Package, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = HEAD + "return {'greet': ('fake_polite:main', 'says hello')}\n"
    package("polite", code + "def main(argv):\n    print('hello', *argv)\n")
    assert list_commands()["greet"] == "says hello"
    assert run(monkeypatch, "greet", "you", "--json") == 0
    assert capsys.readouterr().out == "hello you --json\n"
    assert run(monkeypatch, "-p", "no:polite", "greet") == 1
    assert "package left out by -p no:polite" in capsys.readouterr().err


BAD = {
    "no table": ("['greet']", "servelab_commands: TypeError: it returned list, not a table of commands", ""),
    "raises": ("1 / 0", "servelab_commands: ZeroDivisionError", ""),
    "a name in capitals": ("{'Greet': ('a:b', 'x')}", "the name 'Greet' is not lower-case", "Greet"),
    "a name of ours": ("{'show': ('a:b', 'x')}", "the name is already provided by servelab", "show"),
    "taken": ("{'explain': ('a:b', 'x')}", "the name is already provided by servelab", "explain"),
    "a class for a target": ("{'greet': (int, 'x')}", "not for ('module:function', 'summary')", "greet"),
    "no function": ("{'greet': ('a.b', 'x')}", "the target of 'greet' is 'a.b'", "greet"),
    "two lines": ("{'greet': ('a:b', 'x\\ny')}", "is not one line without a full stop", "greet"),
    "a full stop": ("{'greet': ('a:b', 'x.')}", "is not one line without a full stop", "greet"),
    "text": ("{'greet': 'ab'}", "stands for 'ab'", "greet"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_table_is_set_aside(package: Package, case: str) -> None:
    code, reason, name = BAD[case]
    package("bad", HEAD + f"return {code}")
    registry = Registry.load()
    (found,) = (b for b in registry.broken if b.package == "bad")
    assert reason in found.reason and found.do and "fake-bad 0.9" in str(found)
    assert registry.commands.keys() == TABLE.keys()
    if name == "greet":
        with pytest.raises(PluginError, match="command 'greet' cannot be used"):
            registry.command("greet")


@pytest.mark.parametrize(
    ("target", "error", "text"),
    [
        ("fake_late:nothing", PluginLoadError, "AttributeError"),
        ("no_such_module:main", PluginLoadError, "ModuleNotFoundError"),
        ("fake_late:THREE", PluginError, "fake_late:THREE is int, not a function"),
    ],
)
def test_a_command_that_is_not_there_matters_only_when_called(
    package: Package, target: str, error: type[PluginError], text: str
) -> None:
    package("late", HEAD + f"return {{'late': ({target!r}, 'x')}}\nTHREE = 3\n")
    registry = Registry.load()
    assert registry.broken == []
    with pytest.raises(error, match="command 'late'") as found:
        registry.command("late")
    assert text in found.value.why and "fake-late 0.9" in found.value.where


def test_a_command_is_data() -> None:
    command = check_command("greet", ("a.b:main", "says hello"))
    assert (command.name, command.target, command.summary) == ("greet", "a.b:main", "says hello")
