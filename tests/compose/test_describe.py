"""``task=describe``: figures of any workload, counted from what it sends."""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servelab.core.api import SLO, Arrival, Cancel, RequestSpec, Truth
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.registry import Registry
from servelab.plugins.tasks import _traffic_plot
from servelab.plugins.tasks._traffic import Traffic, correlation
from servelab.plugins.tasks.describe import JSON_FILE, PLOT_FILE

SECOND = 1_000_000_000
TRACES = Path(__file__).parents[1] / "workloads" / "files"

Describe = Callable[..., dict[str, Any]]


def item(i: int, at_s: float, prompt: int, output: int | None, **fields: Any) -> Arrival:
    spec = RequestSpec(id=f"r{i}", prompt_tokens=prompt, max_new_tokens=50, **fields)
    truth = None if output is None else Truth(output, (fields.get("n", 1) > 1 and (60,)) or ())
    return Arrival(round(at_s * SECOND), spec, truth)


HAND = [
    item(0, 1, 10, 5, program="a", slo=SLO(ttft_ns=1)),
    item(1, 2, 20, 15, program="a", turn=1),
    Cancel(3 * SECOND, "r1"),
    item(2, 4, 30, 100, request_class="offline", tenant="t", priority=3, n=2),
    item(3, 8, 40, 20, program="b"),
]


def test_figures_by_hand() -> None:
    told = Traffic(HAND).figures()
    assert (told["requests"], told["duration_s"], told["requests_per_s"]) == (4, 8, 0.5)
    assert told["iat_cv"] == pytest.approx((14 / 9) ** 0.5 / (7 / 3))  # gaps 1, 2, 4
    assert told["iat_cv_60s"] == {"windows": 0, "p50": None, "p90": None}
    prompt = told["prompt_tokens"]
    assert (prompt["mean"], prompt["min"], prompt["p50"], prompt["max"], prompt["total"]) == (
        25,
        10,
        25,
        40,
        100,
    )
    assert prompt["cv"] == pytest.approx(125**0.5 / 25)
    assert prompt["p90"] == pytest.approx(37)
    assert told["output_tokens"]["total"] == 5 + 15 + 100 + 60 + 20  # both samples
    assert told["length_capped"] == 2
    assert (told["cancellations"], told["with_slo"], told["with_prompt_ids"]) == (1, 1, 0)
    assert told["samples_per_request"] == 5 / 4
    assert told["classes"] == [
        {"name": "online", "tenant": "default", "priority": 0, "requests": 3},
        {"name": "offline", "tenant": "t", "priority": 3, "requests": 1},
    ]
    assert (told["programs"], told["turns"]["mean"], told["turns"]["max"]) == (2, 1.5, 2)


