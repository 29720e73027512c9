"""The search for the highest rate, against planted thresholds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from servelab.core.errors import ConfigError
from servelab.plugins.tasks._cells import CellResult
from servelab.plugins.tasks._search import Criteria, Range, Search, Step, disorder, probes_left, walk

LOW = st.floats(1e-3, 1e3)


def search(where: Range, threshold: float) -> tuple[Step, dict[float, bool], list[Step]]:
    """Probe until nothing is wanted any more; every rate up to the threshold passes."""
    verdicts: dict[float, bool] = {}
    steps = []
    while (step := walk(where, verdicts.get)).wanted is not None:
        assert step.wanted not in verdicts and len(verdicts) < 200
        steps.append(step)
        verdicts[step.wanted] = step.wanted <= threshold
    return step, verdicts, steps


@given(LOW, st.floats(1.0, 4000), st.sampled_from([0.5, 0.05, 0.01]), st.booleans())
def test_a_planted_threshold_is_found(low: float, times: float, tol: float, checks: bool) -> None:
    threshold = low * times
    step, verdicts, _ = search(Range(low, rel_tol=tol, checks=checks), threshold)
    assert step.status == "found" and step.passed is not None and step.failed is not None
    assert step.passed <= threshold < step.failed <= step.passed * (1 + tol)
    assert verdicts[step.passed] and not verdicts[step.failed]
    assert disorder(verdicts) == []
    least = math.log2(times) + math.log2(math.log(2) / math.log1p(tol))
    assert len(verdicts) <= least + 6  # doublings, halvings, both ends, two checks


@given(LOW, st.floats(0.01, 0.999))
def test_a_lowest_rate_that_fails_is_said(low: float, share: float) -> None:
    step, verdicts, _ = search(Range(low), low * share)
    assert step == Step(None, "below", failed=low) and list(verdicts) == [low]


@given(LOW, st.floats(1.01, 100))
def test_a_highest_rate_that_passes_is_said(low: float, times: float) -> None:
    high = low * times
    step, verdicts, _ = search(Range(low, high), math.inf)
    assert step == Step(None, "above", high) and max(verdicts) == high


@given(LOW, st.floats(1.0, 50), st.floats(1.1, 100))
def test_no_rate_outside_the_range_is_probed(low: float, times: float, top: float) -> None:
    _, verdicts, _ = search(Range(low, low * top), low * times)
    assert all(low <= rate <= low * top for rate in verdicts)


def test_the_estimate_counts_down_to_nothing() -> None:
    step, _, steps = search(Range(1.0, rel_tol=0.05), 37.0)
    left = [probes_left(Range(1.0, rel_tol=0.05), one) for one in steps]
    bracketed = [n for n, one in zip(left, steps, strict=True) if one.failed]
    assert bracketed == sorted(bracketed, reverse=True)
    assert probes_left(Range(1.0), step) == 0


@given(st.lists(st.tuples(st.floats(1, 100), st.booleans()), max_size=20))
def test_disorder_is_every_failure_below_a_pass(probes: list[tuple[float, bool]]) -> None:
    verdicts = dict(probes)
    passed = [rate for rate, ok in verdicts.items() if ok]
    wrong = {rate for rate, ok in verdicts.items() if not ok and any(p > rate for p in passed)}
    assert {low for low, _ in disorder(verdicts)} == wrong
    assert all(high == max(passed) for _, high in disorder(verdicts))


def result(p99: float | None = 50.0, met: float | None = 1.0, completed: int = 10, **more: Any) -> CellResult:
    own = {"requests": {"arrived": 10}, "slo_attainment": met, "median_queueing_ms": 5.0}
    figures = {"completed": completed, "p99_itl_ms": p99, "servelab": own}
    return CellResult(
        name="x", key="k", changes={"workload.request_rate": 1.0}, seed=0, results=figures, **more
    )


BOTH = Criteria({"p99_itl_ms": 100.0, "median_queueing_ms": 10.0}, attainment=0.9)


@pytest.mark.parametrize(
    ("one", "holds"),
    [
        (result(), True),
        (result(p99=100.0, met=0.9), True),
        (result(p99=100.1), False),
        (result(met=0.89), False),
        (result(completed=9), False),
        (result(p99=None, completed=9), False),
    ],
)
def test_every_criterion_counts(one: CellResult, holds: bool) -> None:
    assert BOTH.hold(one.results) is holds


def test_a_share_may_fail_to_complete_if_that_is_allowed() -> None:
    assert Criteria({}, completed=0.9).hold(result(completed=9).results)
    assert not Criteria({}, completed=0.9).hold(result(completed=8).results)
    assert not Criteria({}).hold(result(completed=0).results)


def test_loads_say_by_how_much() -> None:
    loads = BOTH.loads(result(p99=250.0, met=0.45).results)
    assert loads == {"completed": 1.0, "p99_itl_ms": 2.5, "median_queueing_ms": 0.5, "slo_attainment": 2.0}


def test_a_figure_that_is_not_there_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"p99_itl_s.*\n.*task.at_most(.|\n)*p99_itl_ms"):
        Criteria({"p99_itl_s": 1.0}).hold(result().results)
    with pytest.raises(ConfigError, match=r"no request states a bound"):
        Criteria({}, attainment=0.9).hold(result(met=None).results)


def test_a_run_that_failed_is_a_rate_that_failed() -> None:
    one = Search(label="a", changes={}, seed=3, where=Range(1.0), criteria=Criteria({}))
    found = {one.name(1.0): result(), one.name(2.0): result(status="failed", error="boom")}
    assert one.step(found).failed == 2.0
    assert one.probes(found).keys() == {1.0}
    cell = one.cell(1.5)
    assert cell.changes == {"seed": 3, "workload.request_rate": 1.5} and "seed 3 at 1.5" in cell.name
