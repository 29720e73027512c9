"""The plugins shown in the how-to pages run as they stand, and their declarations are accepted."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.logs import read_log
from servelab.core.metrics import Timeline, summarize
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing import SchedulerSuite, failures, suite_of
from servelab.plugins.executors.scripted import ScriptedExecutor, ScriptedExecutorConfig

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
Run = Callable[..., Path]


def _blocks(page: Path) -> dict[str, Any]:
    """Everything the Python blocks of a page define."""
    space: dict[str, Any] = {"__name__": "shown"}
    for code in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(code, str(page), "exec"), space)
    return space


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Serve with one more plugin in the registry; returns the folder."""

    def serve(
        kind: str, spec: Any, factory: type, config: type, *, executor: type | None = None, **sections: Any
    ) -> Path:
        registry = Registry.load()
        registry.add(kind, spec, factory=factory, config=config)
        if executor is not None:
            brings = frozenset({"executor.sim", "executor.tokenizer"})
            own = PluginSpec(name="own", factory="shown:Own", provides=brings)
            registry.add("executor", own, factory=executor, config=ScriptedExecutorConfig)
            sections["executor"] = "own"
        model = dict.fromkeys(("layers", "heads", "kv_heads"), 2) | dict.fromkeys(("hidden", "head_dim"), 16)
        raw = {
            "scheduler": "vllm_v1",
            "kvcache": "paged",
            "cost": "scripted",
            "executor": "scripted",
            "workload": {"name": "synthetic", "num_requests": 12},
            "task": "bench",
            "observers": ["jsonl"],
            "model": {**model, "name": "toy", "ffn": 8, "vocab": 100, "max_position": 2048},
            **sections,
        }
        made = compose(validate(raw, registry), registry, run_dir=tmp_path)
        made.task.run(made)
        return tmp_path

    return serve


def test_the_scheduler(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what its spec says, and fails what the page exempts it from, and nothing else."""
    page = repository / "docs/howto/add_a_scheduler.md"
    shown = _blocks(page)
    (spec,) = shown["servelab_schedulers"]()
    module = ModuleType("servelab_newest.scheduler")
    vars(module).update(Newest=shown["Newest"], NewestConfig=shown["NewestConfig"])
    monkeypatch.setitem(sys.modules, "servelab_newest", ModuleType("servelab_newest"))
    monkeypatch.setitem(sys.modules, "servelab_newest.scheduler", module)
    suite = suite_of(SchedulerSuite, spec, exempt=shown["TestNewest"].exempt)
    assert failures(suite) == {}


def test_the_observer(repository: Path, run: Run) -> None:
    shown = _blocks(repository / "docs/howto/add_an_observer.md")
    (spec,) = shown["servelab_observers"]()
    chosen = ["jsonl", {"name": "slowest", "count": 2}]
    folder = run("observer", spec, shown["Slowest"], shown["SlowestConfig"], observers=chosen)
    written = json.loads((folder / "slowest.json").read_text(encoding="utf-8"))
    timeline = Timeline().feed_all(read_log(folder / "events.jsonl"))
    waits = sorted((facts.ttft_ns for facts in timeline.requests.values()), reverse=True)
    assert written["status"] == "ok"
    assert list(written["ttft_ns"].values()) == waits[:2]


def test_the_workload(repository: Path, run: Run) -> None:
    shown = _blocks(repository / "docs/howto/add_a_workload.md")
    (spec,) = shown["servelab_workloads"]()
    assert spec.name == "dialogue"
    chosen = {"name": "dialogue", "users": 3}
    folder = run("workload", spec, shown["Dialogue"], shown["DialogueConfig"], workload=chosen)
    timeline = Timeline().feed_all(read_log(folder / "events.jsonl"))
    result = summarize(timeline)
    assert result["completed"] == 9
    assert timeline.info["workload"] == {"requests": 9, "users": 3}


def test_the_workload_in_words(repository: Path, run: Run) -> None:
    class Words:
        vocab_size, stop_ids = 100, frozenset({0})

        def chat(self, messages: list[dict[str, str]]) -> list[int]:
            return [ord(c) % 100 for m in messages for c in m["content"]]

    class Spelling(ScriptedExecutor):
        tokenizer = Words()

    shown = _blocks(repository / "docs/howto/add_a_workload.md")
    chosen = {"name": shown["real"].name, "users": 2, "questions": 2}
    folder = run(
        "workload", shown["real"], shown["Real"], shown["DialogueConfig"], workload=chosen, executor=Spelling
    )
    timeline = Timeline().feed_all(read_log(folder / "events.jsonl"))
    assert summarize(timeline)["completed"] == 4
    said = "I am visitor 1. Tell me 2 facts about rain."
    assert timeline.requests["u1q1"].prompt_tokens == len(said)


def test_reading_a_log_as_the_page_on_logs_shows(
    repository: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = _blocks(repository / "docs/howto/add_a_workload.md")
    (spec,) = shown["servelab_workloads"]()
    monkeypatch.chdir(run("workload", spec, shown["Dialogue"], shown["DialogueConfig"]))
    read = _blocks(repository / "docs/reference/logs.md")
    assert read["result"]["completed"] == 12
    assert "r" in capsys.readouterr().out


def test_the_page_on_logs_names_every_record_and_field(repository: Path) -> None:
    from dataclasses import fields

    from servelab.core.records import RECORDS

    text = (repository / "docs/reference/logs.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    del rows["ev"]  # the head of the table
    assert set(rows) == set(RECORDS)
    for ev, cls in RECORDS.items():
        for field in fields(cls):
            if field.name not in ("t_ns", "engine"):
                assert f"`{field.name}`" in rows[ev], (ev, field.name)
