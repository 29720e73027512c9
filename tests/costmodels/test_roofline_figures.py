"""Figures of the roofline: where they are from, what is missing, what runs say; transfers and energy."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.costmodels.rooflines import CONFIGS, device, model, roofline

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.engine.wall import WallDriver
from servelab.core.errors import ConfigError
from servelab.core.events import Batch
from servelab.core.facts import HardwareFacts
from servelab.core.records import Record, StepDone
from servelab.core.registry import Registry
from servelab.core.sites import weight_bytes
from servelab.core.testing.cost import batch_of, transfer_of

LLAMA3, A100 = model("llama3_8b"), device("a100_80g")
BARE = HardwareFacts(name="bare", flops=1e14, memory_bytes_per_s=1e12)

# --------------------------------------------------------------------- factors


def test_settings_stand_before_the_profile_and_that_before_the_bound() -> None:
    on = replace(BARE, mbu=0.5, op_ns=7)
    cost = roofline(LLAMA3, on, mbu=0.25, step_ns=9)
    assert cost.describe() == {
        "device": "bare",
        "devices": 1,
        "mfu": {"value": 1.0, "from": "bound"},
        "mbu": {"value": 0.25, "from": "settings"},
        "smoothness": {"value": "inf", "from": "bound"},
        "op_ns": {"value": 7, "from": "profile"},
        "layer_ns": {"value": 0, "from": "bound"},
        "step_ns": {"value": 9, "from": "settings"},
        "request_ns": {"value": 0, "from": "bound"},
    }
    json.dumps(cost.describe(), allow_nan=False)
    assert roofline(LLAMA3, replace(on, mbu=0.25), step_ns=9).price(batch_of([(1, 9)]), 1) == cost.price(
        batch_of([(1, 9)]), 1
    )


def test_wider_models_say_which_peak_they_take() -> None:
    """hardware.flops is stated at 16 bits, on a CPU at the model's dtype: which it is only the user knows."""
    wide = replace(LLAMA3, dtype="float32", dtype_bytes=4.0)
    assert roofline(wide, BARE).describe()["peak"] == "hardware.flops, for float32"
    assert "peak" not in roofline(LLAMA3, BARE).describe()
    narrow, doubled = (roofline(of, BARE).breakdown(batch_of([(1, 9)])) for of in (LLAMA3, wide))
    assert doubled.bytes("weight") == 2 * narrow.bytes("weight")


@pytest.mark.parametrize("measured", [True, False])
def test_where_the_all_reduce_is_from_is_told(measured: bool) -> None:
    on = replace(A100, tp=4, all_reduce=A100.all_reduce if measured else ())
    told = roofline(LLAMA3, on).describe()["all_reduce"]
    assert told == ("measured" if measured else "from link_bytes_per_s")


@pytest.mark.parametrize(
    ("on", "what", "do"),
    [
        (None, "has no device to price", "hardware="),
        (replace(BARE, flops=None), "bare does not state flops", "hardware.flops"),
        (replace(BARE, memory_bytes_per_s=None), "not state memory_bytes_per_s", "hardware.memory_bytes"),
        (replace(BARE, tp=2), "does not state link_bytes_per_s", "hardware.link_bytes_per_s"),
        (replace(A100, tp=3), "cannot share 32 query heads", "hardware.tp=2"),
        (replace(A100, tp=12), "cannot share 32 query heads", "hardware.tp=8"),
    ],
)
def test_what_is_missing_is_named(on: HardwareFacts | None, what: str, do: str) -> None:
    with pytest.raises(ConfigError, match=what) as caught:
        roofline(LLAMA3, on)
    assert do in caught.value.do
    assert "roofline" in caught.value.where or caught.value.where == "hardware"


# ------------------------------------------------------------------- transfers


