"""Verdicts: they can fail, and say nothing where nothing was measured."""

from __future__ import annotations

import pytest

from servelab.plugins.tasks._leave import markdown, number, page, table
from servelab.plugins.tasks._rows import (
    Row,
    at_least,
    at_most,
    below,
    mean_and_spread,
    measured,
    relative,
    tally,
    within,
)


@pytest.mark.parametrize(
    ("bound", "inside", "outside"),
    [
        (within(94.7, 2), (92.7, 94.7, 96.7), (92.69, 96.71)),
        (relative(300_000, 0.03), (291_000, 309_000), (290_999, 309_001)),
        (at_least(2.6), (2.6, 9.0), (2.59,)),
        (at_most(0), (0.0, -1.0), (0.001,)),
        (below(0), (-1e-300, -1.0), (0.0, 1.0)),
    ],
)
def test_bounds_and_their_ends(bound: object, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    for value in inside:
        assert Row(name="x", ours=value, bound=bound).holds is True  # type: ignore[arg-type]
    for value in outside:
        assert Row(name="x", ours=value, bound=bound).holds is False  # type: ignore[arg-type]


def test_nothing_measured_or_nothing_judged_is_no_verdict() -> None:
    assert Row(name="x", bound=at_least(1)).holds is None
    assert Row(name="x", ours=3.0).holds is None


def test_student_t_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, t(2) = 4.303: 4.303 / sqrt(3)."""
    mean, spread = mean_and_spread([1.0, 2.0, 3.0])
    assert mean == 2.0 and spread == pytest.approx(4.303 / 3**0.5)
    assert mean_and_spread([5.0]) == (5.0, None)
    assert mean_and_spread([]) == (None, None)
    assert mean_and_spread([1.0] * 50) == (1.0, 0.0)
    assert measured([1.0, 3.0]) == {"ours": 2.0, "spread": pytest.approx(12.706), "seeds": 2}


ROWS = [
    Row(name="good", unit="%", paper=94.7, ours=94.0, spread=0.5, bound=within(94.7, 2, "points")),
    Row(name="bad & <worse>", paper=1.0, ours=9.0, bound=at_most(1), note="read me"),
    Row(name="open", bound=at_most(1)),
    Row(name="only told", ours=1234.5),
]


def test_the_table_says_what_does_not_hold() -> None:
    assert tally(ROWS) == {"hold": 1, "do_not_hold": 1, "not_measured": 1, "told": 1}
    text = "\n".join(table("A title", "interrupted", ROWS, {}))
    assert "INTERRUPTED" in text and "read me" in text
    lines = {line.split("  ")[1]: line for line in text.splitlines() if line.startswith("  ")}
    assert lines["good (%)"].endswith("holds") and "± 2 points" in lines["good (%)"]
    assert lines["bad & <worse>"].endswith("DOES NOT HOLD")
    assert lines["open"].endswith("-") and "only told" not in text
    assert "1 hold, 1 do not hold, 1 not measured, 1 told" in text
    assert len(list(markdown(ROWS))) == 2 + len(ROWS)


def test_the_page_escapes_and_marks_what_does_not_hold() -> None:
    html = page("T & T", "ok", ROWS, ["one < two"], {"p": '<?xml version="1.0"?>\n<svg id="drawn"></svg>'})
    assert "T &amp; T" in html and "bad &amp; &lt;worse&gt;" in html and "one &lt; two" in html
    assert html.count('<tr class="false">') == 1 and html.count('<tr class="true">') == 1
    assert '<svg id="drawn">' in html and "<?xml" not in html


@pytest.mark.parametrize(
    ("value", "text"), [(300700.4, "300,700"), (94.72, "94.7"), (2.6, "2.60"), (0.03, "0.030"), (None, "-")]
)
def test_numbers_have_four_digits_or_fewer(value: float | None, text: str) -> None:
    assert number(value) == text
