"""Many strangers at once: the good ones run together, each broken one is named with its reason."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.packaging.strangers import (
    BROKEN,
    BROKEN_CONFIGS,
    HEAD,
    SCHEDULERS,
    TAKEN,
    WHEN_SELECTED,
    install,
    install_broken,
    install_good,
)

from servelab.core.api import PluginSpec, StepPlan, StepView
from servelab.core.compose import compose
from servelab.core.config import validate
from servelab.core.logs import read_log
from servelab.core.registry import Registry

Command = Callable[..., "subprocess.CompletedProcess[str]"]
GOOD = ("scheduler", "kvcache", "prefix", "cost", "workload", "executor", "observer")
GROUPS = {"scheduler": "+", "kvcache": "+", "prefix": "+", "cost": "+", "workload": "", "executor": ""}
RUN = (
    "+experiment=scripted", "observers=[jsonl,good_observer]", "workload.num_requests=16",
    "executor.num_kv_pages=40", "engine.max_model_len=256", "engine.checks=full", "hydra.run.dir=out",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven good packages and twelve broken ones."""
    site = tmp_path_factory.mktemp("crowd") / "site"
    site.mkdir()
    for kind in GOOD:
        install_good(site, kind, f"good_{kind}")
    for way in BROKEN:
        install_broken(site, way)
    install(
        site, "broken-absent-configs", {"servelab.configs": {BROKEN_CONFIGS[0]: BROKEN_CONFIGS[1]}}, "0.9"
    )
    for which in ("first", "second"):
        (site / f"misc_{which}.py").write_text(
            SCHEDULERS + f"return [PluginSpec(name='{which}', factory='misc_{which}:F')]\nclass F: ...",
            "utf-8",
        )
        install(site, f"misc-{which}", {"servelab": {TAKEN: f"misc_{which}"}}, "0.9")
    return site


@pytest.fixture
def env(site: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(site)}


def test_the_good_ones_are_one_run(run_py: Command, env: dict[str, str], tmp_path: Path) -> None:
    chosen = [f"{plus}{kind}=good_{kind}" for kind, plus in GROUPS.items()]
    done = run_py(*chosen, *RUN, env=env)
    assert done.returncode == 0, done.stderr
    for way in {*BROKEN, BROKEN_CONFIGS[0]} - WHEN_SELECTED:  # said aloud, and no more than that
        assert f"plugin package not loaded: {way} (broken-{way.replace('_', '-')} 0.9)" in done.stderr
    records = list(read_log(tmp_path / "out" / "events.jsonl"))
    plugins = records[0].info["plugins"]
    for kind in GROUPS:
        assert plugins[kind]["distribution"] == f"servelab-good-{kind}"
    # an observer of a stranger sees what our own log sees
    seen = json.loads((tmp_path / "out" / "good_observer.json").read_text(encoding="utf-8"))
    counted = Counter(record.ev for record in records)
    assert (seen["arrived"], seen["finished"]) == (counted["arrived"], counted["finished"]) == (16, 16)
    assert seen["preempted"] == counted["preempted"]
    steps = [record for record in records if record.ev == "step"]
    assert seen["steps"] == sum(len(record.ends_ns) for record in steps)
    assert seen["tokens"] == sum(sum(record.emitted) for record in steps)


def test_plugins_lists_all_of_them(run_py: Command, env: dict[str, str]) -> None:
    listed = json.loads(run_py("plugins", "--json", env=env).stdout)
    found = {(p["kind"], p["name"]): p for p in listed["plugins"]}
    for kind in GOOD:
        about = found[kind, f"good_{kind}"]
        assert (about["package"], about["disabled"]) == (f"good_{kind}", None)
    reasons = {(b["package"]): b["reason"] for b in listed["broken"]}
    for way, (_, reason) in BROKEN.items():
        if way not in WHEN_SELECTED:
            assert reason in reasons[way]
    assert reasons[BROKEN_CONFIGS[0]] == BROKEN_CONFIGS[2] or BROKEN_CONFIGS[2] in reasons[BROKEN_CONFIGS[0]]
    assert "already registered as 'misc'" in reasons[TAKEN]
    assert "no driver" in found["scheduler", "raising_probe"]["disabled"]
    assert found["scheduler", "absent_factory"]["disabled"] is None  # known only when it is wanted
    assert found["scheduler", "vllm_v1"]["package"] == "servelab.schedulers"
    assert ("scheduler", "first") in found
    assert ("scheduler", "second") not in found