def test_transfers_by_hand() -> None:
    """A hundredth of a second for 250 MB over 25 GB/s, and a start; devices move their heads side by side."""
    assert roofline(LLAMA3, A100).transfer_time(transfer_of(250_000_000)) == 10_000 + 10_000_000
    for t, share in ((2, 1 / 2), (8, 1 / 8), (16, 1 / 8)):
        on = replace(A100, tp=t, all_reduce=())
        took = roofline(LLAMA3, on).transfer_time(transfer_of(250_000_000))
        assert took == 10_000 + 10_000_000 * share
    moved = 2048 * 32 * LLAMA3.kv_bytes_per_token_layer  # KV of 2,048 tokens, 268 MB
    for link, ms in ((25e9, 10.7), (300e9, 0.9)):
        took = roofline(LLAMA3, replace(A100, host_link_bytes_per_s=link), transfer_ns=0)
        assert took.transfer_time(transfer_of(moved)) / 1e6 == pytest.approx(ms, abs=0.05)
    latent = replace(model("deepseek_v3_like"), layers=4)
    took = roofline(latent, replace(A100, tp=8)).transfer_time(transfer_of(250_000_000))
    assert took == 10_000 + 10_000_000  # every device moves the whole latent
    with pytest.raises(ConfigError, match="does not state host_link_bytes_per_s"):
        roofline(LLAMA3, BARE).transfer_time(transfer_of(1))


def test_loads_by_hand() -> None:
    cost = roofline(LLAMA3, A100, disk_bytes_per_s=5e9)
    size = weight_bytes(LLAMA3, None)
    assert size == 8_030_261_248 * 2
    assert cost.load_time("disk") == pytest.approx(size / 5 + 10_000, abs=1)
    assert cost.load_time("host") == pytest.approx(size / 25 + 10_000, abs=1)
    assert cost.load_time("peer", 1000) == 10_000 + 40
    both = roofline(LLAMA3, replace(A100, tp=2))
    assert both.load_time("host") == pytest.approx(size / 50 + 10_000, abs=1)
    with pytest.raises(ConfigError, match="bandwidth of the disk is not stated"):
        both.load_time("disk")
    with pytest.raises(ConfigError, match="does not state network_bytes_per_s"):
        roofline(LLAMA3, BARE).load_time("peer")


# ---------------------------------------------------------------------- energy


def test_energy_by_hand() -> None:
    """Two devices of 60 to 400 W: 680 W beyond idling while the busier of compute and memory works."""
    on = replace(A100, tp=2, idle_watts=60.0, peak_watts=400.0)
    cost = roofline(LLAMA3, on)
    assert cost.idle_watts == 120
    for rows in ([(1, 500)] * 8, [(2048, 0)], [(300, 10), (1, 700)]):
        lanes = cost.breakdown(batch_of(rows)).lanes
        busier = max(lanes["compute"], lanes["memory"])
        assert cost.energy(batch_of(rows), 1)[0] == pytest.approx(680 * busier * 1e-9, rel=1e-9)
    assert max(lanes, key=lambda lane: lanes[lane]) in ("compute", "memory")


@pytest.mark.parametrize("figures", [{}, {"idle_watts": 60.0}, {"peak_watts": 400.0}])
def test_without_both_figures_no_energy_is_told(figures: dict[str, float]) -> None:
    on = replace(A100, idle_watts=None, peak_watts=None)
    assert roofline(LLAMA3, replace(on, **figures)).idle_watts is None


def composed(**changes: Any) -> Run:
    a100 = yaml.safe_load((CONFIGS / "hardware" / "a100_80g.yaml").read_text())
    raw: dict[str, Any] = {
        "scheduler": {"name": "vllm_v1"},
        "kvcache": "paged",
        "cost": "roofline",
        "workload": {"name": "synthetic", "num_requests": 12},
        "executor": "sim",
        "task": "bench",
        "model": yaml.safe_load((CONFIGS / "model" / "llama2_7b.yaml").read_text()),
        "hardware": {**a100, "idle_watts": 60, "peak_watts": 400},
        "engine": {"max_batch_tokens": 2048},
        **changes,
    }
    registry = Registry.load()
    return compose(validate(raw, registry), registry)


def served(run: Run) -> tuple[VirtualDriver, list[Record]]:
    records: list[Record] = []
    parts = run.for_driver(Listener(records))  # type: ignore[arg-type]
    driver = VirtualDriver(**parts)
    driver.run()
    return driver, records


class Listener:
    """The part of a bus that a driver needs."""

    def __init__(self, records: list[Record]) -> None:
        self.emit = records.append

    def listens(self, event: str) -> bool:
        return False

    asks = listens


