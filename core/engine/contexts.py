"""Contexts: the KV of a finished turn, kept on the device or the host for the next turn of its program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from servelab.core.engine.state import Lease, Request
from servelab.core.engine.swap import swap_out
from servelab.core.errors import PlanError
from servelab.core.events import SetTimer
from servelab.core.plan import KeepHost, Pin, Release, TurnEnd
from servelab.core.records import ContextEnded, ContextKept
from servelab.core.request import Phase, RequestView

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine


@dataclass(slots=True)
class Context:
    """What one program left behind. Policies see this object; it is to be read only."""

    program: str
    tokens: int
    """Tokens whose KV is kept: the last sampled token of the turn is not among them."""
    tier: Literal["device", "host"]
    until_ns: int | None
    """When it is dropped if no next turn has come; None: when a policy says so."""
    lease: Lease

    @property
    def pages(self) -> tuple[int, ...]:
        """Pages held, per pool, on its tier."""
        tables = self.lease.tables if self.tier == "device" else self.lease.host_tables
        return tuple(len(t) for t in tables)


class Contexts:
    """At most one context per program. It ends by adoption, by expiry, or because a policy drops it.

    A turn that adopted a context and waits to be admitted is its *heir*: until then the context can still be
    dropped, and the heir starts from nothing.
    """

    def __init__(self, engine: Engine, on_turn_end: Callable[[RequestView], TurnEnd] | None) -> None:
        self._engine = engine
        self._on_turn_end = on_turn_end
        self.kept: dict[str, Context] = {}
        self._heirs: dict[str, Request] = {}

    def held_by(self, program: str) -> tuple[Lease | None, Request | None]:
        """The lease that could be dropped for a program, and the heir it belongs to, if any."""
        heir = self._heirs.get(program)
        if heir is not None:
            return heir.lease, heir
        context = self.kept.get(program)
        return (context.lease, None) if context is not None else (None, None)

    def ask(self, r: Request) -> Pin | KeepHost | None:
        """What the scheduler wants kept of a request that completes; None: nothing.

        Raises:
            PlanError: an answer that cannot be carried out.
        """
        if self._on_turn_end is None or r.spec.program is None or r.spec.is_last_turn:
            return None
        engine = self._engine
        decision = engine.call(self._on_turn_end, engine.show(r), f"on_turn_end(), request {r.id}")
        if isinstance(decision, Release):
            return None
        if isinstance(decision, Pin) and type(until := decision.until_ns) is int and until > engine.now_ns:
            return decision
        if isinstance(decision, KeepHost) and engine.ledger.has_host_tier and not r.lease.in_flight:
            return decision
        raise PlanError(
            f"on_turn_end answered {decision!r}",
            where=f"scheduler {engine.scheduler_name!r}, request {r.id}, t={engine.now_ns} ns",
            why="Release(), Pin(a time to come) or KeepHost() is expected; KeepHost needs a host tier and a "
            "request that is not in flight (engine.max_in_flight=1)",
            do="answer with one of them",
        )

    def keep(self, r: Request, decision: Pin | KeepHost) -> None:
        """Take over the lease of a turn that has ended."""
        engine, program = self._engine, r.spec.program
        assert program is not None
        if program in self.kept:
            self.drop(program, "a later turn left its own")
        context = Context(program, r.computed, "device", None, r.lease)
        transfer = None
        if isinstance(decision, Pin):
            context.until_ns = decision.until_ns
            engine.command(SetTimer(decision.until_ns))
        else:
            context.tier = "host"
            transfer = swap_out(engine.ledger, r)
        self.kept[program] = context
        engine.emit(
            ContextKept(
                t_ns=engine.now_ns,
                engine=engine.index,
                program=program,
                request=r.id,
                tokens=context.tokens,
                pages=context.pages,
                tier=context.tier,
                until_ns=context.until_ns,
                reason=decision.reason,
            )
        )
        if transfer is not None:
            engine.start_transfer(transfer)

    def adopt(self, r: Request) -> None:
        """A turn has arrived: it takes over what its program kept, as far as its prompt repeats it.

        It starts with those tokens computed; at least one is left to run. A context on the host is adopted
        there: the request is ``swapped`` (or still ``swapping``) and must be swapped in. Where a pool with a
        window has let go of what the next token of a shorter match would see, nothing is adopted.
        """
        engine, spec = self._engine, r.spec
        context = self.kept.get(spec.program) if spec.program is not None else None
        if context is None:
            return
        tokens = min(context.tokens, spec.context_tokens, r.prompt_tokens - 1)
        if tokens < 1 or not engine.ledger.sees_all(context.lease, tokens):
            return
        del self.kept[context.program]
        self._heirs[context.program] = r
        engine.ledger.release(r.lease)
        context.lease.owner = r.id
        r.lease = context.lease
        r.computed = r.cached = tokens
        r.pending = r.prompt_tokens - tokens
        engine.ledger.adopted(r)
        if context.tier == "host":
            del engine.waiting[r.id]
            engine.samples.unqueued(r)
            moving = next((t for t in engine.transfers.values() if t.lease is context.lease), None)
            if moving is not None:
                moving.request_id = r.id
                r.phase = Phase.SWAPPING
            else:
                r.phase = Phase.SWAPPED
                engine.swapped[r.id] = r
        self._emit_end(context.program, "adopted by the next turn", r.id)

    def forget_heir(self, r: Request) -> None:
        """The heir was admitted, or has ended: the KV is its own now."""
        if r.spec.program is not None and self._heirs.get(r.spec.program) is r:
            del self._heirs[r.spec.program]

    def drop(self, program: str, reason: str) -> None:
        """Free what a program keeps; its pages return when nothing in flight names them."""
        engine = self._engine
        heir = self._heirs.pop(program, None)
        if heir is None:
            engine.ledger.release(self.kept.pop(program).lease)
        else:
            engine.ledger.release(heir.lease)
            heir.forget_progress(engine.ledger.open(heir.id))
            if heir.phase is not Phase.WAITING:
                engine.swapped.pop(heir.id, None)
                heir.phase = Phase.WAITING
                engine.waiting[heir.id] = heir
                engine.samples.requeued(heir)
        self._emit_end(program, reason)

    def expire(self) -> None:
        """Drop the contexts whose time is up. One that was adopted stays with its heir."""
        now = self._engine.now_ns
        for program in [p for p, c in self.kept.items() if c.until_ns is not None and c.until_ns <= now]:
            self.drop(program, "its time is up")

    def drop_all(self, reason: str) -> None:
        for program in list(self.kept):
            self.drop(program, reason)

    def _emit_end(self, program: str, reason: str, request: str | None = None) -> None:
        engine = self._engine
        engine.emit(
            ContextEnded(
                t_ns=engine.now_ns, engine=engine.index, program=program, reason=reason, request=request
            )
        )
