"""The first page of each folder: its pages, with the sentence each begins with."""

from __future__ import annotations

import re
from pathlib import Path

from docs_pages.markdown import DOCS, page, table, title

INTROS = {
    "tutorials": ("Tutorials", "Lessons: each begins with nothing and ends with something that works."),
    "howto": ("How-to guides", "One task each, for readers who know what they want."),
    "experiments": (
        "Experiments",
        "Figures of papers beside ours: one command each, a table that says which claims hold, and every "
        "deviation.",
    ),
    "reference": ("Reference", "Names, settings, fields, files, figures and errors: to look things up."),
    "explanation": ("Explanation", "Why it is built as it is, and how the parts work together."),
}


def render(folder: str) -> str:
    heading, intro = INTROS[folder]
    pages = sorted(p for p in (DOCS / folder).glob("*.md") if p.name != "index.md")
    rows = [(f"[{title(path)}]({path.name})", _first_sentence(path)) for path in pages]
    rows.sort(key=lambda row: row[0].lower().replace("`", ""))
    return page(heading, intro, table(("page", "begins with"), rows) if rows else "No page yet.")


def _first_sentence(path: Path) -> str:
    """Links stay words; code stays code."""
    for block in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        if not re.match(r"#|<!--|\||```|-|\d+\.|    ", block):
            text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", " ".join(block.split()))
            return re.split(r"(?<=[.:])\s", text.replace("**", ""))[0].rstrip(":") or text
    return ""