def test_energy_of_a_run_is_that_of_its_steps() -> None:
    """Counted again from the log: idle power all the time, and each launch as the log has it."""
    run = composed()
    driver, records = served(run)
    contexts: dict[str, int] = {}
    expected = 60 * driver.now_ns * 1e-9
    for record in records:
        if not isinstance(record, StepDone):
            continue
        for k in range(len(record.ends_ns)):
            tokens = record.tokens if k == 0 else [1] * len(record.tokens)
            rows = [(n, contexts.get(r, 0)) for n, r in zip(tokens, record.requests, strict=True)]
            batch = batch_of(rows)
            batch.samples[:] = [bool(n) for n in record.emitted]
            expected += run.cost.energy(batch, 1)[0]  # type: ignore[attr-defined]
            for n, r in zip(tokens, record.requests, strict=True):
                contexts[r] = contexts.get(r, 0) + n
    assert driver.energy_j == pytest.approx(expected, rel=1e-9)


def test_holds_cut_short_cost_what_their_steps_did() -> None:
    held, _ = served(composed())
    stepped, _ = served(composed(scheduler={"name": "vllm_v1", "hold_steps": 1}))
    assert held.now_ns == stepped.now_ns
    assert held.energy_j == pytest.approx(stepped.energy_j, rel=1e-12)


def test_idle_instances_take_power() -> None:
    one, _ = served(composed())
    two, _ = served(composed(router="round_robin", cluster={"instances": 2}))
    assert one.energy_j is not None
    assert two.energy_j is not None
    assert two.energy_j - two._joules == pytest.approx(2 * 60 * two.now_ns * 1e-9, rel=1e-9)
    silent = yaml.safe_load((CONFIGS / "hardware" / "a40.yaml").read_text()) | {"idle_watts": None}
    unknown, _ = served(composed(hardware=silent))
    assert unknown.energy_j is None


def test_energy_and_figures_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    registry = Registry.load()
    first = composed(observers=["report"])
    run = compose(first.config, registry, run_dir=tmp_path)
    run.task.run(run)
    results = json.loads((tmp_path / "results.json").read_text())
    extra = results["servelab"]
    assert extra["energy_j"] > 60 * results["duration"]
    per_token = extra["energy_j"] / results["total_output_tokens"]
    assert extra["energy_per_output_token_j"] == pytest.approx(per_token, rel=1e-12)
    assert extra["info"]["cost"]["mfu"] == {"value": 0.741, "from": "profile"}
    words = " ".join(capsys.readouterr().out.split())
    assert "cost device a100_80g, devices 1, mfu 0.741 (profile), mbu 0.812 (profile)" in words
    assert f"energy {extra['energy_j'] / 1e3:,.1f} kJ" in words


def test_no_energy_is_told_of_real_time() -> None:
    """Also where the executor simulates: what the machine draws meanwhile is nobody's price."""
    run = composed(
        clock={"name": "wall"}, workload={"name": "synthetic", "num_requests": 2, "request_rate": "inf"}
    )
    records: list[Record] = []
    driver = WallDriver(**run.for_driver(Listener(records)))  # type: ignore[arg-type]
    driver.run()
    assert sum(isinstance(record, StepDone) for record in records) > 1
    assert driver.energy_j is None


def test_unpriced_batches_are_not_measured_for_energy() -> None:
    """A cost model whose profile states no power is never asked."""

    class Asked:
        idle_watts = None

        def energy(self, batch: Batch, steps: int) -> list[float]:
            raise AssertionError("asked")

    from servelab.core.families.cost import meter_of

    assert meter_of(Asked()) is None
    assert meter_of(roofline(LLAMA3, replace(A100, idle_watts=60.0))) is not None


def test_the_smooth_maximum_never_overflows() -> None:
    cost = roofline(LLAMA3, A100, smoothness=400)
    smooth = cost.device.smooth
    assert smooth(1e9, 3e9) == pytest.approx(3e9)
    assert smooth(2e9, 2e9) == pytest.approx(2e9 * 2 ** (1 / 400))
    assert smooth(0.0, 5.0) == smooth(5.0, 0.0) == 5.0
    assert smooth(0.0, 0.0) == 0.0
    hard = roofline(LLAMA3, A100, smoothness=inf).device.smooth
    assert hard(3.0, 3.0) == hard(2.0, 3.0) == 3.0
