"""What a scheduler returns: a decision as data. The core validates it and applies it, never repairs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, final

from servelab.core.request import RequestView

PreemptMode = Literal["recompute", "swap", "pause"]
Advance = Literal["append", "rewrite", "none"]


@final
class Tokens:
    """Run ``n`` tokens of one request.

    There is no prefill or decode phase in the contract: a request runs some of its pending tokens.

    Args:
        request: who.
        n: how many of its pending tokens, at least 1.
        layers: ``(first, end)`` layers to run, end exclusive; None: all. A chunk that stops early must be
            continued from ``end`` with the same ``n`` before it counts as computed (layered prefill).
        token_mask: which of the tokens are recomputed, for selective recompute; executor's format.
        advance: ``append`` computes new positions; ``rewrite`` recomputes ``n`` positions already
            computed; ``none`` runs them and keeps no KV.
        draft: draft tokens verified after them (speculation); pages are reserved for these too.
        barrier_group: items sharing a group must run the same number of tokens in this launch.
    """

    __slots__ = ("advance", "barrier_group", "draft", "layers", "n", "plain", "request", "token_mask")

    def __init__(
        self,
        request: RequestView,
        n: int,
        layers: tuple[int, int] | None = None,
        token_mask: object = None,
        advance: Advance = "append",
        draft: int = 0,
        barrier_group: str | None = None,
    ) -> None:
        self.request = request
        self.n = n
        self.layers = layers
        self.token_mask = token_mask
        self.advance = advance
        self.draft = draft
        self.barrier_group = barrier_group
        self.plain = (
            layers is None
            and token_mask is None
            and advance == "append"
            and not draft
            and barrier_group is None
        )

    def __repr__(self) -> str:
        extra = "" if self.plain else f", layers={self.layers}, advance={self.advance!r}, draft={self.draft}"
        return f"Tokens({self.request.id}, {self.n}{extra})"


@final
@dataclass(frozen=True, slots=True)
class Background:
    """Work that belongs to no request, run in the same launch (draft training, index building, ...)."""

    kind: str
    """What it is, for the log."""
    flops: int
    """How much, in floating-point operations."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """Take a running request off the device.

    ``recompute`` drops its KV and requeues it (its output so far is kept); ``swap`` moves its KV to the
    host tier; ``pause`` keeps the KV on the device and stops running it.
    """

    request: RequestView
    """Who."""
    mode: PreemptMode
    """What happens to its KV."""
    reason: str
    """Why, for people and the logs."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A request and the reason for what happens (or does not happen) to it."""

    request: RequestView
    """Who."""
    reason: str
    """Why, for people and the logs."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Repeat the plan's work for up to ``max_steps`` steps without asking again.

    The core ends a hold early at any event (arrival, finish, abort, timer, transfer; while somebody waits,
    pages that come back), when the next step would not fit in KV memory, and at ``until_ns``. With several
    lanes, another one that plans or ends a step is such an event; idle ones are not asked while it goes on.
    """

    max_steps: int
    """Steps in all, the first included."""
    until_ns: int | None = None
    """Ask again at this time at the latest; None: no such time."""


@dataclass(frozen=True, slots=True)
class Unpin:
    """Drop the KV a program keeps between turns, also if its next turn waits with it."""

    program: str
    """Whose."""
    reason: str
    """Why, for people and the logs."""


@dataclass(frozen=True, slots=True)
class Release:
    """At the end of a turn: free its KV (what happens without ``on_turn_end``)."""


@dataclass(frozen=True, slots=True)
class Pin:
    """At the end of a turn: keep its KV on the device until a time, for the program's next turn."""

    until_ns: int
    """When the pin ends, in nanoseconds of the run's clock."""
    reason: str = ""
    """Why, for people and the logs."""


@dataclass(frozen=True, slots=True)
class KeepHost:
    """At the end of a turn: move its KV to the host tier and keep it there for the program's next turn."""

    reason: str = ""
    """Why, for people and the logs."""


TurnEnd = Release | Pin | KeepHost


@dataclass(slots=True)
class StepPlan:
    """What one lane does next. Empty means: nothing, ask again at the next event or at ``wake_at``."""

    work: list[Tokens | Background] = field(default_factory=list)
    """Who runs how many tokens, in the order pages are taken."""
    preemptions: list[Preemption] = field(default_factory=list)
    """Who is taken off the device, before any page is taken."""
    swap_ins: list[Verdict] = field(default_factory=list)
    """Swapped requests whose pages come back to the device."""
    rejections: list[Verdict] = field(default_factory=list)
    """Waiting requests that are refused for good."""
    aborts: list[Verdict] = field(default_factory=list)
    """Admitted requests that are ended."""
    deferred: list[Verdict] = field(default_factory=list)
    """Why a waiting request was passed over; for the plan log, changes nothing."""
    unpins: list[Unpin] = field(default_factory=list)
    """Programs whose kept KV is dropped."""
    wake_at: int | None = None
    """Ask again at this time even if nothing happens."""
    hold: Hold | None = None
    """Repeat the work without asking."""

    def run(self, request: RequestView, n: int) -> None:
        """Append ``Tokens(request, n)``."""
        self.work.append(request.next_token if n == 1 else Tokens(request, n))

    def preempt(self, request: RequestView, mode: PreemptMode, reason: str) -> None:
        """Take a running request off the device."""
        self.preemptions.append(Preemption(request, mode, reason))

    def swap_in(self, request: RequestView, reason: str) -> None:
        """Bring a swapped request back."""
        self.swap_ins.append(Verdict(request, reason))

    def reject(self, request: RequestView, reason: str) -> None:
        """Refuse a waiting request for good."""
        self.rejections.append(Verdict(request, reason))

    def abort(self, request: RequestView, reason: str) -> None:
        """End an admitted request."""
        self.aborts.append(Verdict(request, reason))

    def unpin(self, program: str, reason: str) -> None:
        """Drop what a program keeps between turns."""
        self.unpins.append(Unpin(program, reason))

    def defer(self, request: RequestView, reason: str) -> None:
        """Say why a waiting request was passed over."""
        self.deferred.append(Verdict(request, reason))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a launch did for one request, as the executor reports it.

    ``tokens`` are the new output ids over all steps of the launch, in order; empty for a prompt chunk
    that was not the last. ``finish`` is set by the executor when it saw the end (``stop``).
    """

    tokens: tuple[int, ...] = ()
    """New output ids."""
    accepted: int = 0
    """Draft tokens accepted; the tokens include them."""
    finish: str | None = None
    """Why it ended, if it did."""
    rewritten: int = 0
    """Positions recomputed (``advance="rewrite"``)."""
    exit_layer: int | None = None
    """Layer at which it left early; None: it did not."""
    stash_bytes: int = 0
    """Bytes of activations kept for a later launch."""
    logprobs: tuple[dict[int, float], ...] | None = None
    """Per output token, if the request asked for them: token id -> log-probability, the drawn one first."""
    forks: tuple[Outcome, ...] = ()
    """Where ``Batch.forks`` asks for them: the first token of each further sample, from the same logits."""
