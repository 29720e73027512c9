"""Log records: what happened, as the engine emits it. Metrics, reports and observers read only these.

Every record has ``t_ns`` (when) and ``engine`` (index of the instance). Records of one engine come in the
order it learned of things: on the virtual clock with one lane that is time order; otherwise a step may have
ended a little before the record in front of it. ``to_dict`` gives the JSON form with ``"ev"`` naming the
type; ``from_dict`` reads it back. True output lengths never appear before a request has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from operator import attrgetter
from typing import Any, ClassVar, Literal

LOG_SCHEMA = 1
"""Version of the record fields; raised when one changes meaning or goes away."""


ROUTER = -1
"""``engine`` of records of requests that are in no engine: held or refused by the router."""

Ending = Literal["completed", "rejected", "aborted", "cancelled", "failed", "unfinished"]
"""How a request ends.

``completed`` by itself (reason ``stop``, or ``length`` at its cap), ``rejected`` before it ran, ``aborted``
by a policy after it was admitted, ``cancelled`` by its client, ``failed`` (its instance was lost),
``unfinished`` (the run ended first).
"""


@dataclass(slots=True, kw_only=True)
class Record:
    ev: ClassVar[str]
    t_ns: int
    engine: int = 0


@dataclass(slots=True, kw_only=True)
class RunStarted(Record):
    """First record of a run. ``info`` holds whatever identifies it (settings, versions, seed, stamps)."""

    ev = "run_started"
    info: Mapping[str, Any]
    schema: int = LOG_SCHEMA


@dataclass(slots=True, kw_only=True)
class RunFinished(Record):
    """Last record of a run. ``status`` is ``ok``, ``interrupted`` or ``failed`` with the reason."""

    ev = "run_finished"
    status: Literal["ok", "interrupted", "failed"]
    reason: str = ""
    date: str | None = field(default=None, compare=False)
    """Local time at which the run began, ``YYYYMMDD-HHMMSS``. This and the following are of the real world,
    also where the run's clock is virtual: two runs of one seed differ in nothing else."""
    wall_s: float | None = field(default=None, compare=False)
    """Real seconds from the first record to this one."""
    peak_rss_bytes: int | None = field(default=None, compare=False)
    """Most memory that the process ever held, from its own start."""
    energy_j: float | None = None
    """Energy of all devices by the run's clock; None: the cost model knows no energy, or time was real."""


@dataclass(slots=True, kw_only=True)
class RequestArrived(Record):
    ev = "arrived"
    request: str
    prompt_tokens: int
    max_new_tokens: int
    request_class: str = "online"
    priority: int = 0
    tenant: str = "default"
    program: str | None = None
    turn: int = 0
    slo_ttft_ns: int | None = None
    slo_tpot_ns: int | None = None
    slo_e2el_ns: int | None = None
    slo_tbt_ns: int | None = None
    parent: str | None = None
    """The request that computes its prompt, if it is a further sample of one."""


@dataclass(slots=True, kw_only=True)
class RequestHeld(Record):
    """The router keeps a request that has just arrived: here and in its arrival ``engine`` is ``ROUTER``."""

    ev = "held"
    request: str
    until_ns: int
    """When the router is asked again at the latest."""


@dataclass(slots=True, kw_only=True)
class RequestRouted(Record):
    """A request that the router held goes to an engine."""

    ev = "routed"
    request: str
    source: int
    """Where it was: ``ROUTER``."""


@dataclass(slots=True, kw_only=True)
class RequestMigrated(Record):
    """A request goes on in another engine: ``engine`` is where, its output is kept."""

    ev = "migrated"
    request: str
    source: int
    """The engine it was in."""
    mode: str
    """``live``, ``blocking``, ``recompute`` or ``pull``; decode instances pull what others have prefilled."""
    tokens: int
    """Tokens whose KV came along; 0: it waits, and computes them again."""
    bytes: int
    """KV bytes that were moved, pages copied twice counted twice."""
    stages: int
    """Copies that were made; in all but the last it went on running."""
    started_ns: int
    """When the move was begun."""
    stopped_ns: int
    """When it stood still: from then to the time of this record it produced nothing."""