def test_the_doctor_names_all_of_them(run_py: Command, env: dict[str, str]) -> None:
    done = run_py("doctor", "--json", env=env)
    assert done.returncode == 1, done.stderr
    result = json.loads(done.stdout)
    failed = [f"{f['check']}: {f['about']}" for f in result["findings"] if f["state"] == "fail"]
    assert all(f["do"] for f in result["findings"] if f["state"] != "ok")
    for way, (_, reason) in BROKEN.items():
        which = f"scheduler {way}: " if way in WHEN_SELECTED else f"package {way}: "
        assert any(line.startswith(which) and reason in line for line in failed), (way, failed)
    assert any(line.startswith(f"package {BROKEN_CONFIGS[0]}: ") for line in failed)
    assert any(line.startswith(f"package {TAKEN}: ") for line in failed)
    fine = {f["check"] for f in result["findings"] if f["state"] == "ok"}
    assert {f"package good_{kind}" for kind in GOOD} <= fine
    assert {f"YAML of good_{kind}" for kind in GOOD if kind != "observer"} <= fine


@pytest.mark.parametrize(("way", "said"), [("absent_factory", "'Nothing'"), ("raising_probe", "no driver")])
def test_what_fails_only_when_it_is_selected(
    way: str, said: str, run_py: Command, env: dict[str, str]
) -> None:
    done = run_py(f"++scheduler.name={way}", "+experiment=scripted", "observers=[]", env=env)
    assert done.returncode == 1
    assert said in done.stderr
    assert f"broken-{way.replace('_', '-')} 0.9" in done.stderr


def test_leaving_them_out(run_py: Command, env: dict[str, str]) -> None:
    """``-p no:NAME``: a package with its plugin and its YAML; several at once; of two with one name, both."""
    names = [*(set(BROKEN) - WHEN_SELECTED), BROKEN_CONFIGS[0], TAKEN, "good_scheduler"]
    blocks = [f"-pno:{name}" for name in names]
    quiet = run_py(*blocks, "+experiment=scripted", "observers=[]", "workload.num_requests=2", env=env)
    assert quiet.returncode == 0, quiet.stderr
    assert "not loaded" not in quiet.stderr
    listed = json.loads(run_py(*blocks, "plugins", "--json", env=env).stdout)
    assert listed["broken"] == []
    names_left = {(p["kind"], p["name"]) for p in listed["plugins"]}
    assert not {("scheduler", "good_scheduler"), ("scheduler", "first")} & names_left
    assert "good_scheduler" not in {c["name"] for c in listed["config_packages"]}
    gone = run_py("-p", "no:good_scheduler", "+scheduler=good_scheduler", *RUN, env=env)
    assert gone.returncode == 1
    assert "unknown scheduler 'good_scheduler'" in gone.stderr


def test_new_does_not_take_what_a_stranger_has(run_py: Command, env: dict[str, str], tmp_path: Path) -> None:
    done = run_py("new", "kvcache", "good_kvcache", env=env)
    assert done.returncode == 1
    assert "provided by servelab-good-kvcache 0.1.0" in done.stderr
    done = run_py("new", "kvcache", "misc", env=env)
    assert done.returncode == 1
    assert "a plugin package 'misc' is installed already" in done.stderr
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------- objects in Python


