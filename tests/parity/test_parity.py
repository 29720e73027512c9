"""Every registered scheduler decides the same on the real executor and on the scripted one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Verdict
from servelab.core.records import Planned, Record, RequestFinished, RequestForked, RequestPreempted, StepDone
from servelab.core.registry import Registry
from servelab.core.spec import PluginSpec
from servelab.core.testing.parity import (
    WORLDS,
    World,
    check_parity,
    expanded,
    same,
    scripted,
    settings_for,
    without_ids,
)
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

REGISTRY = Registry.load()
SCHEDULERS = REGISTRY.names("scheduler")
BY_NAME = {world.name: world for world in WORLDS}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_one_log_on_both_executors(scheduler: str, world: World, tiny: Path) -> None:
    if reason := REGISTRY.unavailable(REGISTRY.spec("scheduler", scheduler)):
        pytest.skip(reason)
    check_parity(scheduler, tiny, registry=REGISTRY, worlds=[world])


@pytest.mark.parametrize("chunked", [False, True])
def test_swaps_are_alike_on_both_executors(chunked: bool, tiny: Path) -> None:
    world = dataclasses.replace(BY_NAME["tight"], host_pages=60)
    config = {
        "max_num_batched_tokens": 24,
        "max_num_seqs": 6,
        "preemption_mode": "swap",
        "enable_chunked_prefill": chunked,
    }
    check_parity("vllm_v0", tiny, registry=REGISTRY, config=config, worlds=[world])
    records = scripted("vllm_v0", world, foresight=True, registry=REGISTRY, config=config)
    modes = [x.mode for x in records if isinstance(x, RequestPreempted)]
    assert modes and set(modes) == {"swap"}


def log(world: str, *, foresight: bool = True, **config: int) -> list[Record]:
    settings = {**settings_for(REGISTRY.resolve("scheduler", "vllm_v1", "config")), **config}
    return scripted("vllm_v1", BY_NAME[world], foresight=foresight, registry=REGISTRY, config=settings)


def test_the_worlds_do_what_they_are_for() -> None:
    """Else their logs would be equal because nothing happens."""
    logs = {name: log(name) for name in BY_NAME}
    count = {name: [type(record) for record in records] for name, records in logs.items()}
    assert count["tight"].count(RequestPreempted) > 0
    assert count["samples"].count(RequestForked) > 3
    ends = {x.outcome for x in logs["cancelled"] if isinstance(x, RequestFinished)}
    assert ends == {"completed", "cancelled"}
    assert any(getattr(x, "cached_tokens", 0) for x in logs["prefix"])
    assert any(x.ev == "evicted" for x in logs["prefix"])
    for records in logs.values():
        assert any(isinstance(x, Planned) and x.held > 1 for x in records)
        assert any(isinstance(x, Planned) and x.deferred for x in records)


def test_held_and_stepped_differ_before_expansion_and_not_after() -> None:
    held, stepped = log("tight"), log("tight", foresight=False)
    steps = [[x for x in records if isinstance(x, StepDone)] for records in (held, stepped)]
    assert len(steps[0]) < len(steps[1])
    assert sum(len(x.ends_ns) for x in steps[0]) == len(steps[1])
    assert without_ids(held) != without_ids(stepped)
    assert expanded(held) == expanded(stepped)


def test_the_first_record_that_differs_is_shown() -> None:
    good = without_ids(log("ample"))
    at = next(i for i, x in enumerate(good) if isinstance(x, Planned) and len(x.work) > 1)
    found = good[at]
    assert isinstance(found, Planned)
    bad = [*good[:at], dataclasses.replace(found, requests=found.requests[::-1]), *good[at + 1 :]]
    with pytest.raises(AssertionError) as error:
        same(good, bad, "a title")
    text = str(error.value)
    assert f"a title: the logs of torch and scripted differ at record {at} " in text
    assert f"torch: {found}" in text and f"scripted: {bad[at]}" in text
    with pytest.raises(AssertionError, match="nothing more"):
        same(good, good[:-1], "a title")


class Miscounting(VllmV1):
    """Learns from records, of which a held launch gives one for all its steps."""

    seen = 0

    def on_event(self, record: Record) -> None:
        self.seen += isinstance(record, StepDone)

    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        plan.deferred = [Verdict(v.request, f"{self.seen} steps so far") for v in plan.deferred]
        return plan


def test_a_scheduler_that_counts_records_instead_of_steps_is_found(tiny: Path) -> None:
    registry = Registry.load()
    spec = PluginSpec(name="miscounting", factory="tests:plugin", config="tests:config")
    registry.add("scheduler", spec, factory=Miscounting, config=VllmV1Config)
    with pytest.raises(AssertionError, match="'miscounting', world 'tight', held steps written out") as error:
        check_parity("miscounting", tiny, registry=registry, worlds=[BY_NAME["tight"]])
    assert "steps so far" in str(error.value)
