"""Broken routers, each one change away from the least loaded of all instances."""

from __future__ import annotations

import random
from collections.abc import Sequence
from time import monotonic_ns
from typing import Any, ClassVar

from servelab.core.families.router import (
    Action,
    ClusterView,
    Dispatch,
    Hold,
    Migrate,
    Moment,
    Reject,
    SetRole,
)
from servelab.core.request import RequestSpec
from servelab.core.spec import PluginSpec
from servelab.core.testing.mutants import Mutant


class Least:
    """The honest one: of all active instances the one with the fewest requests, of equal ones the first."""

    spec = PluginSpec(name="least", factory="servelab.core.testing.mutants.router:Least")

    def __init__(self, config: Any = None, context: Any = None) -> None:
        self.context = context

    def among(self, view: ClusterView) -> Sequence[int]:
        return view.instances()

    def load(self, view: ClusterView, i: int) -> int:
        row = view.row(i)
        return row.running + row.waiting

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        ids = self.among(view)
        if not ids:
            return Hold(view.now_ns + 1_000_000)
        return Dispatch(prefill=min(ids, key=lambda i: (self.load(view, i), i)))


class CountsFromOne(Least):
    def among(self, view: ClusterView) -> Sequence[int]:
        return [i + 1 for i in view.instances()]

    def load(self, view: ClusterView, i: int) -> int:
        return 0


class RemembersInstances(Least):
    known: Sequence[int] = ()

    def among(self, view: ClusterView) -> Sequence[int]:
        self.known = self.known or view.instances()
        return self.known


class AnswersNothing(Least):
    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        return super().route(request, moment, view) if request.prompt_tokens % 5 else None


class HoldsForEver(Least):
    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        if request.prompt_tokens > 30:
            return Hold(view.now_ns + 1000)
        return super().route(request, moment, view)


class RefusesWithoutAReason(Least):
    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        return Reject("") if request.prompt_tokens > 30 else super().route(request, moment, view)


class ExpectsSomebody(Least):
    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        return Dispatch(prefill=min(view.instances(), key=lambda i: (self.load(view, i), i)))


class KeepsTheView(Least):
    first: ClusterView | None = None

    def load(self, view: ClusterView, i: int) -> int:
        self.first = self.first or view
        return super().load(self.first, i)


class WritesIntoASpec(Least):
    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        request.features["seen"] = view.now_ns  # type: ignore[index]
        return super().route(request, moment, view)


class WritesOnARow(Least):
    def load(self, view: ClusterView, i: int) -> int:
        row: Any = view.row(i)
        row.waiting += 1
        return super().load(view, i)


class LooksIntoTheEngines(Least):
    """What they hold now, not what they reported."""

    def load(self, view: Any, i: int) -> int:
        return len(view._members[i].engine.requests)


class SharesStateBetweenRuns(Least):
    sent: ClassVar[list[int]] = []

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Any:
        ids = view.instances()
        if not ids:
            return Hold(view.now_ns + 1_000_000)
        self.sent.append(0)
        return Dispatch(prefill=ids[len(self.sent) // 2 % len(ids)])


class ReadsTheClock(Least):
    def load(self, view: ClusterView, i: int) -> int:
        self.read = monotonic_ns()
        return super().load(view, i)


class DrawsFromTheGlobalGenerator(Least):
    def among(self, view: ClusterView) -> Sequence[int]:
        ids = view.instances()
        return random.sample(ids, 2) if len(ids) > 2 else ids


class MovesWithoutSayingSo(Least):
    """Each request once."""

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__(config, context)
        self.moved: set[str] = set()

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        ids = view.instances()
        names = [(x[0], i) for i in ids for x in view.row(i).candidates if x[0] not in self.moved]
        if len(ids) < 2 or not names:
            return ()
        name, source = names[0]
        self.moved.add(name)
        return [Migrate(request=name, source=source, target=next(i for i in ids if i != source))]


class KeepsRoles(Least):
    """Honest as well: of several mixed instances the last one is kept for decoding, and gets nothing."""

    spec = PluginSpec(
        name="keeps_roles",
        factory="servelab.core.testing.mutants.router:KeepsRoles",
        provides=frozenset({"router.roles"}),
    )

    def among(self, view: ClusterView) -> Sequence[int]:
        return view.instances("mixed")

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        mixed, ids = view.instances("mixed"), view.instances()
        if len(mixed) > 1 and len(mixed) == len(ids):
            return [SetRole(mixed[-1], "decode")]
        return [SetRole(ids[0], "mixed")] if ids and not mixed else ()


class ForgetsRoles(KeepsRoles):
    def among(self, view: ClusterView) -> Sequence[int]:
        return view.instances()


class SetsNoRole(KeepsRoles):
    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        return [SetRole(99, "decode")]


def _mutant(plugin: type, check: str, message: str, breaks: str, original: type = Least) -> Mutant:
    return Mutant(
        suite="router", plugin=plugin, original=original, check=check, message=message, breaks=breaks
    )


MUTANTS = (
    _mutant(
        CountsFromOne,
        "test_routes_to_active_instances_only",
        "where it cannot be served",
        "counts instances from 1",
    ),
    _mutant(
        RemembersInstances,
        "test_heeds_draining_and_starting",
        "it is draining",
        "asks once which instances there are",
    ),
    _mutant(
        AnswersNothing,
        "test_every_request_is_routed_held_or_rejected_with_a_reason",
        "answered None for request",
        "has no answer for some requests",
    ),
    _mutant(
        HoldsForEver,
        "test_every_request_is_routed_held_or_rejected_with_a_reason",
        "and is still at the router",
        "holds long prompts again and again",
    ),
    _mutant(
        RefusesWithoutAReason,
        "test_every_request_is_routed_held_or_rejected_with_a_reason",
        "without a reason at",
        "refuses long prompts and does not say why",
    ),
    _mutant(
        ExpectsSomebody,
        "test_raises_nothing",
        "raised ValueError",
        "takes for granted that an instance is active",
    ),
    _mutant(KeepsTheView, "test_keeps_no_view", "outside the call", "keeps the first view it is given"),
    _mutant(
        WritesIntoASpec,
        "test_changes_nothing_it_is_shown",
        "changed while route() was called",
        "changes a request's features in place",
    ),
    _mutant(
        WritesOnARow,
        "test_changes_nothing_it_is_shown",
        "cannot assign to field 'waiting'",
        "counts its own requests on the row",
    ),
    _mutant(
        LooksIntoTheEngines,
        "test_reads_only_what_was_reported",
        "before any report could tell",
        "looks behind the view at what engines hold now",
    ),
    _mutant(
        SharesStateBetweenRuns,
        "test_same_run_twice",
        "the second run of one seed in one process differs",
        "keeps its turn in the class",
    ),
    _mutant(
        ReadsTheClock,
        "test_reads_no_clock_and_no_global_chance",
        "calls time.monotonic_ns in route()",
        "reads the wall clock",
    ),
    _mutant(
        DrawsFromTheGlobalGenerator,
        "test_reads_no_clock_and_no_global_chance",
        "calls random.sample in route()",
        "draws from the global generator",
    ),
    _mutant(
        MovesWithoutSayingSo,
        "test_declares_what_it_does",
        "does not declare 'router.migrates'",
        "moves requests and does not declare it",
    ),
    _mutant(
        ForgetsRoles,
        "test_roles",
        "none for decode",
        "sends prompts to an instance that it has decode only",
        KeepsRoles,
    ),
    _mutant(
        SetsNoRole,
        "test_roles",
        "of instances that are not there",
        "sets roles of an instance that does not exist",
        KeepsRoles,
    ),
)
