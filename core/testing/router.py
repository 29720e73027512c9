"""Conformance of routers: whole runs of toy instances that come, go and report late."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field, replace
from random import Random
from typing import Any, ClassVar, NoReturn

from servelab.core.cluster.rows import settled
from servelab.core.errors import PluginError, ServeLabError, ViewError
from servelab.core.events import InstanceLost
from servelab.core.families.router import (
    Action,
    ClusterView,
    Dispatch,
    Drain,
    Migrate,
    Moment,
    Reject,
    ScaleUp,
    SetRole,
)
from servelab.core.records import ActionDropped, RequestArrived, RequestFinished
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth
from servelab.core.testing.cluster import ClusterRun
from servelab.core.testing.fakes import TOY_MODEL, ToyCost, arrival, toy_limits
from servelab.core.testing.suite import Changed, Endless, PolicySuite, root_of
from servelab.core.testing.traps import guarded

MOST_ASKED = 300
"""Questions about one request, after which it will never be placed."""
CLUSTER = "docs/explanation/cluster.md"


# --------------------------------------------------------------- what is served


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Traffic, and instances that serve it."""

    name: str
    items: tuple[Arrival | Cancel, ...]
    instances: int = 3
    report_ns: int = 0
    """Time between reports; 0: at once."""
    acts: tuple[tuple[int, tuple[Action, ...]], ...] = ()
    """What becomes of the instances, and when."""
    lost: Mapping[int, int] = field(default_factory=dict)
    """Instance -> when its device is gone."""
    step_ns: int = 1000
    """Time of a step, besides that of its tokens."""

    @property
    def changes(self) -> bool:
        """Whether instances come or go."""
        return bool(self.acts or self.lost)


