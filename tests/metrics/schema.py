"""The published JSON schema of ``results.json``, and results of real runs to hold it to."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.registry import Registry

PATH = Path(__file__).parents[2] / "docs" / "reference" / "results.schema.json"
SCHEMA: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
VALIDATOR = Draft202012Validator(SCHEMA)

MODEL = {
    "name": "tiny",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 128,
    "vocab": 100,
    "max_position": 2048,
}


def problems(result: Any) -> list[str]:
    """What the schema has against a result, one line each; as read back from JSON."""
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message:.200}"
        for error in VALIDATOR.iter_errors(json.loads(json.dumps(result)))
    ]


def result_of(folder: Path, spoil: Callable[[Any], None] | None = None, **sections: Any) -> Any:
    """``results.json`` of a composed run without a model; ``spoil`` may prepare the run to fail."""
    raw = {
        "seed": 3,
        "scheduler": {"name": "vllm_v1"},
        "kvcache": {"name": "paged"},
        "kernel": {"name": "sdpa"},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted", "num_kv_pages": 160},
        "workload": {"name": "synthetic", "num_requests": 24, "request_rate": 50},
        "task": {"name": "bench"},
        "model": MODEL,
        "observers": ["report"],
        **sections,
    }
    registry = Registry.load()
    run = compose(validate(raw, registry), registry, run_dir=folder)
    if spoil is not None:
        spoil(run)
    with suppress(KeyboardInterrupt):
        run.task.run(run)
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))
