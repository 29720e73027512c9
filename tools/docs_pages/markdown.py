"""Small pieces of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
NOTICE = "<!-- Made from the code by tools/generate_docs.py; edit the docstrings and tables it names. -->"


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: code in single backticks, lines of a paragraph joined."""
    text = (docstring or "").replace("``", "`")
    paragraphs = re.split(r"\n\s*\n", text.strip())
    return "\n\n".join(_paragraph(p) for p in paragraphs)


def _paragraph(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and re.fullmatch(r"(Args|Raises|Returns|Attributes):", lines[0].strip()):
        indent = len(lines[1]) - len(lines[1].lstrip())
        items: list[str] = []
        for line in lines[1:]:
            if len(line) - len(line.lstrip()) > indent:
                items[-1] += " " + line.strip()
            else:
                items.append(line.strip())
        named = [re.sub(r"^([\w./*, ]+): ", r"`\1`: ", item) for item in items]
        return "\n".join([f"*{lines[0].strip()[:-1]}*", "", *(f"- {item}" for item in named)])
    return " ".join(line.strip() for line in lines)


def cell(text: object) -> str:
    """One cell of a table: a single line, bars escaped."""
    return " ".join(str(text).split()).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its cells may hold Markdown."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell(c) for c in row) + " |" for row in rows]
    return "\n".join(lines)


def page(title: str, *parts: str) -> str:
    """A whole page that nobody edits."""
    return "\n\n".join([f"# {title}", NOTICE, *(part.strip("\n") for part in parts if part)]) + "\n"


def fill(text: str, name: str, content: str, where: str) -> str:
    """``text`` with what is between ``<!-- name: begin -->`` and ``<!-- name: end -->`` replaced.

    Raises:
        ValueError: it has not exactly one such place.
    """
    pattern = re.compile(rf"(<!-- {re.escape(name)}: begin -->\n).*?(<!-- {re.escape(name)}: end -->)", re.S)
    text, count = pattern.subn(lambda m: f"{m[1]}{content}\n{m[2]}", text)
    if count != 1:
        raise ValueError(f"{where} has {count} places for {name!r}, needs 1: <!-- {name}: begin --> ...")
    return text


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def title(path: Path) -> str:
    """The heading of a page."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line[2:].strip()
    raise ValueError(f"{path} has no heading")
