"""The page docs/reference/mutants.md, and the table of checks in docs/reference/suites.md.

``python tests/contract/mutant_table.py --write`` puts them in place; a test fails while they are out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "mutants.md"
SUITES_PAGE = ROOT / "docs" / "reference" / "suites.md"

HEAD = """\
# Mutants: what the suites notice

Each row is a plugin that is broken on purpose in one way. A test runs them all: the check must fail, and its
message must contain the text in the last column, while the plugin it was made from passes the whole suite. So
the table is also a list of messages, each with the mistake behind it. The mutants are in
`core/testing/mutants`; the suites are described in [suites.md](suites.md). This page is generated:
`python tests/contract/mutant_table.py --write`.
"""
COLUMNS = "| mutant | what is wrong with it | check | message |\n|---|---|---|---|\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def render() -> str:
    """The whole page."""
    from servelab.core.testing.mutants import mutants

    parts, kind = [HEAD], ""
    for one in mutants():
        if one.suite != kind:
            kind = one.suite
            parts.append(f"\n## {kind}\n\n{COLUMNS}")
        parts.append(f"| `{one.name}` | {_cell(one.breaks)} | `{one.check}` | {_cell(one.message)} |\n")
    return "".join(parts)


def checks() -> str:
    """Every check of every suite, with the first line of its docstring."""
    from servelab.core.testing import SUITES

    parts: list[str] = []
    for kind, suite in SUITES.items():
        parts.append(f"### {kind}: `{suite.__name__}`\n\n| check | holds when |\n|---|---|\n")
        for name in suite.checks():
            text = (getattr(suite, name).__doc__ or "").strip().splitlines()[0]
            parts.append(f"| `{name}` | {_cell(text)} |\n")
        parts.append("\n")
    return "".join(parts)


def with_checks(page: str) -> str:
    """The page about suites with its table of checks as the code has them now."""
    begin, end = "<!-- checks: begin -->\n", "<!-- checks: end -->"
    page, n = re.subn(f"({begin}).*?({end})", lambda m: f"{m[1]}{checks()}{m[2]}", page, flags=re.S)
    if n != 1:
        raise ValueError(f"{SUITES_PAGE.name} has {n} places for the checks, needs 1")
    return page


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    if "--write" in sys.argv:
        PAGE.write_text(render(), encoding="utf-8")
        SUITES_PAGE.write_text(with_checks(SUITES_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        sys.stdout.write(render())
