"""What is said of work in processes of its own."""

from __future__ import annotations

import pytest

from servelab.core.errors import ServeLabError
from servelab.core.processes import duration, in_one_line


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (60, "1 min 00 s"),
        (125.4, "2 min 05 s"),
        (3599.6, "1 h 00 min"),
        (3725, "1 h 02 min"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_an_error_in_one_line_has_the_first_point_of_its_list() -> None:
    assert in_one_line(str(ServeLabError("it broke", where="here", why="rust"))) == "it broke"
    assert in_one_line("2 problems:\n  - seed: missing\n  - task: missing\n") == "2 problems: seed: missing"
    assert in_one_line("nothing follows:") == "nothing follows:"
    assert in_one_line(" \n") == ""
