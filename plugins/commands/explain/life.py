"""What is known of one request: its stretches, tokens and preemptions. Times in ns of the run's clock."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from servelab.core.metrics import RequestFacts
from servelab.core.metrics.phases import Phase
from servelab.core.records import RequestArrived, RequestForked, RequestMigrated, RequestRouted
from servelab.plugins.commands.explain.reasons import Reasons


@dataclass(slots=True)
class Range:
    """Least and greatest of a figure over a stretch."""

    low: int
    high: int

    def add(self, value: int) -> None:
        self.low, self.high = min(self.low, value), max(self.high, value)


@dataclass(slots=True)
class Chunk:
    """Tokens of the request that one step computed, before its next token came."""

    start_ns: int
    end_ns: int
    tokens: int
    batch: int
    """Requests in that step."""


@dataclass(slots=True)
class Stretch:
    """A time in one phase."""

    phase: Phase
    start_ns: int
    end_ns: int = 0
    first_step: int | None = None
    """Number of the first step it was in."""
    running: Range | None = None
    """Requests that ran, at the ends of launches."""
    free_pages: list[Range] = field(default_factory=list)
    """Per pool, likewise."""
    admitted: list[str] = field(default_factory=list)
    """Others that were admitted meanwhile, in order."""
    overtakers: list[str] = field(default_factory=list)
    """Those of them that had arrived later and had never run."""
    finished: int = 0
    """Others that ended meanwhile."""
    chunks: list[Chunk] = field(default_factory=list)
    cached_tokens: int = 0
    """Found in the prefix store when it was admitted here."""
    reasons: Reasons = field(default_factory=Reasons)
    tokens: int = 0
    """Output tokens that came in it."""
    preemption: Preemption | None = None
    """What it began with."""

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(slots=True)
class PreemptingPlan:
    """The plan that took the request off the device."""

    step: int
    work: list[tuple[str, int]]
    """Who ran instead: (request, tokens)."""
    victims: list[str]
    """Others that it took off as well."""


@dataclass(slots=True)
class Preemption:
    """One time the request was taken off the device."""

    t_ns: int
    mode: str
    reason: str
    lost_tokens: int
    admitted: list[str] = field(default_factory=list)
    """Others that were admitted at that very moment."""
    computed: dict[str, int] = field(default_factory=dict)
    """Tokens with KV of the others on the device, just before."""
    plan: PreemptingPlan | None = None
    """None: the plan log does not have it."""


@dataclass(slots=True)
class Move:
    """Its pages going between the device and the host."""

    transfer: int
    direction: str
    start_ns: int
    pages: int
    bytes: int
    end_ns: int | None = None
    reason: str = ""
    """Why it was swapped in."""


@dataclass(slots=True)
class Gap:
    """The time between two successive chunks of its output, and what the engine did in it."""

    start_ns: int
    end_ns: int
    steps: int = 0
    """Steps that ended in it."""
    prefills: dict[str, int] = field(default_factory=dict)
    """Others that ran more than one token in a step: their tokens."""
    batch: int = 0
    """Requests in the step that ended it."""
    preempted: int = 0
    """Times the request itself was preempted in it."""

    @property
    def ns(self) -> int:
        return self.end_ns - self.start_ns


@dataclass(slots=True)
class Scene:
    """What it met when it arrived."""

    running: list[str]
    waiting: list[str]
    free_pages: tuple[int, ...]
    """Per pool, as the last launch left them; empty before the first."""


@dataclass(slots=True)
class Life:
    """One request, from its arrival to its end or to the end of the log."""

    arrived: RequestArrived
    facts: RequestFacts
    scene: Scene
    stretches: list[Stretch]
    gaps: array[int] = field(default_factory=lambda: array("q"))
    """Every gap between its chunks, in ns."""
    slowest: list[Gap] = field(default_factory=list)
    """The greatest of them first."""
    fork: RequestForked | None = None
    """How it began, if it is a further sample of a prompt that another computed."""
    preemptions: list[Preemption] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    hops: list[RequestRouted | RequestMigrated] = field(default_factory=list)
    """Its ways from the router to an instance, and from one instance to another."""
    end_ns: int = 0
    """Its end, or that of the log."""
    run_status: str | None = None
    """None: the log has no end of the run."""
    run_reason: str = ""
    log_end_ns: int = 0
    plans_end_ns: int | None = None
    """Time of the last plan read; None: there is no plan log."""
    admitting_steps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Time of a plan that ran it after a wait -> (its step, tokens)."""
    pools: list[dict[str, object]] = field(default_factory=list)
    """As the run states them: id, pages, page_tokens."""
    exact: bool = False
    """Whether tokens with KV can be counted from the log: one launch at a time, no drafts."""
