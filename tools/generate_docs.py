"""Makes the parts of the documentation that come from code.

``python tools/generate_docs.py`` says what is out of date; ``--write`` puts it in place. A test fails while
anything is out of date. Needs the extra ``run``: settings of the torch executor are read from its module.
"""

from __future__ import annotations

import sys
from pathlib import Path

from docs_pages import (
    api,
    capabilities,
    catalog,
    command_line,
    configuration,
    errors,
    hooks,
    indexes,
    records,
    techniques,
)
from docs_pages.markdown import DOCS, ROOT, fill

CAPABILITIES = DOCS / "explanation" / "capabilities.md"
README = ROOT / "README.md"


def outputs() -> dict[Path, str]:
    """Every page with generated parts, as it must be.

    Raises:
        ValueError: a page lacks the marks of its generated part.
        FileNotFoundError: a plugin has no page.
    """
    reference = DOCS / "reference"
    found = {
        reference / "hooks.md": hooks.render(),
        reference / "records.md": records.render(),
        reference / "api.md": api.render(),
        reference / "configuration.md": configuration.render(),
        reference / "command_line.md": command_line.render(),
        reference / "errors.md": errors.render(),
        reference / "catalog.md": catalog.render(),
        DOCS / "techniques" / "index.md": techniques.index(),
        **techniques.pages(),
        CAPABILITIES: fill(
            fill(
                CAPABILITIES.read_text(encoding="utf-8"),
                "capabilities",
                capabilities.vocabulary(),
                str(CAPABILITIES),
            ),
            "conflicts",
            capabilities.conflicts(),
            str(CAPABILITIES),
        ),
        README: fill(README.read_text(encoding="utf-8"), "plugins", techniques.readme(), README.name),
    }
    return found


def indexes_of() -> dict[Path, str]:
    """The first pages of folders, which list what is there once the rest is in place."""
    return {DOCS / folder / "index.md": indexes.render(folder) for folder in indexes.INTROS}


def stale(found: dict[Path, str]) -> list[Path]:
    """Those of the pages that are not as they must be."""
    return [p for p, text in found.items() if not p.exists() or p.read_text(encoding="utf-8") != text]


def main(argv: list[str]) -> int:
    """Write, or list what is out of date; the exit status."""
    late: list[Path] = []
    for group in (outputs, indexes_of):
        wanted = group()
        for path in stale(wanted):
            late.append(path)
            if "--write" in argv:
                path.write_text(wanted[path], encoding="utf-8")
    for path in late:
        print(path.relative_to(ROOT))
    return 0 if "--write" in argv or not late else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
