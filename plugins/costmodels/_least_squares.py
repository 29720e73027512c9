"""Linear least squares for a handful of unknowns, in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

_RANK = 1e-9
"""A column that keeps less than this share of its length beside the others is taken as one of them."""


def least_squares(rows: Sequence[Sequence[float]], values: Sequence[float]) -> list[float] | None:
    """``x`` that minimises ``|A x - y|``, by orthogonal columns (modified Gram-Schmidt).

    Args:
        rows: of A.
        values: y, as many.

    Returns:
        As many numbers as A has columns; None where the rows do not decide them.
    """
    if not rows or len(rows) < len(rows[0]):
        return None
    columns = [list(column) for column in zip(*rows, strict=True)]
    size, left = len(columns), list(values)
    upper = [[0.0] * size for _ in range(size)]
    along = [0.0] * size
    for i, column in enumerate(columns):
        before = sqrt(sum(row[i] ** 2 for row in rows))
        length = sqrt(sum(v * v for v in column))
        if length <= _RANK * before:
            return None
        unit = [v / length for v in column]
        upper[i][i] = length
        for j in range(i + 1, size):
            upper[i][j] = sum(u * v for u, v in zip(unit, columns[j], strict=True))
            columns[j] = [v - upper[i][j] * u for u, v in zip(unit, columns[j], strict=True)]
        along[i] = sum(u * v for u, v in zip(unit, left, strict=True))
        left = [v - along[i] * u for u, v in zip(unit, left, strict=True)]
    found = [0.0] * size
    for i in reversed(range(size)):
        found[i] = (along[i] - sum(upper[i][j] * found[j] for j in range(i + 1, size))) / upper[i][i]
    return found
