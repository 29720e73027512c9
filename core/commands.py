"""Subcommands of the command line that packages declare: ``servelab NAME ARGUMENTS``.

A table names each one with ``("module:function", "one-line summary")``. The function gets the arguments after
the name, prints to stdout and raises ``ServeLabError`` for what the user should read; its module is imported
only when the command is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

Main = Callable[[Sequence[str]], None]

_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, slots=True)
class Command:
    """One subcommand."""

    name: str
    target: str
    """``module:function``."""
    summary: str
    """One line for ``--help``, without a full stop."""


def check_table(table: object) -> Mapping[str, object]:
    """What a hook returned, if it is a table.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(table, Mapping):
        raise TypeError(f"it returned {type(table).__name__}, not a table of commands")
    return table


def check_command(name: object, entry: object) -> Command:
    """One line of a table.

    Raises:
        TypeError: name, target or summary are not as they must be.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TypeError(f"the name {name!r} is not lower-case letters, digits, '-' and '_'")
    if not isinstance(entry, tuple) or len(entry) != 2 or not all(isinstance(part, str) for part in entry):
        raise TypeError(f"{name!r} stands for {entry!r}, not for ('module:function', 'summary')")
    target, summary = cast("tuple[str, str]", entry)
    if not _TARGET.fullmatch(target):
        raise TypeError(f"the target of {name!r} is {target!r}, not 'module:function'")
    if not summary or "\n" in summary or summary.endswith("."):
        raise TypeError(f"the summary of {name!r} is not one line without a full stop: {summary!r}")
    return Command(name, target, summary)


def is_command(args: Sequence[str]) -> bool:
    """Whether the arguments begin with the name of a command: no option, and no override of Hydra's."""
    return bool(args) and _NAME.fullmatch(args[0]) is not None


def run_command(args: Sequence[str]) -> None:
    """Call the command that ``args`` begin with.

    Raises:
        PluginError: nobody declares it, or it cannot be imported.
        ServeLabError: whatever it raises.
    """
    from servelab.core.registry import Registry

    name, *rest = args
    main: Main = Registry.load().command(name)
    main(rest)