class Alone:
    """One request at a time."""

    def __init__(self) -> None:
        self.asked = 0

    def plan(self, view: StepView) -> StepPlan:
        self.asked += 1
        plan = StepPlan()
        request = view.running.first() or view.waiting.first()
        if request is not None and request.pending_tokens:
            plan.run(request, min(request.pending_tokens, 64))
        return plan


def test_objects_beside_strangers_plugins(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocking_all_but: Callable[..., None]
) -> None:
    """A scheduler and an observer that exist already, composed with installed plugins."""
    from servelab.core.api import StepDone, hookimpl

    class Watcher:
        def __init__(self) -> None:
            self.batches: list[int] = []

        @hookimpl
        def servelab_after_step(self, record: StepDone) -> None:
            self.batches.append(len(record.requests))

    monkeypatch.syspath_prepend(str(site))
    blocking_all_but(*(f"good_{kind}" for kind in GOOD))
    registry = Registry.load()
    scheduler, watcher = Alone(), Watcher()
    objects: dict[str, tuple[str, Any]] = {
        "alone": ("scheduler", scheduler),
        "watcher": ("observer", watcher),
    }
    for name, (kind, one) in objects.items():
        spec = PluginSpec(name=name, factory="tests:unused", summary="given as an object")
        registry.add(kind, spec, provider="this test", factory=lambda config, context, one=one: one)
    model = dict.fromkeys(("layers", "heads", "kv_heads"), 2) | dict.fromkeys(("hidden", "head_dim"), 16)
    raw = {
        "scheduler": "alone",
        "kvcache": "good_kvcache",
        "cost": {"name": "good_cost", "step_ns": 1000},
        "executor": "good_executor",
        "workload": {"name": "good_workload", "num_requests": 6},
        "task": "bench",
        "observers": ["watcher", "good_observer"],
        "model": {**model, "name": "toy", "ffn": 8, "vocab": 100, "max_position": 2048},
    }
    made = compose(validate(raw, registry), registry, run_dir=tmp_path)
    made.task.run(made)
    assert scheduler.asked > 0
    assert set(watcher.batches) == {1}
    counts = json.loads((tmp_path / "good_observer.json").read_text(encoding="utf-8"))
    assert (counts["status"], counts["finished"]) == ("ok", 6)
    assert made.info["plugins"]["scheduler"]["distribution"] == "this test"


def test_a_package_of_several_kinds(run_py: Command, tmp_path: Path) -> None:
    """One module may declare plugins of several kinds, and one bad line costs only itself."""
    site = tmp_path / "site"
    site.mkdir()
    for kind in ("cost", "observer"):
        install_good(site, kind, f"many_{kind}")
    code = (
        HEAD + "@hookimpl\ndef servelab_cost_models():\n"
        "    yield PluginSpec(name='own_cost', factory='servelab_many_cost.cost:ManyCost',"
        " config='servelab_many_cost.cost:ManyCostConfig')\n"
        "@hookimpl\ndef servelab_observers():\n"
        "    yield PluginSpec(name='own_observer', factory='servelab_many_observer.observer:ManyObserver',"
        " config='servelab_many_observer.observer:ManyObserverConfig')\n"
        "    yield PluginSpec(name='Bad Name', factory='a:b')\n"
    )
    (site / "own_kinds.py").write_text(code, encoding="utf-8")
    (site / "own_conf" / "cost").mkdir(parents=True)
    (site / "own_conf" / "cost" / "own_cost.yaml").write_text("name: own_cost\n", encoding="utf-8")
    install(site, "own", {"servelab": {"own": "own_kinds"}, "servelab.configs": {"own": "own_conf"}}, "2.0")
    done = run_py(
        "+experiment=scripted", "+cost=own_cost", "observers=[own_observer]", "workload.num_requests=3",
        "hydra.run.dir=out", env={"PYTHONPATH": os.fspath(site)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "observer 'Bad Name': field 'name'" in done.stderr
    assert json.loads((tmp_path / "out" / "many_observer.json").read_text("utf-8"))["finished"] == 3
