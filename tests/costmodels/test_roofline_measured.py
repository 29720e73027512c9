"""The roofline against what others measured: matrix products of three devices, and a real run of vLLM 0.19.

The data are not in the repository: ``SERVELAB_DATA`` names a folder with
``calibration/vidur_profiling/compute/DEVICE/OWNER/MODEL/mlp.csv`` (microsoft/vidur) and
``calibration/vllm_rtx4090/vllm/requests.jsonl`` (casys-kaist/LLMServingSim).
"""

from __future__ import annotations

import csv
import json
import os
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from tests.costmodels.rooflines import CONFIGS, device, model, roofline

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.metrics.summary import SummaryOptions, summarize
from servelab.core.metrics.timeline import Timeline
from servelab.core.records import Record
from servelab.core.registry import Registry
from servelab.core.request import Arrival, RequestSpec, Truth
from servelab.core.testing.fakes import ListWorkload
from servelab.plugins.costmodels.roofline.device import Work


def data(*parts: str) -> Path:
    """A file or folder of the data, or skip."""
    root = os.environ.get("SERVELAB_DATA")
    if not root:
        pytest.skip("SERVELAB_DATA is not set: it names the folder of measurements")
    found = Path(root, *parts)
    if not found.exists():
        pytest.skip(f"{found} is not there")
    return found


# ------------------------------------------------------------- matrix products


def products(path: Path) -> list[tuple[int, int, int, float]]:
    """(tokens, outputs, inputs, median ns) of the four products of a layer, over degrees of parallelism."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            tokens, t = int(row["num_tokens"]), int(row["num_tensor_parallel_workers"])
            d, f = int(row["n_embd"]), int(row["n_expanded_embd"])
            heads, kv = int(row["n_head"]), int(row["n_kv_head"])
            width, up = d // heads, 2 if row["use_gated_mlp"] == "True" else 1
            shapes = {
                "attn_pre_proj": ((heads // t + 2 * max(1, kv // t)) * width, d),
                "attn_post_proj": (d, d // t),
                "mlp_up_proj": (up * f // t, d),
                "mlp_down_proj": (d, f // t),
            }
            for name, (n, k) in shapes.items():
                if ms := row[f"time_stats.{name}.median"]:
                    found.append((tokens, n, k, float(ms) * 1e6))
    return found


@pytest.mark.parametrize(
    ("folder", "name", "published", "datasheet"),
    [("a100", "a100_80g", 6.2, 34.6), ("h100", "h100", 9.2, 38.4), ("a40", "a40", 6.6, 30.8)],
)
def test_profiles_reproduce_the_errors_of_their_fits(
    folder: str, name: str, published: float, datasheet: float
) -> None:
    """Mean error over all measured products, of the profile and of the bare datasheet, in percent."""
    files = sorted(data("calibration", "vidur_profiling", "compute", folder).rglob("mlp.csv"))
    rows = [row for path in files for row in products(path)][::7]  # 3,000 to 5,000 of them
    assert len(rows) > 3000
    fitted = roofline(model("llama2_7b"), device(name)).device
    bare = roofline(model("llama2_7b"), device(name), mfu=1, mbu=1, smoothness=inf, op_ns=0).device
    errors, worse = [], []
    for tokens, n, k, ns in rows:
        moved = tokens * (n + k) * 2
        work = Work(flops=2 * tokens * n * k, weight_bytes=n * k * 2, activation_bytes=moved)
        errors.append(abs(fitted.time(work) / ns - 1))
        worse.append(abs(bare.time(work) / ns - 1))
    assert 100 * mean(errors) == pytest.approx(published, abs=0.8)
    assert 100 * mean(worse) == pytest.approx(datasheet, abs=2)


# ------------------------------------------------------------------ a real run


def replay(log: Path, **settings: Any) -> dict[str, Any]:
    """The results of the log's requests on a described RTX 4090, pages and budget as vLLM had them."""
    import yaml

    raw: dict[str, Any] = {
        "scheduler": {"name": "vllm_v1", "max_num_batched_tokens": 2048, "max_num_seqs": 256},
        "kvcache": "paged",
        "cost": {"name": "roofline", **settings},
        "workload": "synthetic",  # replaced below
        "executor": {"name": "sim", "num_kv_pages": 2588},
        "task": "bench",
        "model": yaml.safe_load((CONFIGS / "model" / "llama3_8b.yaml").read_text()) | {"max_position": 32768},
        "hardware": yaml.safe_load((CONFIGS / "hardware" / "rtx4090.yaml").read_text()),
        "engine": {"max_batch_tokens": 2048, "max_batch_requests": 256},
    }
    registry = Registry.load()
    run = compose(validate(raw, registry), registry)
    rows = requests(log)
    records: list[Record] = []
    driver = VirtualDriver(
        engines=[run.engine],
        executors=[run.executor],
        costs=[run.cost],
        workload=ListWorkload(
            [
                Arrival(
                    round((row["queued_ts"] - rows[0]["queued_ts"]) * 1e9),
                    RequestSpec(
                        id=row["request_id"],
                        prompt_tokens=row["input_toks"],
                        max_new_tokens=row["output_toks"],
                    ),
                    Truth(output_tokens=row["output_toks"]),
                )
                for row in rows
            ]
        ),
        truths=run.truths,
        emit=records.append,
    )
    driver.run()
    return summarize(Timeline().feed_all(records), SummaryOptions(percentiles=(90, 99)))


