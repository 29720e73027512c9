"""Held launches are the same run as single steps, at the roofline's prices, for every scheduler."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.hookspecs import hookimpl
from servelab.core.records import Record, RequestFinished, RequestPreempted, StepDone
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import step_by_step

GIB = 2**30
MODEL = {
    "name": "half of a 7B",
    "layers": 16,
    "hidden": 4096,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "ffn": 11008,
    "vocab": 32000,
    "max_position": 2048,
}
DEVICE = {
    "name": "like an A100",
    "flops": 312e12,
    "memory_bytes": 40 * GIB,
    "memory_bytes_per_s": 1.5e12,
    "host_link_bytes_per_s": 25e9,
    "mfu": 0.74,
    "mbu": 0.81,
    "smoothness": 1.5,
    "op_ns": 4600,
    "step_ns": 1_000_000,
}
TRAFFIC = {
    "name": "synthetic",
    "num_requests": 70,
    "request_rate": 40.0,
    "prompt_length": {"law": "lognormal", "median": 200, "sigma": 1.0, "max": 900},
    "output_length": {"law": "lognormal", "median": 80, "sigma": 1.0, "max": 400},
}
SWAPPING = {"name": "vllm_v0", "preemption_mode": "swap"}


def serve(scheduler: Any, foresight: bool, **changes: Any) -> list[Record]:
    """Records of a run whose pages are so few that requests are evicted."""
    registry = Registry.load()
    records: list[Record] = []

    class Keep:
        @hookimpl
        def servelab_on_record(self, record: Record) -> None:
            records.append(record)

    registry.add("observer", PluginSpec(name="all", factory="t:Keep"), factory=lambda config, ctx: Keep())
    executor = {"name": "sim", "num_kv_pages": 600, "num_host_pages": 4000, "foresight": foresight}
    raw: dict[str, Any] = {
        "scheduler": scheduler,
        "kvcache": "paged",
        "cost": "roofline",
        "workload": TRAFFIC,
        "executor": executor,
        "task": "bench",
        "observers": ["all"],
        "model": MODEL,
        "hardware": DEVICE,
        **changes,
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    return records


def _name(scheduler: Any) -> str:
    return scheduler if isinstance(scheduler, str) else "swapping"


@pytest.mark.parametrize("scheduler", [*sorted(Registry.load().names("scheduler")), SWAPPING], ids=_name)
def test_a_held_run_is_the_stepped_run(scheduler: Any) -> None:
    held, stepped = serve(scheduler, True), serve(scheduler, False)
    assert step_by_step(held) == step_by_step(stepped)
    ends = [r for r in held if isinstance(r, RequestFinished)]
    assert len(ends) == 70
    assert {r.outcome for r in ends} == {"completed"}
    launches = [sum(isinstance(r, StepDone) for r in records) for records in (held, stepped)]
    assert launches[0] < 0.8 * launches[1]


def test_the_swapping_run_swaps() -> None:
    modes = {r.mode for r in serve(SWAPPING, True) if isinstance(r, RequestPreempted)}
    assert modes == {"swap"}


def test_planning_ahead() -> None:
    """Where launches queue up nothing is fast-forwarded, and the run is the same."""
    held, stepped = (serve("vllm_v1", sees, engine={"max_in_flight": 2}) for sees in (True, False))
    assert step_by_step(held) == step_by_step(stepped)
