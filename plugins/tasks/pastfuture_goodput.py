"""Goodput of Past-Future against closed-loop clients: flat at its peak, where aggressive admission loses.

Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025, arXiv
2507.10150, and its artifact WuSiYu/lightllm-ae at d93ff69 (``client-*.sh``, ``lightllm-server-*``):
Llama-2-7B on one A100 80 GB with 120,000 tokens of KV; 10 to 100 clients, each of which asks again when it
has been answered, and the same again when it has failed; SLA: first token within 10 s, no gap between tokens
above 1.5 s. Goodput counts prompt and output tokens of requests that meet it.

Mechanism: the artifact's three servers, under law D1 (prompts U[32, 4096], outputs U[2048, 4096]) with all
numbers of clients, under D2, D3 and ShareGPT-o1 with the last. Past-Future remembers 40 lengths and keeps 5 %
free; conservative keeps 5 % free and takes 12,000 output tokens for everybody's worst case; aggressive admits
while less than 95 % is in use and the prompt fits. Each ends a request that has waited for 8 s, and but for
aggressive one whose last token is 1.49 s old; its client sends it again. Tokens of good requests that end
from ``warm_s`` to ``duration_s`` are counted. Variants of the baselines stand beside them. Another part
switches a backlog from D1 to D3 in mid-run and looks at KV use by finished requests: outputs suddenly are
shorter than the window remembers, and use has recovered once the window holds the new ones.

Symbols:
    W   ``window`` of pastfuture: 40 here as in the artifact's server, 200 in the drift run

Deviations:
1. The paper's goodput figures are in its plots: its words are judged here (flat, collapsing, saturating
   early, up to 2 to 3 times), by bounds of ours; "up to" by the law under which the gain is largest.
2. Step times are the roofline's for this device, not LightLLM's; KV memory is 7500 pages of 16 tokens,
   whatever the device has room for. Llama-2's 4096 positions are exceeded, as in the paper.
3. ShareGPT-o1 is drawn from its file's percentiles, prompts and outputs apart.
4. The artifact's client states each true output length as the cap, and its Past-Future server then uses that
   instead of its draws. Here caps are a law's longest output, and nobody but the oracle knows lengths.
5. Goodput is that of a span in mid-run; the artifact divides a fixed number of requests, all of them repeated
   until they have met the SLA, by the time until the last. A request that ended, but too late, is not
   repeated: its client goes on.
6. The paper's figure calls aggressive's watermark 99 %; its server's code is 95 % before a prompt and 100 %
   with it, which is judged. The other reading is told.
7. The drift run divides lengths and capacity by ``scale`` and counts decode steps, as the toy study.

Faithful when: past-future at 100 clients keeps 90 % of its peak; aggressive at most half of its own;
conservative peaks below past-future and no later; under one of the laws the others have at most half of
past-future's goodput at 100 clients; after W further finishes use is within 2 points of what it stays at.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from servelab.core.api import Context, hookimpl
from servelab.core.metrics import Timeline
from servelab.core.records import RequestFinished, RunStarted, StepDone
from servelab.plugins.tasks._cells import Cell, CellResult, Found
from servelab.plugins.tasks._experiment import EQUAL_STEPS, ManyRuns, ManyRunsConfig, backlog, uniform, values
from servelab.plugins.tasks._rows import Row, at_least, at_most, below, mean_and_spread, measured, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KV_TOKENS, PAGE, LONGEST, NS = 120_000, 16, 22_000, 1_000_000_000
TTFT_MS, GAP_MS, QUEUE_LIMIT_MS, GAP_LIMIT_MS = 10_000, 1_500, 8_000, 1_490
STEP_TOKENS, FIRST_LENGTH = 18_000, 6_000
"""Of the artifact's servers: batch_max_tokens, and the longest request less the longest prompt."""
HERE = "servelab.plugins.tasks.pastfuture_goodput:"
FLAT, COLLAPSED, SHARE, POINTS = 0.9, 0.5, 0.5, 2.0
W, BLOCK, BEFORE, AFTER = 200, 100, 600, 1000
"""Of the drift run: window, finishes per mean, requests of D1, requests of D3."""

