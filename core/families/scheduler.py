"""Scheduler: what each request does next.

Intent: batch composition, admission, order, victims, and what happens to KV when a turn ends. One call of
``plan`` per free lane; the answer is data, checked and applied by the core.

What must be expressible: chunked prefill, prefix hits, speculation lengths, layered prefill, preemption by
recompute, swap or pause, swap-in ahead of need, keeping KV between turns, rejection and abort with reasons,
several lanes, planning one step ahead, periodic re-planning (``wake_at``), and long stretches of identical
steps (``hold``).

Capabilities: ``scheduler.chunks`` (may run a prompt in several launches), ``scheduler.retains`` (keeps KV
between turns), ``scheduler.layers`` (emits layer ranges), ``scheduler.swap`` (preempts by swap; needs
``kvcache.swap``), ``scheduler.lanes``, ``scheduler.ahead`` (plans one step ahead).

True of every scheduler, and tested by its suite: KV is conserved; output so far survives preemption; with
lossless plugins greedy tokens do not depend on the schedule; the same seed gives the same plans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from servelab.core.facts import HardwareFacts, Limits, ModelFacts
    from servelab.core.plan import StepPlan, Tokens, TurnEnd
    from servelab.core.records import Record
    from servelab.core.request import RequestView


class Scheduler(Protocol):
    """The one required method. ``LearningScheduler`` and ``RetainingScheduler`` name the optional ones."""

    def plan(self, view: StepView) -> StepPlan:
        """Decide what the free lane does next. Pure in the view and in the scheduler's own state."""
        ...


class LearningScheduler(Scheduler, Protocol):
    """A scheduler that also learns from history."""

    def on_event(self, record: Record) -> None:
        """Called for every record of its engine, in order, before the next ``plan``: arrivals, admissions,
        steps, preemptions, transfers, ends (with output lengths). Records may be kept."""
        ...


class RetainingScheduler(Scheduler, Protocol):
    """A scheduler that also decides what happens to KV when a turn ends."""

    def on_turn_end(self, request: RequestView) -> TurnEnd:
        """Called when a request of a program completes and is not its last turn.

        ``Release()``, ``Pin(until_ns)`` or ``KeepHost()``. The next turn adopts what was kept as far as its
        prompt repeats it (``RequestSpec.context_tokens``). ``StepPlan.unpin`` drops it earlier.
        """
        ...


class Queue(Protocol):
    """Live, ordered, read-only collection of requests."""

    def __iter__(self) -> Iterator[RequestView]: ...
    def __reversed__(self) -> Iterator[RequestView]: ...
    def __len__(self) -> int: ...
    def first(self) -> RequestView | None:
        """The one at the head; None if it is empty."""
        ...


class KVBudget(Protocol):
    """Scratch account of free KV pages while a plan is being made. Changing it changes nothing else."""

    def take(self, request: RequestView, n: int) -> bool:
        """Set aside what ``n`` more tokens of it need, in every pool; False (and nothing) if short.

        A waiting or swapped request leaves ``KVView.watermark_pages`` free, unless nobody runs.
        """
        ...

    def take_decodes(self, requests: Sequence[RequestView]) -> list[Tokens]:
        """``take`` of one token of each, from the first on, up to one that has not just one token pending or
        finds no page: the items to plan. Faster than asking one by one.
        """
        ...

    def give_back(self, request: RequestView) -> None:
        """Count the pages that preempting the request frees at once (none while it is in flight)."""
        ...

    @property
    def free(self) -> tuple[int, ...]:
        """Pages left, per pool."""
        ...


