"""Figures and lists as words."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap

WIDTH = 100
"""Columns that every line keeps to, where words allow."""
SHOWN = 6
"""Names, and reasons, that are listed at most."""


def duration(ns: float) -> str:
    """In the unit a reader would choose."""
    if ns < 10_000:
        return f"{ns / 1000:.3g} us" if ns else "0 ms"
    if ns < 1_000_000_000:
        return f"{ns / 1_000_000:.2f} ms" if ns < 100_000_000 else f"{ns / 1_000_000:.1f} ms"
    if ns < 60_000_000_000:
        return f"{ns / 1_000_000_000:.3f} s"
    minutes, rest = divmod(ns / 1_000_000_000, 60)
    return f"{minutes:.0f} min {rest:.1f} s"


def wrapped(line: str, indent: str) -> list[str]:
    """Words move to further lines, which begin with ``indent``; runs of spaces stay."""
    return wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def number(value: int) -> str:
    """With thousands separated."""
    return f"{value:,}"


def count(value: int, noun: str) -> str:
    """``1 token``, ``2 tokens``."""
    return f"{value:,} {noun}{'' if value == 1 else 's'}"


def percent(part: int, whole: int) -> str:
    """A share."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def span(low: int, high: int) -> str:
    """``3 to 5``, or ``3`` if both are."""
    return number(low) if low == high else f"{number(low)} to {number(high)}"


def joined(parts: Sequence[str]) -> str:
    """``a, b and c``."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def listed(names: Sequence[str]) -> str:
    """The first names; how many more."""
    if len(names) <= SHOWN + 1:
        return joined(names)
    return f"{', '.join(names[:SHOWN])} and {len(names) - SHOWN:,} others"
