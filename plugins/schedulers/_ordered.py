"""A scheduler whose queues are shown in another order: what the ordering wrappers share.

Mechanism: the inner scheduler is asked as ever, with a view whose waiting requests (and, where a setting says
so, running ones) stand in ascending order of a key; ties stand as the core has them. Which request is
admitted, how much of it runs and who is preempted stays the inner scheduler's decision: most admit from the
front and stop at the first that does not fit, and take victims from the end of the running ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Context, RequestView, Scheduler, StepPlan, StepView
from servelab.core.config import Choice, PartOf

Key = Callable[[RequestView], Any]
"""What requests are sorted by, least first."""


class OrderedConfig(BaseModel):
    """Settings that every ordering wrapper has."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    inner: Annotated[Choice, PartOf("scheduler")] = Field(
        default="vllm_v1",
        validate_default=True,
        description="the scheduler that sees the ordered queues: its name, or a mapping with its settings",
    )
    running: bool = Field(
        False,
        description="show running requests in this order too: those at the end run last in a step and are "
        "preempted first; false: in order of admission",
    )


class Ordered(ABC):
    """Asks the inner scheduler; sorts O(n log n) in the requests that wait, once per plan."""

    def __init__(self, config: OrderedConfig, ctx: Context) -> None:
        self.config = config
        self._inner: Scheduler = ctx.part("scheduler", config.inner)
        for method in ("on_event", "on_turn_end"):  # optional: the engine looks whether they are there
            if hasattr(self._inner, method) and not hasattr(self, method):
                setattr(self, method, getattr(self._inner, method))

    @abstractmethod
    def key(self, request: RequestView) -> Any:
        """What requests are sorted by, least first."""

    def plan(self, view: StepView) -> StepPlan:
        return self._inner.plan(_OrderedView(view, self.key, self.config.running))


class _OrderedView:
    """A step's view with other queues; everything else is the view's own."""

    __slots__ = ("_view", "running", "waiting")

    def __init__(self, view: StepView, key: Key, running: bool) -> None:
        self._view = view
        self.waiting = _Sorted(view.waiting, key)
        self.running = _Sorted(view.running, key) if running else view.running

    def __getattr__(self, name: str) -> Any:
        return getattr(self._view, name)


class _Sorted:
    """A queue in order of a key; the order of the moment at which it was made."""

    __slots__ = ("_items",)

    def __init__(self, requests: Iterator[RequestView] | Any, key: Key) -> None:
        self._items: Sequence[RequestView] = sorted(requests, key=key)

    def __iter__(self) -> Iterator[RequestView]:
        return iter(self._items)

    def __reversed__(self) -> Iterator[RequestView]:
        return reversed(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def first(self) -> RequestView | None:
        return self._items[0] if self._items else None
