"""Figures as SVG for a page with others."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

from servelab.plugins.drawing import INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r"url\(#([^)]+)\)")
SHORT_PATH = 60
"""Paths of fewer words, such as a point's, keep their decimals."""
SPACES = re.compile(r"\s+")


def svg(made: Figure, prefix: str, title: str) -> str:
    """The figure as an ``<svg>`` element for a page with others: ids begin with ``prefix``, text is text, ink
    is the page's colour of text, the ground is clear. The same text for the same figure.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    made.patch.set_visible(False)
    cast(Any, FigureCanvasSVG(made)).print_svg(out, metadata={"Date": None})
    return compact(out.getvalue(), prefix, title)


def compact(text: str, prefix: str, title: str) -> str:
    """What matplotlib wrote, without what a page does not need, and with ids of its own."""
    ElementTree.register_namespace("", SVG)
    root = ElementTree.fromstring(text)
    used = dict.fromkeys(REFERENCE.findall(text))
    used |= dict.fromkeys(one.attrib[XLINK].removeprefix("#") for one in root.iter() if XLINK in one.attrib)
    names = {own: f"{prefix}-{i}" for i, own in enumerate(used)}
    for parent in root.iter():
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
            else:
                _shorten(child, names)
        _share_style(parent)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("role", "img")
    root.set("aria-labelledby", f"{prefix}-title")
    about = ElementTree.Element(f"{{{SVG}}}title", {"id": f"{prefix}-title"})
    about.text = title
    root.insert(0, about)
    return ElementTree.tostring(root, encoding="unicode")


def _shorten(element: ElementTree.Element, names: dict[str, str]) -> None:
    if element.text and not element.text.strip():
        element.text = None
    if element.tail and not element.tail.strip():
        element.tail = None
    at = element.attrib
    own = names.get(at.pop("id", ""))
    if own:
        at["id"] = own
    if XLINK in at:
        at["href"] = f"#{names[at.pop(XLINK).removeprefix('#')]}"
    for key, value in at.items():
        if key == "d":
            at[key] = short_path(value)
        elif key in ("x", "y"):
            at[key] = _one_decimal(value)
        elif "url(#" in value:
            at[key] = REFERENCE.sub(lambda found: f"url(#{names[found[1]]})", value)
        elif key == "style":
            at[key] = SPACES.sub(" ", value.replace(INK, "currentColor"))


def _share_style(parent: ElementTree.Element) -> None:
    """Points that look alike say so once."""
    uses = parent.findall(f"{{{SVG}}}use")
    styles = {one.get("style") for one in uses}
    if len(uses) > 1 and len(uses) == len(parent) and len(styles) == 1 and "style" not in parent.attrib:
        shared = styles.pop()
        if shared:
            parent.set("style", shared)
            for one in uses:
                del one.attrib["style"]


def short_path(path: str) -> str:
    """The same path to a tenth of a point, where it is long and has no curves: stairs become moves along one
    axis, and moves one after another in one direction along x become one.
    """
    words = path.split()
    if len(words) < SHORT_PATH or not set(re.findall("[A-Za-z]", path)) <= {"M", "L", "z"}:
        return " ".join(words)
    out: list[tuple[str, str]] = []
    x = y = turn = ""
    i = 0
    while i < len(words):
        command = words[i]
        if command == "z":
            out.append(("z", ""))
            i += 1
            continue
        new_x, new_y = _one_decimal(words[i + 1]), _one_decimal(words[i + 2])
        i += 3
        if command == "M":
            out.append(("M", f"{new_x} {new_y}"))
        elif new_y == y and new_x != x:
            if out[-1][0] == "H" and (float(x) > float(turn)) == (float(new_x) > float(x)):
                out[-1] = ("H", new_x)
            else:
                out.append(("H", new_x))
                turn = x
        elif new_x == x and new_y != y:
            out.append(("V", new_y))
        elif new_x != x:
            out.append(("L", f"{new_x} {new_y}"))
        x, y = new_x, new_y
    return "".join(command + value for command, value in out)


def _one_decimal(number: str) -> str:
    return f"{float(number):.1f}".removesuffix(".0")
