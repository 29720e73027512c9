"""How tables look on a terminal, shared by every family that prints one."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence


def aligned(
    lines: Sequence[Sequence[str]], right: Container[int] = (), widths: Sequence[int] | None = None
) -> Iterator[str]:
    """Lines of cells as text, two spaces between columns.

    Args:
        lines: the head among them; all of one length.
        right: columns whose cells end below one another, as numbers do; those of the others begin so.
        widths: of the columns; None: that of the longest cell.
    """
    if widths is None:
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = zip(line, widths, strict=True)
        yield "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(cells)
        ).rstrip()
