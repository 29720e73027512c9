"""docs/reference/command_line.md: what every command says of itself."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO

from docs_pages.markdown import page
from servelab.core import help
from servelab.core.registry import Registry

INTRO = """The words of the program itself. What the commands do and how they are used:
[commands](commands.md). `servelab` and, in a checkout, `python run.py` are the same."""
COLUMNS = "100"


def render() -> str:
    parts = [
        INTRO,
        "## servelab --help",
        "Below it come the choices of every group and the settings of the default run.",
    ]
    parts.append(f"```text\n{help.USAGE.strip()}\n```")
    registry = Registry.load()
    names = [n for n, one in registry.commands.items() if one.target.startswith("servelab.plugins.")]
    for name in names:
        parts += [f"## servelab {name}", f"```text\n{_help(name, registry)}\n```"]
    return page("Command line", *parts)


def _help(name: str, registry: Registry) -> str:
    out = StringIO()
    with _plain_terminal(), redirect_stdout(out), suppress(SystemExit):  # how argparse ends after its help
        registry.command(name)(["--help"])
    return re.sub(r"[ \t]+$", "", out.getvalue().strip(), flags=re.M)


@contextmanager
def _plain_terminal() -> Iterator[None]:
    """The same width everywhere, no colour."""
    wanted = {"COLUMNS": COLUMNS, "NO_COLOR": "1"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
