"""docs/explanation/life_of_a_request.md: the walk it describes is the one a traced run takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.hookspecs import EVENT_OF_RECORD, hookimpl
from servelab.core.records import Record
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "explanation" / "life_of_a_request.md"
KINDS = {"scheduler": "vllm_v1", "kvcache": "paged", "cost": "scripted", "executor": "scripted"}
KINDS["workload"] = "synthetic"


class Traced:
    """Passes everything on to the real plugin and writes down which method was called."""

    def __init__(self, kind: str, inner: Any, calls: list[str]) -> None:
        self._kind, self._inner, self._calls = kind, inner, calls

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value

        def call(*args: Any, **more: Any) -> Any:
            self._calls.append(f"{self._kind}.{name}")
            return value(*args, **more)

        return call


class Witness:
    """An observer that writes records down among the calls."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    @hookimpl
    def servelab_on_record(self, record: Record) -> None:
        if record.ev == "run_started":
            self._calls.clear()  # what compose() asked is told elsewhere on the page
        self._calls.append(record.ev)


def traced_run() -> list[str]:
    """Calls and records of a run of one request, in order."""
    calls: list[str] = []
    registry = Registry.load()
    raw: dict[str, Any] = {}

    def wrapped(kind: str, make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda config, context: Traced(kind, make(config, context), calls)

    for kind, name in KINDS.items():
        spec = replace(registry.spec(kind, name), name="traced")
        registry.add(kind, spec, factory=wrapped(kind, registry.resolve(kind, name, "factory")))
        raw[kind] = {"name": "traced"}
    registry.add("observer", PluginSpec(name="witness", factory="x:Y"), factory=lambda *_: Witness(calls))
    raw["workload"] |= {"num_requests": 1, "prompt_length": 40, "output_length": 4}
    raw |= {"task": "bench", "observers": ["witness"], "engine": {"max_model_len": 256}}
    raw["model"] = dict.fromkeys(("layers", "heads", "kv_heads"), 2) | {
        **dict.fromkeys(("hidden", "head_dim"), 16),
        **{"name": "toy", "ffn": 8, "vocab": 100, "max_position": 256},
    }
    run = compose(validate(raw, registry), registry)
    run.task.run(run)
    return calls


def test_the_walk_is_the_one_that_is_traced() -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = re.search(r"<!-- walk: begin -->\n(.*?)<!-- walk: end -->", text, re.S)
    assert table is not None
    told: list[str] = []
    for row in table[1].splitlines()[2:]:
        _, _, called, record, _ = row.split("|")
        told += re.findall(r"`(\w+\.\w+)`", called)
        for ev, hook in re.findall(r"`(\w+)`: `(servelab_\w+)`", record):
            assert EVENT_OF_RECORD[ev] == hook, f"{PAGE.name} names the hook {hook} for record {ev!r}"
            told.append(ev)
    happened = traced_run()
    assert set(told) <= set(happened), f"not in a traced run: {sorted(set(told) - set(happened))}"
    order = [what for what in dict.fromkeys(happened) if what in told]
    assert order == told, f"the table of {PAGE.name} has another order than the run"
