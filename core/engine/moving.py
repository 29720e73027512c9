"""Requests on their way between engines: stopped here, put in there, with pages on both sides.

The cluster decides when; these are the few steps it takes, each between two events of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from servelab.core.engine.pages import place
from servelab.core.engine.state import Request
from servelab.core.engine.views import ProgramView
from servelab.core.records import Record
from servelab.core.request import Phase

if TYPE_CHECKING:
    from servelab.core.engine.engine import Engine


class Moving:
    """One engine's side."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.stopped: dict[str, Request] = {}
        """Requests that no policy sees any more: they leave as soon as nothing in flight names them."""
        self.guests: dict[str, Request] = {}
        """Requests that are still elsewhere and have pages here."""
        self.left = 0
        """Requests ever given to other engines."""

    def why_not(self, request_id: str) -> str | None:
        """Why a request cannot leave now; None: it can."""
        r = self._engine.requests.get(request_id)
        if r is None:
            return "it is not there"
        if r.spec.n > 1 or r.spec.sample:
            return "samples of one prompt stay together"
        if r.phase is Phase.WAITING and r.computed:
            return "it waits with KV that its program kept"
        if r.phase not in (Phase.RUNNING, Phase.WAITING):
            return f"it is {r.phase}"
        return "its chunk is between layers" if r.layer_cursor else None

    def stop(self, r: Request) -> None:
        """Policies see it no more; what is in flight still lands."""
        engine = self._engine
        engine.break_holds()
        del (engine.running if r.phase is Phase.RUNNING else engine.waiting)[r.id]
        r.phase = Phase.MOVING
        self.stopped[r.id] = r

    def resume(self, r: Request) -> None:
        """It stays after all."""
        engine = self._engine
        engine.break_holds()
        del self.stopped[r.id]
        if not r.computed:
            r.phase = Phase.WAITING
            engine.waiting[r.id] = r
            engine.waiting.move_to_end(r.id, last=False)
        else:
            r.phase = Phase.RUNNING
            engine.running[r.id] = r

    def give(self, r: Request, record: Record) -> None:
        """It is gone: nothing in flight names it."""
        engine = self._engine
        engine.break_holds()
        del self.stopped[r.id], engine.requests[r.id]
        self.left += 1
        r.home, r.phase = None, Phase.FINISHED
        if r.spec.program is not None:
            engine.programs[r.spec.program].live -= 1
        engine.ledger.release(r.lease)
        engine.teach(record)

    def invite(self, r: Request, *, with_kv: bool) -> Request:
        """A guest without pages, for a request from elsewhere; ``with_kv``: what left a window stays away."""
        guest = Request(r.spec, r.arrival_ns, r.max_new_tokens, self._engine.ledger.open(r.id))
        if with_kv:
            guest.lease.first = list(r.lease.first)
        self.guests[r.id] = guest
        return guest

    def has_room(self, r: Request, tokens: int) -> bool:
        """Whether ``reserve`` would find pages for so many tokens of a request from elsewhere."""
        ledger, first = self._engine.ledger, r.lease.first
        counts = (ledger.chooser.ask(ledger.kvcache.pages_for, pool, r.view, tokens) for pool in ledger.pools)
        return self._fits([n - gone for n, gone in zip(counts, first, strict=True)], [[] for _ in first])

    def reserve(self, guest: Request, tokens: int) -> bool:
        """Pages for so many tokens of a guest, or none and False."""
        ledger = self._engine.ledger
        if not self._fits(ledger.missing(guest, tokens), guest.lease.tables):
            return False
        self._engine.break_holds()  # free pages are fewer than a plan that is being repeated may think
        ledger.reserve(guest, tokens)
        return True

    def _fits(self, needs: Sequence[int], tables: Sequence[Sequence[int]]) -> bool:
        """Whether so many further pages per pool are free where these tables can use them."""
        ledger = self._engine.ledger
        if any(need > left for need, left in zip(needs, ledger.free(), strict=True)):
            return False
        scratches = ledger.scratches()
        return scratches is None or place(scratches, needs, tables)

    def uninvite(self, guest: Request) -> None:
        """It does not come: its pages are free."""
        del self.guests[guest.id]
        self._engine.break_holds()
        self._engine.ledger.release(guest.lease)

    def take(self, guest: Request, r: Request, record: Record, *, with_kv: bool) -> None:
        """The request lives here from now on, its output kept.

        Args:
            guest: the request as it will be here.
            r: as it was elsewhere.
            record: what is told of it.
            with_kv: its KV is in the guest's pages; otherwise it waits, and computes it again.
        """
        engine = self._engine
        engine.break_holds()
        del self.guests[guest.id]
        for name in _KEPT:
            setattr(guest, name, getattr(r, name))
        guest.home = engine
        engine.requests[guest.id] = guest
        engine.arrived += 1
        if guest.spec.program is not None:
            program = engine.programs.setdefault(
                guest.spec.program, ProgramView(guest.spec.program, guest.program_arrival_ns)
            )
            program.turns += 1
            program.live += 1
        if with_kv:
            guest.computed, guest.pending = r.computed, r.pending
            guest.phase = Phase.RUNNING
            engine.running[guest.id] = guest
            engine.ledger.adopted(guest)
            engine.ledger.slide(guest)
        else:
            guest.pending = guest.prompt_tokens + guest.generated
            engine.waiting[guest.id] = guest
        engine.emit(record)


_KEPT = (
    *("accepted", "admitted_ns", "cached", "drafted", "generated", "output"),
    *("preemptions", "program_arrival_ns", "token_times"),
)
"""What a request keeps wherever it is, besides its specification."""