@dataclass(slots=True, kw_only=True)
class ActionDropped(Record):
    """An action of the router was not carried out, or not wholly. ``engine`` is its source, or ``ROUTER``."""

    ev = "action_dropped"
    action: str
    reason: str
    request: str | None = None
    """The request it was about, which goes on where it is, if it has not ended."""


@dataclass(slots=True, kw_only=True)
class InstanceChanged(Record):
    """An instance starts, becomes active, is drained, has stopped, or has another role."""

    ev = "instance"
    state: Literal["starting", "active", "draining", "stopped"]
    role: str
    ready_ns: int | None = None
    """While starting: when it will be active."""


@dataclass(slots=True, kw_only=True)
class RequestForked(Record):
    """A prompt is computed, and a further sample of it has its first output token, drawn in the same step."""

    ev = "forked"
    request: str
    parent: str
    shared_tokens: int
    """Tokens of the prompt whose KV it shares; 0: it waits, and computes the prompt itself."""
    reason: str = ""
    """Why it shares nothing."""


@dataclass(slots=True, kw_only=True)
class RequestAdmitted(Record):
    """A waiting request was scheduled: its first time, or again after a preemption."""

    ev = "admitted"
    request: str
    resumed: bool
    cached_tokens: int = 0
    """Prompt tokens found in a prefix store, not computed again."""


@dataclass(slots=True, kw_only=True)
class Planned(Record):
    """One decision of the scheduler, before it runs. ``held`` steps repeat it without asking again."""

    ev = "planned"
    lane: int
    step: int
    requests: list[str]
    """Who runs, in the plan's order."""
    tokens: list[int]
    """How many tokens each."""
    preempted: list[tuple[str, str, str]]
    """(request, mode, reason)."""
    swapped_in: list[tuple[str, str]]
    rejected: list[tuple[str, str]]
    aborted: list[tuple[str, str]]
    deferred: list[tuple[str, str]]
    """(waiting request, why it was passed over)."""
    unpinned: list[tuple[str, str]] = field(default_factory=list)
    """(program, why its kept KV is dropped)."""
    held: int
    """Steps the launch may repeat; 1 without a hold."""
    wake_at: int | None = None

    @property
    def work(self) -> list[tuple[str, int]]:
        """(request, tokens), in the plan's order."""
        return list(zip(self.requests, self.tokens, strict=True))


@dataclass(slots=True, kw_only=True)
class StepDone(Record):
    """A launch ended: ``len(ends_ns)`` equal steps. ``t_ns`` is the end of the last one.

    In the first step request ``i`` ran ``tokens[i]`` tokens, in each later one 1. It emitted ``emitted[i]``
    output tokens over all steps: the same number in each step. A preempted or aborted request's late
    outcome is dropped and shows 0.
    """

    ev = "step"
    lane: int
    step: int
    """Number of the first step of the launch."""
    start_ns: int
    ends_ns: list[int]
    requests: list[str]
    tokens: list[int]
    emitted: list[int]
    waiting: int
    """Requests waiting when the launch ended."""
    running: int
    free_pages: tuple[int, ...]
    """Per pool, free when the launch ended, before requests that finished in it give theirs back."""
    unusable_pages: tuple[int, ...] = ()
    """Per pool, those of them that are of no use to the request at the head of the queue, because they are
    not side by side; empty: all are, or nobody waits."""


@dataclass(slots=True, kw_only=True)
class TokensEmitted(Record):
    """Output tokens of one request, right after the step that brought them. Sent only to runs in which an
    observer has the hook ``servelab_on_tokens_emitted``: a log of every token is large.
    """

    ev = "tokens"
    request: str
    tokens: list[int]
    logprobs: list[dict[int, float]] | None = None
    """Per token, if the request asked for them: token id -> natural logarithm, the drawn one first."""


@dataclass(slots=True, kw_only=True)
class RequestPreempted(Record):
    ev = "preempted"
    request: str
    mode: str
    reason: str
    lost_tokens: int
    """Computed tokens that must be computed again."""


@dataclass(slots=True, kw_only=True)
class TransferStarted(Record):
    ev = "transfer_started"
    transfer: int
    request: str
    direction: Literal["out", "in"]
    pages: int
    bytes: int


@dataclass(slots=True, kw_only=True)
class TransferEnded(Record):
    ev = "transfer_ended"
    transfer: int


