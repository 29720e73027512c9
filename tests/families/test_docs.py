"""The page about families says what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from servelab.core.families import KINDS


def _tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_tables", Path(__file__).with_name("docs_tables.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TABLES = _tables()
PAGE: str = TABLES.PAGE.read_text(encoding="utf-8")


def test_generated_tables_are_up_to_date() -> None:
    assert TABLES.render(PAGE) == PAGE, "run: python tests/families/docs_tables.py --write"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_one_row(kind: str) -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith(f"| `{kind}` |")]
    assert len(rows) == 1, f"the table of kinds has {len(rows)} rows for {kind!r}"
    assert rows[0].count(" | ") == 4 and rows[0].endswith(" |")
