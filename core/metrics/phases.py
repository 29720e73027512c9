"""Where each request is: the phases of its life, from the records.

``queued`` until it is first admitted, ``prefill`` until its first token, then ``decode``. Taken off the
device it is ``preempted`` (its KV dropped) until it is admitted again, and in ``recompute`` until its next
token; or in ``swap out``, ``swapped``, ``swap in``; or ``paused``, its KV kept.

A further sample of a prompt is in ``prefill`` while another computes the prompt for it. It then decodes; or,
if it cannot share the prompt's KV, is ``preempted`` until it is admitted to compute that itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from servelab.core.records import (
    Record,
    RequestAdmitted,
    RequestArrived,
    RequestFinished,
    RequestForked,
    RequestMigrated,
    RequestPreempted,
    RequestRouted,
    StepDone,
    TransferEnded,
    TransferStarted,
)

Phase = Literal[
    "queued", "prefill", "decode", "preempted", "recompute", "swap out", "swapped", "swap in", "paused"
]
ON_DEVICE: frozenset[Phase] = frozenset({"prefill", "decode", "recompute"})
"""Phases in which plans may run it."""
WAITING: frozenset[Phase] = frozenset({"queued", "preempted", "swapped", "paused"})
"""Phases that end by a decision of the scheduler."""

OFF: dict[str, Phase] = {"recompute": "preempted", "swap": "swap out", "pause": "paused"}
"""Mode of a preemption -> what follows. A mode that is not here is taken as waiting."""


@dataclass(frozen=True, slots=True)
class Change:
    """A request enters a phase; None: it ended."""

    request: str
    phase: Phase | None
    t_ns: int


class Live:
    """One request that has not ended."""

    __slots__ = ("active", "phase", "since_ns")

    def __init__(self, since_ns: int) -> None:
        self.phase: Phase = "queued"
        self.since_ns = since_ns
        self.active: Phase = "prefill"
        """The phase it was last in on the device, to which it returns with its KV."""


class Phases:
    """Follows all requests of a run. Feed it every record in order.

    State: one object per live request. Cost: nothing per step while every request in it decodes.
    """

    def __init__(self) -> None:
        self.live: dict[int, dict[str, Live]] = {}
        """By engine, then by request, in order of arrival."""
        self._moving: dict[tuple[int, int], TransferStarted] = {}
        self._watched: dict[int, set[str]] = {}
        """Requests whose phase a step may change."""
        self._feeders: dict[str, Callable[[Any], Sequence[Change]]] = {
            RequestArrived.ev: self._arrived,
            RequestRouted.ev: self._routed,
            RequestMigrated.ev: self._migrated,
            RequestAdmitted.ev: self._admitted,
            StepDone.ev: self._step,
            RequestForked.ev: self._forked,
            RequestPreempted.ev: self._preempted,
            TransferStarted.ev: self._transfer_started,
            TransferEnded.ev: self._transfer_ended,
            RequestFinished.ev: self._finished,
        }

    def feed(self, record: Record) -> Sequence[Change]:
        """Take in one record; what changed by it, in order. Times of a request's changes never go back."""
        feeder = self._feeders.get(record.ev)
        return () if feeder is None else feeder(record)

    def names(self, engine: int, phases: frozenset[Phase]) -> list[str]:
        """Requests of an engine that are in one of these phases."""
        return [name for name, one in self.live.get(engine, {}).items() if one.phase in phases]

    def _get(self, record: Record, name: str) -> Live | None:
        return self.live.get(record.engine, {}).get(name)

    def _enter(self, record: Record, name: str, one: Live, phase: Phase, t_ns: int) -> Change:
        one.phase, one.since_ns = phase, max(t_ns, one.since_ns)
        if phase in ON_DEVICE:
            one.active = phase
        watched = self._watched.setdefault(record.engine, set())
        if phase in ("prefill", "recompute", "paused"):
            watched.add(name)
        else:
            watched.discard(name)
        return Change(name, phase, one.since_ns)

    def _arrived(self, r: RequestArrived) -> Sequence[Change]:
        self.live.setdefault(r.engine, {})[r.request] = Live(r.t_ns)
        return (Change(r.request, "queued", r.t_ns),)

    def _routed(self, r: RequestRouted) -> Sequence[Change]:
        one = self.live.get(r.source, {}).pop(r.request, None)
        if one is not None:
            self.live.setdefault(r.engine, {})[r.request] = one
        return ()

    def _migrated(self, r: RequestMigrated) -> Sequence[Change]:
        one = self.live.get(r.source, {}).pop(r.request, None)
        self._watched.get(r.source, set()).discard(r.request)
        if one is None:
            return ()
        self.live.setdefault(r.engine, {})[r.request] = one
        phase: Phase = one.phase if one.phase == "queued" or r.tokens else "preempted"
        if phase == one.phase:
            if phase in ("prefill", "recompute"):
                self._watched.setdefault(r.engine, set()).add(r.request)
            return ()
        return (self._enter(r, r.request, one, phase, r.t_ns),)

    def _admitted(self, r: RequestAdmitted) -> Sequence[Change]:
        one = self._get(r, r.request)
        if one is None:
            return ()
        return (self._enter(r, r.request, one, "recompute" if r.resumed else "prefill", r.t_ns),)

    def _forked(self, r: RequestForked) -> Sequence[Change]:
        one = self._get(r, r.request)
        if one is None:
            return ()
        return (self._enter(r, r.request, one, "decode" if r.shared_tokens else "preempted", r.t_ns),)

    def _preempted(self, r: RequestPreempted) -> Sequence[Change]:
        one = self._get(r, r.request)
        if one is None:
            return ()
        return (self._enter(r, r.request, one, OFF.get(r.mode, "preempted"), r.t_ns),)

    def _transfer_started(self, r: TransferStarted) -> Sequence[Change]:
        self._moving[r.engine, r.transfer] = r
        one = self._get(r, r.request)
        if one is None or r.direction == "out":
            return ()
        return (self._enter(r, r.request, one, "swap in", r.t_ns),)

    def _transfer_ended(self, r: TransferEnded) -> Sequence[Change]:
        started = self._moving.pop((r.engine, r.transfer), None)
        one = None if started is None else self._get(r, started.request)
        if started is None or one is None:
            return ()
        if one.phase == "swap out":
            return (self._enter(r, started.request, one, "swapped", r.t_ns),)
        if one.phase == "swap in":
            return (self._enter(r, started.request, one, one.active, r.t_ns),)
        return ()

    def _finished(self, r: RequestFinished) -> Sequence[Change]:
        one = self.live.get(r.engine, {}).pop(r.request, None)
        self._watched.get(r.engine, set()).discard(r.request)
        return () if one is None else (Change(r.request, None, max(r.t_ns, one.since_ns)),)

    def _step(self, r: StepDone) -> Sequence[Change]:
        watched = self._watched.get(r.engine)
        if not watched or not r.ends_ns:
            return ()
        changes: list[Change] = []
        for name, emitted in zip(r.requests, r.emitted, strict=True):
            if name not in watched:
                continue
            one = self.live[r.engine][name]
            if one.phase == "paused":
                if r.start_ns < one.since_ns:  # it was paused while this launch ran, which still counts
                    one.active = "decode" if emitted else one.active
                    continue
                changes.append(self._enter(r, name, one, one.active, r.start_ns))
            if emitted and one.phase != "decode":
                changes.append(self._enter(r, name, one, "decode", r.ends_ns[0]))
        return changes
