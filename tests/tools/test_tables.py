"""Tables as they stand on a terminal."""

from __future__ import annotations

from servelab.plugins.tables import aligned


def test_columns_begin_or_end_below_one_another() -> None:
    lines = [("name", "n", "note"), ("a", "12,345", ""), ("longer", "7", "x")]
    assert list(aligned(lines, right=(1,))) == [
        "name         n  note",
        "a       12,345",
        "longer       7  x",
    ]


def test_columns_may_be_wider_than_their_cells() -> None:
    assert list(aligned([("a", "b", "c")], range(1, 3), (3, 3, 2))) == ["a      b   c"]
    assert list(aligned([])) == []