def traffic(seed: int, n: int = 40, every_ns: int = 1500) -> tuple[Arrival | Cancel, ...]:
    """Prompts of up to 40 tokens in bursts, samples and clients that give up among them."""
    rng = Random(seed)
    at, items = 0, list[Arrival | Cancel]()
    for i in range(n):
        at += rng.choice((0, 1, every_ns // 2, every_ns, 2 * every_ns))
        spec: dict[str, Any] = {"n": rng.choice((1, 1, 1, 1, 2)), "features": {"seen": 0}}
        items.append(arrival(f"r{i}", rng.randrange(1, 40), rng.randrange(1, 25), at=at, **spec))
        if rng.randrange(10) == 0:
            items.append(Cancel(at + rng.randrange(6000), f"r{i}"))
    return tuple(sorted(items, key=lambda item: item.time_ns))


def scenarios(seed: int = 0) -> list[Scenario]:
    """Those that every router is run in."""
    drained = (9_000, (Drain(0),))
    started = (15_000, (ScaleUp(""),))
    late = (20_000, (Drain(1),))
    few = tuple(arrival(f"r{i}", 8, 6, at=700 * i) for i in range(30))
    return [
        Scenario(name="reports at once", items=traffic(seed)),
        Scenario(name="late reports", items=traffic(seed + 1), report_ns=7000),
        Scenario(name="one instance", items=traffic(seed + 2, 15), instances=1),
        Scenario(name="instances come and go", items=traffic(seed + 3), acts=(drained, started, late)),
        Scenario(
            name="they come and go between late reports",
            items=traffic(seed + 4),
            report_ns=6000,
            acts=(drained, started, late),
        ),
        Scenario(
            name="nobody is there for a while",
            items=few,
            instances=1,
            acts=((100, (ScaleUp(""),)),),
            lost={0: 2050},
        ),
    ]


# -------------------------------------------------------------- who is watched


class Shown:
    """A view, and only during the call it was given to."""

    def __init__(self, view: ClusterView, name: str) -> None:
        self._view: Any = view
        self._name = name

    def __getattr__(self, name: str) -> Any:
        view = self._view
        if view is None:
            raise ViewError(
                "a cluster view was read outside the call it was given to",
                where=f"ClusterView.{name}, given to {self._name}()",
                do="read the view of the current call, and keep the figures that must be remembered",
            )
        return getattr(view, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("_view", "_name"):
            raise FrozenInstanceError(f"the cluster view is read-only, {name!r} cannot be set")
        object.__setattr__(self, name, value)

    def close(self) -> None:
        self._view = None


class Watched:
    """A router as the core calls it, with what a check wants done around each call.

    Args:
        inner: the router.
        acts: what becomes of the instances, and when; carried out beside what the router wants.
        watch_views: compare what the view shows before and after each call.
        forbidden: told the names of calls that are not a policy's.
    """

    def __init__(
        self,
        inner: Any,
        *,
        acts: Sequence[tuple[int, Sequence[Action]]] = (),
        watch_views: bool = False,
        forbidden: Callable[[str], None] | None = None,
    ) -> None:
        self.inner = inner
        self.answers: list[tuple[int, str, Moment, Any]] = []
        """(time, request, moment, answer) of every question."""
        self.actions: list[tuple[int, Any]] = []
        """What the router itself wanted later."""
        self._asked: Counter[str] = Counter()
        self._acts = list(acts)
        self._watch, self._forbidden = watch_views, forbidden
        self._moves = hasattr(inner, "rebalance")
        if self._moves or acts:  # optional: the core looks whether they are there
            self.rebalance, self.wake_at = self._rebalance, self._wake_at
        if hasattr(inner, "observe"):
            self.observe = self._observe

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        self._asked[request.id] += 1
        if self._asked[request.id] > MOST_ASKED:
            raise Endless(f"request {request.id} was held {MOST_ASKED} times, and is still at the router")
        answer = self._call("route", view, request, moment)
        self.answers.append((view.now_ns, request.id, moment, answer))
        return answer

    def _rebalance(self, view: ClusterView) -> Sequence[Any]:
        out: list[Any] = list(self._call("rebalance", view)) if self._moves else []
        self.actions += [(view.now_ns, action) for action in out]
        while self._acts and self._acts[0][0] <= view.now_ns:
            out += self._acts.pop(0)[1]
        return out

    def _wake_at(self) -> int | None:
        own = self._guarded("wake_at", self.inner.wake_at) if hasattr(self.inner, "wake_at") else None
        times = [t for t in (own, self._acts[0][0] if self._acts else None) if t is not None]
        return min(times, default=None)

    def _observe(self, instance: int, record: Any) -> None:
        self._guarded("observe", self.inner.observe, instance, record)

    def _call(self, name: str, view: ClusterView, *args: Any) -> Any:
        before = self._shown(view, args) if self._watch else None
        shown = Shown(view, name)
        try:
            answer = self._guarded(name, getattr(self.inner, name), *args, shown)
        finally:
            shown.close()
        if before is not None and (after := self._shown(view, args)) != before:
            changed = next(key for key in before if after.get(key) != before[key])
            raise Changed(f"{changed} changed while {name}() was called, at {view.now_ns} ns")
        return answer

    def _guarded(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        return guarded(method, name, self._forbidden)(*args)

    @staticmethod
    def _shown(view: Any, args: Sequence[Any]) -> dict[str, Any]:
        """Copies of what a call is shown, by what it is."""
        ids = tuple(view.instances())
        return {
            **{f"request {arg.id}": repr(arg) for arg in args if isinstance(arg, RequestSpec)},
            "view.instances()": ids,
            **{f"the row of instance {i}": repr(settled(view.row(i))) for i in ids},
        }


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A scenario that was run."""

    scenario: Scenario
    watched: Watched
    run: ClusterRun
    error: ServeLabError | None


# ------------------------------------------------------------------- the suite


class RouterSuite(PolicySuite):
    """What is true of every router; see ``servelab.core.families.router``.

    Instances are toys of 40 pages of 4 tokens. They report at once or late, are drained, started and lost.
    """

    kind: ClassVar[str] = "router"
    contract: ClassVar[str] = "servelab/core/families/router.py"

    _runs: ClassVar[dict[tuple[type, str], Routed]] = {}

    # ------------------------------------------------------------- running

    def run(self, scenario: Scenario, **watch: Any) -> Routed:
        """A scenario behind a fresh router."""
        made = self.make(limits=toy_limits(), model=TOY_MODEL)
        watched = Watched(made, acts=scenario.acts, **watch)
        run = ClusterRun(
            scenario.items,
            watched,
            scenario.instances,
            hold=8,
            report_ns=scenario.report_ns,
            costs=[ToyCost(step_ns=scenario.step_ns) for _ in range(scenario.instances)],
            pages=40,
            shares=True,
            cluster={"max_instances": scenario.instances + 2},
        )
        for instance, at in scenario.lost.items():
            run.driver.post(at, InstanceLost("gone"), instance)
        error: ServeLabError | None = None
        try:
            run.driver.run()
        except ServeLabError as exc:
            error = exc
        return Routed(scenario=scenario, watched=watched, run=run, error=error)

    def routed(self) -> Iterator[Routed]:
        """Every scenario, run once for all checks of the suite."""
        for scenario in scenarios(self.seed):
            key = type(self), scenario.name
            if key not in self._runs:
                self._runs[key] = self.run(scenario, watch_views=True)
            yield self._runs[key]

    def finished(self) -> Iterator[Routed]:
        """Those that came to their end; other checks say why the rest did not."""
        return (one for one in self.routed() if one.error is None)

    def _errors(self) -> Iterator[tuple[Routed, str, Any]]:
        """Runs that failed, with what it is about."""
        for one in self.routed():
            error = root_of(one.error)
            if error is not None:
                yield one, _about(error, one.scenario), error

    def _blame(self, about: str, what: str, *, rule: str, do: str) -> None:
        for one, found, error in self._errors():
            if found == about:
                told = getattr(error, "what", str(error))
                more = "; ".join(filter(None, (getattr(error, "where", ""), getattr(error, "why", ""))))
                self.fail(
                    f"{self.name} {what}, in scenario {one.scenario.name!r}: {told} ({more})",
                    rule=rule,
                    where=CLUSTER,
                    do=do,
                    cause=error,
                )

    # -------------------------------------------------------------- checks

    def test_routes_to_active_instances_only(self) -> None:
        """A request goes to an instance that there is, that is active and serves its phase."""
        for about in ("place", "role"):
            self._blame(
                about,
                "sends a request where it cannot be served",
                rule="a request goes to an active instance; the core refuses another, and never redirects",
                do="choose among view.instances()",
            )

    def test_heeds_draining_and_starting(self) -> None:
        """Nothing goes to an instance that starts, is drained or has stopped, whatever it once was."""
        self._blame(
            "gone",
            "sends a request to an instance that is not active now",
            rule="instances come and go: those that are active now are in view.instances()",
            do="ask view.instances() at every call, and keep no list of your own",
        )

    def test_every_request_is_routed_held_or_rejected_with_a_reason(self) -> None:
        """Answers are Dispatch, Hold until later, or Reject with a reason; nobody is held for ever."""
        self._blame(
            "answer",
            "leaves requests unserved",
            rule="route() answers Dispatch, Hold until later or Reject, and holds no request for ever",
            do="return one of the three; dispatch or reject in the end",
        )
        for one in self.finished():
            for at, request, _, answer in one.watched.answers:
                if isinstance(answer, Reject) and not answer.reason.strip():
                    self.fail(
                        f"{self.name} refuses request {request} without a reason at {at} ns of scenario "
                        f"{one.scenario.name!r}",
                        rule="every rejection has its reason in the log, and its client reads it",
                        where="docs/reference/logs.md",
                        do="say it: Reject('the queue is longer than ...')",
                    )

    def test_raises_nothing(self) -> None:
        """``route``, ``rebalance``, ``wake_at`` and ``observe`` return, also while nobody is active."""
        self._blame(
            "other",
            "does not get through",
            rule="a policy answers every view and takes every record, also one without active instances",
            do="mend the plugin; the cause is chained",
        )

    def test_keeps_no_view(self) -> None:
        """Views and rows are read only in the call they were given to."""
        self._blame(
            "kept",
            "keeps a view or a row",
            rule="a view is valid during the call it was given to",
            do="keep the figures that must be remembered, not the view",
        )

    def test_changes_nothing_it_is_shown(self) -> None:
        """Policies return decisions as data; what they see stays as it is."""
        self._blame(
            "changed",
            "changes what it is shown",
            rule="views are read-only: a router returns answers and actions, and the core carries them out",
            do="keep your own state in a dict keyed by instance or request id",
        )

    def test_reads_only_what_was_reported(self) -> None:
        """Between two reports nothing fresher is known: neither queues and speeds, nor true lengths."""
        items = tuple(arrival(f"r{i}", 3 + 5 * i % 29, 4 + 7 * i % 19, at=850 * i) for i in range(60))
        base = Scenario(name="no report yet", items=items, report_ns=60_000)
        shorter = [replace(x, truth=Truth(1)) if isinstance(x, Arrival) else x for x in base.items]
        others = {
            "lengths of its own": replace(base, items=tuple(shorter)),
            "faster steps": replace(base, step_ns=200),
        }
        first = self.run(base)
        for what, other in others.items():
            again = self.run(other)
            runs = [[x for x in one.watched.answers if x[0] < base.report_ns] for one in (first, again)]
            for a, b in zip([*runs[0], None], [*runs[1], None], strict=False):
                if a != b:
                    self.fail(
                        f"{self.name} knows more than was reported: where the same requests have {what}, "
                        f"its answer at {(a or b or (0,))[0]} ns is {b} instead of {a}, before any report "
                        "could tell",
                        rule="a router sees reports, not the truth: each row says when it was made, and "
                        "nothing fresher is shown",
                        where=CLUSTER,
                        do="decide from view.row(), as old as it is; believe a stale report",
                    )

    def test_same_run_twice(self) -> None:
        """A second run of one seed in the same process is the same, whatever ran between them."""
        for first in reversed(list(self.routed())):
            again = self.run(first.scenario)
            for k, (a, b) in enumerate(
                zip([*first.watched.answers, None], [*again.watched.answers, None], strict=False)
            ):
                if a != b:
                    self.fail(
                        f"{self.name}: the second run of one seed in one process differs at answer {k} of "
                        f"scenario {first.scenario.name!r}: {b} instead of {a}",
                        rule="the same seed gives the same run",
                        where=CLUSTER,
                        do="keep state in the instance, never in the class or module; draw from context.rng",
                    )
            if first.watched.actions != again.watched.actions:
                self.fail(
                    f"{self.name}: the second run of one seed acts otherwise in scenario "
                    f"{first.scenario.name!r}",
                    rule="the same seed gives the same run",
                    where=CLUSTER,
                    do="keep state in the instance, never in the class or module; draw from context.rng",
                )

    def test_reads_no_clock_and_no_global_chance(self) -> None:
        """Time is ``view.now_ns``, chance is ``context.rng``, settings are its config."""
        found: list[str] = []
        for scenario in scenarios(self.seed)[:4]:
            self.run(scenario, forbidden=found.append)
            self.called_nothing_forbidden(found, f", in scenario {scenario.name!r}", "view.now_ns for time")

    def test_conserves(self) -> None:
        """Each request has one arrival and one end, and when all have ended every page is free."""
        for one in self.finished():
            run = one.run
            came = Counter(x.request for x in run.of(RequestArrived))
            ended = Counter(x.request for x in run.of(RequestFinished))
            odd = next((id for id in came | ended if not came[id] == ended[id] == 1), None)
            if odd is not None:
                self._lost(f"request {odd} arrived {came[odd]} times and ended {ended[odd]} times", one)
            for engine in run.engines:
                if engine.ledger.free() != engine.ledger.total():
                    free, total = engine.ledger.free(), engine.ledger.total()
                    self._lost(f"instance {engine.index} has {free} of {total} pages free at the end", one)
            if run.cluster.moves.live or len(run.driver.links):
                self._lost("requests are still on their way at the end", one)
            for x in run.of(RequestFinished):
                if x.outcome == "unfinished" or (x.outcome == "failed" and not one.scenario.lost):
                    self._lost(f"request {x.request} ended as {x.outcome!r} ({x.reason})", one)

    def _lost(self, what: str, one: Routed) -> NoReturn:
        self.fail(
            f"{self.name}: {what}, in scenario {one.scenario.name!r}",
            rule="every request gets exactly one terminal record, and KV memory is conserved",
            where=CLUSTER,
            do="look at the last action about it: events.jsonl of a run has every one",
        )

    def test_declares_what_it_does(self) -> None:
        """What it does after dispatch is among the capabilities of its spec: others rely on it."""
        did: dict[str, str] = {}
        for one in self.routed():
            for at, request, _, answer in one.watched.answers:
                if isinstance(answer, Dispatch) and (
                    answer.decide_decode_late or answer.decode not in (None, answer.prefill)
                ):
                    did.setdefault("router.disaggregates", f"splits request {request} at {at} ns")
            for at, action in one.watched.actions:
                capability = _CAPABILITY.get(type(action))
                if capability is not None:
                    did.setdefault(capability, f"wants {action} at {at} ns")
        self.declares(did)

    def test_roles(self) -> None:
        """With ``router.roles``: it sets some that can be set, and every instance gets what it is for."""
        self.needs("router.roles")
        self._blame(
            "role",
            "gives an instance what it is not for",
            rule="an instance that prefills or decodes only gets what it is for",
            do="choose among view.instances(role), or look at view.row(i).role",
        )
        wanted = [x for one in self.routed() for _, x in one.watched.actions if isinstance(x, SetRole)]
        dropped = [x for one in self.routed() for x in one.run.of(ActionDropped) if "SetRole" in x.action]
        if len(dropped) == len(wanted):
            self.fail(
                f"{self.name} declares 'router.roles', and set {len(wanted)} roles, {len(dropped)} of them "
                "of instances that are not there",
                rule="a declared capability is there",
                where="docs/explanation/families.md",
                do="return SetRole of instances in view.instances(), or do not declare it",
            )


_CAPABILITY: dict[type, str] = {
    Migrate: "router.migrates",
    SetRole: "router.roles",
    ScaleUp: "router.scales",
    Drain: "router.scales",
}


def _about(error: BaseException, scenario: Scenario) -> str:
    """Which rule a run's error is about."""
    what = getattr(error, "what", str(error))
    if isinstance(error, Changed | FrozenInstanceError):
        return "changed"
    if isinstance(error, ViewError) and "outside the call" in what:
        return "kept"
    if isinstance(error, Endless) or " holds request " in what or " answered " in what:
        return "answer"
    if type(error) is PluginError and any(verb in what for verb in (" sent request ", " sends request ")):
        why = error.why or ""
        if "none for" in why or "decode_late" in why or ("that decodes" in why and "it is active" in why):
            return "role"
        return "gone" if scenario.changes and "it is " in why else "place"
    return "other"
