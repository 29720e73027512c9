"""Goodput against closed-loop clients: what counts, what is judged, and the study from end to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from tests.experiments.conftest import Do
from tests.experiments.test_pastfuture_toy import context

from servelab.core.metrics import Timeline
from servelab.core.records import RequestFinished, RunStarted, StepDone
from servelab.plugins.tasks._cells import CellResult
from servelab.plugins.tasks.pastfuture_goodput import (
    POLICIES,
    GoodputStudy,
    GoodputStudyConfig,
    GoodTokens,
    UseByFinish,
    _drift_name,
)

S = 1_000_000_000


def facts(ended_s: float, ttft_s: float, gap_s: float, outcome: str = "completed") -> Any:
    return SimpleNamespace(
        outcome=outcome,
        ended_ns=round(ended_s * S),
        ttft_ns=round(ttft_s * S),
        tbt_ns=round(gap_s * S),
        prompt_tokens=100,
        output_tokens=10,
    )


def test_only_requests_within_both_bounds_count_with_prompt_and_output() -> None:
    served = [
        facts(50, 10.0, 1.5),
        facts(20, 1.0, 0.1),
        facts(60, 10.001, 0.1),
        facts(70, 1.0, 1.501),
        facts(80, 1.0, 0.1, "aborted"),
    ]
    timeline: Any = SimpleNamespace(requests={str(k): one for k, one in enumerate(served)})
    assert GoodTokens().figures(timeline) == {"good": [(20.0, 110), (50.0, 110)]}


def study(**settings: Any) -> GoodputStudy:
    return GoodputStudy(GoodputStudyConfig(**settings), context("pastfuture_goodput"))


def result(**figures: Any) -> CellResult:
    return CellResult(name="x", key="k", changes={}, seed=0, figures=figures)


def found(curves: dict[str, list[float]], use: list[float]) -> dict[str, CellResult]:
    """Tokens per second of each policy at 10 and 100 clients, all of it in one second of 100 to 200."""
    out = {_drift_name(0): result(use=use)}
    for policy, curve in curves.items():
        for clients, rate in zip((10, 100), curve, strict=True):
            good = [(50.0, 99), (150.0, rate * 100), (250.0, 99)]
            out[f"{policy}, {clients} clients, seed 0"] = result(good=good)
    return out


FLAT = {policy: [1000.0, 1000.0] for policy in POLICIES}
CLAIMED = {**FLAT, "aggressive": [900.0, 100.0], "conservative": [500.0, 500.0]}
STEADY = [0.9] * 6 + [0.5, 0.6] + [0.9] * 8


def verdicts(curves: dict[str, list[float]], use: list[float] = STEADY) -> dict[str, bool | None]:
    rows = study(clients=(10, 100), warm_s=100, duration_s=200).rows(found(curves, use))
    return {row.name: row.holds for row in rows if row.bound is not None}


def test_the_papers_words_hold_for_such_curves() -> None:
    assert set(verdicts(CLAIMED).values()) == {True} and len(verdicts(CLAIMED)) == 7


@pytest.mark.parametrize(
    ("curves", "use", "broken"),
    [
        ({**CLAIMED, "past-future": [1200.0, 1070.0]}, STEADY, "past-future: goodput"),
        ({**CLAIMED, "aggressive": [900.0, 451.0]}, STEADY, "aggressive: goodput"),
        ({**CLAIMED, "conservative": [1000.0, 500.0]}, STEADY, "peak of conservative"),
        ({**CLAIMED, "conservative": [400.0, 500.0]}, STEADY, "clients at which"),
        ({**CLAIMED, "conservative": [501.0, 501.0]}, STEADY, "the best of"),
        (CLAIMED, [*STEADY[:8], 0.8, *STEADY[9:]], "drift"),
    ],
)
def test_other_curves_do_not(curves: dict[str, list[float]], use: list[float], broken: str) -> None:
    failed = [name for name, ok in verdicts(curves, use).items() if ok is False]
    assert len(failed) == 1 and failed[0].startswith(broken)


def test_tokens_outside_the_window_do_not_count() -> None:
    rows = {
        row.name: row.ours
        for row in study(clients=(10, 100), warm_s=100, duration_s=200).rows(found(FLAT, STEADY))
    }
    assert rows["oracle, 10 clients"] == 1000.0


def test_use_by_finish_by_hand() -> None:
    """Blocks of 100 finishes: 3 steps of 2 requests that end with 40 of 100 tokens held hold 36, 38, 40."""
    meter = UseByFinish()
    meter.servelab_on_run_started(RunStarted(t_ns=0, info={"kv": {"pools": [{"pages": 100}]}}))
    done: dict[str, Any] = {"t_ns": 0, "lane": 0, "step": 0, "start_ns": 0, "waiting": 0, "running": 2}

    def step(tokens: list[int], k: int, free: int) -> None:
        names = ["a", "b"]
        meter.servelab_after_step(
            StepDone(
                **done, ends_ns=[*range(k)], requests=names, tokens=tokens, emitted=[k, k], free_pages=(free,)
            )
        )

    step([10, 1], 1, 5)
    step([1, 1], 3, 60)
    end = RequestFinished(t_ns=0, request="a", outcome="completed", reason="stop", output_tokens=1)
    for _ in range(100):
        meter.servelab_on_request_finished(end)
    step([1, 1], 1, 90)
    for _ in range(100):
        meter.servelab_on_request_finished(end)
    assert meter.figures(Timeline()) == {"use": [pytest.approx(0.38), pytest.approx(0.10)]}


def test_a_small_study_from_end_to_end(do: Do) -> None:
    """On prices of ours: ten clients or two, a device without figures is not asked."""
    registry_model = {
        "name": "small", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128,
        "vocab": 100, "max_position": 8192,
    }  # fmt: skip
    told = do(
        {
            "name": "pastfuture_goodput", "preset": "quick", "clients": [2, 40], "duration_s": 60,
            "warm_s": 30, "scale": 32, "processes": 2,
        },
        model=registry_model,
        executor={"name": "sim", "num_kv_pages": 7500},
        hardware={
            "name": "h", "flops": 3e14, "memory_bytes": 80_000_000_000, "memory_bytes_per_s": 2e12,
            "mfu": 0.7, "mbu": 0.8, "step_ns": 5_000_000,
        },
        cost={"name": "roofline"},
    )  # fmt: skip
    assert told["status"] == "ok" and len(told["cells"]) == 13
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["oracle, 40 clients"]["ours"] > rows["oracle, 2 clients"]["ours"] > 0
    assert (
        rows["drift: KV use from W to 2 W finishes after the switch, less what it stays at"]["ours"]
        is not None
    )
