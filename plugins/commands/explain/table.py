"""The requests of a run as a table, in the order a reader asks for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from servelab.core.errors import ServeLabError, nearest
from servelab.core.metrics import RequestFacts
from servelab.plugins.tables import aligned

COLUMNS = {
    "request": "request",
    "class": "class",
    "state": "state",
    "prompt": "prompt",
    "output": "output",
    "queueing": "queueing ms",
    "ttft": "TTFT ms",
    "tpot": "TPOT ms",
    "e2el": "E2E ms",
    "preemptions": "preempted",
}
"""Name for ``--by`` -> heading. Latencies are in ms."""
NUMBERS = ("prompt", "output", "queueing", "ttft", "tpot", "e2el", "preemptions")
SORTABLE = ("arrival", *NUMBERS)


def row(facts: RequestFacts) -> dict[str, Any]:
    """One request; a latency that it does not have is None."""
    admitted = facts.admitted_ns
    return {
        "request": facts.id,
        "class": facts.request_class,
        "state": facts.state,
        "prompt": facts.prompt_tokens,
        "output": facts.output_tokens,
        "queueing": None if admitted is None else (admitted - facts.arrival_ns) / 1e6,
        "ttft": None if facts.ttft_ns is None else facts.ttft_ns / 1e6,
        "tpot": facts.tpot_ns / 1e6 if facts.output_tokens > 1 else None,
        "e2el": None if facts.e2el_ns is None else facts.e2el_ns / 1e6,
        "preemptions": facts.preemptions,
    }


def rows(requests: Iterable[RequestFacts], by: str) -> list[dict[str, Any]]:
    """All of them: in order of arrival, or the greatest of a column first and those without it last.

    Raises:
        ServeLabError: there is no such column.
    """
    if by not in SORTABLE:
        raise ServeLabError(f"requests cannot be sorted by {by!r}", do=nearest(by, SORTABLE))
    found = [row(facts) for facts in requests]
    if by != "arrival":
        found.sort(key=lambda one: (one[by] is None, -(one[by] or 0)))
    return found


def render(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Aligned columns, numbers to the right."""
    cells = [[_text(one[name]) for name in COLUMNS] for one in found]
    numbers = [i for i, name in enumerate(COLUMNS) if name in NUMBERS]
    yield from (f"  {line}" for line in aligned([list(COLUMNS.values()), *cells], numbers))


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.1f}" if value >= 100 else f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
