"""How plots look, shared by every family that draws. Imports matplotlib only when asked to draw.

Figures are as wide as the text of a two-column paper, with its font size. Colours are those of Okabe and Ito,
which colour-blind readers tell apart; lines in one panel differ in style too.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

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
    "axes.titley": 1.0,  # where it is anyway; else every panel is measured to find out
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


def label(text: object, longest: int = 28) -> str:
    """Text from a run as a label: one line, not too long, and nothing that matplotlib or XML trips over."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return f" {line}" if line.startswith("_") else line or "(no name)"  # "_" would hide it from a legend
