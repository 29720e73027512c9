"""What the pages about commands show is what the commands print."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from servelab.plugins.commands import TABLE
from servelab.plugins.commands.compare.command import _parser as compare_parser
from servelab.plugins.commands.doctor.command import _parser as doctor_parser
from servelab.plugins.commands.explain.command import _parser as explain_parser
from servelab.plugins.commands.explain.command import main as explain
from servelab.plugins.commands.explain.table import SORTABLE
from servelab.plugins.commands.new.command import _parser as new_parser

BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_transcript_of_the_how_to(
    repository: Path,
    tmp_path: Path,
    run_py: Callable[..., object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = (repository / "docs/howto/explain_a_request.md").read_text(encoding="utf-8")
    serve, _, transcript = (code for _, code in BLOCK.findall(page)[:3])
    _, *args = shlex.split(serve.replace("\\\n", " "))
    run_py(*args)
    command, _, expected = transcript.partition("\n")
    monkeypatch.chdir(tmp_path)
    explain(shlex.split(command.removeprefix("$ servelab explain ")))
    assert capsys.readouterr().out == expected


def test_every_command_and_option_is_in_the_reference(repository: Path) -> None:
    page = (repository / "docs/reference/commands.md").read_text(encoding="utf-8")
    for name in TABLE:
        assert f"\n| `{name} " in page, name
    for parser in (explain_parser(), compare_parser(), new_parser(), doctor_parser()):
        for action in parser._actions:
            for option in action.option_strings:
                assert option in ("-h", "--help") or f"| `{option}" in page, option
    (row,) = (line for line in page.splitlines() if line.startswith("| `--by"))
    assert set(SORTABLE) <= set(re.findall(r"`(\w+)`", row))
