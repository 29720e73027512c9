"""Transform: another workload's requests, changed step by step.

Technique: baseline. What studies do to a trace before they replay it: another rate, a part of it, other
lengths, other classes.

Mechanism: the requests of ``of`` pass through ``steps`` in the order stated. ``scale`` and ``thin`` both
reach another rate and differ for bursty traffic: dividing all times keeps the size of bursts and the CV
of gaps, keeping each request by chance makes bursts smaller. ``describe()`` says which were used, with
the statistics of what comes out.

What is drawn for a request depends on the run's seed, the step's place and the request's id, and on
nothing else: so ``keep: p`` with and without ``others`` divide the traffic in two. Steps that change
times or take requests out are for open loops only: a client that waits for its answer would wait for
ever.

Faithful when: thinned and complement together are the original; scaled times are the original's over the
factor, and the CV of gaps is unchanged; new times have the mean rate within 3 sigma and the CV of their
law within 3 %; a modulated day has its profile; the same seed gives the same bytes.

Tier: stable.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from servelab.core.api import Arrival, Cancel, Context, WorkloadError
from servelab.core.config import Choice, PartOf
from servelab.core.records import RequestFinished
from servelab.plugins.workloads._describe import arrival_statistics, json_settings, statistics
from servelab.plugins.workloads._steps import Chance, Item, Step


class TransformConfig(BaseModel):
    """Settings of the ``transform`` workload."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: Annotated[Choice, PartOf("workload")] = Field(
        default="synthetic", validate_default=True, description="The workload that is changed."
    )
    steps: tuple[Step, ...] = Field(
        default=(),
        description="What is done, in this order: [{step: thin, keep: 0.5}, {step: clip, output: 9}].",
    )


class Transform:
    """Requests of another workload, changed as they come.

    State: that of the other. Costs microseconds a request and step; ``describe`` reads the traffic once.

    Raises:
        WorkloadError: nothing is left, or a step would take requests from clients that wait for them.
    """

    def __init__(self, config: TransformConfig, ctx: Context) -> None:
        self._config, self._inner = config, ctx.part("workload", config.of)
        root = ctx.rng.getrandbits(64)
        self._chances = [Chance(f"{root}/{place}") for place in range(len(config.steps))]
        self._changes: list[Callable[[Arrival], Arrival]] = [
            step.changer(chance)
            for step, chance in zip(config.steps, self._chances, strict=True)
            if not step.moves
        ]
        self._moving = next((step.step for step in config.steps if step.moves), None)
        self._reacted = False

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        """What the steps leave of the other's traffic."""
        items: Iterator[Item] = self._inner.arrivals()
        for step, chance in zip(self._config.steps, self._chances, strict=True):
            items = step.apply(items, chance)
        return items

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        """What the other says to an end, changed as well."""
        for item in self._inner.react(finished):
            if self._moving is not None:
                raise WorkloadError(
                    f"workload {self._config.of.name!r} waits for its answers",
                    where=f"workload.steps, step {self._moving!r}",
                    why="it changes times or takes requests out: clients would wait for what was not sent",
                    do="take an open loop, or settings of that workload; steps that change lengths and "
                    "labels are for every workload",
                )
            if isinstance(item, Arrival):
                for change in self._changes:
                    item = change(item)
            yield item

    def describe(self) -> dict[str, Any]:
        """Statistics of what comes out of the steps, what was done, and every setting."""
        within = self._inner.describe()
        return {
            **summary(self.arrivals()),
            "traffic": f"{within.get('traffic') or self._config.of.name}, transformed",
            "steps": [step.model_dump(mode="json", exclude_none=True) for step in self._config.steps],
            "of": within,
            "settings": json_settings(self._config),
        }


def summary(items: Iterable[Item]) -> dict[str, Any]:
    """Statistics of traffic, read once.

    Raises:
        WorkloadError: there is none.
    """
    times, prompts, caps, outputs = (array("q") for _ in range(4))
    classes: Counter[tuple[str, str]] = Counter()
    cancellations = capped = 0
    for item in items:
        if isinstance(item, Cancel):
            cancellations += 1
            continue
        spec, truth = item.spec, item.truth
        times.append(item.time_ns)
        prompts.append(spec.prompt_tokens)
        caps.append(spec.max_new_tokens)
        classes[spec.request_class, spec.tenant] += 1
        if truth is not None:
            drawn = [truth.of(k).output_tokens for k in range(spec.n)]
            outputs.extend(drawn)
            capped += sum(length > spec.max_new_tokens for length in drawn)
    if not times:
        raise WorkloadError(
            "no request is left",
            where="workload 'transform', steps",
            why="what is sliced or thinned has none in it",
            do="take a larger part",
        )
    return {
        **arrival_statistics(times),
        "prompt_tokens": statistics(prompts),
        "output_tokens": statistics(outputs),
        "max_new_tokens": statistics(caps),
        "length_capped": capped,
        "cancellations": cancellations,
        "classes": [{"name": n, "tenant": t, "requests": k} for (n, t), k in sorted(classes.items())],
    }
