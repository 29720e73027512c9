"""Broken schedulers, each one change away from first come first served."""

from __future__ import annotations

import os
import random
import sys
from time import monotonic_ns
from typing import Any, ClassVar

from servelab.core.families.scheduler import StepView
from servelab.core.plan import Hold, StepPlan, Tokens
from servelab.core.records import Record
from servelab.core.request import RequestView
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import Fcfs
from servelab.core.testing.mutants import Mutant


class FirstCome(Fcfs):
    """The honest one: in order of arrival, the youngest recomputed when pages run out."""

    spec = PluginSpec(
        name="first_come",
        factory="servelab.core.testing.mutants.scheduler:FirstCome",
        provides=frozenset({"scheduler.chunks"}),
    )

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__(hold=32)
        self.context = context


class ExceedsBudget(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        plan.work = [Tokens(x.request, x.request.pending_tokens) for x in plan.work if isinstance(x, Tokens)]
        return plan


class SchedulesFinished(FirstCome):
    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__()
        self.last: list[Any] = []

    def plan(self, view: StepView) -> StepPlan:
        plan, alive = super().plan(view), {r.id for q in (view.waiting, view.running) for r in q}
        plan.work += [x for x in self.last if x.request.id not in alive]
        self.last = [Tokens(x.request, 1) for x in plan.work if isinstance(x, Tokens)]
        return plan


class NamesTwice(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        plan.work += plan.work[:1]
        return plan


class ForgetsMemory(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        plan, left = StepPlan(), view.limits.max_batch_tokens
        for request in [*view.running, *view.waiting][: view.limits.max_batch_requests]:
            n = min(request.pending_tokens, left)
            if n:
                plan.run(request, n)
                left -= n
        return plan


class Backwards:
    """A queue from its other end."""

    def __init__(self, view: StepView) -> None:
        self._view = view
        self.waiting = list(reversed(view.waiting))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class Starves(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        return super().plan(Backwards(view))  # type: ignore[arg-type]


class Overlooks(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        seen = Backwards(view)
        seen.waiting = [r for r in view.waiting if r.prompt_tokens % 5]
        return super().plan(seen)  # type: ignore[arg-type]


class Thrashes(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        running = list(view.running)
        if running and view.waiting.first() is not None:
            plan = StepPlan()
            for request in running:
                plan.preempt(request, "recompute", "the other one has waited")
            return plan
        return super().plan(view)


class ReadsTheClock(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        self.began = monotonic_ns()
        return super().plan(view)


class DrawsFromTheGlobalGenerator(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        if len(view.running) > 1:
            self.favourite = random.choice(list(view.running)).id
        return super().plan(view)


class ReadsTheEnvironment(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        self.chunk = int(os.environ.get("MY_CHUNK", "64"))
        return super().plan(view)


class WritesOnAView(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        for request in view.waiting:
            request.priority = 7
        return super().plan(view)


class WritesIntoASpec(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        for request in view.running:
            request.spec.features["seen"] = view.step  # type: ignore[index]
        return super().plan(view)


class KeepsAView(FirstCome):
    oldest: RequestView | None = None

    def plan(self, view: StepView) -> StepPlan:
        if self.oldest is not None and self.oldest.pending_tokens:
            self.oldest = None
        self.oldest = self.oldest or view.running.first()
        return super().plan(view)


class PeeksAtLengths(FirstCome):
    """Finds the driver's truths on the stack, and admits the shortest first."""

    def plan(self, view: StepView) -> StepPlan:
        frame: Any = sys._getframe()
        while frame is not None and not hasattr(frame.f_locals.get("self"), "truths"):
            frame = frame.f_back
        truths = frame.f_locals["self"].truths
        seen = Backwards(view)
        seen.waiting = sorted(view.waiting, key=lambda r: truths[r.id].output_tokens)
        return super().plan(seen)  # type: ignore[arg-type]


class AsksTheOracle(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        oracle = self.context.oracle
        if oracle is not None:
            self.lengths = [oracle(request.id).output_tokens for request in view.waiting]
        return super().plan(view)


class HoldsAcrossAnArrival(FirstCome):
    """Once it decodes it does so for 400 steps, whoever comes."""

    until = 0

    def plan(self, view: StepView) -> StepPlan:
        seen = Backwards(view)
        if view.step < self.until and len(view.running):
            seen.waiting = []
        else:
            seen.waiting = list(view.waiting)
            self.until = view.step + 400
        return super().plan(seen)  # type: ignore[arg-type]


class CountsCalls(FirstCome):
    """Lets the older half wait at every other call; a held step is not a call."""

    calls = 0

    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        self.calls += 1
        if self.calls % 2 and plan.hold is not None and len(plan.work) > 1:
            del plan.work[0]
            plan.hold = Hold(8)
        return plan


class SharesStateBetweenRuns(FirstCome):
    seen: ClassVar[list[str]] = []

    def plan(self, view: StepView) -> StepPlan:
        self.chunk = 3 + len(self.seen) % 7
        self.seen.extend(r.id for r in view.waiting)
        return super().plan(view)


class IteratesOverASet(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        by_id = {r.id: r for r in view.waiting}
        seen = Backwards(view)
        seen.waiting = [by_id[id] for id in set(by_id)]
        return super().plan(seen)  # type: ignore[arg-type]


class RaisesOnRecords(FirstCome):
    def on_event(self, record: Record) -> None:
        self.last = record.request  # type: ignore[attr-defined]


class DoesNotDeclareChunks(FirstCome):
    spec = PluginSpec(
        name="undeclared", factory="servelab.core.testing.mutants.scheduler:DoesNotDeclareChunks"
    )


class ClaimsLanes(FirstCome):
    """Its victims and its chunks are made for one lane."""

    spec = PluginSpec(
        name="claims_lanes",
        factory="servelab.core.testing.mutants.scheduler:ClaimsLanes",
        provides=frozenset({"scheduler.chunks", "scheduler.lanes"}),
    )

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__()
        self.mine: dict[str, RequestView] = {}

    def plan(self, view: StepView) -> StepPlan:
        self.mine |= {r.id: r for r in view.running}
        plan = super().plan(view)
        named = {x.request.id for x in plan.work if isinstance(x, Tokens)}
        live = set(self.mine) - {r.id for r in view.running} - {r.id for r in view.waiting}
        for id in sorted(live - named):
            if self.mine[id]._r.phase == "running":
                plan.work.append(Tokens(self.mine[id], 1))
        return plan


class PreemptsWithoutAReason(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        plan = super().plan(view)
        victims, plan.preemptions = plan.preemptions, []
        for victim in victims:
            plan.preempt(victim.request, victim.mode, "")
        return plan


class RejectsWithoutAReason(FirstCome):
    def plan(self, view: StepView) -> StepPlan:
        for request in view.waiting:
            if request.admitted_ns is None and request.prompt_tokens > 20:
                plan = StepPlan()
                plan.reject(request, "")
                return plan
        return super().plan(view)


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="scheduler", plugin=plugin, original=FirstCome, check=check, message=message, breaks=breaks
    )


MUTANTS = (
    _mutant(
        ExceedsBudget,
        "test_plans_are_legal",
        "max_batch_tokens is",
        "runs all pending tokens, whatever the budget",
    ),
    _mutant(
        SchedulesFinished,
        "test_plans_are_legal",
        "which is not live here",
        "schedules a request that has finished",
    ),
    _mutant(NamesTwice, "test_plans_are_legal", "is named twice in one plan", "plans one request twice"),
    _mutant(
        ForgetsMemory, "test_plans_are_legal", "KV pages up to request", "admits without asking for KV pages"
    ),
    _mutant(Starves, "test_no_starvation", "was overtaken by", "admits the newest first"),
    _mutant(Overlooks, "test_no_stall", "nothing will ever run", "never plans some requests"),
    _mutant(
        Thrashes, "test_no_stall", "requests are still unfinished", "requests preempt each other for ever"
    ),
    _mutant(
        ReadsTheClock,
        "test_no_clock_no_chance_no_environment",
        "calls time.monotonic_ns in plan()",
        "reads the wall clock",
    ),
    _mutant(
        DrawsFromTheGlobalGenerator,
        "test_no_clock_no_chance_no_environment",
        "calls random.choice in plan()",
        "draws from the global generator",
    ),
    _mutant(
        ReadsTheEnvironment,
        "test_no_clock_no_chance_no_environment",
        "calls os.environ",
        "takes a setting from the environment",
    ),
    _mutant(
        WritesOnAView,
        "test_changes_nothing_it_is_shown",
        "request views are read-only, 'priority' cannot be set",
        "sets a field of a view",
    ),
    _mutant(
        WritesIntoASpec,
        "test_changes_nothing_it_is_shown",
        "changed while step",
        "changes a request's features in place",
    ),
    _mutant(
        KeepsAView, "test_keeps_no_view", "outside the call it was given to", "keeps a view across calls"
    ),
    _mutant(
        PeeksAtLengths,
        "test_no_length_leak",
        "knows hidden output lengths",
        "finds true output lengths on the stack and orders by them",
    ),
    _mutant(
        AsksTheOracle,
        "test_no_length_leak",
        "asks the oracle for the output length",
        "asks for true lengths without declaring oracle=True",
    ),
    _mutant(
        HoldsAcrossAnArrival,
        "test_looks_at_arrivals",
        "steps while memory was plenty",
        "holds its decoding across arrivals",
    ),
    _mutant(
        CountsCalls,
        "test_holds_equal_steps",
        "planned step by step it is",
        "holds a plan that it would not make again",
    ),
    _mutant(
        SharesStateBetweenRuns,
        "test_same_seed_same_plans",
        "the second run of one seed in one process differs",
        "keeps state in its class",
    ),
    _mutant(
        IteratesOverASet,
        "test_plans_do_not_depend_on_hashes",
        "the run with other request ids differs",
        "takes its order from a set",
    ),
    _mutant(
        RaisesOnRecords,
        "test_raises_nothing",
        "raised AttributeError: 'StepDone' object has no attribute 'request'",
        "does not expect every type of record",
    ),
    _mutant(
        DoesNotDeclareChunks,
        "test_declares_what_it_does",
        "does not declare 'scheduler.chunks'",
        "runs prompts in parts without saying so",
    ),
    _mutant(
        ClaimsLanes, "test_lanes", "with two lanes", "declares lanes and takes requests of the other one"
    ),
    _mutant(
        PreemptsWithoutAReason, "test_gives_reasons", "without a reason", "gives no reason for a preemption"
    ),
    _mutant(
        RejectsWithoutAReason, "test_nothing_is_dropped", "(no reason)", "refuses requests without a reason"
    ),
)
