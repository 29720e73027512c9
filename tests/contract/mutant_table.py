"""The page docs/reference/mutants.md.

``python tests/contract/mutant_table.py --write`` puts it in place; a test fails while it is out of date.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "reference" / "mutants.md"

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


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "src"))
    if "--write" in sys.argv:
        PAGE.write_text(render(), encoding="utf-8")
    else:
        sys.stdout.write(render())
