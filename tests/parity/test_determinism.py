"""One seed, one log: again in the same process, and whatever order plugins were registered in."""

from __future__ import annotations

from typing import Any

import pytest

from servelab.core.records import Record
from servelab.core.registry import Registry
from servelab.core.testing.parity import WORLDS, World, same, scripted, settings_for

REGISTRY = Registry.load()
SCHEDULERS = REGISTRY.names("scheduler")
WORLD = World("busy", pages=26, count=20, samples=2, cancelled=True, stem=8)


def backwards() -> Registry:
    """Everything, registered in reversed order."""
    registry, found = Registry.load(), Registry.load()
    registry.specs = dict(reversed(found.specs.items()))
    registry.providers = dict(reversed(found.providers.items()))
    return registry


def log(scheduler: str, registry: Registry, world: World = WORLD, seed: int = 5) -> list[Record]:
    config: dict[str, Any] = settings_for(registry.resolve("scheduler", scheduler, "config"))
    records = scripted(scheduler, world, foresight=True, registry=registry, config=config, seed=seed)
    return records[1:-1]  # those of the run state when it was, and its settings


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_one_seed_one_log(scheduler: str) -> None:
    first, again = log(scheduler, REGISTRY), log(scheduler, REGISTRY)
    same(first, again, f"scheduler {scheduler!r}, the same seed", names=("one", "another"))
    reversed_ = log(scheduler, backwards())
    same(first, reversed_, f"scheduler {scheduler!r}, registered backwards", names=("forwards", "backwards"))
    assert first != log(scheduler, REGISTRY, seed=6)


def test_worlds_of_parity_repeat_too() -> None:
    for world in WORLDS:
        assert log("vllm_v1", REGISTRY, world) == log("vllm_v1", backwards(), world)
