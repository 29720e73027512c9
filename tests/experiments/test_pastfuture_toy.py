"""The toy study: its meter against stepping, its cells against the card, its verdicts."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.experiments.conftest import Do

from servelab.core.context import Context
from servelab.core.facts import Limits
from servelab.core.metrics import Timeline
from servelab.core.records import RequestArrived, RequestFinished, RunStarted, StepDone
from servelab.core.testing.fakes import TOY_MODEL
from servelab.plugins.tasks._cells import Cell, Work
from servelab.plugins.tasks._cells.cell import CellResult
from servelab.plugins.tasks.pastfuture_toy import POLICIES, DecodeSteps, ToyStudy, ToyStudyConfig


def context(name: str) -> Context:
    return Context(
        kind="task",
        name=name,
        rng=Random(0),
        model=TOY_MODEL,
        hardware=None,
        limits=Limits(max_model_len=1, max_batch_tokens=1, max_batch_requests=1),
    )


def study(**settings: Any) -> ToyStudy:
    return ToyStudy(ToyStudyConfig(**settings), context("pastfuture_toy"))


def test_the_full_study_is_the_papers() -> None:
    cells = {cell.name: cell.changes for cell in study().cells({})}
    assert len(cells) == 30
    one = cells["D2 past-future 5 % seed 0"]
    assert one["executor"]["num_kv_pages"] == 120_000 and one["kvcache"]["page_tokens"] == 1
    assert one["scheduler"] == {
        "name": "pastfuture",
        "reserve": 0.05,
        "window": 1000,
        "initial_length": 512,
        "admission_interval": 10,
        "max_num_batched_tokens": 32768,
    }
    assert one["workload"]["num_requests"] == 3000 and one["workload"]["request_rate"] == "inf"
    assert one["workload"]["prompt_length"] == {"law": "uniform", "min": 3000, "max": 5000}
    assert cells["D1 oracle seed 0"]["workload"]["output_length"] == {
        "law": "uniform",
        "min": 2048,
        "max": 4096,
    }
    assert cells["D3 oracle seed 0"]["workload"]["max_new_tokens"] == 4096


def test_the_window_shrinks_with_the_requests() -> None:
    """Else a short study would be over before the window forgets what it began with."""
    made = study(preset="quick", laws=("D1",)).cells({})
    (one,) = (cell.changes for cell in made if "past-future 3" in cell.name)
    assert one["workload"]["num_requests"] == 800 and one["scheduler"]["window"] == 1000 * 800 // 3000
    assert (
        one["scheduler"]["initial_length"] == 512 // 32 and one["executor"]["num_kv_pages"] == 120_000 // 32
    )


def test_a_seed_serves_every_policy_the_same_requests() -> None:
    cells = [cell.changes for cell in study(seeds=2, laws=("D1",)).cells({})]
    assert {cell["seed"] for cell in cells} == {0, 1}
    assert all(cell["workload"] == cells[0]["workload"] for cell in cells)


def figures(use: float, **more: float) -> dict[str, float]:
    return {"kv_use": use, "steps": 300_000, "future_peak": 95.0, "evictions": 0.0, **more}


def found(uses: dict[str, float], **more: float) -> dict[str, CellResult]:
    return {
        f"D1 {name} seed 0": CellResult(name=name, key="k", changes={}, seed=0, figures=figures(use, **more))
        for name, use in uses.items()
    }


PAPER = {policy.name: policy.paper["D1"][1] for policy in POLICIES}


def verdicts(uses: dict[str, float], **more: float) -> dict[tuple[str, str], bool | None]:
    rows = study(laws=("D1",)).rows(found(uses, **more))
    return {(row.name, row.unit): row.holds for row in rows if row.bound is not None}


def test_the_papers_own_figures_hold() -> None:
    said = verdicts(PAPER)
    assert all(ok for (_, unit), ok in said.items() if unit != "decode steps")


def test_use_that_is_off_does_not_hold() -> None:
    said = verdicts({**PAPER, "past-future 3 %": PAPER["past-future 3 %"] - 2.1})
    assert [key for key, ok in said.items() if ok is False and key[1] == "% KV use"] == [
        ("D1 past-future 3 %", "% KV use")
    ]


def test_a_wrong_order_and_an_eviction_do_not_hold() -> None:
    said = verdicts({**PAPER, "past-future 3 %": 97.0}, evictions=0.1)
    assert said["D1 KV use of past-future 3 % less that of oracle", "points"] is False
    assert said["D1 KV use of oracle less that of aggressive 99 %", "points"] is True
    assert said["D1 evictions of oracle", "%"] is False


def test_what_was_not_measured_has_no_verdict() -> None:
    assert set(verdicts({}).values()) == {None}


def test_fewer_requests_are_not_judged_by_their_use() -> None:
    rows = study(preset="quick", laws=("D1",)).rows(found(PAPER))
    assert all(row.bound is None for row in rows if row.unit in ("% KV use", "decode steps"))
    assert rows[0].note and rows[0].ours == PAPER["oracle"]


def step(requests: list[str], tokens: list[int], k: int, free: int) -> StepDone:
    n = len(requests)
    return StepDone(
        t_ns=0, lane=0, step=0, start_ns=0, ends_ns=list(range(k)), requests=requests, tokens=tokens,
        emitted=[k] * n, waiting=0, running=n, free_pages=(free,),
    )  # fmt: skip


def test_the_meter_by_hand() -> None:
    """Capacity 100. Prompts 10 and 20 run in a step of their own; then 3 steps of both, then 2 of the second.

    Held after each step: 33, 35, 37; then the first has left: 25, 26. The first made 4 tokens, the second 6.
    M* when both run, with a = (11, 21), b = (3, 5): max(21 + 5, 32 + 2 * 3) = 38; alone: 24 + 2 = 26.
    """
    meter = DecodeSteps()
    meter.servelab_on_run_started(
        RunStarted(t_ns=0, info={"kv": {"pools": [{"pages": 100, "page_tokens": 1}]}})
    )
    for name, prompt in (("a", 10), ("b", 20)):
        meter.servelab_on_request_arrived(
            RequestArrived(t_ns=0, request=name, prompt_tokens=prompt, max_new_tokens=9)
        )
    meter.servelab_after_step(step(["a", "b"], [10, 20], 1, 70))
    meter.servelab_after_step(step(["a", "b"], [1, 1], 3, 63))
    meter.servelab_after_step(step(["b"], [1], 2, 74))
    for name, output in (("a", 4), ("b", 6)):
        meter.servelab_on_request_finished(
            RequestFinished(t_ns=0, request=name, outcome="completed", reason="stop", output_tokens=output)
        )
    assert meter.figures(Timeline()) == {
        "steps": 5,
        "kv_use": pytest.approx((33 + 35 + 37 + 25 + 26) / 5),
        "future_peak": pytest.approx((3 * 38 + 2 * 26) / 5),
        "evictions": 0.0,
    }


def test_holds_change_nothing_that_the_meter_sees(base: dict[str, Any]) -> None:
    (cell,) = (c for c in study(scale=32, requests=30, laws=("D1",)).cells({}) if "aggressive 99" in c.name)
    stepped = Cell(
        name="stepped",
        changes={**cell.changes, "executor": {**cell.changes["executor"], "foresight": False}},
        meters=cell.meters,
    )
    done = Work(base).run(lambda found: [cell, stepped])
    held, single = done[cell.name], done["stepped"]
    assert held.figures == single.figures and held.figures["evictions"] > 0
    batch = [one.results["servelab"]["batch"] for one in (held, single)]
    assert batch[0]["launches"] < batch[1]["launches"] and batch[0]["steps"] == batch[1]["steps"]


def test_a_small_study_from_end_to_end(do: Do) -> None:
    told = do(
        {
            "name": "pastfuture_toy",
            "preset": "quick",
            "requests": 60,
            "scale": 32,
            "laws": ["D3"],
            "processes": 2,
        }
    )
    assert told["status"] == "ok" and len(told["cells"]) == 10 and len(told["deviations"]) == 3
    rows = {(row["name"], row["unit"]): row for row in told["rows"]}
    assert rows["D3 evictions of oracle", "%"]["holds"] is True
    assert rows["D3 evictions of conservative 100 %", "%"]["holds"] is True
    assert rows["D3 KV use of conservative 100 % less that of past-future 3 %", "points"]["holds"] is True
    use = rows["D3 aggressive 99 %", "% KV use"]
    assert use["paper"] == 98.1 and 50 < use["ours"] <= 100 and "lengths and capacity / 32" in use["setup"]
    assert rows["D3 aggressive 99 %", "% future peak"]["ours"] > use["ours"]