class KVView(Protocol):
    """KV memory as a policy sees it. Per-pool tuples are in layout order."""

    @property
    def free_pages(self) -> tuple[int,]:
        """Device pages nobody holds; pages only the prefix store holds count as free."""
        ...

    @property
    def total_pages(self) -> tuple[int,]:
        """Device pages there are."""
        ...

    @property
    def free_host_pages(self) -> tuple[int,]:
        """The same of the host tier; empty without one."""
        ...

    @property
    def total_host_pages(self) -> tuple[int,]:
        """Host pages there are; empty without a host tier."""
        ...

    @property
    def page_tokens(self) -> tuple[int,]:
        """Tokens a page holds."""
        ...

    @property
    def window_tokens(self) -> tuple[int | None, ...]:
        """How many recent tokens a pool serves; older pages come back by themselves. None: it keeps all."""
        ...

    @property
    def watermark_pages(self) -> tuple[int, ...]:
        """Pages to leave free when a request is admitted, as the kvcache says; budgets heed it."""
        ...

    @property
    def pinned_pages(self) -> tuple[int, ...]:
        """Device pages kept for programs between turns."""
        ...

    def pages_needed(self, request: RequestView, n: int) -> tuple[int, ...]:
        """Further pages the request needs for ``n`` more tokens."""
        ...

    def budget(self) -> KVBudget:
        """A scratch account that starts at ``free_pages``."""
        ...


class CostView(Protocol):
    """What-if prices in nanoseconds, pure; of work alone on its device, whatever other lanes run."""

    def step_ns(self, work: list[Tokens]) -> int:
        """One step of this work."""
        ...

    def recompute_ns(self, request: RequestView) -> int:
        """Computing the request's KV again in one step."""
        ...

    def swap_ns(self, request: RequestView) -> int:
        """Moving the request's KV to or from the host, link otherwise idle."""
        ...


class ProgramView(Protocol):
    """A conversation, job or agent: several requests over time."""

    @property
    def id(self) -> str:
        """Its id."""
        ...

    @property
    def arrival_ns(self) -> int:
        """When its first turn arrived."""
        ...

    @property
    def turns(self) -> int:
        """Turns that have arrived."""
        ...

    @property
    def live(self) -> int:
        """Turns not yet finished."""
        ...


class ContextView(Protocol):
    """KV that a program's last turn left behind."""

    @property
    def program(self) -> str:
        """Whose it is."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens with KV."""
        ...

    @property
    def tier(self) -> str:
        """``device`` or ``host``."""
        ...

    @property
    def until_ns(self) -> int | None:
        """When a pin ends; None: it has no end."""
        ...

    @property
    def pages(self) -> tuple[int,]:
        """Pages it holds on its tier, per pool."""
        ...


class StepView(Protocol):
    """Everything a plan may depend on. Live and read-only; valid during the call."""

    @property
    def now_ns(self) -> int:
        """The time of the run's clock, in nanoseconds."""
        ...

    @property
    def step(self) -> int:
        """Number of the step being planned, counted per engine over all lanes."""
        ...

    @property
    def lane(self) -> int:
        """The free lane this plan is for. Requests in flight on other lanes are not shown in the queues."""
        ...

    @property
    def waiting(self) -> Queue:
        """Not admitted, in arrival order, preempted ones (recompute) in front."""
        ...

    @property
    def running(self) -> Queue:
        """Admitted, in order of admission."""
        ...

    @property
    def forking(self) -> int:
        """Further samples of prompts that are being computed: they join ``running`` when these are done,
        without a plan. So admitting a request takes ``1 + request.forks`` places.
        """
        ...

    @property
    def paused(self) -> Queue:
        """Preempted with their KV kept on the device."""
        ...

    @property
    def swapped(self) -> Queue:
        """On the host tier, ready to be swapped in."""
        ...

    @property
    def kv(self) -> KVView:
        """KV memory."""
        ...

    @property
    def cost(self) -> CostView:
        """What work would cost."""
        ...

    @property
    def limits(self) -> Limits:
        """What the device takes."""
        ...

    @property
    def model(self) -> ModelFacts:
        """The model's shape."""
        ...

    @property
    def hardware(self) -> HardwareFacts | None:
        """Peak figures of the device; None: not stated."""
        ...

    def predict(self, request: RequestView, quantile: float) -> int:
        """Predicted total output tokens; needs a predictor, else ``CapabilityError``."""
        ...

    def program(self, id: str) -> ProgramView:
        """The program that some live request belongs to; else ``ViewError``."""
        ...

    @property
    def contexts(self) -> Mapping[str, ContextView]:
        """KV kept between turns, by program, in the order it was kept."""
        ...
