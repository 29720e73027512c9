"""What goes into an engine and what comes out: ``Engine.handle(event, now_ns) -> [Command]``.

Events at one instant are ordered by class, then by the order they were posted: lost instances,
completions, transfers, tools, arrivals, aborts, timers, and last ``Schedule``, which every driver sends
once all other events of that instant have been handled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from servelab.core.plan import Background, Outcome, Tokens
from servelab.core.request import RequestSpec

if TYPE_CHECKING:
    from servelab.core.engine.state import Lease, Request
    from servelab.core.engine.swap import Transfer
    from servelab.core.records import Record

# ---------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class InstanceLost:
    """The device is gone: KV and launches with it. Every live request fails."""

    ORDER: ClassVar[int] = 0
    reason: str = "instance lost"


@dataclass(frozen=True, slots=True)
class LaunchDone:
    """A launch ended after ``len(ends_ns)`` steps, at most ``batch.steps``; or so many steps of it did."""

    ORDER: ClassVar[int] = 1
    lane: int
    launch: int
    ends_ns: Sequence[int]
    """End of each step, ascending."""
    outcomes: Sequence[Outcome]
    """One per request of the batch, in its order."""
    more: bool = False
    """The launch goes on with exactly one more step, which is running now. Drivers send this before any
    other event that finds steps of a held launch completed, so that the engine never lags behind."""


@dataclass(frozen=True, slots=True)
class TransferDone:
    ORDER: ClassVar[int] = 2
    transfer: int


@dataclass(frozen=True, slots=True)
class ToolDone:
    """A tool that a program was waiting for has answered."""

    ORDER: ClassVar[int] = 3
    program: str
    tool: str


@dataclass(frozen=True, slots=True)
class Abort:
    """The client gave up. Unknown or finished requests are ignored: the answer crossed the abort."""

    ORDER: ClassVar[int] = 5
    request_id: str
    reason: str = "the client gave up"


@dataclass(frozen=True, slots=True)
class Arrive:
    ORDER: ClassVar[int] = 4
    spec: RequestSpec
    since_ns: int | None = None
    """When it really arrived, if it was held at the router; None: now."""


@dataclass(frozen=True, slots=True)
class Timer:
    """A time asked for by ``SetTimer`` has come."""

    ORDER: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class Schedule:
    """Nothing else happens at this instant: plan every free lane."""

    ORDER: ClassVar[int] = 7


Event = InstanceLost | LaunchDone | TransferDone | ToolDone | Abort | Arrive | Timer | Schedule


# -------------------------------------------------------------- commands


@dataclass(slots=True)
class Batch:
    """Everything an executor or cost model needs for one launch, as parallel lists over its requests.

    In every later step of a launch with ``steps > 1`` each request runs one token more; only decodes
    (``tokens[i] == 1``) are held.
    """

    lane: int
    launch: int
    first_step: int
    """Number of the engine's step this launch begins with."""
    steps: int
    """Steps to run at most; stop after a step in which a request finishes or an interrupt came."""
    requests: list[Request]
    """Engine state of each request: read it, never write it. One may end or be preempted while in flight
    (phase ``finished``, or another lease): its outcome is dropped, whatever it is."""
    leases: list[Lease]
    """The pages of each request for this launch; ``request.lease`` may have changed since."""
    tokens: list[int]
    """Tokens run in the first step, drafts excluded."""
    starts: list[int]
    """Position of the first of them: the context length before it."""
    samples: list[bool]
    """Whether the step ends with a new output token."""
    extras: dict[int, Tokens]
    """Index -> work item, where it is more than plain tokens (layers, drafts, masks, groups)."""
    background: tuple[Background, ...] = ()
    copies: tuple[tuple[int, int, int], ...] = ()
    """(pool, source page, destination page) to copy before the first step (copy-on-write)."""
    forks: dict[int, list[Request]] = field(default_factory=dict)
    """Index -> further samples of the prompt that ends here: each needs a first token too
    (``Outcome.forks``). Such a launch has one step."""

    def num_tokens(self) -> int:
        """Tokens of the first step, drafts included."""
        return sum(self.tokens) + sum(item.draft for item in self.extras.values())


@dataclass(frozen=True, slots=True)
class Launch:
    batch: Batch


@dataclass(frozen=True, slots=True)
class Interrupt:
    """End the running launch of a lane after the step in progress. Harmless if that is its last one."""

    lane: int
    launch: int


@dataclass(frozen=True, slots=True)
class StartTransfer:
    transfer: Transfer


@dataclass(frozen=True, slots=True)
class SetTimer:
    at_ns: int


@dataclass(frozen=True, slots=True)
class Emit:
    """A record for observers, metrics and the log."""

    record: Record


Command = Launch | Interrupt | StartTransfer | SetTimer | Emit
