"""Whole runs of a small configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from servelab.core.compose import Run, compose
from servelab.core.config import validate
from servelab.core.logs import read_log
from servelab.core.metrics import Timeline, summarize
from servelab.core.records import Record
from servelab.core.registry import Registry

PAGES = 140
MODEL = {
    "name": "toy",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn": 128,
    "vocab": 100,
    "max_position": 2048,
}


def composed(registry: Registry | None = None, run_dir: Path | None = None, **sections: Any) -> Run:
    """A run on scripted prices; sections may be names of plugins."""
    registry = registry or Registry.load()
    raw: dict[str, Any] = {
        "scheduler": {"name": "vllm_v1"},
        "kvcache": {"name": "paged"},
        "cost": {"name": "scripted"},
        "workload": {"name": "synthetic", "num_requests": 60},
        "executor": {"name": "scripted", "num_kv_pages": PAGES},
        "engine": {"checks": "full"},
        "task": {"name": "bench"},
        "observers": [],
        "model": MODEL,
    }
    for name, value in sections.items():
        found = {"name": value} if isinstance(value, str) else value
        if name == "workload":
            found = {**raw[name], **found}
        raw[name] = found
    return compose(validate(raw, registry), registry, run_dir=run_dir)


def served(folder: Path, **sections: Any) -> tuple[Run, list[Record], dict[str, Any]]:
    """A run with its log on disk: (run, records, results)."""
    folder.mkdir(parents=True)
    run = composed(run_dir=folder, **{"observers": ["jsonl"], **sections})
    run.task.run(run)
    records = list(read_log(folder / "events.jsonl"))
    return run, records, summarize(Timeline().feed_all(records))
