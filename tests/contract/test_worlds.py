"""The worlds bring about what the suites are to see, and honest schedulers of every kind pass in them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from servelab.core.api import KeepHost, Pin, PluginSpec, Release, RequestView, StepPlan, StepView, TurnEnd
from servelab.core.records import RequestAdmitted
from servelab.core.testing import SUITES, SchedulerSuite, failures, results, suite_of
from servelab.core.testing.fakes import Fcfs, RandomPlans
from servelab.core.testing.kvcache import AnyPlans
from servelab.core.testing.mutants.scheduler import FirstCome
from servelab.core.testing.worlds import Served, serve, stream, worlds

ROOT = Path(__file__).resolve().parents[2]


class Swaps(FirstCome):
    """Moves the youngest to the host when pages run out, and keeps KV between turns."""

    spec = PluginSpec(
        name="swaps",
        factory="x:Swaps",
        provides=frozenset({"scheduler.chunks", "scheduler.swap", "scheduler.retains"}),
    )

    def plan(self, view: StepView) -> StepPlan:
        plan = StepPlan()
        pages = view.kv.budget()
        for request in view.swapped:
            room = [free - held for free, held in zip(pages.free, request.host_pages, strict=True)]
            if min(room) > len(view.running) and pages.take(request, 1):  # those who run can grow
                plan.swap_in(request, "room again")
        if plan.swap_ins:
            return plan
        if view.contexts and not len(view.running) and not len(view.swapped):
            for program in view.contexts:
                plan.unpin(program, "memory for others")
        if plan.unpins and len(view.waiting):
            return plan
        plan = super().plan(view)
        host = list(view.kv.free_host_pages)
        victims, plan.preemptions = plan.preemptions, []
        for victim in victims:
            need = victim.request.pages
            if any(view.kv.total_host_pages) and all(a <= b for a, b in zip(need, host, strict=True)):
                host = [b - a for a, b in zip(need, host, strict=True)]
                plan.preempt(victim.request, "swap", victim.reason)
            else:
                plan.preempt(victim.request, "recompute", victim.reason)
        if any(p.mode == "swap" for p in plan.preemptions):
            plan.work.clear()  # pages come back when the transfer has ended
            plan.hold = None
        return plan

    def on_turn_end(self, request: RequestView) -> TurnEnd:
        if request.turn == 0:
            return Pin(request.arrival_ns + 10**6, "the next turn comes soon")
        return KeepHost("later") if request.turn == 1 else Release()


def _seen(runs: list[Served]) -> Counter[str]:
    seen: Counter[str] = Counter()
    for served in runs:
        assert served.error is None, f"{served.world.name}: {served.error}"
        seen.update(x.ev for x in served.records)
        seen["hits"] += sum(x.cached_tokens > 0 for x in served.of(RequestAdmitted))
        seen["held"] += sum(getattr(x, "held", 1) > 1 for x in served.records)
        seen["swaps"] += sum(getattr(x, "mode", "") == "swap" for x in served.records)
        for ends in served.ends.values():
            seen.update(end.outcome for end in ends)
    return seen


def test_the_worlds_are_full_of_incidents() -> None:
    seen = _seen([serve(world, scheduler=Fcfs(hold=64)) for world in worlds()])
    wanted = {
        "preempted": 40,
        "hits": 8,
        "evicted": 5,
        "forked": 4,
        "held": 50,
        "cancelled": 2,
        "completed": 150,
    }
    assert {k: seen[k] for k in wanted if seen[k] < wanted[k]} == {}, seen


def test_the_stream_is_an_overload() -> None:
    served = serve(stream(), scheduler=Fcfs())
    queued = max(x.waiting for x in served.records if x.ev == "step")  # type: ignore[attr-defined]
    assert served.error is None and queued > 30


def test_any_plans_do_everything() -> None:
    runs = []
    for seed in range(4):
        for world in worlds():
            if world.name in ("host tier", "samples that share"):
                plans = AnyPlans(seed, RandomPlans.KINDS - {"rewrite"}, shrinks=True)
                runs.append(serve(world, scheduler=plans, started=plans.started))
    seen = _seen(runs)
    wanted = {"preempted": 50, "swaps": 5, "transfer_ended": 10, "aborted": 3, "rejected": 3}
    assert {k: seen[k] for k in wanted if seen[k] < wanted[k]} == {}, seen


def test_a_scheduler_that_swaps_and_retains_passes() -> None:
    suite = suite_of(SchedulerSuite, Swaps)
    failed = failures(suite)
    assert not failed, "\n\n".join(map(str, failed.values()))
    seen = _seen(list(suite().served()))
    assert seen["swaps"] > 3 and seen["context_kept"] > 3


class Shown(SchedulerSuite):
    """The scheduler of the README, which admits the newest first."""

    exempt: ClassVar = {"test_no_starvation": "admits the newest first: the oldest wait while others come"}


def test_the_scheduler_of_the_readme_passes_but_for_what_it_is_exempt_from() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from servelab.core.api import StepPlan, StepView\n.*?)```", text, re.S)
    assert code is not None
    space: dict[str, Any] = {"__name__": "shown"}
    exec(code[1], space)
    newest = space["Newest"]
    newest.spec = PluginSpec(name="newest", factory="shown:Newest", provides=frozenset({"scheduler.chunks"}))
    found = list(results(suite_of(Shown, newest)))
    assert [str(r.error) for r in found if r.error] == []
    assert [r.check for r in found if r.exempted] == ["test_no_starvation"]


def test_a_refused_setting_is_said_once() -> None:
    failed = failures(suite_of(SchedulerSuite, "vllm_v1"))
    assert list(failed) == ["test_builds"]
    assert "at most 16 tokens and 4 requests per launch" in str(failed["test_builds"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("plugin", ["vllm_v1", "pastfuture"])
def test_other_worlds(plugin: str, seed: int) -> None:
    config = {"max_num_batched_tokens": 16, "max_num_seqs": 4}
    failed = failures(suite_of(SchedulerSuite, plugin, config=config, seed=seed))
    assert not failed, "\n\n".join(map(str, failed.values()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize(
    ("kind", "plugin"), [("kvcache", "paged"), ("kvcache", "contiguous"), ("prefix", "hash")]
)
def test_other_worlds_of_memory(kind: str, plugin: str, seed: int) -> None:
    failed = failures(suite_of(SUITES[kind], plugin, seed=seed))
    assert not failed, "\n\n".join(map(str, failed.values()))
