"""Goodput against closed-loop clients: what counts, what is judged, and the study from end to end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tests.experiments.conftest import Do
from tests.experiments.test_pastfuture_toy import context

from servelab.core.metrics import Timeline
from servelab.core.records import RequestFinished, RunStarted, StepDone
from servelab.plugins.tasks import pastfuture_goodput
from servelab.plugins.tasks._cells import CellResult
from servelab.plugins.tasks.pastfuture_goodput import (
    D1,
    LAWS,
    OTHERS,
    SERVERS,
    VARIANTS,
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


def found(
    curves: dict[str, list[float]], use: list[float], others: dict[str, float] | None = None
) -> dict[str, CellResult]:
    """Tokens per second at 10 and 100 clients under D1, all of it in one second of 100 to 200; and what the
    other servers have at 100 clients under another law, 1000 being past-future's.
    """
    out = {_drift_name(0): result(use=use)}
    rates = {(policy, D1, n): y for policy, ys in curves.items() for n, y in zip((10, 100), ys, strict=True)}
    for law in LAWS:
        if law != D1:
            rates["past-future", law, 100] = 1000.0
            rates.update({(other, law, 100): (others or {}).get(law, 900.0) for other in OTHERS})
    for (policy, law, clients), rate in rates.items():
        good = [(50.0, 99), (150.0, rate * 100), (250.0, 99)]
        out[f"{policy}, {law}, {clients} clients, seed 0"] = result(good=good)
    return out


FLAT = {policy: [1000.0, 1000.0] for policy in SERVERS}
CLAIMED = {**FLAT, "aggressive": [900.0, 100.0], "conservative": [500.0, 500.0]}
STEADY = [0.9] * 6 + [0.5, 0.6] + [0.9] * 8


def verdicts(
    curves: dict[str, list[float]], use: list[float] = STEADY, others: dict[str, float] | None = None
) -> dict[str, bool | None]:
    rows = study(clients=(10, 100), warm_s=100, duration_s=200).rows(found(curves, use, others))
    return {row.name: row.holds for row in rows if row.bound is not None}


def test_the_papers_words_hold_for_such_curves() -> None:
    assert set(verdicts(CLAIMED).values()) == {True} and len(verdicts(CLAIMED)) == 6


@pytest.mark.parametrize(
    ("curves", "use", "broken"),
    [
        ({**CLAIMED, "past-future": [1200.0, 1070.0]}, STEADY, "past-future: goodput"),
        ({**CLAIMED, "aggressive": [900.0, 451.0]}, STEADY, "aggressive: goodput"),
        ({**CLAIMED, "conservative": [1000.0, 500.0]}, STEADY, "peak of conservative"),
        ({**CLAIMED, "conservative": [400.0, 500.0]}, STEADY, "clients at which"),
        ({**CLAIMED, "conservative": [501.0, 501.0]}, STEADY, "the better of"),
        (CLAIMED, [*STEADY[:8], 0.8, *STEADY[9:]], "drift"),
    ],
)
def test_other_curves_do_not(curves: dict[str, list[float]], use: list[float], broken: str) -> None:
    failed = [name for name, ok in verdicts(curves, use).items() if ok is False]
    assert len(failed) == 1 and failed[0].startswith(broken)


@pytest.mark.parametrize(("theirs", "holds"), [(500.0, True), (501.0, False)])
def test_up_to_is_said_of_the_law_with_the_largest_gain(theirs: float, holds: bool) -> None:
    """Under D1 the gain is 1.1; what counts is the better of the others, not the worse."""
    curves = {**FLAT, "aggressive": [900.0, 100.0], "conservative": [900.0, 900.0]}
    cells = found(curves, STEADY, {"D3": theirs})
    cells["aggressive, D3, 100 clients, seed 0"] = result(good=[])
    rows = {row.name: row for row in study(clients=(10, 100), warm_s=100, duration_s=200).rows(cells)}
    (judged,) = [row for name, row in rows.items() if name.endswith("least of all laws")]
    assert judged.ours == theirs / 1000 and judged.holds is holds and "D3" in judged.setup
    under_d1 = rows["the better of aggressive and conservative over past-future at 100 clients, D1"]
    assert under_d1.ours == 0.9 and under_d1.holds is None
    assert rows["aggressive over past-future at 100 clients, D1"].ours == 0.1
    assert rows["conservative over past-future at 100 clients, D3"].ours == theirs / 1000


def test_up_to_is_not_said_before_every_law_is_measured() -> None:
    cells = found(CLAIMED, STEADY)
    del cells["past-future, D2, 100 clients, seed 0"]
    rows = study(clients=(10, 100), warm_s=100, duration_s=200).rows(cells)
    (judged,) = [row for row in rows if row.name.endswith("least of all laws")]
    assert judged.ours is None and judged.holds is None


def test_every_server_meets_all_clients_and_every_law() -> None:
    made = study(clients=(10, 100), seeds=2)
    names = [cell.name for cell in made.cells({})]
    assert len(names) == len(set(names)) == 2 * (len(SERVERS) * 2 + 3 * 3 + len(VARIANTS) + 1)
    assert {"aggressive, D2, 100 clients, seed 1", "oracle, D1, 10 clients, seed 0"} <= set(names)


def test_the_servers_are_the_artifacts() -> None:
    """By what each reads in WuSiYu/lightllm-ae at d93ff69."""
    assert SERVERS["aggressive"] == {
        "name": "aggressive", "start_below": 0.95, "watermark": 1.0, "queue_limit_ms": 8000,
    }  # fmt: skip
    ends = {"queue_limit_ms": 8000, "gap_limit_ms": 1490, "max_new_per_pass": 1}
    assert SERVERS["conservative"] == {
        "name": "conservative", "assumed_output_tokens": 12000, "overcommit": 0.95, **ends,
    }  # fmt: skip
    assert SERVERS["past-future"] == {
        "name": "pastfuture", "window": 40, "initial_length": 6000, "reserve": 0.05, **ends,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"clients": (40, 10)}, r"clients=\[40, 10\] must rise"),
        ({"clients": (10, 10)}, r"clients=\[10, 10\] must rise"),
        ({"clients": (0, 10)}, "greater than or equal to 1"),
        ({"warm_s": 1200}, "warm_s=1200 must be below duration_s=1200"),
        ({"duration_s": 100, "preset": "quick"}, "warm_s=240 must be below duration_s=100"),
    ],
)
def test_settings_that_measure_nothing_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        GoodputStudyConfig(**settings)


def test_tokens_outside_the_window_do_not_count() -> None:
    rows = {
        row.name: row.ours
        for row in study(clients=(10, 100), warm_s=100, duration_s=200).rows(found(FLAT, STEADY))
    }
    assert rows["oracle, D1, 10 clients"] == 1000.0


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


def test_a_small_study_from_end_to_end(do: Do, monkeypatch: pytest.MonkeyPatch) -> None:
    """On prices of ours, with two laws and without variants: a device without figures is not asked."""
    monkeypatch.setattr(pastfuture_goodput, "LAWS", {law: LAWS[law] for law in (D1, "ShareGPT-o1")})
    monkeypatch.setattr(pastfuture_goodput, "VARIANTS", {})
    registry_model = {
        "name": "small", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 128,
        "vocab": 100, "max_position": 8192,
    }  # fmt: skip
    told = do(
        {
            "name": "pastfuture_goodput", "preset": "quick", "clients": [2, 40], "duration_s": 30,
            "warm_s": 10, "scale": 32, "processes": 2,
        },
        model=registry_model,
        executor={"name": "sim", "num_kv_pages": 7500},
        hardware={
            "name": "h", "flops": 3e14, "memory_bytes": 80_000_000_000, "memory_bytes_per_s": 2e12,
            "mfu": 0.7, "mbu": 0.8, "step_ns": 5_000_000,
        },
        cost={"name": "roofline"},
    )  # fmt: skip
    assert told["status"] == "ok" and len(told["cells"]) == 12
    rows = {row["name"]: row for row in told["rows"]}
    assert rows["oracle, D1, 40 clients"]["ours"] > rows["oracle, D1, 2 clients"]["ours"] > 0
    assert (
        rows["drift: KV use from W to 2 W finishes after the switch, less what it stays at"]["ours"]
        is not None
    )
