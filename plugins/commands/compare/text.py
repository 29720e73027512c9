"""The comparison as text, in ``WIDTH`` columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from servelab.plugins.commands.compare.differences import ABSENT, labels, table, warnings
from servelab.plugins.commands.compare.facts import RunFacts
from servelab.plugins.commands.compare.measures import measure
from servelab.plugins.tables import aligned

WIDTH = 100
BLOCK = 2
"""Runs beside the first one in one table of figures."""
VALUES = 16
"""Columns of a setting's value, at least."""
CLOSE = 0.01
"""Figures within this share of each other are marked ``~``."""
MARKS = {"better": "+", "worse": "-", "close": "~", "equal": "=", "": ""}


def tell(runs: Sequence[RunFacts], *, everything: bool) -> Iterator[str]:
    """The lines of the comparison; the first run is what the others are held against."""
    for label, run in zip(labels(runs), runs, strict=True):
        state = f", PARTIAL ({run.status})" if run.partial else ""
        yield from _wrap(f"{label}  {run.folder}{state}", "   ")
    yield ""
    found = warnings(runs)
    for text in found:
        yield from _wrap(f"WARNING: {text}", "         ")
    if not found:
        yield "Same workload, seed, model and machine, as far as the runs state them."
    yield ""
    yield from _values("settings", runs, [run.settings for run in runs], everything)
    yield from _values("versions and machine", runs, [run.ground for run in runs], everything)
    yield from _figures(runs, everything)
    yield from _wrap(
        "One run each: small differences may be chance. Runs of several seeds (-m seed=0,1,2) show how much.",
        "",
    )


def _values(
    title: str, runs: Sequence[RunFacts], sides: Sequence[Mapping[str, Any]], everything: bool
) -> Iterator[str]:
    rows = table(sides, equal=everything)
    if not rows:
        yield f"Equal: {title}."
        yield ""
        return
    names = labels(runs)
    width = min(max(len(key) for key in [*rows, title]), 44)
    for others in _blocks(len(runs)):
        shown = (0, *others)
        each = max((WIDTH - 2 - width) // len(shown) - 2, VALUES)
        yield ("  " + title.ljust(width) + "".join(f"  {names[i]:<{each}}" for i in shown)).rstrip()
        for key, row in rows.items():
            cells = [wrap(key, width) or [""], *(wrap(_shown(row[i]), each) or [""] for i in shown)]
            lines = list(zip_longest(*cells, fillvalue=""))
            yield from (f"  {line}".rstrip() for line in aligned(lines, widths=[width, *[each] * len(shown)]))
        yield ""


def _blocks(runs: int) -> Iterator[range]:
    """The runs after the first one, in groups that fit beside it."""
    for start in range(1, runs, BLOCK):
        yield range(start, min(start + BLOCK, runs))


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "(absent)"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _figures(runs: Sequence[RunFacts], everything: bool) -> Iterator[str]:
    names = labels(runs)
    keys = [key for key in _order(runs) if everything or (measure(key).main and _says_something(key, runs))]
    pair = len(runs) == 2
    for others in _blocks(len(runs)):
        head = ["figure", "unit", names[0]]
        for i in others:
            ratio = f"{names[i]}/{names[0]}"
            head += [names[i], f"{names[i]}-{names[0]}", ratio, ""] if pair else [names[i], ratio, ""]
        rows = [_row(key, runs, others, pair) for key in keys]
        if pair:
            head.append("samples")
        else:
            rows += _sample_rows(runs, others)
        yield from _aligned(head, rows)
        yield ""
    yield from _wrap(
        "  + better, - worse than A; ~ within 1 %, = equal; no mark: neither way is better", "  "
    )
    yield ""


def _row(key: str, runs: Sequence[RunFacts], others: range, pair: bool) -> list[str]:
    about = measure(key)
    base = runs[0].figures.get(key)
    cells = [key.removeprefix("servelab."), about.unit, _number(base)]
    for i in others:
        value = runs[i].figures.get(key)
        cells.append(_number(value))
        if pair:
            cells.append(_signed(base, value))
        cells += [_ratio(base, value), MARKS[verdict(key, base, value)]]
    if pair:
        counts = [_number(run.samples[about.samples]) for run in runs if about.samples in run.samples]
        cells.append(" / ".join(dict.fromkeys(counts)))
    return cells


def _sample_rows(runs: Sequence[RunFacts], others: range) -> Iterator[list[str]]:
    """How much is behind each latency."""
    for name in runs[0].samples:
        row = [f"samples of {name}", "", _number(runs[0].samples[name])]
        for i in others:
            row += [_number(runs[i].samples.get(name)), "", ""]
        yield row


def verdict(key: str, base: float | None, value: float | None) -> str:
    """How a figure of a run stands to that of the first: better, worse, close, equal, or empty."""
    better = measure(key).better
    if base is None or value is None or (not better and base != value):
        return ""
    if base == value:
        return "equal"
    if abs(value - base) <= CLOSE * max(abs(base), abs(value)):
        return "close"
    return "better" if (value < base) == (better == "less") else "worse"


def _order(runs: Sequence[RunFacts]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.figures))


def _says_something(key: str, runs: Sequence[RunFacts]) -> bool:
    """Not zero in every run."""
    return any(run.figures.get(key) for run in runs)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    digits = 1 if abs(value) >= 1000 else 2 if abs(value) >= 10 else 3 if abs(value) >= 0.1 else 5
    return f"{value:,.{digits}f}"


def _signed(base: float | None, value: float | None) -> str:
    if base is None or value is None:
        return "-"
    text = _number(value - base)
    return text if text.startswith("-") or value == base else f"+{text}"


def _ratio(base: float | None, value: float | None) -> str:
    return "-" if not base or value is None else f"{value / base:.3f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Figures to the right of their column, names and units to the left."""
    widths = [max(len(line[i]) for line in (head, *rows)) for i in range(len(head))]
    spare = WIDTH - 2 - 2 * (len(head) - 1) - sum(widths[1:])
    widths[0] = min(widths[0], max(spare, 20))
    for line in (head, *rows):
        first, *rest = wrap(line[0], widths[0]) or [""]
        for text in aligned([[first, *line[1:]]], range(2, len(head)), widths):
            yield f"  {text}".rstrip()
        yield from (f"    {more}" for more in rest)


def _wrap(line: str, indent: str) -> list[str]:
    return wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
