"""Any order of events under everything that is registered; see ``core/testing/machine.py``.

One test per scheduler, toys that draw any legal plan among them, so that no plugin can be forgotten.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from time import monotonic
from typing import Any

import pytest

from servelab.core.testing.machine import LONG, EngineMachine, run_machine
from servelab.core.testing.parts import combinations, with_toys

REGISTRY = with_toys()
SCHEDULERS = REGISTRY.names("scheduler")
LONG_RULES = 100_000
"""Of the slow profile, over all schedulers."""
ALWAYS = ("hits", "evicted", "shared forks", "copies", "preempted", "held", "scheduler raised")


def machine(**only: Any) -> type[EngineMachine]:
    return type("Machine", (EngineMachine,), {"only": {kind: [name] for kind, name in only.items()}})


def test_everything_registered_meets_something() -> None:
    found = combinations(REGISTRY)
    for kind in ("scheduler", "kvcache", "prefix"):
        assert set(REGISTRY.names(kind)) <= {getattr(one, kind) for one in found}, kind


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_any_order_of_events(scheduler: str) -> None:
    """With every kvcache and store that the scheduler may meet, a few examples each."""
    seen: Counter[str] = Counter()
    for parts in combinations(REGISTRY, {"scheduler": [scheduler]}):
        seen += run_machine(machine(scheduler=scheduler, kvcache=parts.kvcache, prefix=parts.prefix))
    assert min(seen[what] for what in ALWAYS) > 0, seen
    if "scheduler.retains" in REGISTRY.spec("scheduler", scheduler).provides:
        assert seen["context_kept"] and seen["transfer_ended"]


SAME = """
import hashlib
from servelab.core.testing.machine import EngineMachine, run_machine
EngineMachine.digest = hashlib.sha256()
class Machine(EngineMachine):
    only = {"kvcache": ["paged"], "prefix": ["hash"]}
seen = run_machine(Machine)
print(EngineMachine.digest.hexdigest(), seen["rules"])
"""


def test_the_quick_profile_does_the_same_every_time() -> None:
    """In another process, under another hash seed."""

    def run(seed: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SAME],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        return done.stdout

    digest, rules = run("1").split()
    assert run("2").split() == [digest, rules] and int(rules) > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_long_runs(scheduler: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = monotonic()

    def progress(seen: Counter[str]) -> None:
        nonlocal said
        if monotonic() - said > 10:
            said = monotonic()
            with capsys.disabled():
                print(
                    f"\n{scheduler}: {seen['examples']} examples, {seen['rules']} rules", end="", flush=True
                )

    made: Any = machine(scheduler=scheduler)
    made.progress = staticmethod(progress)
    seen = run_machine(made, LONG)
    assert seen["rules"] > LONG_RULES / len(SCHEDULERS), seen
