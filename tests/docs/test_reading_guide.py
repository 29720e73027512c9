"""The guide through ``core/`` names what is there: every file once, and none that is gone."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "explanation" / "reading_the_core.md").read_text(encoding="utf-8")


def test_every_file_of_the_core_has_one_line() -> None:
    """Or the folder that it is in has."""
    named = re.findall(r"^\| `(core/[\w/.]+)` \|", GUIDE, re.MULTILINE)
    files = [path.relative_to(ROOT).as_posix() for path in (ROOT / "core").rglob("*.py")]
    lines = {
        file: [name for name in named if file == name or file.startswith(f"{name.rstrip('/')}/")]
        for file in files
    }
    assert {file: found for file, found in lines.items() if len(found) != 1} == {}
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_plugins_it_leads_to_exist() -> None:
    assert [path for path in re.findall(r"`(plugins/[\w/.]+)`", GUIDE) if not (ROOT / path).is_file()] == []
