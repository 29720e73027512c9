"""Router: which instance does what.

Intent: dispatch, and everything that corrects a dispatch later: migration, roles, shares, scaling, lending.
It sees reports, not the truth: each row says when it was made, and nothing fresher is ever shown. Answers
are data; the core carries them out in stages, with reservations, and drops an action whose target is gone.

What must be expressible: stateless baselines that look at two rows; prefix affinity with load guards; a
pair of instances for prefill and decode, decided together or late; fetching KV from a third; refusal before
any work; live migration and pull; role flips; shares of one device; elastic scaling and resizing of expert
parallelism; lending KV memory; models as a dimension, with cascades and help for one step; planning a fleet
offline.

Carried out so far: ``Dispatch`` to one instance, or to a pair for prefill and decode; ``Migrate``,
``SetRole``, ``ScaleUp``, ``Drain``. The rest is refused by name.

Capabilities: ``router.places`` (its choice of instance is the technique, nobody else may decide it),
``router.disaggregates`` (prefill and decode on different instances), ``router.migrates``, ``router.roles``,
``router.shares``, ``router.scales``, ``router.lends``, ``router.replicates`` (copies KV between instances),
``router.experts`` (places experts), ``router.models`` (chooses or escalates among models), ``router.plans``
(plans fleets offline).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, get_args

if TYPE_CHECKING:
    from servelab.core.facts import HardwareFacts, ModelFacts
    from servelab.core.families.cost import CostModel
    from servelab.core.families.prefix import StoreEvent
    from servelab.core.records import Record
    from servelab.core.request import SLO, RequestSpec

Role = Literal["mixed", "prefill", "decode", "encode", "attention", "cache"]
Moment = Literal["arrival", "prefill_end", "stage_ready", "hold_end"]
"""When ``route`` is called: at arrival; when a prompt is computed whose decode instance was left open; when a
stage of a workflow is ready (not yet); when the time of a held request has come, or a report."""
Mode = Literal["live", "blocking", "recompute", "pull"]
_ROLES, _MODES = get_args(Role), get_args(Mode)


@dataclass(frozen=True, kw_only=True, slots=True)
class InstanceRow:
    """One instance as it last reported itself. Times in nanoseconds, pages of its first pool."""

    id: int
    reported_ns: int
    """When this was true; ``view.now_ns - reported_ns`` is its age."""
    state: Literal["starting", "active", "draining", "stopped"] = "active"
    ready_ns: int | None = None
    """While starting: when it will be active."""
    role: Role = "mixed"
    model: str = ""
    hardware: str = ""
    cost_per_hour: float = 0.0
    parallel: Mapping[str, int] = field(default_factory=dict)
    """``tp``, ``pp``, ``dp``, ``ep``; absent: 1."""
    shares: tuple[float, float] = (1.0, 1.0)
    """Parts of the device for prefill and decode."""
    free_pages: int = 0
    total_pages: int = 0
    page_tokens: int = 1
    running: int = 0
    waiting: int = 0
    waiting_pages: tuple[int, ...] = ()
    """Pages each waiting request needs, in queue order."""
    context_tokens: int = 0
    """Sum over running requests."""
    prefill_tokens: int = 0
    """Prompt tokens not yet computed."""
    prefill_backlog_ns: int = 0
    """Predicted time to work them off."""
    step_ns: int = 0
    """Last step."""
    token_interval_ns: int = 0
    """Mean time between tokens of a request over the report window."""
    preemptions: int = 0
    """Since the report before."""
    dispatched: int = 0
    """Requests ever sent to it, those that moved there included."""
    assigned_ns: int = 0
    """Work ever dispatched to it, as predicted: prompts, each with the device to itself."""
    expert_tokens: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """Layer -> tokens per expert since the report before."""
    candidates: tuple[tuple[str, int, int, int], ...] = ()
    """Requests that may move: ``(id, context tokens, output tokens, priority)``, in admission order."""

    def __post_init__(self) -> None:
        if not 0 <= self.free_pages <= self.total_pages:
            raise ValueError(f"instance {self.id}: {self.free_pages} of {self.total_pages} pages free")


class ClusterView(Protocol):
    """Read-only, valid during the call; rows are read one by one, so two probes cost two probes."""

    @property
    def now_ns(self) -> int: ...
    def instances(self, role: Role | None = None, model: str | None = None) -> Sequence[int]:
        """Ids of active instances in ascending order."""
        ...

    def row(self, instance: int) -> InstanceRow: ...
    def cached_tokens(self, instance: int, request: RequestSpec) -> int:
        """Prefix that the instance holds now. Periodic reports do not tell it: with them it is refused."""
        ...

    def home(self, session: str) -> int | None:
        """Instance that served this program last."""
        ...

    def ttft_ns(self, instance: int, request: RequestSpec, cached_tokens: int = 0) -> int:
        """Predicted: queue plus prefill."""
        ...

    def tpot_ns(self, instance: int, extra_requests: int = 0, extra_tokens: int = 0) -> int:
        """Predicted time per token with so much more running."""
        ...

    def transfer_ns(self, nbytes: int, source: int, target: int) -> int:
        """Predicted, with what is in flight on the path; needs a stated network."""
        ...

    def kv_bytes(self, tokens: int) -> int: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatch:
    """Run it here. One instance unless ``decode`` or ``attention`` name others."""

    prefill: int
    decode: int | None = None
    """None: where it was prefilled, or decided at prefill end with ``decide_decode_late``."""
    decide_decode_late: bool = False
    attention: int | None = None
    model: str | None = None
    fetch_from: int | None = None
    """Instance whose cached prefix is copied first; the copy stays with the target."""

    def __post_init__(self) -> None:
        if self.decide_decode_late and self.decode is not None:
            raise ValueError("a decode instance is either named or decided late")


@dataclass(frozen=True, slots=True)
class Hold:
    """Keep it at the router and ask again then, or at the next report if that is earlier."""

    until_ns: int


@dataclass(frozen=True, slots=True)
class Reject:
    """Refuse it; it costs nothing."""

    reason: str


@dataclass(frozen=True, slots=True)
class Accept:
    """An answer is good enough."""


Route = Dispatch | Hold | Reject


@dataclass(frozen=True, kw_only=True, slots=True)
class Migrate:
    request: str
    source: int
    target: int
    mode: Mode = "live"

    def __post_init__(self) -> None:
        if self.mode not in _MODES:
            raise ValueError(f"{self.mode!r} is no way to migrate: {', '.join(_MODES)}")
        if self.source == self.target:
            raise ValueError(f"{self.request} would migrate from {self.source} to itself")


@dataclass(frozen=True, slots=True)
class SetRole:
    instance: int
    role: Role

    def __post_init__(self) -> None:
        _check_role(self.role)


@dataclass(frozen=True, slots=True)
class SetShare:
    """Parts of one device for prefill and decode, each in 0..1; their sum may exceed 1."""

    instance: int
    prefill: float
    decode: float

    def __post_init__(self) -> None:
        if not (0.0 <= self.prefill <= 1.0 and 0.0 <= self.decode <= 1.0):
            raise ValueError(f"shares lie in 0..1, not ({self.prefill}, {self.decode})")


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """So many instances more; ``profile`` names their device, "" that of the others."""

    profile: str
    n: int = 1
    role: Role = "mixed"

    def __post_init__(self) -> None:
        _check_role(self.role)
        if self.n < 1:
            raise ValueError(f"{self.n} instances cannot be started")


@dataclass(frozen=True, slots=True)
class Drain:
    """Send it nothing more, move or finish what it has, then stop it."""

    instance: int


@dataclass(frozen=True, slots=True)
class LendKV:
    """Later KV of a request goes to pages of another instance, which may refuse."""

    request: str
    owner: int
    holder: int
    pages: int


@dataclass(frozen=True, slots=True)
class ReplicateKV:
    hashes: tuple[int, ...]
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class PlaceExperts:
    """Layer -> device -> experts held there; every expert at least once."""

    instance: int
    placement: Mapping[int, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True, slots=True)
class Resize:
    instance: int
    dp: int
    ep: int


def _check_role(role: Role) -> None:
    if role not in _ROLES:
        raise ValueError(f"{role!r} is no role of an instance: {', '.join(_ROLES)}")


Action = Migrate | SetRole | SetShare | ScaleUp | Drain | LendKV | ReplicateKV | PlaceExperts | Resize


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedInstance:
    profile: str
    count: int
    role: Role = "mixed"
    parallel: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrafficStats:
    """What offline planning knows of the workload."""

    rate_per_s: float
    lengths: Mapping[tuple[int, int], float]
    """(prompt tokens, output tokens) -> share of requests; shares add up to 1."""

    def __post_init__(self) -> None:
        if abs(sum(self.lengths.values()) - 1.0) > 1e-6:
            raise ValueError(f"shares of lengths add up to {sum(self.lengths.values())}, not 1")


class Router(Protocol):
    """The one required method. Called on the cluster's clock; pure in the view, its own state and its
    generator.

    The protocols below add methods. The core calls those that a router has, and its spec must name the
    capability of what they do: ``RouterSuite`` compares. Capabilities that nothing serves yet are refused.
    """

    def route(self, request: RequestSpec, moment: Moment, view: ClusterView) -> Route:
        """Where a request goes. At ``prefill_end`` the answer's ``decode`` counts, None: where it is."""
        ...


