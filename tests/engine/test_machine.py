"""Any order of events under everything that is registered; see ``core/testing/machine.py``.

One test per scheduler, toys that draw any legal plan among them, so that no plugin can be forgotten.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from time import monotonic
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, field_validator

from servelab.core.capabilities import select
from servelab.core.config import choice_of
from servelab.core.errors import ConfigError, LedgerError
from servelab.core.families.prefix import Content, Provenance
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import Fcfs, ToyKV
from servelab.core.testing.machine import LONG, EngineMachine, run_machine
from servelab.core.testing.parts import combinations, with_toys
from servelab.plugins.prefix.hash import HashConfig, HashStore

REGISTRY = with_toys()
SCHEDULERS = REGISTRY.names("scheduler")
LONG_RULES = 100_000
"""Of the slow profile, over all schedulers."""
ALWAYS = ("hits", "shared forks", "held")
ANY_PLAN = ("evicted", "copies", "preempted", "scheduler raised")
"""What must have happened, under every scheduler and under those that draw their plans."""


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
    wanted = [*ALWAYS, *(ANY_PLAN if scheduler.startswith("any_plan") else ())]
    assert min(seen[what] for what in wanted) > 0, seen
    (whole,) = select([("scheduler", choice_of("scheduler", scheduler, REGISTRY, "here"))], REGISTRY)
    if "scheduler.retains" in whole.provides:  # of a wrapper: if what it wraps does
        assert seen["context_kept"] and seen["transfer_ended"]


class Choosy(Fcfs):
    """Never admits a long prompt."""

    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        short = [w for w in plan.work if w.request.prompt_tokens < 9]  # type: ignore[union-attr]
        return plan if len(short) == len(plan.work) else replace(plan, work=short, hold=None)


class Leaky(ToyKV):
    """Forgets one of the pages it gets back."""

    def released(self, pool: int, tier: str, pages: Sequence[int]) -> None:
        super().released(pool, tier, pages[1:])


class Confused(HashStore):
    """Takes tokens of one page for those of any other."""

    def _chain(self, content: Content, provenance: Provenance, pages: int) -> Sequence[bytes]:
        return [bytes([k]) for k in range(pages)] if content.ids is not None else []


BROKEN = {
    "scheduler": (Choosy, None, "some requests are never served: [0-9]+ waiting"),
    "kvcache": (Leaky, None, "kvcache and ledger disagree|chose [0-9]+ pages, asked for"),
    "prefix": (Confused, HashConfig, "reads KV of another text at token"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_it_says_what_a_broken_plugin_does(kind: str) -> None:
    factory, config, message = BROKEN[kind]
    registry = with_toys()
    like = {"scheduler": "conservative", "kvcache": "toy", "prefix": "hash"}
    spec = replace(registry.spec(kind, like[kind]), name="broken", config=config and "tests:config")
    made: Any = factory if config else lambda settings, ctx: factory()
    registry.add(kind, spec, factory=made, config=config)
    usual = {"scheduler": "conservative", "kvcache": "toy", "prefix": "hash" if kind == "prefix" else None}
    broken: Any = machine(**{**usual, kind: "broken"})
    broken.registry = registry
    with pytest.raises((AssertionError, LedgerError), match=message):
        run_machine(broken)


def test_settings_that_fit_are_drawn_or_asked_for() -> None:
    class Picky(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        number: int = Field(ge=0)

        @field_validator("number")
        @classmethod
        def _only_one(cls, value: int) -> int:
            if value != 4711:
                raise ValueError("it must be 4711")
            return value

    registry = with_toys()
    spec = PluginSpec(name="picky", factory="tests:plugin", config="tests:config", provides=frozenset())
    registry.add("scheduler", spec, factory=lambda settings, ctx: Fcfs(), config=Picky)
    picky: Any = machine(scheduler="picky", kvcache="toy", prefix=None)
    picky.registry = registry
    with pytest.raises(ConfigError, match="no small settings of scheduler 'picky' were found"):
        run_machine(picky)
    picky.config = {"scheduler": {"number": 4711}}
    assert run_machine(picky)["examples"]


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
