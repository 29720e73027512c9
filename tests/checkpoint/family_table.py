"""The generated table of docs/reference/model_families.md.

``python tests/checkpoint/family_table.py --write`` puts it in place; a test fails while it is out of date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "model_families.md"


def table() -> str:
    from servelab.plugins.executors.checkpoint.architectures import ARCHITECTURES

    rows = ["| `architectures` of config.json | beside Llama's decoder | must be null or false | GGUF |"]
    rows += ["|---|---|---|---|"]
    for name, row in ARCHITECTURES.items():
        refused = ", ".join(f"`{key}`" for key in row.refuses) or "-"
        gguf = f"`{row.gguf.architecture}`" if row.gguf else "no"
        rows.append(f"| `{name}` | {row.adds} | {refused} | {gguf} |")
    return "\n".join(rows)


def render(page: str) -> str:
    """The page with the table as the code has it now."""
    pattern = re.compile(r"(<!-- families: begin -->\n).*?(<!-- families: end -->)", re.S)
    page, n = pattern.subn(lambda m: f"{m[1]}{table()}\n{m[2]}", page)
    if n != 1:
        raise ValueError(f"{PAGE.name} has {n} places for the table, needs 1")
    return page


if __name__ == "__main__":
    new = render(PAGE.read_text(encoding="utf-8"))
    if "--write" in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    else:
        sys.stdout.write(new)
