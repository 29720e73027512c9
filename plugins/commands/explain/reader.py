"""From the logs to the life of one request: one pass over the events, one over the plans.

Memory is that of the requests alive at one time and of the output of the one request, whatever the size of
the logs.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import replace
from heapq import heappush, heapreplace
from itertools import count, pairwise
from typing import Any

from servelab.core.errors import LogError
from servelab.core.metrics import RequestFacts
from servelab.core.metrics.phases import ON_DEVICE, WAITING, Change, Phases
from servelab.core.records import (
    Planned,
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestMigrated,
    RequestPreempted,
    RequestRouted,
    RunFinished,
    RunStarted,
    StepDone,
    TransferEnded,
    TransferStarted,
)
from servelab.plugins.commands.explain.life import (
    Chunk,
    Gap,
    Life,
    Move,
    PreemptingPlan,
    Preemption,
    Range,
    Scene,
    Stretch,
)

SLOWEST = 3
"""Gaps that are kept with what happened in them."""


class UnknownRequest(Exception):
    """The log has no such request; ``known`` are those it has."""

    def __init__(self, known: list[str]) -> None:
        self.known = known


def read_life(request: str, events: Iterable[Record], plans: Iterable[Planned] | None) -> Life:
    """Everything the logs say about a request.

    Args:
        request: its id.
        events: the event log from its beginning.
        plans: the plan log; None: there is none.

    Raises:
        UnknownRequest: it never arrived.
        LogError: the events contradict themselves.
    """
    reader = _Events(request)
    for record in events:
        reader.feed(record)
    life = reader.close()
    if plans is not None:
        _read_plans(life, plans)
    return life


class _Events:
    """State: where every live request is, and the life so far."""

    def __init__(self, request: str) -> None:
        self._name = request
        self._life: Life | None = None
        self._known: list[str] = []
        self._phases = Phases()
        self._moving: dict[tuple[int, int], Move] = {}
        self._free: dict[int, tuple[int, ...]] = {}
        self._computed: dict[str, int] = {}
        """Tokens with KV of requests on the device."""
        self._later: set[str] = set()
        """Arrived after it and never admitted yet."""
        self._gap: Gap | None = None
        self._heap: list[tuple[int, int, Gap]] = []
        self._order = count()
        self._last_ns = 0
        self._end: RunFinished | None = None
        self._info: dict[str, Any] = {}
        self._feeders: dict[str, Callable[[Any], None]] = {
            RunStarted.ev: self._run_started,
            RequestArrived.ev: self._arrived,
            RequestRouted.ev: self._moved,
            RequestMigrated.ev: self._moved,
            RequestAdmitted.ev: self._admitted,
            StepDone.ev: self._step,
            RequestForked.ev: self._forked,
            RequestPreempted.ev: self._preempted,
            TransferStarted.ev: self._transfer_started,
            TransferEnded.ev: self._transfer_ended,
            RequestFinished.ev: self._finished,
            RunFinished.ev: self._run_finished,
        }

    def feed(self, record: Record) -> None:
        self._last_ns = max(self._last_ns, record.t_ns)
        feeder = self._feeders.get(record.ev)
        if feeder is not None:  # other records say nothing about a request
            feeder(record)

    def close(self) -> Life:
        life = self._life
        if life is None:
            raise UnknownRequest(self._known)
        last = life.stretches[-1]
        if life.facts.ended_ns is None:
            last.end_ns = max(self._last_ns, last.start_ns)
        life.end_ns, life.log_end_ns = last.end_ns, self._last_ns
        life.slowest = [gap for _, _, gap in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]
        if self._end is not None:
            life.run_status, life.run_reason = self._end.status, self._end.reason
        return life

    # ------------------------------------------------------------ the run

    def _run_started(self, record: RunStarted) -> None:
        self._info = dict(record.info)

    def _run_finished(self, record: RunFinished) -> None:
        self._end = record

    # ------------------------------------------------------------ its life

    def _follow(self, record: Record) -> list[Change]:
        """Let the phases take the record in; what changed for the request."""
        return [change for change in self._phases.feed(record) if change.request == self._name]

    def _enter(self, life: Life, change: Change) -> None:
        last = life.stretches[-1]
        last.end_ns = change.t_ns
        if change.phase is None or (last.phase, last.start_ns) == (change.phase, change.t_ns):
            return
        stretch = Stretch(change.phase, change.t_ns)
        stretch.reasons.begin(change.t_ns)
        life.stretches.append(stretch)

    def _concerned(self, engine: int) -> Life | None:
        """The life, while it goes on and what happens on this engine concerns it."""
        life = self._life
        return life if life and life.facts.ended_ns is None and life.arrived.engine == engine else None

    def _arrived(self, r: RequestArrived) -> None:
        if r.request != self._name:
            if self._life is None:
                self._known.append(r.request)
            else:
                self._later.add(r.request)
            self._follow(r)
            return
        if self._life is not None:
            raise LogError(
                f"request {r.request} arrives twice",
                where=f"record 'arrived' at {r.t_ns} ns",
                why="ids are unique over a run",
                do="look for two runs in one log",
            )
        running = self._phases.names(r.engine, ON_DEVICE)
        waiting = self._phases.names(r.engine, WAITING)
        self._follow(r)
        first = Stretch("queued", r.t_ns)
        first.reasons.begin(r.t_ns)
        scene = Scene(running, waiting, self._free.get(r.engine, ()))
        self._life = Life(r, RequestFacts(r), scene, [first])
        self._life.pools = list((self._info.get("kv") or {}).get("pools") or ())
        self._life.exact = _exact(self._info)

    def _admitted(self, r: RequestAdmitted) -> None:
        changes = self._follow(r)
        self._computed[r.request] = r.cached_tokens
        first = r.request in self._later
        self._later.discard(r.request)
        life = self._concerned(r.engine)
        if life is None:
            return
        if changes:
            if life.facts.admitted_ns is None:
                life.facts.admitted_ns = r.t_ns
            self._enter(life, changes[0])
            life.stretches[-1].cached_tokens = r.cached_tokens
            return
        stretch = life.stretches[-1]
        stretch.admitted.append(r.request)
        if first:
            stretch.overtakers.append(r.request)
        if life.preemptions and life.preemptions[-1].t_ns == r.t_ns:
            life.preemptions[-1].admitted.append(r.request)

    def _forked(self, r: RequestForked) -> None:
        changes = self._follow(r)
        if r.shared_tokens:
            self._computed[r.request] = r.shared_tokens
        life = self._concerned(r.engine)
        if life is None or not changes:
            return
        self._enter(life, changes[0])
        life.fork = r
        life.facts.add(array("q", [r.t_ns]), 1)
        life.stretches[-1].tokens += 1
        self._gap = Gap(r.t_ns, r.t_ns)

    def _moved(self, r: RequestRouted | RequestMigrated) -> None:
        changes = self._follow(r)
        life = self._concerned(r.source)
        if life is None or r.request != self._name:
            return
        life.hops.append(r)
        life.arrived = replace(life.arrived, engine=r.engine)
        for change in changes:
            self._enter(life, change)

    def _preempted(self, r: RequestPreempted) -> None:
        changes = self._follow(r)
        if r.mode == "recompute":
            self._computed.pop(r.request, None)
        life = self._concerned(r.engine)
        if life is None or not changes:
            return
        life.facts.preemptions += 1
        running = self._phases.names(r.engine, ON_DEVICE)
        computed = {name: self._computed[name] for name in running if name in self._computed}
        life.preemptions.append(Preemption(r.t_ns, r.mode, r.reason, r.lost_tokens, computed=computed))
        if self._gap is not None:
            self._gap.preempted += 1
        self._enter(life, changes[0])
        life.stretches[-1].preemption = life.preemptions[-1]

    def _transfer_started(self, r: TransferStarted) -> None:
        changes = self._follow(r)
        life = self._concerned(r.engine)
        if life is None or r.request != self._name:
            return
        move = Move(r.transfer, r.direction, r.t_ns, r.pages, r.bytes)
        life.moves.append(move)
        self._moving[r.engine, r.transfer] = move
        for change in changes:
            self._enter(life, change)

    def _transfer_ended(self, r: TransferEnded) -> None:
        changes = self._follow(r)
        if (move := self._moving.pop((r.engine, r.transfer), None)) is not None:
            move.end_ns = r.t_ns
        if (life := self._concerned(r.engine)) is not None:
            for change in changes:
                self._enter(life, change)

    def _finished(self, r: RequestFinished) -> None:
        changes = self._follow(r)
        self._computed.pop(r.request, None)
        self._later.discard(r.request)
        life = self._concerned(r.engine)
        if life is None:
            return
        if not changes:
            life.stretches[-1].finished += 1
            return
        self._enter(life, changes[0])
        facts = life.facts
        facts.outcome, facts.reason, facts.ended_ns = r.outcome, r.reason, r.t_ns
        facts.reported_tokens, facts.cached_tokens = r.output_tokens, r.cached_tokens

    # ------------------------------------------------------------ steps

    def _step(self, r: StepDone) -> None:
        changes = self._follow(r)
        self._free[r.engine] = r.free_pages
        steps = len(r.ends_ns)
        if not steps:
            return
        computed = self._computed
        for name, tokens, emitted in zip(r.requests, r.tokens, r.emitted, strict=True):
            if name in computed:
                computed[name] += emitted if emitted > steps else tokens + steps - 1
        life = self._concerned(r.engine)
        if life is None:
            return
        self._surroundings(life.stretches[-1], r)
        if changes and changes[0].phase != "decode":  # it had been paused
            self._enter(life, changes.pop(0))
        if self._name in r.requests:
            place = r.requests.index(self._name)
            self._ran(life, r, r.tokens[place], r.emitted[place], changes)
        elif self._gap is not None:
            self._happened(self._gap, r, steps)

    def _surroundings(self, stretch: Stretch, r: StepDone) -> None:
        if stretch.running is None:
            stretch.running = Range(r.running, r.running)
            stretch.free_pages = [Range(free, free) for free in r.free_pages]
            return
        stretch.running.add(r.running)
        for seen, free in zip(stretch.free_pages, r.free_pages, strict=True):
            seen.add(free)

    def _ran(self, life: Life, r: StepDone, tokens: int, emitted: int, changes: list[Change]) -> None:
        ends, steps, batch = r.ends_ns, len(r.ends_ns), len(r.requests)
        if life.stretches[-1].phase in ("prefill", "recompute"):
            life.stretches[-1].chunks.append(Chunk(r.start_ns, ends[0], tokens, batch))
        for change in changes:
            self._enter(life, change)
        if not emitted:
            if self._gap is not None:
                self._happened(self._gap, r, steps)
            return
        life.facts.add(array("q", ends), emitted // steps)
        life.stretches[-1].tokens += emitted
        if self._gap is not None:  # ended by the first step of this launch
            self._happened(self._gap, r, 1)
            self._gap.end_ns, self._gap.batch = ends[0], batch
            self._keep(life, self._gap)
        for start_ns, end_ns in pairwise(ends):
            self._keep(life, Gap(start_ns, end_ns, 1, batch=batch))
        self._gap = Gap(ends[-1], ends[-1])

    def _happened(self, gap: Gap, r: StepDone, steps: int) -> None:
        gap.steps += steps
        for name, tokens in zip(r.requests, r.tokens, strict=True):
            if tokens > 1 and name != self._name:
                gap.prefills[name] = gap.prefills.get(name, 0) + tokens

    def _keep(self, life: Life, gap: Gap) -> None:
        life.gaps.append(gap.ns)
        entry = gap.ns, -next(self._order), gap
        if len(self._heap) < SLOWEST:
            heappush(self._heap, entry)
        elif entry > self._heap[0]:
            heapreplace(self._heap, entry)


def _exact(info: dict[str, Any]) -> bool:
    """Whether the tokens that have KV follow from steps alone: nothing is planned ahead, no drafts."""
    settings = info.get("settings")
    if not isinstance(settings, dict):
        return False
    engine, drafts = settings.get("engine") or {}, settings.get("spec")
    return engine.get("lanes") == 1 and engine.get("max_in_flight") == 1 and not drafts


# ---------------------------------------------------------------- plans


def _read_plans(life: Life, plans: Iterable[Planned]) -> None:
    name, engine = life.arrived.request, life.arrived.engine
    starts = [stretch.start_ns for stretch in life.stretches]
    preemptions = list(life.preemptions)  # in order, those whose plan is not found yet
    moves = {move.start_ns: move for move in life.moves if move.direction == "in"}
    life.plans_end_ns = 0
    for plan in plans:
        life.plans_end_ns = plan.t_ns
        if plan.t_ns > life.end_ns:
            break  # nothing later is about it
        if plan.engine != engine or plan.t_ns < life.arrived.t_ns:
            continue
        t_ns = plan.t_ns
        tokens = next((n for one, n in plan.work if one == name), None)
        victim = any(one == name for one, _, _ in plan.preempted)
        while preemptions and preemptions[0].t_ns < t_ns:
            preemptions.pop(0)
        if victim and preemptions and preemptions[0].t_ns == t_ns:
            others = [one for one, _, _ in plan.preempted if one != name]
            preemptions.pop(0).plan = PreemptingPlan(plan.step, list(plan.work), others)
        for one, reason in plan.swapped_in:
            if one == name and t_ns in moves:
                moves[t_ns].reason = reason
        stretch = life.stretches[bisect_right(starts, t_ns) - 1]
        if tokens is not None:
            life.admitting_steps.setdefault(t_ns, (plan.step, tokens))
        elif stretch.phase in WAITING and t_ns < stretch.end_ns and not victim:
            _answer(stretch, plan, name)
    for stretch in life.stretches:
        stretch.reasons.close(stretch.end_ns)


def _answer(stretch: Stretch, plan: Planned, name: str) -> None:
    """What this plan said about the wait: of the request itself, else of the first other it passed over."""
    for one, reason in plan.deferred:
        if one == name:
            stretch.reasons.say(plan.t_ns, reason, own=True)
            return
    if plan.deferred:
        other, reason = plan.deferred[0]
        stretch.reasons.say(plan.t_ns, reason, own=False, other=other)
    else:
        stretch.reasons.say(plan.t_ns, "", own=False)
