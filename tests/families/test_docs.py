"""The page about families says what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from servelab.core.families import KINDS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "families.md"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_one_row(kind: str) -> None:
    rows = [
        line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{kind}` |")
    ]
    assert len(rows) == 1, f"the table of kinds has {len(rows)} rows for {kind!r}"
    assert rows[0].count(" | ") == 4 and rows[0].endswith(" |")