@dataclass(slots=True, kw_only=True)
class ContextKept(Record):
    """The KV of a finished turn stays for the next turn of its program."""

    ev = "context_kept"
    program: str
    request: str
    tokens: int
    pages: tuple[int, ...]
    """Per pool, on its tier."""
    tier: Literal["device", "host"]
    until_ns: int | None
    reason: str


@dataclass(slots=True, kw_only=True)
class ContextEnded(Record):
    """A kept context is gone: adopted by the next turn (``request`` says which), or dropped."""

    ev = "context_ended"
    program: str
    reason: str
    request: str | None = None


@dataclass(slots=True, kw_only=True)
class PagesEvicted(Record):
    """The prefix store gave up stored KV, because its pages were needed."""

    ev = "evicted"
    pool: int
    pages: int


@dataclass(slots=True, kw_only=True)
class RequestFinished(Record):
    """The one terminal record of a request; ``reason`` says more for people, ``outcome`` is what counts."""

    ev = "finished"
    request: str
    outcome: Ending
    reason: str
    output_tokens: int
    preemptions: int = 0
    cached_tokens: int = 0


@dataclass(slots=True, kw_only=True)
class QualityBegan(Record):
    """The serving, if any, is over; quantized models will be compared with the unquantized one."""

    ev = "quality_began"
    labels: list[str]
    """The quantizers."""
    total: int
    """Predicted tokens that will be compared."""


@dataclass(slots=True, kw_only=True)
class QualityMeasured(Record):
    """A quantized model beside the unquantized one, over all tokens compared so far; the last record of a
    label stands. Natural logarithms; definitions in ``core/quality.py`` and ``docs/reference/metrics.md``.
    """

    ev = "quality"
    label: str
    """The quantizer."""
    tokens: int
    """Predicted tokens compared."""
    total: int
    """Predicted tokens that will be compared."""
    windows: int
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    """Share of the tokens, 0 to 1."""
    perplexity: float
    reference_perplexity: float
    linear_bytes: int
    """Of all linear layers, as this quantizer stores them."""
    reference_linear_bytes: int


RECORDS: dict[str, type[Record]] = {
    cls.ev: cls
    for cls in (
        RunStarted,
        RequestArrived,
        RequestHeld,
        RequestRouted,
        RequestMigrated,
        ActionDropped,
        InstanceChanged,
        RequestAdmitted,
        RequestForked,
        Planned,
        StepDone,
        TokensEmitted,
        RequestPreempted,
        TransferStarted,
        TransferEnded,
        ContextKept,
        ContextEnded,
        PagesEvicted,
        RequestFinished,
        QualityBegan,
        QualityMeasured,
        RunFinished,
    )
}


def to_dict(record: Record) -> dict[str, Any]:
    """JSON-ready form; fields at their default are left out, but for the schema version."""
    out: dict[str, Any] = {"ev": record.ev}
    names, defaults, values = _fields(type(record))  # type: ignore[arg-type] # python/mypy#11470: a class has a hash
    for name, default, value in zip(names, defaults, values(record), strict=True):
        if value != default or name == "schema":
            out[name] = value
    return out


@cache
def _fields(
    cls: type[Record],
) -> tuple[tuple[str, ...], tuple[Any, ...], Callable[[Record], tuple[Any, ...]]]:
    """Names and defaults of the fields of a type of record, at least two, and what reads them all."""
    names = tuple(f.name for f in fields(cls))
    return names, tuple(f.default for f in fields(cls)), attrgetter(*names)


def from_dict(data: Mapping[str, Any]) -> Record:
    """The record behind ``to_dict``'s output.

    Raises:
        KeyError: unknown ``ev``.
        TypeError: missing or unknown fields.
    """
    values = dict(data)
    cls = RECORDS[values.pop("ev")]
    for name in ("free_pages", "unusable_pages", "pages"):
        if isinstance(values.get(name), list):  # JSON has no tuples
            values[name] = tuple(values[name])
    if cls is TokensEmitted and values.get("logprobs"):  # JSON has only text as keys
        values["logprobs"] = [{int(k): v for k, v in one.items()} for one in values["logprobs"]]
    if cls is Planned:
        for name in ("preempted", "swapped_in", "rejected", "aborted", "deferred", "unpinned"):
            values[name] = [tuple(item) for item in values[name]]
    return cls(**values)
