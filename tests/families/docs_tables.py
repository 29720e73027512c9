"""The generated tables of docs/explanation/families.md.

``python tests/families/docs_tables.py --write`` puts them in place; a test fails while they are out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "explanation" / "families.md"


def _code(names: object) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))  # type: ignore[call-overload]


def capabilities() -> str:
    from servelab.core.vocabulary import CAPABILITIES

    rows = [f"| `{name}` | {meaning} |" for name, meaning in CAPABILITIES.items()]
    return "\n".join(["| capability | meaning |", "|---|---|", *rows])


def conflicts() -> str:
    from servelab.core.vocabulary import CONFLICTS

    rows = [
        f"| {c.name} | `{c.a}` | `{c.b}` | {_code(c.unless) or '-'} | {c.reason} | {c.remedy} |"
        for c in CONFLICTS
    ]
    return "\n".join(["| name | one | other | unless | because | do |", "|---|---|---|---|---|---|", *rows])


def render(page: str) -> str:
    """The page with both tables as the data has them now."""
    for name, table in (("capabilities", capabilities()), ("conflicts", conflicts())):
        pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
        page, n = pattern.subn(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page)  # type: ignore[misc]
        if n != 1:
            raise ValueError(f"{PAGE.name} has {n} places for the table of {name}, needs 1")
    return page


if __name__ == "__main__":
    new = render(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    else:
        sys.stdout.write(new)
