"""Mix: several workloads at the same time on one system.

Technique: baseline. How papers put traffic of several classes together: an online trace and an offline
backlog (xLLM), 10 % requests of high priority (Llumnix), clients that each have their own process
(ServeGen).

Mechanism: each component is a workload of its own, with its own settings and its own chance, which
depends on its key and on nothing else. Its requests are called ``KEY.ID``. Requests of all components are
merged in order of time; at the same time in the order of the components. What ends is told to the
component that sent it, in that component's ids and time. A component's time begins at ``start_s`` and
goes ``rate_scale`` times as fast as the run's: arrivals, think times and patience shrink by this factor.

Symbols:
    t, u   time of the run and of a component, u = (t - start_s) * rate_scale

Faithful when: the requests are those of the components; adding a component or changing one leaves the others'
requests as they were.

Tier: stable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import merge
from operator import attrgetter
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from servelab.core.api import Arrival, Cancel, Context, Workload
from servelab.core.config import Choice, PartOf
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._arrivals import NS
from servelab.plugins.workloads._describe import json_settings
from servelab.plugins.workloads._labels import Labels

KEY = re.compile(r"[A-Za-z0-9_-]+")
"""What components may be called; a point ends the key in an id."""


class Component(Labels):
    """One workload of a mix, and what is said of its requests."""

    workload: Annotated[Choice, PartOf("workload")] = Field(description="The workload.")
    start_s: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="When it begins, seconds into the run."
    )
    rate_scale: float = Field(
        default=1.0, gt=0, le=1e6, description="How many times as fast its time goes; 2 doubles its rate."
    )


def _two() -> dict[str, Component]:
    return {
        "online": Component.model_validate({"workload": "synthetic", "priority": 1}),
        "offline": Component.model_validate({"workload": "closed_loop", "request_class": "offline"}),
    }


class MixConfig(BaseModel):
    """Settings of the ``mix`` workload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    components: dict[str, Component] = Field(
        default_factory=_two,
        min_length=1,
        description="Workloads by key, such as {chat: {workload: burstgpt}, batch: {workload: {name: "
        "closed_loop, clients: 4}, request_class: offline}}. Default: 'synthetic' of priority 1 as online, "
        "and 'closed_loop' as offline. Ours.",
    )

    @model_validator(mode="after")
    def _keys(self) -> Self:
        for key in self.components:
            if not KEY.fullmatch(key):
                raise ValueError(
                    f"{key!r} cannot begin the ids of requests: take letters, digits, '_' and '-' only"
                )
        return self


@dataclass(slots=True)
class _Played:
    """A component that plays along."""

    key: str
    workload: Workload
    label: Callable[[Any], Any]
    start_ns: int
    scale: float

    def items(self) -> Iterator[Arrival | Cancel]:
        return map(self.out, self.workload.arrivals())

    def react(self, finished: RequestFinished, own_id: str) -> Iterator[Arrival | Cancel]:
        at = finished.t_ns
        # rounded down, and back up again: nothing comes before what it follows
        mine = at - self.start_ns if self.scale == 1 else int((at - self.start_ns) * self.scale)
        for item in self.workload.react(replace(finished, request=own_id, t_ns=max(0, mine))):
            out = self.out(item)
            yield out if out.time_ns >= at else replace(out, time_ns=at)

    def out(self, item: Arrival | Cancel) -> Arrival | Cancel:
        """An item of the component as one of the mix."""
        time_ns = item.time_ns if self.scale == 1 else round(item.time_ns / self.scale)
        time_ns += self.start_ns
        if isinstance(item, Cancel):
            return Cancel(time_ns, f"{self.key}.{item.request_id}")
        return Arrival(time_ns, self.label(item.spec), item.truth)


class Mix:
    """Workloads side by side.

    State: that of the components. A request costs two to five microseconds more than in its component.
    """

    def __init__(self, config: MixConfig, ctx: Context) -> None:
        self._config = config
        self._parts = {
            key: _Played(
                key,
                ctx.part("workload", one.workload, key),
                _labelled(key, one.changes()),
                round(one.start_s * NS),
                one.rate_scale,
            )
            for key, one in config.components.items()
        }

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """Items of all components in time order."""
        return merge(*(part.items() for part in self._parts.values()), key=attrgetter("time_ns"))

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """What the component that sent the request says to its end."""
        key, point, own_id = finished.request.partition(".")
        part = self._parts.get(key)
        return () if part is None or not point else part.react(finished, own_id)

    def describe(self) -> dict[str, Any]:
        """What each component says of itself, in its own time, and sums over them."""
        described = {key: part.workload.describe() for key, part in self._parts.items()}
        return {
            **{name: _sum(described.values(), name) for name in ("requests", "cancellations")},
            "traffic": "; ".join(
                f"{key}: {described[key].get('traffic') or one.workload.name}"
                for key, one in self._config.components.items()
            ),
            "components": described,
            "settings": json_settings(self._config),
        }


def _labelled(key: str, changes: dict[str, Any]) -> Callable[[Any], Any]:
    """A request of a component with its labels, under its new name."""

    def label(spec: Any) -> Any:
        program = None if spec.program is None else f"{key}.{spec.program}"
        return replace(spec, id=f"{key}.{spec.id}", program=program, **changes)

    return label


def _sum(described: Iterable[dict[str, Any]], name: str) -> int | None:
    """A count over all components; None if one of them does not know."""
    counts = [each.get(name) for each in described]
    return None if any(count is None for count in counts) else sum(counts)  # type: ignore[arg-type]
