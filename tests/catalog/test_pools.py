"""KV pools of real engines against the simulated device's, and models that do not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tests.catalog.test_hardware import raw
from tests.catalog.test_models import FOLDER, config

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.errors import ConfigError
from servelab.core.registry import Registry

REGISTRY = Registry.load()


def run(name: str, device: str, tp: int = 1, **changes: Any) -> Run:
    assert (FOLDER / f"{name}.yaml").exists()
    settings: dict[str, Any] = {
        "scheduler": "vllm_v1",
        "kvcache": "paged",
        "cost": "scripted",
        "workload": "synthetic",
        "executor": "sim",
        "task": "bench",
        "model": config(name).model_dump(mode="json"),
        "hardware": {**raw(device), "tp": tp},
        **changes,
    }
    return compose(validate(settings, REGISTRY), REGISTRY)


def tokens(made: Run) -> int:
    return sum(pool["pages"] * pool["page_tokens"] for pool in made.info["kv"]["pools"])


U95 = {"executor": {"name": "sim", "memory_utilization": 0.95}}
U93 = {"executor": {"name": "sim", "memory_utilization": 0.93}}


@pytest.mark.parametrize(
    ("model", "device", "tp", "changes", "measured", "tolerance"),
    [
        # DistServe's profiler: its engine takes 95 % of the memory
        ("opt_13b", "a100_80g", 1, U95, 66_144, 0.03),
        ("opt_13b", "a100_80g", 2, U95, 163_008, 0.03),
        ("opt_13b", "a100_80g", 4, U95, 356_736, 0.03),
        ("opt_13b", "a100_80g", 8, U95, 744_208, 0.03),
        ("opt_66b", "a100_80g", 2, U95, 11_600, 0.03),
        ("opt_66b", "a100_80g", 4, U95, 78_496, 0.03),
        ("opt_66b", "a100_80g", 8, U95, 212_304, 0.03),
        # vLLM 0.19, max_num_batched_tokens 2048, max_model_len 32768, 90 % of the memory
        (
            "llama3_8b",
            "rtx4090",
            1,
            {"engine": {"max_batch_tokens": 2048, "max_batch_requests": 256}},
            41_408,
            0.06,
        ),
        # vLLM of 2023: about 7,400 blocks of 16
        ("llama2_7b", "a100_80g", 1, {"engine": {"max_batch_tokens": 4096}}, 118_400, 0.02),
        # LightLLM in the Past-Future study, rounded there to thousands
        ("llama2_7b", "a100_80g", 1, U93, 120_000, 0.04),
        ("llama2_13b", "a100_80g", 1, U93, 64_000, 0.04),
        ("llama2_70b", "a100_80g", 4, U93, 550_000, 0.06),
    ],
)
def test_pools_of_real_engines(
    model: str, device: str, tp: int, changes: dict[str, Any], measured: int, tolerance: float
) -> None:
    ours = tokens(run(model, device, tp, **changes))
    print(f"| {model} | {tp} x {device} | {measured:,} | {ours:,} | {100 * (ours / measured - 1):+.1f} % |")
    assert ours == pytest.approx(measured, rel=tolerance)


@pytest.mark.parametrize(
    ("model", "device", "tp", "least"),
    [
        ("llama2_70b", "a100_80g", 1, 2),
        ("llama3_405b", "h100", 8, 16),
        ("llama2_13b", "l4", 1, 2),
        ("mixtral_8x7b", "a100_80g", 1, 2),
        ("deepseek_v3_like", "h200", 8, 16),
        ("qwen2_5_32b", "rtx4090", 1, 4),
    ],
)
def test_a_model_larger_than_the_device_names_the_devices_that_do(
    model: str, device: str, tp: int, least: int
) -> None:
    """And it is the least number that does: the next smaller one that shares the heads evenly does not."""
    with pytest.raises(ConfigError, match=f"does not fit on {tp} x {device}") as caught:
        run(model, device, tp)
    named = re.search(r"hardware\.tp=(\d+)", str(caught.value))
    assert named and int(named[1]) == least
    assert tokens(run(model, device, least)) > 0


def test_the_devices_named_hold_one_request_of_full_length() -> None:
    """Two H100 hold Llama 3 70B and 8,192 tokens, but not the 131,072 of Llama 3.1."""
    long = config("llama3_70b").model_dump(mode="json") | {"max_position": 131_072}
    with pytest.raises(ConfigError, match=r"hardware\.tp=4"):
        run("llama3_70b", "h100", model=long)
    with pytest.raises(ConfigError, match=r"hardware\.tp=2"):
        run("llama3_70b", "h100")


def test_no_number_of_devices_is_named_where_none_does() -> None:
    """Two heads are shared by two devices at most, and eight are too few of 4 GiB."""
    tiny = {"name": "tiny", "memory_bytes": 4 * 2**30}
    with pytest.raises(ConfigError, match="does not fit on 1 x tiny") as caught:
        run("llama2_70b", "l4", hardware=tiny)
    assert "hardware.tp=64" in str(caught.value)
    two = config("llama2_70b").model_dump(mode="json") | {"heads": 2, "kv_heads": 2, "head_dim": 4096}
    settings = {"name": "two", "memory_bytes": 4 * 2**30}
    with pytest.raises(ConfigError, match="does not fit on 1 x two") as caught:
        run("llama2_70b", "l4", hardware=settings, model=two)
    assert "hardware.tp" not in str(caught.value)