_QUEUE = {"queue_limit_ms": QUEUE_LIMIT_MS}
_ENDS = {**_QUEUE, "gap_limit_ms": GAP_LIMIT_MS}
_ONE = {"max_new_per_pass": 1, **_ENDS}
_PASTFUTURE = {"window": 40, "initial_length": FIRST_LENGTH, "reserve": 0.05, **_ONE}
SERVERS: Mapping[str, Mapping[str, Any]] = {
    "past-future": {"name": "pastfuture", **_PASTFUTURE},
    "aggressive": {"name": "aggressive", "start_below": 0.95, "watermark": 1.0, **_QUEUE},
    "conservative": {"name": "conservative", "assumed_output_tokens": 12_000, "overcommit": 0.95, **_ONE},
    "oracle": {"name": "pf_oracle", **_ENDS},
}
"""The artifact's, and what could be reached."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "aggressive, 99 %": {"name": "aggressive", "watermark": 0.99, **_QUEUE},
    "aggressive, 95 %, ending all late": {"name": "aggressive", "watermark": 0.95, **_ENDS},
    "aggressive, 95 %, ending nobody": {"name": "aggressive", "watermark": 0.95},
    "conservative, caps of the law": {"name": "conservative", **_ENDS},
}
"""Of the baselines, with the last number of clients under D1 only."""
POLICIES = {**SERVERS, **VARIANTS}
OTHERS = ("aggressive", "conservative")
COMPARED = ("past-future", *OTHERS)
D1 = "D1"
LAWS = {
    D1: "pastfuture_d1",
    "D2": "pastfuture_d2",
    "D3": "pastfuture_d3",
    "ShareGPT-o1": "sharegpt_o1_like",
}


class GoodputStudyConfig(ManyRunsConfig):
    """Settings of ``+experiment=pastfuture_goodput``."""

    preset: Literal["quick", "full"] = Field(
        "full",
        description="full: 10 to 100 clients; quick: 10, 30 and 100, half as long, drift at a small scale",
    )
    clients: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=2, description="numbers of clients, rising; null: the preset's"
    )
    duration_s: float | None = Field(
        None, gt=0, description="requests are sent so long, seconds; null: the preset's, 1200 or 600"
    )
    warm_s: float | None = Field(
        None, ge=0, description="tokens are counted from then on, seconds; null: the preset's, 300 or 240"
    )
    seeds: int | None = Field(None, ge=1, description="seeds per point; null: the preset's, 3 or 1")
    scale: int | None = Field(
        None,
        ge=1,
        le=32,
        description="divides lengths and capacity of the drift run; null: 8, or 32 if quick",
    )

    @property
    def span_s(self) -> tuple[float, float]:
        """When tokens are counted."""
        warm, duration = (240, 600) if self.preset == "quick" else (300, 1200)
        return warm if self.warm_s is None else self.warm_s, self.duration_s or duration

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.clients is not None and any(a >= b for a, b in pairwise(self.clients)):
            raise ValueError(f"clients={list(self.clients)} must rise: the last are those of heavy load")
        warm, duration = self.span_s
        if warm >= duration:
            raise ValueError(
                f"warm_s={warm:g} must be below duration_s={duration:g}: no token would be counted"
            )
        return self


@dataclass(frozen=True)
class Point:
    """A policy under so many clients and a law of lengths."""

    policy: str
    clients: int
    law: str = D1

    def name(self, seed: int) -> str:
        return f"{self.policy}, {self.law}, {self.clients} clients, seed {seed}"


class GoodputStudy(ManyRuns):
    """Keeps no state between runs."""

    title = "Past-Future: goodput against closed-loop clients (ASPLOS 2025, arXiv 2507.10150)"

    def __init__(self, config: GoodputStudyConfig, context: Context) -> None:
        super().__init__(config, context)
        quick = config.preset == "quick"
        self._clients = config.clients or ((10, 30, 100) if quick else (10, 20, 30, 40, 60, 100))
        self._warm_s, self._duration_s = config.span_s
        self._scale = config.scale or (32 if quick else 8)
        self._seeds = range(context.seed, context.seed + (config.seeds or (1 if quick else 3)))

    # ------------------------------------------------------------------ cells

    def cells(self, found: Found) -> Sequence[Cell]:
        loops = [self._loop(point, seed) for seed in self._seeds for point in self._points]
        return [*loops, *(self._drift(seed) for seed in self._seeds)]

    @property
    def _points(self) -> list[Point]:
        most = self._clients[-1]
        return [
            *(Point(policy, clients) for clients, policy in product(self._clients, SERVERS)),
            *(Point(policy, most, law) for law in LAWS if law != D1 for policy in COMPARED),
            *(Point(policy, most) for policy in VARIANTS),
        ]

    def _loop(self, point: Point, seed: int) -> Cell:
        return Cell(
            name=point.name(seed),
            changes={
                "seed": seed,
                "scheduler": {
                    "admission_interval": 2,
                    "max_num_batched_tokens": STEP_TOKENS,
                    **POLICIES[point.policy],
                },
                "kvcache": {"name": "paged", "page_tokens": PAGE},
                "executor": {"name": "sim", "num_kv_pages": KV_TOKENS // PAGE},
                "engine.max_batch_tokens": STEP_TOKENS,
                "engine.max_model_len": LONGEST,
                "model.max_position": LONGEST,
                "slo": {"ttft_ms": TTFT_MS, "tbt_ms": GAP_MS},
                "workload": {
                    "name": "closed_loop",
                    "lengths": LAWS[point.law],
                    "clients": point.clients,
                    "duration_s": self._duration_s,
                    "ramp_s": min(30.0, self._duration_s / 4),
                    "retry": True,
                    "max_attempts": 1_000_000,
                    "with_prompt_ids": False,
                },
            },
            meters=(f"{HERE}GoodTokens",),
            weight=min(point.clients, 40),
        )

    def _drift(self, seed: int) -> Cell:
        scale = self._scale
        longest = 8192 // scale
        long, wide = uniform(2048, 4096, scale), uniform(32, 4096, scale)
        return Cell(
            name=_drift_name(seed),
            changes={
                "seed": seed,
                "scheduler": {
                    "name": "pastfuture",
                    "window": W,
                    "reserve": 0.05,
                    "initial_length": 512 // scale,
                    "admission_interval": max(1, 10 // scale),
                    "max_num_batched_tokens": 32768 // scale,
                },
                "kvcache": {"name": "paged", "page_tokens": 1},
                "cost": EQUAL_STEPS,
                "executor": {"name": "scripted", "num_kv_pages": KV_TOKENS // scale},
                "engine.max_batch_tokens": max(32768 // scale, longest),
                "engine.max_model_len": longest,
                "model.max_position": longest,
                "workload": backlog(
                    BEFORE + AFTER,
                    prompt_length=wide,
                    output_length=long,
                    max_new_tokens=4096 // scale,
                    phases=[{"after": BEFORE, "prompt_length": long, "output_length": wide}],
                ),
            },
            meters=(f"{HERE}UseByFinish",),
            weight=40,
        )

    # ------------------------------------------------------------------- rows

    def rows(self, found: Found) -> Sequence[Row]:
        most, setup = self._clients[-1], self._setup(D1)
        rows = [
            Row(
                name=f"{policy}: goodput at {most} clients over its peak",
                bound=bound,
                setup=setup,
                **measured([curve[-1] / max(curve) for _, curve in self._curves(found, policy)]),
            )
            for policy, bound in (
                ("past-future", at_least(FLAT)),
                ("aggressive", at_most(COLLAPSED)),
                ("conservative", None),
                ("oracle", None),
            )
        ]
        rows.append(
            Row(
                name="peak of conservative over that of past-future",
                bound=below(1),
                setup=setup,
                **measured(self._peaks(found)),
            )
        )
        rows.append(
            Row(
                name="clients at which conservative has 90 % of its peak, less those of past-future",
                bound=at_most(0),
                setup=setup,
                **measured(self._earlier(found)),
            )
        )
        compared = f"the better of {' and '.join(OTHERS)} over past-future at {most} clients"
        each = {law: self._best_over(found, law) for law in LAWS}
        known = {law: fmean(got) for law, got in each.items() if got}
        least = min(known, key=lambda law: known[law]) if len(known) == len(LAWS) else None
        rows.append(
            Row(
                name=f"{compared}, least of all laws",
                paper=SHARE,
                bound=at_most(SHARE),
                setup=self._setup(least or "all laws"),
                note="The paper says that past-future has up to 2 to 3 times the goodput of others under "
                "heavy load, over several models and laws.",
                **measured(each[least] if least else []),
            )
        )
        for law in LAWS:
            rows.append(Row(name=f"{compared}, {law}", setup=self._setup(law), **measured(each[law])))
            rows += [
                Row(
                    name=f"{other} over past-future at {most} clients, {law}",
                    setup=self._setup(law),
                    **measured(self._best_over(found, law, (other,))),
                )
                for other in OTHERS
            ]
        for point in self._points:
            rows.append(
                Row(
                    name=f"{point.policy}, {point.law}, {point.clients} clients",
                    unit="tokens/s",
                    setup=self._setup(point.law),
                    **measured(self._goodput(found, point)),
                )
            )
        return [*rows, *self._recovery(found)]

    def _setup(self, law: str) -> str:
        span = f"{self._warm_s:g} to {self._duration_s:g} s"
        return f"Llama-2-7B, A100 80 GB, {KV_TOKENS:,} KV tokens, {law}, {span}"

    def _goodput(self, found: Found, point: Point) -> list[float]:
        return list(self._by_seed(found, point).values())

    def _by_seed(self, found: Found, point: Point) -> dict[int, float]:
        """Goodput by seed, of those that are measured."""

        def goodput(one: CellResult) -> float:
            return _per_second(one, self._warm_s, self._duration_s)

        each = ((seed, values(found, [point.name(seed)], goodput)) for seed in self._seeds)
        return {seed: got[0] for seed, got in each if got}

    def _curves(self, found: Found, policy: str) -> list[tuple[int, list[float]]]:
        """Goodput over clients under D1 by seed, of curves that are whole and not nothing."""
        each = [self._by_seed(found, Point(policy, clients)) for clients in self._clients]
        whole = [(seed, [got[seed] for got in each]) for seed in each[0] if all(seed in got for got in each)]
        return [(seed, curve) for seed, curve in whole if max(curve) > 0]

    def _peaks(self, found: Found) -> list[float]:
        theirs = dict(self._curves(found, "past-future"))
        ours = self._curves(found, "conservative")
        return [max(curve) / max(theirs[seed]) for seed, curve in ours if seed in theirs]

    def _earlier(self, found: Found) -> list[float]:
        """Where the one saturates less where the other does, seed by seed."""

        def saturates(curve: Sequence[float]) -> int:
            return next(n for n, y in zip(self._clients, curve, strict=True) if y >= 0.9 * max(curve))

        theirs = dict(self._curves(found, "past-future"))
        ours = self._curves(found, "conservative")
        return [float(saturates(one) - saturates(theirs[seed])) for seed, one in ours if seed in theirs]

    def _best_over(self, found: Found, law: str, names: Sequence[str] = OTHERS) -> list[float]:
        """With most clients, the best of these over past-future, seed by seed."""
        most = self._clients[-1]
        others = [self._by_seed(found, Point(name, most, law)) for name in names]
        ours = self._by_seed(found, Point("past-future", most, law))
        return [
            max(other[seed] for other in others) / goodput
            for seed, goodput in ours.items()
            if goodput and all(seed in other for other in others)
        ]

    def _recovery(self, found: Found) -> list[Row]:
        """Means of KV use: D1, the first W finishes after the switch, the next W, and the rest."""
        parts: dict[str, list[float]] = {"before": [], "during": [], "after": [], "later": []}
        for use in values(found, [_drift_name(seed) for seed in self._seeds], _blocks):
            first, window = BEFORE // BLOCK, W // BLOCK
            if len(use) < first + 2 * window + 2:  # requests did not complete
                continue
            ends = (first - window, first, first + window, first + 2 * window, len(use) - 1)
            for name, low, high in zip(parts, ends, ends[1:], strict=False):
                parts[name].append(100 * fmean(use[low:high]))
        setup = f"D1 to D3 after {BEFORE} requests, W = {W}, lengths and capacity / {self._scale}"
        gaps = [a - b for a, b in zip(parts["after"], parts["later"], strict=True)]
        told = (
            ("before the switch", "before"),
            (f"in the first {W} finishes after it", "during"),
            ("in those that follow", "later"),
        )
        return [
            Row(
                name="drift: KV use from W to 2 W finishes after the switch, less what it stays at",
                unit="points",
                paper=0.0,
                bound=within(0, POINTS, "points"),
                setup=setup,
                **measured(gaps),
            ),
            *(
                Row(name=f"drift: KV use {name}", unit="%", setup=setup, **measured(parts[part]))
                for name, part in told
            ),
        ]

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        def goodput(axes: Axes) -> None:
            for policy in SERVERS:
                points = [
                    (clients, *mean_and_spread(self._goodput(found, Point(policy, clients))))
                    for clients in self._clients
                ]
                known = [(x, y, e or 0.0) for x, y, e in points if y is not None]
                if known:
                    x, y, e = zip(*known, strict=True)
                    axes.errorbar(x, y, yerr=e, marker="o", label=policy, capsize=2)
            axes.set(xlabel="clients", ylabel="goodput, prompt and output tokens/s", ylim=(0, None))
            axes.legend(frameon=False)

        def laws(axes: Axes) -> None:
            for k, policy in enumerate(COMPARED):
                points = [Point(policy, self._clients[-1], law) for law in LAWS]
                means = [mean_and_spread(self._goodput(found, point)) for point in points]
                places = [place + 0.27 * (k - 1) for place in range(len(LAWS))]
                heights, errors = [y or 0.0 for y, _ in means], [e or 0.0 for _, e in means]
                axes.bar(places, heights, 0.25, yerr=errors, capsize=2, label=policy)
            axes.set_xticks(range(len(LAWS)), list(LAWS))
            axes.set(ylabel=f"goodput at {self._clients[-1]} clients, tokens/s")
            axes.legend(frameon=False)

        def drift(axes: Axes) -> None:
            for seed in self._seeds:
                for use in values(found, [_drift_name(seed)], _blocks):
                    at = [BLOCK * (k + 0.5) for k in range(len(use))]
                    axes.plot(at, [100 * one for one in use], "o-", label=f"seed {seed}")
            axes.axvline(BEFORE, color="0.6", linewidth=1)
            axes.axvline(BEFORE + W, color="0.6", linewidth=1, linestyle=":")
            axes.set(xlabel="finished requests", ylabel="mean KV use, %", ylim=(0, 100))

        return {"goodput": goodput, "laws": laws, "drift": drift}


def _drift_name(seed: int) -> str:
    return f"drift, seed {seed}"


def _per_second(one: CellResult, since_s: float, until_s: float) -> float:
    tokens = sum(n for at, n in one.figures["good"] if since_s <= at <= until_s)
    return float(tokens / (until_s - since_s))


def _blocks(one: CellResult) -> Any:
    return one.figures["use"]


class GoodTokens:
    """When each good request ended, in seconds, and its prompt and output tokens."""

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        good = [
            (facts.ended_ns / NS, facts.prompt_tokens + facts.output_tokens)
            for facts in timeline.requests.values()
            if facts.outcome == "completed" and facts.ended_ns is not None
            if facts.ttft_ns is not None and facts.ttft_ns <= TTFT_MS * NS / 1000
            if facts.tbt_ns <= GAP_MS * NS / 1000
        ]
        return {"good": sorted(good)}


class UseByFinish:
    """Mean share of KV memory in use over decode steps, per block of finished requests."""

    def __init__(self) -> None:
        self._capacity = self._used = self._steps = self._finished = 0
        self._use: list[float] = []

    @hookimpl
    def servelab_on_run_started(self, record: RunStarted) -> None:
        self._capacity = record.info["kv"]["pools"][0]["pages"]

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        n, k = len(record.requests), len(record.ends_ns)
        if max(record.tokens) == 1:
            self._steps += k
            self._used += k * (self._capacity - record.free_pages[0]) - n * k * (k - 1) // 2

    @hookimpl
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        self._finished += 1
        if self._finished % BLOCK == 0:
            self._use.append(self._used / max(1, self._steps) / self._capacity)
            self._used = self._steps = 0

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        return {"use": self._use}
