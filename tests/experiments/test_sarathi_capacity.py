"""The capacity study of Sarathi: its searches share runs, its verdicts can fail."""

from __future__ import annotations

from typing import Any

import pytest
from tests.experiments.test_pastfuture_toy import context

from servelab.plugins.tasks._cells import Cell, CellResult
from servelab.plugins.tasks.sarathi_capacity import (
    REFERENCE,
    SCHEDULERS,
    SarathiCapacity,
    SarathiCapacityConfig,
)

TRUE = {
    ("vllm", "strict"): 1.0, ("orca", "strict"): 0.9, ("sarathi-512", "strict"): 2.5,
    ("sarathi-2048", "strict"): 2.0, ("vllm", "relaxed"): 3.0, ("orca", "relaxed"): 2.0,
    ("sarathi-512", "relaxed"): 3.5, ("sarathi-2048", "relaxed"): 4.0,
}  # fmt: skip


def planted(thresholds: dict[tuple[str, str], float], cell: Cell, iteration: float) -> CellResult:
    """A gap of 50, 200 or 800 ms: within both bounds, the relaxed one, or none."""
    own: dict[str, Any] = {"requests": {"arrived": 10}, "median_queueing_ms": 10.0, "slo_attainment": None}
    figures: dict[str, Any] = {"completed": 10, "median_itl_ms": iteration, "servelab": own}
    if cell.name != REFERENCE:
        scheduler, rate = cell.name.partition(",")[0], cell.changes["workload.request_rate"]
        met = [slo for slo in ("strict", "relaxed") if rate <= thresholds[scheduler, slo]]
        figures["p99_itl_ms"] = {0: 800.0, 1: 200.0, 2: 50.0}[len(met)]
    return CellResult(name=cell.name, key="k", changes=cell.changes, seed=0, results=figures)


def searched(
    thresholds: dict[tuple[str, str], float], iteration: float = 20.0, **settings: Any
) -> tuple[SarathiCapacity, dict[str, CellResult]]:
    study = SarathiCapacity(SarathiCapacityConfig(**settings), context("sarathi_capacity"))
    found: dict[str, CellResult] = {}
    while new := [cell for cell in study.cells(found) if cell.name not in found]:
        assert len({cell.name for cell in new}) == len(new)
        found[new[0].name] = planted(thresholds, new[0], iteration)
        assert len(found) < 1000
    return study, found


def verdicts(thresholds: dict[tuple[str, str], float], **more: Any) -> dict[str, bool | None]:
    study, found = searched(thresholds, seeds=1, **more)
    return {row.name: row.holds for row in study.rows(found) if row.bound is not None}


def test_planted_capacities_are_found() -> None:
    study, found = searched(TRUE, seeds=2)
    told = {row.name: row for row in study.rows(found)}
    for (scheduler, slo), rate in TRUE.items():
        row = told[f"capacity of {scheduler}, {slo}"]
        assert rate / 1.05 <= (row.ours or 0) <= rate and row.seeds == 2
    assert set(verdicts(TRUE).values()) == {True}
    study.complain(found)


def test_a_rate_is_run_once_for_both_bounds() -> None:
    study, found = searched(TRUE, seeds=1)
    searches = study.extra(found)["searches"]
    probed = [{probe["rate"] for probe in one["probes"]} for one in searches if one["scheduler"] == "vllm"]
    assert len(searches) == 8 and probed[0] == probed[1]  # each sees what the other has run
    rates = [
        (one.changes["scheduler"]["name"], str(one.changes))
        for one in found.values()
        if one.name != REFERENCE
    ]
    assert len(set(rates)) == len(rates)


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({("vllm", "strict"): 1.6}, "sarathi-512 over vllm, strict"),
        ({("vllm", "strict"): 0.6}, "sarathi-512 over vllm, strict"),
        ({("orca", "strict"): 2.8, ("orca", "relaxed"): 3.0}, "sarathi-512 over orca, strict"),
        ({("sarathi-2048", "strict"): 3.0}, "sarathi-512 over sarathi-2048, strict"),
        ({("sarathi-512", "relaxed"): 4.6}, "sarathi-2048 over sarathi-512, relaxed"),
        ({("orca", "relaxed"): 4.6}, "sarathi-2048 over orca, relaxed"),
    ],
)
def test_other_capacities_do_not_hold(change: dict[tuple[str, str], float], broken: str) -> None:
    failed = [name for name, ok in verdicts({**TRUE, **change}).items() if ok is False]
    assert failed == [f"capacity, {broken}"]


def test_one_seed_counts_as_far_as_its_brackets() -> None:
    """Of the quick preset: gains of 1.5 and 4 are outside also when they are known to 15 % only."""
    for vllm, holds in ((2.5 / 3.4, True), (2.5 / 1.8, True), (2.5 / 4.0, False), (2.5 / 1.5, False)):
        found = verdicts({**TRUE, ("vllm", "strict"): vllm}, preset="quick", rel_tol=0.15)
        assert found["capacity, sarathi-512 over vllm, strict"] is holds, vllm


def test_a_slow_iteration_does_not_hold() -> None:
    assert verdicts(TRUE, iteration=25.1)[REFERENCE] is False
    assert verdicts(TRUE, iteration=25.0)[REFERENCE] is True


def test_every_scheduler_is_asked_the_same() -> None:
    study = SarathiCapacity(SarathiCapacityConfig(seeds=1), context("sarathi_capacity"))
    cells = [cell for cell in study.cells({}) if cell.name != REFERENCE]
    assert len(cells) == len(SCHEDULERS)
    assert all(cell.changes["workload"] == cells[0].changes["workload"] for cell in cells)
    assert len({cell.changes["seed"] for cell in cells}) == 1
