"""How plots look, and a figure as PNG and as SVG for a page. Imports matplotlib only when asked to draw.

Figures are as wide as the text of a two-column paper, with its font size. Colours are those of Okabe and Ito,
which colour-blind readers tell apart; lines in one panel differ in style too.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 7.0
"""Width of a figure in inches."""
DPI = 200
"""Of PNG files."""
LEFT_IN = 0.68
"""Left of the panels, for numbers and what they are."""
LEGEND_ROW_IN = 0.17
LEGEND_COLUMNS = 4

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW = "#CC79A7", "#56B4E9", "#F0E442"
PALETTE = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY)
INK = "#1c1d20"
"""Text, axes and grid; a page puts its own colour of text in its place."""
DASHES = ("solid", "dashed", "dashdot", "dotted", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))

RC: dict[str, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.titlesize": 8.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 5,
    "axes.labelsize": 8,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.4,
    "lines.linewidth": 1.2,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "servelab",
}
"""matplotlib's settings while a figure is made and written."""

SVG = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"
REFERENCE = re.compile(r"url\(#([^)]+)\)")
SHORT_PATH = 60
"""Paths of fewer words, such as a point's, keep their decimals."""
SPACES = re.compile(r"\s+")


@contextmanager
def styled() -> Iterator[None]:
    """Make and write figures in here."""
    import matplotlib

    with matplotlib.rc_context(cast(Any, RC)), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # SVG readers have other fonts
        yield


def figure(rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure with its panels, row by row; ``fit`` gives it its size."""
    from matplotlib.figure import Figure

    made = Figure(dpi=DPI)
    return made, list(made.subplots(rows, columns, squeeze=False, **options).flat)


def fit(
    made: Figure, panel_in: float, rows: int = 1, columns: int = 1, *, top: float = 0.3, right: float = 0.12
) -> None:
    """Set the figure's height and its margins, in inches. All have the same margin at the left, so that the
    time axes of different figures lie below each other; and it costs nothing, as matplotlib's layouts do.

    Args:
        made: the figure.
        panel_in: height of one panel.
        rows: of panels.
        columns: of panels.
        top: above the panels of a row, for their titles.
        right: right of the last panel.
    """
    bottom = 0.42 + (0.08 + LEGEND_ROW_IN * legend_rows(made) if made.legends else 0)
    height = rows * (panel_in + top) + bottom
    made.set_size_inches(WIDTH_IN, height)
    made.subplots_adjust(
        left=LEFT_IN / WIDTH_IN,
        right=1 - right / WIDTH_IN,
        bottom=bottom / height,
        top=1 - top / height,
        hspace=top / panel_in,
        wspace=0.12,
    )


def legend_rows(made: Figure) -> int:
    """Rows of the legend below the panels."""
    return -(-len(made.legends[0].get_texts()) // LEGEND_COLUMNS)


def png(made: Figure) -> bytes:
    """The figure as PNG; the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    # not savefig: it draws everything once more before, to find out sizes that we know
    cast(Any, FigureCanvasAgg(made)).print_png(out, metadata={"Software": None})
    return out.getvalue()


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


def label(text: object, longest: int = 28) -> str:
    """Text from a run as a label: one line, not too long, and nothing that matplotlib or XML trips over."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line or "(no name)"  # "_" would hide it from a legend
