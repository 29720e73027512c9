"""The tables of docs/explanation/capabilities.md."""

from __future__ import annotations

from docs_pages.markdown import table
from servelab.core.vocabulary import CAPABILITIES, CONFLICTS


def vocabulary() -> str:
    rows = [(f"`{name}`", meaning) for name, meaning in CAPABILITIES.items()]
    return table(("capability", "meaning"), rows)


def conflicts() -> str:
    rows = []
    for c in CONFLICTS:
        unless = ", ".join(f"`{name}`" for name in sorted(c.unless))
        rows.append((c.name, f"`{c.a}`", f"`{c.b}`", unless or "-", c.reason, c.remedy))
    return table(("name", "one", "other", "unless", "because", "do"), rows)
