"""What the site needs beyond ``mkdocs.yml``: the order of its sections, and links out of ``docs/``.

Pages are written to be read in the repository too, where a link to ``../../README.md`` works. The site has no
such page, so there the link becomes the file's path.
"""

from __future__ import annotations

import os
import re
from typing import Any

SECTIONS = {
    "tutorials": "Tutorials",
    "howto": "How-to guides",
    "reference": "Reference",
    "explanation": "Explanation",
    "techniques": "Techniques",
    "experiments": "Experiments",
}
"""Folders of ``docs/`` and their titles, in the order of the navigation."""

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#\s:]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links that leave ``docs/`` become code with the path from the repository's root."""
    here = os.path.dirname(os.path.join("docs", page.file.src_uri))

    def plain(link: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(here, link[2]))
        return link[0] if target.startswith("docs" + os.sep) else f"{link[1]} (`{target}`)"

    return _LINK.sub(plain, markdown)


def on_nav(nav: Any, **_: Any) -> Any:
    """Sections in the order and with the titles above; a folder that is not named there comes last."""
    order = list(SECTIONS)

    def folder(item: Any) -> str:
        while getattr(item, "children", None):
            item = item.children[0]
        src = item.file.src_uri if getattr(item, "file", None) else ""
        return src.partition("/")[0] if "/" in src else ""

    def place(item: Any) -> int:
        name = folder(item)
        return -1 if not name else order.index(name) if name in order else len(order)

    nav.items.sort(key=place)
    for item in nav.items:
        if item.is_section:
            item.title = SECTIONS.get(folder(item), item.title)
    return nav
