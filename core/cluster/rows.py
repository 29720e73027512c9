"""What an instance reports of itself."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

from servelab.core.cluster.pricing import Prices
from servelab.core.engine.engine import Engine
from servelab.core.errors import ViewError
from servelab.core.families.router import InstanceRow, Role
from servelab.core.records import StepDone

State = Literal["starting", "active", "draining", "stopped"]


@dataclass(slots=True, eq=False)
class Member:
    """One instance of the cluster, as the core knows it."""

    engine: Engine
    prices: Prices
    state: State = "active"
    role: Role = "mixed"
    ready_ns: int | None = None
    reported_ns: int = 0
    """When something last happened to it."""
    step_ns: int = 0
    spans_ns: int = 0
    """Of steps since the last report, with their number."""
    steps: int = 0
    preemptions: int = 0
    """Since the last report."""
    dispatched: int = 0
    assigned_ns: int = 0
    unpriced: array[int] = field(default_factory=lambda: array("q"))
    """Prompts sent to it that ``assigned_ns`` does not count yet."""
    row: InstanceRow | None = None
    """As reported; with reports at every step made when it is asked for."""

    @property
    def id(self) -> int:
        return self.engine.index

    def stepped(self, record: StepDone, live: bool) -> None:
        """A launch ended, or steps of it did."""
        ends = record.ends_ns
        self.step_ns = ends[-1] - (ends[-2] if len(ends) > 1 else record.start_ns)
        if live:  # its last step is all that happened since the report before
            self.spans_ns, self.steps, self.preemptions = self.step_ns, 1, 0
        else:
            self.spans_ns += ends[-1] - record.start_ns
            self.steps += len(ends)

    def assigned(self) -> int:
        """Work ever sent to it: prompts, each with the device to itself."""
        for tokens in self.unpriced:
            self.assigned_ns += self.prices.prompt_ns(tokens)
        del self.unpriced[:]
        return self.assigned_ns


class LiveRow(InstanceRow):
    """A row that counts what takes long when it is first read, during the call it was made for."""

    __slots__ = ("_member",)
    _member: Member | None

    def __getattr__(self, name: str) -> Any:
        # only fields of the base that have no value yet come here
        count = _COUNTS.get(name)
        if count is None:
            raise AttributeError(f"an instance row has no {name!r}")
        member = self._member
        if member is None:
            raise ViewError(
                f"a row of instance {self.id} was read outside the call it was given to",
                where=f"InstanceRow.{name}",
                do="read rows of the current view, and keep the figures that must be remembered",
            )
        value = count(member)
        object.__setattr__(self, name, value)
        return value

    def expire(self) -> None:
        """The call is over."""
        object.__setattr__(self, "_member", None)


def report(member: Member, about: Mapping[str, Any], reported_ns: int) -> LiveRow:
    """What an instance says of itself now.

    Args:
        member: the instance.
        about: fields that never change.
        reported_ns: when this became true.
    """
    engine = member.engine
    ledger = engine.ledger
    row = object.__new__(LiveRow)
    put = object.__setattr__
    for name, value in about.items():
        put(row, name, value)
    put(row, "id", engine.index)
    put(row, "reported_ns", reported_ns)
    put(row, "state", member.state)
    put(row, "ready_ns", member.ready_ns)
    put(row, "role", member.role)
    put(row, "free_pages", ledger.free()[0])
    put(row, "total_pages", ledger.total()[0])
    put(row, "running", len(engine.requests) - len(engine.waiting))
    put(row, "waiting", len(engine.waiting))
    put(row, "step_ns", member.step_ns)
    put(row, "token_interval_ns", member.spans_ns // member.steps if member.steps else 0)
    put(row, "preemptions", member.preemptions)
    put(row, "dispatched", member.dispatched)
    put(row, "_member", member)
    return row


def settled(row: LiveRow) -> InstanceRow:
    """The row as plain data: everything counted now."""
    return InstanceRow(**{f.name: getattr(row, f.name) for f in fields(InstanceRow)})


def constant_fields(engine: Engine, model: str, tp: int, price_per_hour: float) -> Mapping[str, Any]:
    """Fields of a row that never change while a run lasts."""
    return MappingProxyType(
        {
            "model": model,
            "hardware": engine.hardware.name if engine.hardware else "",
            "cost_per_hour": price_per_hour * tp,
            "parallel": MappingProxyType({"tp": tp} if tp > 1 else {}),
            "shares": (1.0, 1.0),
            "page_tokens": engine.layout.pools[0].page_tokens,
            "expert_tokens": MappingProxyType({}),
        }
    )


def _waiting_pages(member: Member) -> tuple[int, ...]:
    engine = member.engine
    return tuple(engine.ledger.missing(r, max(r.pending, 1))[0] for r in engine.waiting.values())


def _context_tokens(member: Member) -> int:
    return sum(r.computed for r in member.engine.running.values())


def _prefill_tokens(member: Member) -> int:
    engine = member.engine
    running = sum(r.pending for r in engine.running.values() if r.pending > 1)
    return running + sum(r.pending for r in engine.waiting.values())


def _prefill_backlog_ns(member: Member) -> int:
    return member.prices.prompt_ns(_prefill_tokens(member))


def _candidates(member: Member) -> tuple[tuple[str, int, int, int], ...]:
    return tuple(
        (r.id, r.computed, r.generated, r.spec.priority)
        for r in member.engine.running.values()
        if r.spec.n == 1 and not r.spec.sample
    )


_COUNTS: dict[str, Callable[[Member], Any]] = {
    "waiting_pages": _waiting_pages,
    "context_tokens": _context_tokens,
    "prefill_tokens": _prefill_tokens,
    "prefill_backlog_ns": _prefill_backlog_ns,
    "assigned_ns": Member.assigned,
    "candidates": _candidates,
}
