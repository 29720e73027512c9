"""Conformance of schedulers: run in the real engine over many small worlds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import FrozenInstanceError, replace
from typing import Any, ClassVar, cast

import pytest

from servelab.core.config import choice_of
from servelab.core.errors import PlanError, ServeLabError, StallError, ViewError
from servelab.core.facts import Limits
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import (
    Planned,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    StepDone,
)
from servelab.core.request import Truth
from servelab.core.testing.fakes import TOY_MODEL, step_by_step
from servelab.core.testing.suite import Changed, ConformanceError, Endless, PolicySuite, root_of
from servelab.core.testing.traps import guarded
from servelab.core.testing.worlds import Served, World, expected_output, long_answer, serve, stream, worlds

MOST_PLANS = 60
"""Calls of ``plan`` per request of a world, and 300 more, after which nothing will come of it."""
MOST_OVERTAKEN = 40
"""Requests that arrived later and were admitted earlier, in a stream of 100."""
MOST_WAITED = 100
"""Plans that a request waits with memory and places to spare."""

ENGINE = "docs/explanation/engine.md"


class Watched:
    """A scheduler as the engine calls it, with what a check wants done around each call.

    Args:
        inner: the scheduler.
        hold: False takes the holds off its plans.
        most: calls of ``plan`` after which the run is given up.
        watch_views: compare what the view shows before and after each call.
        forbidden: told the names of calls that are not a policy's.
    """

    def __init__(
        self,
        inner: Any,
        *,
        hold: bool = True,
        most: int = 1 << 30,
        watch_views: bool = False,
        forbidden: Callable[[str], None] | None = None,
    ) -> None:
        self.inner = inner
        self.most = most
        self.plans = 0
        self.split: list[str] = []
        """Requests of which a plan ran a part of what was pending."""
        self.layered: list[str] = []
        self._hold, self._watch = hold, watch_views
        for name in ("on_event", "on_turn_end"):  # optional: the engine looks whether they are there
            if hasattr(inner, name):
                setattr(self, name, guarded(getattr(inner, name), name, forbidden))
        self._plan = guarded(inner.plan, "plan", forbidden)

    def plan(self, view: StepView) -> StepPlan:
        self.plans += 1
        if self.plans > self.most:
            raise Endless(f"{self.most} plans, and requests are still unfinished")
        before = shown(view) if self._watch else None
        plan = self._plan(view)
        if before is not None and (after := shown(view)) != before:
            changed = next(
                name for name in after.keys() | before.keys() if after.get(name) != before.get(name)
            )
            raise Changed(f"{changed} changed while step {view.step} was planned")
        for item in getattr(plan, "work", ()):  # a plan that is none is for the core to refuse
            if isinstance(item, Tokens) and item.layers is not None:
                self.layered.append(item.request.id)
            elif isinstance(item, Tokens) and item.advance == "append" and item.n < item.request._r.pending:
                self.split.append(item.request.id)
        if self._hold or not isinstance(plan, StepPlan) or plan.hold is None:
            return cast("StepPlan", plan)
        return replace(plan, hold=None)


def shown(view: StepView) -> dict[str, Any]:
    """Copies of what a view shows, by what it is."""
    out: dict[str, Any] = {}
    for queue in ("waiting", "running", "paused", "swapped"):
        requests = list(getattr(view, queue))
        out[f"the order of view.{queue}"] = [r.id for r in requests]
        for r in requests:
            out[f"request {r.id}"] = {**r.freeze(), "spec": repr(r.spec)}
    kv = view.kv
    out["view.kv"] = (kv.free_pages, kv.total_pages, kv.free_host_pages, kv.pinned_pages)
    out["view.contexts"] = list(view.contexts)
    return out


class SchedulerSuite(PolicySuite):
    """What is true of every scheduler; see ``servelab.core.families.scheduler``.

    Worlds have at least 16 tokens and 4 requests per launch. A scheduler whose settings have to fit these
    limits overrides ``settings``.
    """

    kind: ClassVar[str] = "scheduler"
    contract: ClassVar[str] = "servelab/core/families/scheduler.py"

    advice: ClassVar[str] = (
        "mend the factory; or state in 'config' limits of at most 16 tokens and 4 requests per launch, the "
        "least that worlds have; or override settings(limits)"
    )

    _served: ClassVar[dict[tuple[type, str], Served]] = {}

    # ------------------------------------------------------------- running

    def settings(self, limits: Limits) -> Mapping[str, Any]:
        """The scheduler's settings in a world with these limits."""
        return self.config

    def built(self, world: World, truths: dict[str, Truth], **context: Any) -> Any:
        """A fresh scheduler for a world."""
        oracle = truths.__getitem__ if self.spec.oracle else None
        registry, spec, _ = self._selected
        value = {"name": spec.name, **self.settings(world.limits)}
        try:
            choice = choice_of(self.kind, value, registry, f"{type(self).__name__}.settings()")
        except ServeLabError as exc:
            self.fail(
                f"{self.name} refuses the settings for {world.limits}: {exc}",
                rule="settings() gives what the config model allows",
                do="mend settings() of the suite",
                cause=exc,
            )
        self._selected = registry, spec, choice
        return self.make(**{"limits": world.limits, "model": TOY_MODEL, "oracle": oracle} | context)

    def scheduler(self, world: World, truths: dict[str, Truth], **context: Any) -> Any:
        """As ``built``; skips the check where that fails."""
        try:
            return self.built(world, truths, **context)
        except ConformanceError as exc:
            pytest.skip(f"test_builds fails: {exc.what.splitlines()[0]}")

    def worlds(self) -> list[World]:
        """The worlds that the scheduler says it can live in."""
        found = worlds(self.seed)
        if not self.provides(
            "scheduler.chunks"
        ):  # a prompt, also one with output to recompute, must fit a launch
            found = [
                replace(w, limits=replace(w.limits, max_batch_tokens=max(64, w.limits.max_batch_tokens)))
                for w in found
            ]
        return found

    def run(self, world: World, *, foresight: bool = True, **watch: Any) -> Served:
        """A world under a fresh scheduler."""
        truths: dict[str, Truth] = {}
        most = 300 + MOST_PLANS * len(world.items) * world.turns
        watched = Watched(self.scheduler(world, truths), most=most, **watch)
        served = serve(world, scheduler=watched, truths=truths, foresight=foresight)
        served.watched = watched  # type: ignore[attr-defined]
        return served

    def served(self) -> Iterator[Served]:
        """Every world, run once for all checks of the suite."""
        for world in self.worlds():
            key = type(self), world.name
            if key not in self._served:
                self._served[key] = self.run(world, watch_views=True)
            yield self._served[key]

    def finished(self) -> Iterator[Served]:
        """Those that came to their end; other checks say why the rest did not."""
        return (served for served in self.served() if served.error is None)

    def _errors(self, *kinds: type[BaseException]) -> Iterator[tuple[Served, Any]]:
        for served in self.served():
            error = root_of(served.error)
            if isinstance(error, kinds):
                yield served, error

    # -------------------------------------------------------------- checks

    def test_builds(self) -> None:
        """The factory builds a scheduler of its own for every run, within the limits of every world."""
        for world in self.worlds():
            if self.built(world, {}) is self.built(world, {}):
                self.fail(
                    f"{self.name}: the factory returned the same object twice",
                    rule="every run has a plugin of its own, so that nothing of one run reaches the next",
                    do="make a new object in the factory",
                )

    def test_plans_are_legal(self) -> None:
        """The core can execute every plan."""
        for served, error in self._errors(PlanError):
            self.fail(
                f"{self.name} made a plan that cannot be executed, in world {served.world.name!r}: "
                f"{error.what} ({error.where}); {error.why}",
                rule="a plan keeps to limits, memory and phases; the core refuses another, and never "
                "repairs it",
                where=ENGINE,
                do=error.do,
            )

    def test_raises_nothing(self) -> None:
        """``plan``, ``on_event`` and ``on_turn_end`` return."""
        known = (PlanError, ViewError, StallError, FrozenInstanceError, Endless, Changed)
        for served, error in self._errors(Exception):
            if not isinstance(error, known):
                cause = error.__cause__ or error
                where = getattr(error, "where", "")
                self.fail(
                    f"{self.name} raised {type(cause).__name__}: {cause}, in world {served.world.name!r} "
                    f"({where})",
                    rule="a policy answers every view and takes every record; nothing it sees is an error",
                    do="mend the plugin; the cause is chained",
                    cause=cause,
                )

    def test_keeps_no_view(self) -> None:
        """Views are read only in the call they were given to."""
        for served, error in self._errors(ViewError):
            if "outside the call" in error.what:
                self.fail(
                    f"{self.name} keeps a view, in world {served.world.name!r}: {error.what} ({error.where})",
                    rule="a view is valid during the call it was given to",
                    where=ENGINE,
                    do=error.do,
                )

    def test_changes_nothing_it_is_shown(self) -> None:
        """Policies return decisions as data; what they see stays as it is."""
        for served, error in self._errors(ViewError, FrozenInstanceError, Changed):
            what = getattr(error, "what", str(error))
            if "outside the call" not in what:
                self.fail(
                    f"{self.name} changes what it is shown, in world {served.world.name!r}: {what}",
                    rule="views are read-only: policies return a StepPlan, and the core applies it",
                    where=ENGINE,
                    do="keep your own state in a dict keyed by request.id",
                )

    def test_no_stall(self) -> None:
        """Somebody is planned as long as anybody waits, and every world comes to its end."""
        for served, error in self._errors(StallError, Endless):
            self.fail(
                f"{self.name} leaves requests unserved, in world {served.world.name!r}: {error.what}"
                + (f"; {error.why}" if error.why else ""),
                rule="every request that fits alone is planned in the end, or rejected with a reason",
                where=ENGINE,
                do=error.do or "look which requests it preempts in turn; run at least the oldest to its end",
            )

    def test_every_request_ends_once(self) -> None:
        """One terminal record each, and all of its tokens: output so far survives preemption."""
        for served in self.finished():
            expected, tokens = expected_output(served.world), served.tokens
            for id in served.arrived:
                ends = served.ends.get(id, [])
                if len(ends) != 1:
                    self.fail(
                        f"{self.name}: request {id} has {len(ends)} ends in world {served.world.name!r}",
                        rule="every request gets exactly one terminal record",
                        where=ENGINE,
                        do="plan only requests of this call's queues",
                    )
                got = [token % 1000 for token in tokens.get(id, [])]
                if ends[0].outcome == "completed" and id in expected and got != list(range(expected[id])):
                    self.fail(
                        f"{self.name}: request {id} was given tokens {got[:8]} of {expected[id]}, in world "
                        f"{served.world.name!r}",
                        rule="output so far survives preemption: tokens come once and in order",
                        where=ENGINE,
                        do="look at what it does to the request after its last correct token",
                    )

    def test_nothing_is_dropped(self) -> None:
        """Requests that fit end completed, or cancelled by their client, or are refused with a reason."""
        for served in self.finished():
            for end in served.of(RequestFinished):
                refused = end.outcome in ("rejected", "aborted") and end.reason.strip()
                if end.outcome not in ("completed", "cancelled") and not refused:
                    self.fail(
                        f"{self.name}: request {end.request} ended as {end.outcome!r} "
                        f"({end.reason or 'no reason'}) in world {served.world.name!r}",
                        rule="requests end completed unless the client or the policy, with a reason, ends "
                        "them",
                        do="give plan.reject() and plan.abort() a reason that its client can read",
                    )

    def test_gives_reasons(self) -> None:
        """Every preemption says why: the plan log is read by people."""
        for served in self.finished():
            for x in served.of(RequestPreempted):
                if not x.reason.strip():
                    self.fail(
                        f"{self.name} preempts request {x.request} at {x.t_ns} ns without a reason",
                        rule="every preemption, rejection and abort has its reason in the plan log",
                        where="docs/reference/logs.md",
                        do="say it: plan.preempt(request, mode, 'out of KV pages')",
                    )

    def test_memory_is_given_back(self) -> None:
        """When all requests have ended every page is free."""
        for served in self.finished():
            ledger = served.engine.ledger
            if ledger.free() != ledger.total() or ledger.free("host") != ledger.total("host"):
                self.fail(
                    f"{self.name}: {ledger.free()} of {ledger.total()} pages are free at the end of world "
                    f"{served.world.name!r}",
                    rule="KV memory is conserved",
                    where=ENGINE,
                    do="look for requests it paused, pinned or swapped out and forgot",
                )

    def test_declares_what_it_does(self) -> None:
        """What its plans contain is among the capabilities of its spec: other parts rely on it."""
        did: dict[str, str] = {}
        for served in self.served():
            watched: Watched = served.watched  # type: ignore[attr-defined]
            for id in watched.split:
                did.setdefault("scheduler.chunks", f"ran a part of the pending tokens of request {id}")
            for id in watched.layered:
                did.setdefault("scheduler.layers", f"ran some layers of request {id}")
            for x in served.of(RequestPreempted):
                if x.mode == "swap":
                    did.setdefault("scheduler.swap", f"swapped out request {x.request}")
            if hasattr(watched.inner, "on_turn_end"):
                did.setdefault("scheduler.retains", "has on_turn_end()")
        self.declares(did)

    def test_no_starvation(self) -> None:
        """Waiting is bounded: nobody is passed over again and again while others keep coming."""
        served = self._through(self.run(stream(self.seed)))
        admitted = served.admitted_ns
        order = [id for id in served.arrived if id in admitted]
        for k, id in enumerate(order):
            overtaken = sum(admitted[later] < admitted[id] for later in order[k + 1 :])
            if overtaken > MOST_OVERTAKEN:
                self.fail(
                    f"{self.name}: request {id} was overtaken by {overtaken} later ones in a stream of "
                    f"{len(order)}, more than {MOST_OVERTAKEN}",
                    rule="waiting is bounded: a request is not passed over for ever while others keep coming",
                    do="let age count in its order; or, where that is the technique, exempt it and say so",
                )

    def test_looks_at_arrivals(self) -> None:
        """With memory and places to spare, who comes is let in while others run."""
        served = self._through(self.run(long_answer(self.seed)))
        batches = [x for run in self.finished() for x in run.of(StepDone) if len(x.requests) > 1]
        if not batches:
            pytest.skip(f"{self.name} runs one request at a time")
        steps, since, waits = 0, dict[str, int](), dict[str, int]()
        for x in served.records:
            if isinstance(x, RequestArrived):
                since[x.request] = steps
            elif isinstance(x, StepDone):
                steps += len(x.ends_ns)
            elif isinstance(x, RequestAdmitted) and not x.resumed:
                waits[x.request] = steps - since[x.request]
        for id, waited in waits.items():
            if waited > MOST_WAITED:
                self.fail(
                    f"{self.name}: request {id} waited {waited} steps while memory was plenty",
                    rule="a hold never outlives an arrival: new requests are looked at",
                    where=ENGINE,
                    do="look at view.waiting in every plan; a technique whose batches are closed is exempt",
                )

    def _through(self, served: Served) -> Served:
        """A world of one check's own, which came to its end."""
        if served.error is not None:
            error: Any = served.error
            self.fail(
                f"{self.name}, in world {served.world.name!r}: {getattr(error, 'what', error)} "
                f"({getattr(error, 'where', '')}); {getattr(error, 'why', '')}",
                rule="every world can be served",
                where=ENGINE,
                do=getattr(error, "do", "") or "mend the plugin; the cause is chained",
                cause=error,
            )
        return served

    def test_holds_equal_steps(self) -> None:
        """A held run and one planned step by step are the same: a hold says what it would plan anyway."""
        held = False
        for world in self.worlds():
            run = self.run(world)
            if run.error is not None or not any(x.held > 1 for x in run.of(Planned)):
                continue
            held = True
            stepped = self.run(world, hold=False)
            one, other = step_by_step(run.records), step_by_step(stepped.records)
            if one != other:
                k = next(
                    i
                    for i, pair in enumerate(zip([*one, None], [*other, None], strict=False))
                    if pair[0] != pair[1]
                )
                self.fail(
                    f"{self.name}: with holds, event {k} of world {world.name!r} is {_brief(one, k)}; "
                    f"planned step by step it is {_brief(other, k)}",
                    rule="a hold repeats the plan while the same plan would be made again",
                    where=ENGINE,
                    do="hold only when nothing but the lapse of steps lies ahead; count view.step, not calls",
                )
        if not held:
            pytest.skip(f"{self.name} holds no plan")

    def test_same_seed_same_plans(self) -> None:
        """A second run in the same process makes the same plans, whatever ran between them."""
        for first in reversed(list(self.served())):
            again = self.run(first.world)
            self._same(
                first,
                again.plan_log(),
                "the second run of one seed in one process",
                rule="the same seed gives the same plans",
                do="keep state in the instance, never in the class or module; draw from context.rng only",
            )

    def test_plans_do_not_depend_on_hashes(self) -> None:
        """Ids of the same order with other hashes give the same plans."""
        for first in self.served():
            other = self.run(first.world.renamed())
            log = [_renamed(entry) for entry in other.plan_log()]
            self._same(
                first,
                log,
                "the run with other request ids",
                rule="the same seed gives the same plans, in every process",
                do="iterate over lists, dicts or sorted(), never over sets; do not use hash() or id()",
            )

    def _same(self, first: Served, log: list[Any], what: str, *, rule: str, do: str) -> None:
        reference = first.plan_log()
        for k, (a, b) in enumerate(zip([*reference, None], [*log, None], strict=False)):
            if a != b:
                self.fail(
                    f"{self.name}: {what} differs at plan {k} of world {first.world.name!r}: "
                    f"{b} instead of {a}",
                    rule=rule,
                    where=ENGINE,
                    do=do,
                )

    def test_no_clock_no_chance_no_environment(self) -> None:
        """Time is ``view.now_ns``, chance is ``context.rng``, settings are its config."""
        found: list[str] = []
        for world in self.worlds():
            if world.name in ("little memory", "conversations", "plenty of memory"):
                self.run(world, forbidden=found.append)
                self.called_nothing_forbidden(found, f", in world {world.name!r}", "view.now_ns for time")

    def test_no_length_leak(self) -> None:
        """Plans do not depend on true output lengths before these show."""
        if self.spec.oracle:
            pytest.skip(f"{self.name} declares oracle=True: it may read true lengths")
        asked: list[str] = []

        def canary(id: str) -> Truth:
            asked.append(id)
            return Truth(1)

        for world in self.worlds():
            runs = []
            for lengths in (None, 1):
                truths: dict[str, Truth] = {}
                other = world if lengths is None else world.with_lengths(lengths)
                scheduler = Watched(self.scheduler(other, truths, oracle=canary), hold=False)
                runs.append(serve(other, scheduler=scheduler, truths=truths, foresight=False))
            if asked:
                self.fail(
                    f"{self.name} asks the oracle for the output length of request {asked[0]}",
                    rule="true lengths are hidden from policies that do not declare oracle=True",
                    do="declare oracle=True in its PluginSpec, so that reports are stamped; or predict",
                )
            a, b = runs
            until = min(_first_end(a), _first_end(b))
            for x, y in zip([*a.plan_log(until), None], [*b.plan_log(until), None], strict=False):
                if x != y:
                    self.fail(
                        f"{self.name} knows hidden output lengths: with other lengths the plan at "
                        f"{(x or y or (0,))[0]} ns of world {world.name!r} is {y} instead of {x}, before any "
                        "request has ended",
                        rule="true lengths are hidden from policies that do not declare oracle=True",
                        do="decide from the view alone; declare oracle=True if it is an oracle",
                    )

    def test_lanes(self) -> None:
        """Two lanes side by side."""
        self.needs("scheduler.lanes")
        self._with_limits("two lanes", lanes=2)

    def test_ahead(self) -> None:
        """Planning a step before the results of the one before are known."""
        self.needs("scheduler.ahead")
        self._with_limits("two launches in flight", max_in_flight=2)

    def _with_limits(self, what: str, **changed: int) -> None:
        for world in self.worlds():
            served = self.run(replace(world, limits=replace(world.limits, **changed)))
            error = served.error
            if error is not None:
                self.fail(
                    f"{self.name} with {what}, in world {world.name!r}: {error}",
                    rule="a scheduler that declares scheduler.lanes or scheduler.ahead plans every lane",
                    where=ENGINE,
                    do=f"{getattr(error, 'do', '')}; or take the capability out of its PluginSpec",
                )
            expected, tokens = expected_output(world), served.tokens
            for end in served.of(RequestFinished):
                got = [token % 1000 for token in tokens.get(end.request, [])]
                if end.outcome == "completed" and got != list(range(expected.get(end.request, len(got)))):
                    self.fail(
                        f"{self.name} with {what}: request {end.request} was given tokens {got[:8]}",
                        rule="tokens come once and in order",
                        where=ENGINE,
                        do="plan only requests of this call's queues",
                    )


def _brief(log: list[tuple[Any, ...]], k: int) -> str:
    return repr(log[k]) if k < len(log) else "nothing"


def _first_end(served: Served) -> int:
    """When hidden lengths first show: the first request ends."""
    return min((x.t_ns for x in served.of(RequestFinished)), default=1 << 62)


def _renamed(entry: Any) -> Any:
    """A plan log entry with the ids of ``World.renamed`` turned back."""
    if isinstance(entry, str):
        return entry.replace("other-", "")
    if isinstance(entry, tuple):
        return tuple(map(_renamed, entry))
    return entry
