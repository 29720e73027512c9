"""A raw configuration of a small run without a model, and a task's run in a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from servelab.core import processes
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.registry import Registry

RAW: dict[str, Any] = {
    "seed": 0,
    "scheduler": {"name": "vllm_v1"},
    "kvcache": {"name": "paged"},
    "cost": {"name": "scripted", "step_ns": 10_000_000, "token_ns": 0, "context_ns": 0},
    "executor": {"name": "scripted", "num_kv_pages": 64},
    "workload": {
        "name": "synthetic",
        "num_requests": 10,
        "request_rate": 20,
        "prompt_length": 8,
        "output_length": 4,
        "max_new_tokens": 4,
    },
    "task": {"name": "bench"},
    "model": {
        "name": "tiny",
        "layers": 2,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "ffn": 128,
        "vocab": 100,
        "max_position": 512,
    },
    "clock": {"name": "virtual"},
}


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests may have left threads behind, with which cells would be spawned: slow, deaf to patches."""
    monkeypatch.setattr(processes.threading, "active_count", lambda: 1)


Do = Callable[..., dict[str, Any]]


@pytest.fixture
def raw() -> dict[str, Any]:
    return json.loads(json.dumps(RAW))


@pytest.fixture
def base(raw: dict[str, Any]) -> dict[str, Any]:
    """What cells change."""
    from servelab.plugins.tasks._cells.cell import base_of

    return base_of(validate(raw, Registry.load()))


@pytest.fixture
def do(raw: dict[str, Any], tmp_path: Path) -> Do:
    """Run a task, with what else is changed; the object in its ``experiment.json``."""

    def run(task: dict[str, Any], folder: str = "run", **changes: Any) -> dict[str, Any]:
        registry = Registry.load()
        where = tmp_path / folder
        where.mkdir(exist_ok=True)
        made = compose(validate({**raw, **changes, "task": task}, registry), registry, run_dir=where)
        made.task.run(made)
        return json.loads((where / "experiment.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    return run
