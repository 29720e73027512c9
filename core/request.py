"""Requests as the outside states them, and as policies see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

from servelab.core.errors import ViewError

if TYPE_CHECKING:
    from servelab.core.engine.state import Request
    from servelab.core.plan import Tokens


class Phase(StrEnum):
    """Where a request is. It is in exactly one phase at any time."""

    WAITING = "waiting"
    COMPILING = "compiling"
    FORKING = "forking"
    """A further sample of a prompt that another request computes; no policy sees it before that is done."""
    RUNNING = "running"
    PAUSED = "paused"
    SWAPPING = "swapping"
    SWAPPED = "swapped"
    LOADING = "loading"
    MOVING = "moving"
    """Stopped, on its way to another instance; no policy sees it meanwhile."""
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class SLO:
    """Bounds a request should meet, in nanoseconds; None: not stated. Inclusive, as in vLLM's goodput."""

    ttft_ns: int | None = None
    """On the time to the first token."""
    tpot_ns: int | None = None
    """On the mean time per output token after the first."""
    e2el_ns: int | None = None
    """On the time from arrival to the end."""
    tbt_ns: int | None = None
    """On the longest time between two tokens: every gap of the request."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestSpec:
    """What a client asks for. Never contains the true output length."""

    id: str
    """Unique in the run."""
    prompt_tokens: int
    """Prompt length."""
    max_new_tokens: int
    """The client's cap. Workloads draw it independently of true lengths."""
    prompt_ids: Sequence[int] | None = None
    """Token ids for executors that run a model, length ``prompt_tokens``."""
    program: str | None = None
    """Conversation, job or agent this request is one turn of."""
    turn: int = 0
    """Turn within the program, from 0."""
    is_last_turn: bool = True
    """Whether the program ends with it."""
    context_tokens: int = 0
    """Leading prompt tokens that repeat the program's previous turn, prompt and output: what a scheduler
    that keeps KV between turns can reuse."""
    stage: str | None = None
    """Stage within a workflow."""
    tool: str | None = None
    """Tool called when this turn ends, if known in advance."""
    tenant: str = "default"
    """Who pays."""
    request_class: str = "online"
    """``online``, ``offline``, ``latency``, ``deadline`` or ``compound``; workloads may add others."""
    priority: int = 0
    """Higher is more important."""
    slo: SLO | None = None
    """Bounds it should meet; None: the run's (section ``slo``)."""
    sampling: Any = None
    """Sampling parameters, understood by the executor."""
    n: int = 1
    """Outputs drawn from the prompt. Each is a request of its own (``sample_id``): the first computes the
    prompt, the others fork from it."""
    sample: int = 0
    """Which of them this is; the core sets it."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """What special plugins need (category, block hashes, grammar id, ...), by documented key."""


@dataclass(frozen=True, slots=True)
class Truth:
    """What will really happen to a request. Kept apart, readable by executors and declared oracles."""

    output_tokens: int
    """Output length."""
    further: tuple[int, ...] = ()
    """The same of the further samples of its prompt; empty: all are as long as the first."""

    def of(self, sample: int) -> Truth:
        """What will happen to one of the samples."""
        if not self.further:
            return self
        return Truth(self.further[sample - 1] if sample else self.output_tokens)


def sample_id(id: str, sample: int) -> str:
    """Id of one of the outputs drawn from the prompt of request ``id``: ``r7``, ``r7#1``, ``r7#2``, ..."""
    return f"{id}#{sample}" if sample else id


def samples_of(spec: RequestSpec) -> list[RequestSpec]:
    """The outputs drawn from one prompt, as requests of their own; the further ones are no turns of its
    program.
    """
    if spec.n == 1:
        return [spec]
    alone = replace(spec, n=1, program=None, turn=0, is_last_turn=True, tool=None)
    return [spec, *(replace(alone, id=sample_id(spec.id, k), sample=k) for k in range(1, spec.n))]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request entering at ``time_ns``. The driver splits the truth off before the engine sees it."""

    time_ns: int
    """When it arrives."""
    spec: RequestSpec
    """What the client asks for."""
    truth: Truth | None = None
    """What will really happen; None: only a model can tell."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client gives up on a request at ``time_ns``."""

    time_ns: int
    """When."""
    request_id: str
    """Whose."""


def _live(path: str, doc: str) -> Any:
    """A read-only property that reads straight through to the engine's state (no Python frame)."""
    return property(attrgetter(path), doc=doc)


