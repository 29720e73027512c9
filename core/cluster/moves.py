"""Moves of requests between instances, in stages, with pages reserved on both sides.

A blocking move stops the request, copies its KV and goes on at the target. A live one copies full pages
while the request runs on, then those filled meanwhile, and stops it only for the rest. A pull waits until the
target has room. With ``recompute`` nothing is copied. A move whose request ends, is preempted or finds no
room is dropped, and the request goes on where it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from servelab.core.engine.state import Lease, Request
from servelab.core.families.router import Mode
from servelab.core.records import ActionDropped, RequestMigrated
from servelab.core.request import Phase

if TYPE_CHECKING:
    from servelab.core.cluster.rows import Member
    from servelab.core.engine.driver import Driver

LIVE_STAGES = 3
"""Copies beside which a request runs on, at most (Llumnix, main branch)."""
LAST_PAGES = 16
"""With fewer pages than this left to copy it is stopped (Llumnix, main branch)."""


@dataclass(slots=True, eq=False)
class Move:
    """One request on its way."""

    request: str
    source: int
    target: int
    mode: Mode
    started_ns: int
    lease: Lease
    """Of the request when the move began: with another one it has been preempted."""
    guest: Request | None = None
    """The request at the target."""
    copied: int = 0
    """Tokens whose full pages are there."""
    stages: int = 0
    bytes: int = 0
    flow: int | None = None
    """Number on the links of the copy in progress."""
    stopped_ns: int | None = None
    """When it was told to stop."""
    ready: bool = False
    """Everything is copied."""

    @property
    def wants_room(self) -> bool:
        """Whether it waits until the target has pages for it."""
        return self.mode == "pull" and self.guest is None


class Moves:
    """All moves in progress.

    Args:
        members: instances by id.
        bytes_per_ns: bandwidth of an instance's network link, one way; None: not stated.
        latency_ns: of a transfer between instances.
        placed: told of a request's new engine.
    """

    def __init__(
        self,
        members: list[Member],
        bytes_per_s: float | None,
        latency_ns: int,
        placed: Callable[[Request, int], None],
    ) -> None:
        self._members = members
        self._bytes_per_s = bytes_per_s
        self._latency_ns = latency_ns
        self._placed = placed
        self.driver: Driver
        self.live: dict[str, Move] = {}
        """By request, in the order they were begun."""

    # --------------------------------------------------------------- transfers

    @property
    def has_network(self) -> bool:
        return self._bytes_per_s is not None

    def work_ns(self, nbytes: int) -> int:
        """Time of so many bytes on a link of their own."""
        assert self._bytes_per_s is not None
        return -(-nbytes * 1_000_000_000 // round(self._bytes_per_s))

    def predict_ns(self, nbytes: int, source: int, target: int, now: int) -> int:
        """Time of a copy that began now."""
        path = _path(source, target)
        return self.driver.links.predict(now, path, self._latency_ns, self.work_ns(nbytes)) - now

    # ------------------------------------------------------------------ begin

    def begin(self, request: str, source: int, target: int, mode: Mode, now: int, stop: bool = False) -> None:
        """Begin a move; with ``stop`` the request stands still at once. One that cannot be is dropped."""
        why = self._refusal(request, source, target, now)
        if why is not None:
            self._tell_dropped(request, source, target, mode, why, now)
            return
        r = self._members[source].engine.requests[request]
        if r.phase is Phase.WAITING:
            mode = "recompute"  # there is nothing to copy
        move = self.live[request] = Move(request, source, target, mode, now, r.lease)
        if stop:
            self._stop(move, r, now)
        self.advance(move, now)

    def _refusal(self, request: str, source: int, target: int, now: int) -> str | None:
        ids = range(len(self._members))
        if source not in ids or target not in ids:
            return "there is no such instance"
        if self._members[target].state != "active":
            return f"instance {target} is {self._members[target].state}"
        if request in self.live:
            return "it is on its way already"
        self.driver.sync(source, now)
        return self._members[source].engine.moving.why_not(request)

    # ----------------------------------------------------------------- stages

    def settle(self, now: int) -> None:
        """Nothing more happens at this instant: go on with every move that can."""
        for move in list(self.live.values()):
            self.advance(move, now)

    def settle_pulls(self, now: int) -> bool:
        """A plan may have made room: go on with pulls that waited for it. Whether there was one."""
        waiting = [move for move in self.live.values() if move.wants_room]
        for move in waiting:
            self.advance(move, now)
        return any(not move.wants_room or move.request not in self.live for move in waiting)

    @property
    def watched(self) -> set[int]:
        """Instances of which every step matters, also within held launches: pulls wait for room."""
        return {i for move in self.live.values() if move.wants_room for i in (move.source, move.target)}

    def advance(self, move: Move, now: int) -> None:
        """Take the next steps of a move."""
        if move.flow is not None:
            return
        self.driver.sync(move.source, now)
        source, target = self._members[move.source].engine, self._members[move.target]
        r = source.requests[move.request]  # when it ends its move is dropped
        if r.lease is not move.lease or r.phase not in (*_MAY_MOVE, Phase.MOVING):
            self.drop(move, "it was taken off the device", now)
            return
        if target.state not in ("active", "draining"):
            self.drop(move, f"instance {move.target} is {target.state}", now)
            return
        if move.mode == "recompute":
            self._stop(move, r, now)
            if not r.launches:
                move.guest = self._invite(move, r)
                self._hand_over(move, r, now)
            return
        if move.ready:
            self._hand_over(move, r, now)
            return
        waited_for = r.computed + r.flying
        if move.guest is None:
            self.driver.sync(move.target, now)
            if move.mode == "pull" and not target.engine.moving.has_room(r, waited_for):
                return  # asked again when a step of either has ended, and when it is planned
            move.guest = self._invite(move, r)
        if not self._reserve(move, waited_for, now):
            self.drop(move, f"instance {move.target} has no room for {waited_for} tokens", now)
            return
        rest = self._bytes(r, move.copied, r.computed, full=False)[1]
        if move.mode == "live" and move.stages < LIVE_STAGES and rest >= LAST_PAGES:
            upto = r.computed
            size, _ = self._bytes(r, move.copied, upto, full=True)
            self._copy(move, size, now)
            move.copied = upto
            return
        self._stop(move, r, now)
        if r.launches:
            return
        if r.layer_cursor:
            self.drop(move, "its chunk is between layers", now)
            return
        size, _ = self._bytes(r, move.copied, r.computed, full=False)
        move.ready = True
        self._copy(move, size, now)

    def _copy(self, move: Move, size: int, now: int) -> None:
        def done(at: int) -> None:
            move.flow = None  # goes on when everything of this instant has happened

        move.stages += 1
        move.bytes += size
        path = _path(move.source, move.target)
        move.flow = self.driver.links.start(now, path, self._latency_ns, self.work_ns(size), done)
        self.driver.watch_links()

    def _hand_over(self, move: Move, r: Request, now: int) -> None:
        source, target = self._members[move.source].engine, self._members[move.target].engine
        guest = move.guest
        assert guest is not None and move.stopped_ns is not None
        with_kv = move.mode != "recompute"
        record = RequestMigrated(
            t_ns=now,
            engine=move.target,
            request=r.id,
            source=move.source,
            mode=move.mode,
            tokens=r.computed if with_kv else 0,
            bytes=move.bytes,
            stages=move.stages,
            started_ns=move.started_ns,
            stopped_ns=max([move.stopped_ns, *r.token_times[-1:]]),
        )
        del self.live[move.request]
        self._placed(r, move.target)
        self.driver.apart(move.source, now, lambda: source.moving.give(r, record))
        take = target.moving.take
        self.driver.apart(move.target, now, lambda: take(guest, r, record, with_kv=with_kv))

    def drop(self, move: Move, reason: str, now: int) -> None:
        """Give a move up: the request goes on where it is, the target's pages are free."""
        del self.live[move.request]
        if move.flow is not None:
            self.driver.links.cancel(move.flow, now)
            self.driver.watch_links()
        self._uninvite(move, now)
        source = self._members[move.source].engine
        r = source.moving.stopped.get(move.request)
        if r is not None:
            self.driver.apart(move.source, now, lambda: source.moving.resume(r))
        self._tell_dropped(move.request, move.source, move.target, move.mode, reason, now)

    def ended(self, request: str, now: int) -> None:
        """A request has ended: its move is pointless."""
        move = self.live.get(request)
        if move is not None:
            self.drop(move, "it has ended", now)

    def lost(self, instance: int, now: int) -> None:
        """An instance is gone; requests that were on their way from it have ended with it."""
        for move in [m for m in self.live.values() if m.target == instance]:
            self.drop(move, f"instance {instance} is lost", now)

    # ------------------------------------------------------------------ parts

    def _stop(self, move: Move, r: Request, now: int) -> None:
        if move.stopped_ns is None:
            move.stopped_ns = now
            source = self._members[move.source].engine
            self.driver.apart(move.source, now, lambda: source.moving.stop(r))

    def _invite(self, move: Move, r: Request) -> Request:
        return self._members[move.target].engine.moving.invite(r, with_kv=move.mode != "recompute")

    def _uninvite(self, move: Move, now: int) -> None:
        guest, move.guest = move.guest, None
        if guest is not None:
            target = self._members[move.target].engine
            self.driver.apart(move.target, now, lambda: target.moving.uninvite(guest))

    def _reserve(self, move: Move, tokens: int, now: int) -> bool:
        guest, target = move.guest, self._members[move.target].engine
        assert guest is not None
        found: list[bool] = []
        self.driver.apart(move.target, now, lambda: found.append(target.moving.reserve(guest, tokens)))
        return found[0]

    def _bytes(self, r: Request, copied: int, upto: int, *, full: bool) -> tuple[int, int]:
        """Bytes and pages of these tokens; ``full``: of full pages only."""
        size = count = 0
        for pool, first in zip(self._members[0].engine.layout.pools, r.lease.first, strict=True):
            begin = max(copied // pool.page_tokens, first)
            end = upto // pool.page_tokens if full else -(-upto // pool.page_tokens)
            size += (end - begin) * pool.bytes_per_page
            count += end - begin
        return size, count

    def _tell_dropped(self, request: str, source: int, target: int, mode: str, reason: str, now: int) -> None:
        action = f"migrate {request} from {source} to {target}, {mode}"
        self.driver.tell(
            ActionDropped(t_ns=now, engine=source, action=action, reason=reason, request=request)
        )


_MAY_MOVE = (Phase.RUNNING, Phase.WAITING)


def _path(source: int, target: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """Network links of a copy: full duplex, one way out of each instance and one way in."""
    return ("from", source), ("to", target)