class JudgingRouter(Router, Protocol):
    """With ``router.models`` (not served yet): cascades and learning from answers."""

    def judge(
        self, request: RequestSpec, model: str, output_ids: Sequence[int], view: ClusterView
    ) -> Accept | Dispatch:
        """An answer, or a step of one, is there: take it, or have another model redo or continue it."""
        ...

    def feedback(self, request_id: str, reward: float) -> None:
        """A later judgement of an answer, -1 to 1."""
        ...


class RebalancingRouter(Router, Protocol):
    """With any of ``migrates``, ``roles``, ``shares``, ``scales``, ``lends``, ``replicates``, ``experts``."""

    def rebalance(self, view: ClusterView) -> Sequence[Action]:
        """What to change, after reports and at ``wake_at``; at most once per instant.

        With reports at once that is whenever something happened to an instance: an arrival, the end of a
        step, also within a held launch, or of a request. Otherwise it is after each periodic report. It
        is the end of the instant: arrivals are placed, those held were asked for again, and nothing is
        planned yet. Actions are carried out in order; one whose target has gone is dropped (record
        ``action_dropped``), and the request goes on where it is.
        """
        ...

    def wake_at(self) -> int | None:
        """When ``rebalance`` wants to be called if no report comes before: a time to come. None: never.
        Asked after each call of ``rebalance``.
        """
        ...


class ObservingRouter(Router, Protocol):
    """A router that learns from what instances report; no capability needed."""

    def observe(self, instance: int, record: Record) -> None:
        """Records of every instance in order, when its report arrives: all but ``planned`` and ``tokens``."""
        ...

    def observe_store(self, instance: int, event: StoreEvent) -> None:
        """What an instance's prefix store gained or lost; needs its ``prefix.events`` (not called yet)."""
        ...


class PlanningRouter(Router, Protocol):
    """With ``router.plans`` (not served yet)."""

    def plan_cluster(
        self,
        traffic: TrafficStats,
        model: ModelFacts,
        catalog: Mapping[str, HardwareFacts],
        prices_per_hour: Mapping[str, float],
        cost: Mapping[str, CostModel],
        slo: SLO,
    ) -> Sequence[PlannedInstance]:
        """The fleet it would buy, per profile of the catalog; slow and pure."""
        ...