class RequestView:
    """A policy's read-only window on one live request.

    Reads are live: they show the engine's state at that moment, without copies. A view is valid during
    the call it was given to; keep ``view.id`` to remember a request, or ``freeze()`` to keep its values.
    Token counts are in tokens, times in nanoseconds.
    """

    __slots__ = ("_r",)

    def __init__(self, request: Request) -> None:
        object.__setattr__(self, "_r", request)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise ViewError(
            f"request views are read-only, {name!r} cannot be set",
            where=f"request {self._r.id}",
            why="policies return decisions as a StepPlan; the core applies them",
            do="keep your own state in a dict keyed by request.id",
        )

    if TYPE_CHECKING:
        _r: Request

    id: str = _live("_r.id", "The request's id.")
    spec: RequestSpec = _live("_r.spec", "The client's request, unchanged.")
    prompt_tokens: int = _live("_r.prompt_tokens", "Prompt length.")
    max_new_tokens: int = _live("_r.max_new_tokens", "Output cap, already cut to the model's length.")
    arrival_ns: int = _live("_r.arrival_ns", "When it arrived.")
    program_arrival_ns: int = _live("_r.program_arrival_ns", "When the first turn of its program arrived.")
    admitted_ns: int | None = _live("_r.admitted_ns", "When it was first scheduled.")
    phase: Phase = _live("_r.phase", "Where it is.")
    computed_tokens: int = _live("_r.computed", "Tokens whose KV is committed.")
    generated_tokens: int = _live("_r.generated", "Output tokens committed so far.")
    in_flight_tokens: int = _live("_r.flying", "Tokens launched and not yet committed.")
    pending_tokens: int = _live(
        "_r.pending", "Tokens it could run now: prompt or recompute left, or 1 when decoding."
    )
    slack_tokens: int = _live("_r.slack", "Tokens that still fit in the pages it holds.")
    layer_cursor: int = _live("_r.layer_cursor", "Layers its current chunk has passed (layered prefill).")
    cached_tokens: int = _live("_r.cached", "Prompt tokens reused from a prefix store.")
    preemptions: int = _live("_r.preemptions", "Times it was preempted.")
    forks: int = _live(
        "_r.num_forks", "Further samples of its prompt, which start to run when the prompt is computed."
    )
    drafted_tokens: int = _live("_r.drafted", "Draft tokens verified so far.")
    accepted_tokens: int = _live("_r.accepted", "Draft tokens accepted so far.")
    next_token: Tokens = _live(
        "_r.one", "The ready-made work item ``Tokens(request, 1)``, cheaper than a new one."
    )

    # shorthands for fields of the spec
    program: str | None = _live("_r.spec.program", "Conversation, job or agent.")
    turn: int = _live("_r.spec.turn", "Turn within the program, from 0.")
    is_last_turn: bool = _live("_r.spec.is_last_turn", "Whether the program ends with it.")
    stage: str | None = _live("_r.spec.stage", "Stage within a workflow.")
    tool: str | None = _live("_r.spec.tool", "Tool called when the turn ends.")
    tenant: str = _live("_r.spec.tenant", "Who pays.")
    request_class: str = _live("_r.spec.request_class", "Service class.")
    priority: int = _live("_r.spec.priority", "Higher is more important.")
    slo: SLO | None = _live("_r.spec.slo", "Bounds it should meet.")

    @property
    def known_tokens(self) -> int:
        """Prompt plus committed output."""
        return self._r.prompt_tokens + self._r.generated

    @property
    def is_prefilling(self) -> bool:
        """True until its prompt (after a preemption: prompt and output so far) is computed."""
        r = self._r
        return r.computed + r.flying < r.prompt_tokens + r.generated - 1 or not r.generated

    @property
    def in_flight(self) -> bool:
        """True while a launch or transfer names its pages."""
        return self._r.lease.in_flight > 0

    @property
    def token_times_ns(self) -> tuple[int, ...]:
        """Commit time of each output token. A copy: use ``last_token_ns`` where that is enough."""
        return tuple(self._r.token_times)

    @property
    def first_token_ns(self) -> int | None:
        """Commit time of its first output token; None: it has none."""
        times = self._r.token_times
        return times[0] if times else None

    @property
    def last_token_ns(self) -> int | None:
        """Commit time of its latest output token; None: it has none."""
        times = self._r.token_times
        return times[-1] if times else None

    @property
    def pages(self) -> tuple[int, ...]:
        """Device pages held, per pool."""
        return tuple(len(t) for t in self._r.lease.tables)

    @property
    def host_pages(self) -> tuple[int, ...]:
        """Host pages held, per pool."""
        return tuple(len(t) for t in self._r.lease.host_tables)

    def freeze(self) -> dict[str, Any]:
        """A copy of every value, for logs and for keeping beyond the call."""
        return {name: getattr(self, name) for name in VIEW_FIELDS if name not in ("spec", "next_token")}

    def __repr__(self) -> str:
        r = self._r
        return (
            f"<request {r.id} {r.phase} prompt={r.prompt_tokens} computed={r.computed} "
            f"generated={r.generated} pending={r.pending}>"
        )


VIEW_FIELDS: tuple[str, ...] = tuple(
    name for name, value in vars(RequestView).items() if isinstance(value, property)
)
"""Every readable field of a request view, in the order of the class."""