def requests(log: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return sorted(rows, key=lambda row: float(row["queued_ts"]))


STATISTICS = [
    f"{name}_{metric}_ms" for metric in ("ttft", "tpot", "e2el") for name in ("mean", "median", "p90", "p99")
]


def measured(log: Path) -> dict[str, float]:
    """The same twelve statistics of the real run, in ms."""
    times: dict[str, list[float]] = {"ttft": [], "tpot": [], "e2el": []}
    for row in requests(log):
        first, last = row["first_token_ts"] - row["queued_ts"], row["last_token_ts"] - row["queued_ts"]
        times["ttft"].append(first * 1e3)
        times["e2el"].append(last * 1e3)
        if row["output_toks"] > 1:
            times["tpot"].append((last - first) * 1e3 / (row["output_toks"] - 1))
    found = {}
    for metric, values in times.items():
        found[f"mean_{metric}_ms"] = mean(values)
        for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
            found[f"{name}_{metric}_ms"] = quantile(sorted(values), share)
    return found


def quantile(ordered: list[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


@pytest.mark.parametrize(
    ("settings", "average", "worst"),
    [
        ({}, 7, 10),  # the profile, whose efficiencies fit two devices at once
        # four settings chosen on this very run
        ({"mfu": 0.928, "mbu": 0.924, "smoothness": 3, "step_ns": 1_390_000, "op_ns": 0}, 2, 4),
        ({"mfu": 1, "mbu": 1, "smoothness": "inf", "op_ns": 0, "step_ns": 0}, 20, 22),  # the datasheet
    ],
    ids=["profile", "calibrated", "datasheet"],
)
def test_a_real_run_of_vllm(settings: dict[str, Any], average: float, worst: float) -> None:
    """300 ShareGPT requests at 10/s, Llama-3.1-8B on an RTX 4090: errors of twelve statistics, in percent."""
    log = data("calibration", "vllm_rtx4090", "vllm", "requests.jsonl")
    ours, theirs = replay(log, **settings), measured(log)
    errors = {name: 100 * (ours[name] / theirs[name] - 1) for name in STATISTICS}
    print({name: f"{error:+.1f}" for name, error in errors.items()}, ours["servelab"]["preemptions"])
    assert ours["completed"] == 300
    assert mean(map(abs, errors.values())) < average
    assert max(map(abs, errors.values())) < worst
