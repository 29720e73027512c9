"""Runs with a folder, small and quick, for the tests of commands."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from tests.compose.conftest import MODEL
from tests.observers.test_jsonl import context

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.context import Context
from servelab.core.errors import StallError
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan
from servelab.core.records import Record
from servelab.core.registry import Registry
from servelab.core.run_folder import RunFolder
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import RandomPlans
from servelab.core.vocabulary import CAPABILITIES
from servelab.plugins.observers.jsonl import JsonlConfig, JsonlObserver

ABILITIES = frozenset(name for name in CAPABILITIES if name.startswith("scheduler."))


def serve(folder: Path, *, scheduler: Any = "vllm_v1", seed: int = 0, **sections: Any) -> RunFolder:
    """Serve a workload on the scripted executor; returns the folder of the run.

    ``scheduler`` is a name, or a factory. Sections replace or add fields: ``executor={"num_kv_pages": 8}``.
    """
    registry = Registry.load()
    if not isinstance(scheduler, str):
        registry.add(
            "scheduler", PluginSpec(name="given", factory="tests:X", provides=ABILITIES), factory=scheduler
        )
        scheduler = "given"
    raw: dict[str, Any] = {
        "seed": seed,
        "scheduler": {"name": scheduler},
        "kvcache": {"name": "paged", "page_tokens": 4},
        "cost": {"name": "scripted"},
        "executor": {"name": "scripted", "num_kv_pages": 16},
        "workload": {
            "name": "synthetic",
            "num_requests": 6,
            "request_rate": 100,
            "prompt_length": {"law": "uniform", "min": 4, "max": 20},
            "output_length": {"law": "uniform", "min": 4, "max": 20},
        },
        "task": {"name": "bench"},
        "engine": {"max_model_len": 48},
        "model": dict(MODEL),
        "clock": {"name": "virtual"},
        "observers": [{"name": "jsonl"}],
    }
    for name, fields in sections.items():
        raw[name] = fields if isinstance(fields, list) else {**raw.get(name, {}), **fields}
    run = compose(validate(raw, registry), registry, run_dir=folder)
    with suppress(StallError):  # schedulers that draw may leave somebody paused for good
        run.task.run(run)
    return RunFolder.find(folder)


def drawn(kinds: Iterable[str] = RandomPlans.KINDS) -> Any:
    """A factory of schedulers that draw legal plans of these kinds."""

    def make(config: None, ctx: Context) -> RandomPlans:
        return RandomPlans(Random(ctx.rng.random()), kinds)

    return make


class Swapper:
    """First come, first served; the youngest is swapped out when pages run out, and in when they do not."""

    def __init__(self, config: None, ctx: Context) -> None:
        pass

    def plan(self, view: StepView) -> StepPlan:
        plan, pages = StepPlan(), view.kv.budget()
        running = list(view.running)
        while running:
            victim = running[-1]
            probe = view.kv.budget()
            if all(probe.take(request, request.pending_tokens) for request in running):
                break
            running.pop()
            plan.preempt(victim, "swap", f"{probe.free[0]} pages are not enough for {len(running) + 1}")
            if len(running) == 1:
                break
        for request in running:
            pages.take(request, request.pending_tokens)
            plan.run(request, request.pending_tokens)
        if not plan.preemptions:
            for request in view.swapped:
                if pages.take(request, 1):
                    plan.swap_in(request, "pages are free again")
            for request in view.waiting:
                if len(view.swapped) or not pages.take(request, request.pending_tokens):
                    plan.defer(request, f"needs more than {pages.free[0]} pages")
                    break
                plan.run(request, request.pending_tokens)
        return plan


def write(folder: Path, records: Iterable[Record], **settings: bool) -> RunFolder:
    """Records made by hand, as the log of a run."""
    observer = JsonlObserver(JsonlConfig(**settings), context(folder))
    for record in records:
        observer.servelab_on_record(record)
    observer.close()
    return RunFolder.find(folder)
