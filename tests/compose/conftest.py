"""A raw configuration to start from, as Hydra would hand it over, and fakes to put into it."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.registry import Registry

MODEL = {
    "name": "tiny",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 128,
    "vocab": 100,
    "max_position": 512,
}


@pytest.fixture
def raw() -> dict[str, Any]:
    return {
        "seed": 7,
        "scheduler": {"name": "vllm_v1"},
        "kvcache": {"name": "paged"},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted"},
        "workload": {
            "name": "synthetic",
            "num_requests": 5,
            "prompt_length": {"law": "constant", "value": 20},
            "output_length": {"law": "constant", "value": 4},
        },
        "task": {"name": "bench"},
        "model": dict(MODEL),
        "clock": {"name": "virtual"},
    }


@pytest.fixture
def registry() -> Registry:
    return Registry.load()