def test_windows_of_60_seconds() -> None:
    """Even gaps in the first minute, none but bursts in the second, too few in the third."""
    even = [item(i, i, 1, 1) for i in range(60)]
    bursts = [item(100 + i, 60 + 10 * (i // 6), 1, 1) for i in range(36)]
    few = [item(200 + i, 130 + i, 1, 1) for i in range(5)]
    told = Traffic([*even, *bursts, *few]).figures()["iat_cv_60s"]
    burst = [0, 0, 0, 0, 0, 10] * 5 + [0] * 5
    mean = sum(burst) / 35
    cv = (sum((gap - mean) ** 2 for gap in burst) / 35) ** 0.5 / mean
    assert told["windows"] == 2
    assert told["p50"] == pytest.approx(cv / 2) and told["p90"] == pytest.approx(0.9 * cv)


def test_rates_add_up() -> None:
    traffic = Traffic(HAND)
    window_s, rates = traffic.rates(4)
    assert window_s == 2
    assert rates == [0.5, 0.5, 0.5, 0.5]  # 1; 2; 4; 8, the end
    assert Traffic([item(0, 0, 1, 1)]).rates(4) == (0.0, [])


def test_correlation() -> None:
    assert correlation(array("q", [1, 2, 3]), array("q", [2, 4, 6])) == pytest.approx(1)
    assert correlation(array("q", [1, 2, 3]), array("q", [6, 4, 2])) == pytest.approx(-1)
    assert correlation(array("q", [1, 2, 1, 2]), array("q", [5, 5, 9, 9])) == 0
    assert correlation(array("q", [1, 1]), array("q", [5, 9])) is None


def test_nothing_and_nothing_known() -> None:
    told = Traffic([]).figures()
    assert (told["requests"], told["requests_per_s"], told["prompt_tokens"]) == (0, None, None)
    told = Traffic([item(0, 1, 5, None), item(1, 2, 6, None)]).figures()
    assert told["output_tokens"] is None and told["prompt_output_correlation"] is None
    assert json.dumps(told, allow_nan=False)


# --- the task ----------------------------------------------------------------------------------------------


@pytest.fixture
def describe(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> Describe:
    def run(workload: dict[str, Any], **task: Any) -> dict[str, Any]:
        raw["workload"], raw["task"] = workload, {"name": "describe", **task}
        composed = compose(validate(raw, registry), registry, run_dir=tmp_path)
        composed.task.run(composed)
        return json.loads((tmp_path / JSON_FILE).read_text())

    return run


WORKLOADS: list[dict[str, Any]] = [
    {
        "name": "synthetic",
        "num_requests": 300,
        "prompt_length": 20,
        "output_length": 9,
        "cancel_fraction": 0.2,
    },
    {"name": "burstgpt", "num_requests": 300},
    {"name": "azure", "path": str(TRACES / "azure.csv")},
    {"name": "mooncake", "path": str(TRACES / "mooncake.jsonl")},
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w["name"])
def test_a_workload_and_its_arrivals_say_the_same(describe: Describe, workload: dict[str, Any]) -> None:
    told = describe(workload, plot=False)
    measured, said = told["measured"], told["described"]
    assert measured["requests"] == said["requests"]
    assert measured["requests_per_s"] == pytest.approx(said["realised_rate"])
    assert measured["iat_cv"] == pytest.approx(said["iat_cv"])
    assert measured["iat_cv_60s"]["windows"] == said["iat_cv_60s"]["windows"]
    for key in ("prompt_tokens", "output_tokens", "max_new_tokens"):
        assert measured[key] == pytest.approx(said[key])
    assert measured["length_capped"] == said["length_capped"]
    assert measured["cancellations"] == said["cancellations"]


def test_the_table_says_what_it_is(describe: Describe, capsys: pytest.CaptureFixture[str]) -> None:
    describe({"name": "burstgpt", "num_requests": 2000}, plot=False)
    said = capsys.readouterr().out
    assert "BurstGPT-like" in said and "2,000" in said
    assert "where the generator's constants are from" in said
    assert "longer than the model's 512 tokens and cut: " in said
    describe({"name": "mooncake", "path": str(TRACES / "mooncake.jsonl"), "prompt_scale": 0.25}, plot=False)
    assert "a cache would reuse" in capsys.readouterr().out
    describe(
        {
            "name": "synthetic",
            "prompt_length": 9,
            "output_length": 5,
            "classes": [{"name": "a"}, {"name": "b", "tenant": "t"}],
        },
        plot=False,
    )
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " t   " in line] == ["b"]


def test_kv_memory_plays_no_part(
    describe: Describe, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    raw["executor"]["num_kv_pages"] = 1
    told = describe({"name": "synthetic", "num_requests": 3, "prompt_length": 400, "output_length": 100})
    assert told["measured"]["prompt_tokens"]["total"] == 1200


def test_the_picture(describe: Describe, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    describe({"name": "burstgpt", "num_requests": 200})
    first = (tmp_path / PLOT_FILE).read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 20_000
    describe({"name": "burstgpt", "num_requests": 200})
    assert (tmp_path / PLOT_FILE).read_bytes() == first


@pytest.mark.parametrize(
    "items", [[], [item(0, 0, 5, 5)], [item(0, 0, 5, None), item(1, 200_000, 7, None)], HAND]
)
def test_pictures_of_odd_traffic(items: list[Arrival | Cancel]) -> None:
    pytest.importorskip("matplotlib")
    assert _traffic_plot.draw(Traffic(items), "a $name$").startswith(b"\x89PNG")


def test_medians_of_the_picture_are_those_of_the_table() -> None:
    traffic = Traffic([item(0, 0, 5, 3), item(1, 1, 7_000, 4)])
    assert _traffic_plot.medians(traffic) == "Prompt, median 3,502.5; output, 3.5 (dashed)"
    assert traffic.figures()["prompt_tokens"]["p50"] == 3502.5
    assert _traffic_plot.medians(Traffic([])) == "Lengths"


def test_without_matplotlib(
    describe: Describe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The figures are told, and so is that the picture is left out."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    describe({"name": "synthetic", "num_requests": 3, "prompt_length": 20})
    told = capsys.readouterr().out
    assert "requests" in told and "workload.png: left out" in told and "pip install matplotlib" in told
    assert (tmp_path / JSON_FILE).is_file() and not (tmp_path / PLOT_FILE).exists()


def test_from_the_command_line(run_py: Callable[..., Any], tmp_path: Path) -> None:
    """No executor is named: none with weights is loaded, whatever the default is."""
    done = run_py("task=describe", "workload=burstgpt", "workload.num_requests=50", "hydra.run.dir=out")
    assert done.returncode == 0, done.stderr
    assert "BurstGPT-like" in done.stdout and "artefacts: " in done.stdout
    assert json.loads((tmp_path / "out" / JSON_FILE).read_text())["measured"]["requests"] == 50
    refused = run_py("task=describe", "workload=chat")
    assert refused.returncode == 1 and "executor=torch" in refused.stderr


BURSTS: dict[str, Any] = {"name": "burstgpt", "num_requests": 20}
SHORT: dict[str, Any] = {"prompt_length": 20, "output_length": 9, "max_new_tokens": 9, "num_requests": 20}
LOOP: dict[str, Any] = {"name": "closed_loop", "clients": 2, **SHORT}


@pytest.mark.parametrize(
    ("workload", "traffic", "closed"),
    [
        (LOOP, "closed_loop", True),
        ({"name": "transform", "of": BURSTS, "steps": []}, "BurstGPT-like, transformed", False),
        ({"name": "transform", "of": LOOP, "steps": []}, "closed_loop, transformed", True),
        (
            {
                "name": "mix",
                "components": {"a": {"workload": BURSTS}, "b": {"workload": {"name": "synthetic", **SHORT}}},
            },
            "a: BurstGPT-like; b: synthetic",
            False,
        ),
        (
            {"name": "mix", "components": {"a": {"workload": BURSTS}, "b": {"workload": LOOP}}},
            "a: BurstGPT-like; b: closed_loop",
            True,
        ),
    ],
)
def test_what_is_within_keeps_its_label_and_its_loop(
    describe: Describe,
    capsys: pytest.CaptureFixture[str],
    workload: dict[str, Any],
    traffic: str,
    closed: bool,
) -> None:
    assert describe(workload, plot=False)["traffic"] == traffic
    assert ("a closed loop:" in capsys.readouterr().out) == closed
