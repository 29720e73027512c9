"""The toy study of Past-Future: how full ten admission rules keep KV memory, and what it costs in evictions.

Source: Gong et al., "Past-Future Scheduler for LLM Serving under SLA Guarantees", ASPLOS 2025, arXiv
2507.10150; artifact WuSiYu/lightllm-ae at 0da617f, ``behavior-analysis/``. The figures beside ours are those
of the authors' scripts, run once; they vary by about a point.

Mechanism: a backlog of 3000 requests and memory for 120,000 tokens in pages of one; nobody arrives later,
so time decides nothing and every figure counts decode steps: steps in which each running request makes one
token. An admission pass comes every 10 of them, for at most 32768 tokens of prompts; W = 1000, H begins with
512. Computing a prompt, also again after an eviction, is work of the engine that no figure counts, as in the
study.

Symbols:
    D1, D2, D3   prompts U[32, 4096], outputs U[2048, 4096]; both U[3000, 5000]; the first exchanged
    KV use       KV tokens held over capacity, mean over decode steps
    future peak  M* of the running requests by their true lengths over capacity, mean over decode steps

Deviations:
1. In the authors' scripts memory may overflow for a step; here a prompt waits until its pages are free, and
   running requests are evicted before a step that they would not fit.
2. An evicted request comes back with what it has produced; their scripts count only its prompt, or
   nothing, and so admit it again too early: they evict more.
3. The preset ``quick`` divides lengths, capacity, tokens of a pass and the interval by ``scale`` and takes
   fewer requests, W with them: filling and draining weigh more, and use is lower.

Faithful when: every mean KV use is within 2 points of theirs; KV use is conservative < pastfuture <= oracle <
aggressive; neither the oracle nor conservative at 100 % ever evicts.

Tier: stable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from servelab.core.api import Context, hookimpl
from servelab.core.metrics import Timeline
from servelab.core.records import RequestArrived, RequestFinished, RequestPreempted, RunStarted, StepDone
from servelab.plugins.tasks._cells import Cell, Found
from servelab.plugins.tasks._experiment import EQUAL_STEPS, ManyRuns, ManyRunsConfig, backlog, uniform, values
from servelab.plugins.tasks._rows import Bound, Row, at_most, below, measured, relative, within

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPACITY, REQUESTS, WINDOW, FIRST, INTERVAL, PASS = 120_000, 3000, 1000, 512, 10, 32768
ASSUMED = 4096
"""Output that the scripts' conservative rule assumes under every law, also D2, whose outputs reach 5000."""
METER = "servelab.plugins.tasks.pastfuture_toy:DecodeSteps"

Law = Literal["D1", "D2", "D3"]
LAWS: Mapping[Law, tuple[tuple[int, int], tuple[int, int]]] = {
    "D1": ((32, 4096), (2048, 4096)),
    "D2": ((3000, 5000), (3000, 5000)),
    "D3": ((2048, 4096), (32, 4096)),
}
"""Prompts and outputs, uniform from the first to the second."""

Reference = tuple[float, float, float, float]
"""Decode steps, mean KV use %, mean future peak %, evictions per finished request %."""


@dataclass(frozen=True)
class Policy:
    """A line of the table."""

    name: str
    scheduler: Mapping[str, Any]
    paper: Mapping[Law, Reference]


def _policy(name: str, scheduler: str, *paper: Reference, **settings: Any) -> Policy:
    return Policy(name, {"name": scheduler, **settings}, dict(zip(LAWS, paper, strict=True)))


POLICIES = (
    _policy("oracle", "pf_oracle", (300700, 94.7, 98.9, 0), (649000, 92.7, 98.2, 0), (233080, 96.6, 98.7, 0)),
    _policy("past-future 3 %", "pastfuture", (298970, 93.3, 97.6, 8.0), (653220, 92.0, 97.3, 7.1),
            (242250, 94.6, 96.7, 3.6), reserve=0.03),
    _policy("past-future 5 %", "pastfuture", (304330, 91.6, 95.8, 3.6), (673810, 90.0, 95.7, 4.4),
            (246310, 92.6, 94.6, 0.5), reserve=0.05),
    _policy("past-future 10 %", "pastfuture", (317310, 87.0, 91.5, 1.4), (709100, 85.3, 90.8, 1.4),
            (255050, 87.7, 89.7, 0.03), reserve=0.1),
    _policy("aggressive 99 %", "aggressive", (285430, 98.4, 103.6, 94.9), (615800, 97.9, 103.3, 91.2),
            (233610, 98.1, 100.2, 35.0), watermark=0.99),
    _policy("aggressive 95 %", "aggressive", (290980, 96.1, 101.2, 24.1), (628410, 95.9, 101.8, 26.2),
            (234540, 95.1, 97.2, 3.2), watermark=0.95),
    _policy("aggressive 90 %", "aggressive", (302900, 92.5, 97.9, 10.8), (654190, 92.4, 99.1, 13.9),
            (247130, 90.3, 92.3, 0.2), watermark=0.9),
    _policy("conservative 100 %", "conservative", (480100, 57.3, 60.5, 0), (845180, 71.7, 75.3, 0),
            (387720, 59.9, 61.9, 0), overcommit=1.0),
    _policy("conservative 125 %", "conservative", (386210, 72.5, 75.8, 0), (665970, 90.6, 94.7, 84),
            (297060, 75.1, 77.1, 0), overcommit=1.25),
    _policy("conservative 150 %", "conservative", (320530, 87.3, 90.8, 17.2), (612160, 99.2, 112, 5017),
            (246870, 90.5, 92.5, 19.1), overcommit=1.5),
)  # fmt: skip

FEW = (
    "Fewer requests than the study's 3000: filling and draining memory weigh more, so that use and steps are "
    "told and not judged."
)
USE_POINTS, STEPS_SHARE = 2.0, 0.03


class ToyStudyConfig(ManyRunsConfig):
    """Settings of ``+experiment=pastfuture_toy``."""

    preset: Literal["quick", "full"] = Field(
        "full", description="full: the study's size; quick: 800 requests, lengths and capacity divided by 32"
    )
    requests: int | None = Field(None, ge=1, description="requests (study: 3000); null: the preset's")
    scale: int | None = Field(
        None,
        ge=1,
        le=32,
        description="divides lengths, capacity, tokens of a pass and the interval; null: the preset's",
    )
    seeds: int = Field(1, ge=1, description="seeds per line of the table, from the run's own seed upwards")
    laws: tuple[Law, ...] = Field(("D1", "D2", "D3"), min_length=1, description="length laws")


class ToyStudy(ManyRuns):
    """Keeps no state between runs."""

    title = "Past-Future, toy study: KV use of admission rules (ASPLOS 2025, arXiv 2507.10150)"

    def __init__(self, config: ToyStudyConfig, context: Context) -> None:
        super().__init__(config, context)
        quick = config.preset == "quick"
        self._laws = config.laws
        self._requests = config.requests or (800 if quick else REQUESTS)
        self._scale = config.scale or (32 if quick else 1)
        self._seeds = range(context.seed, context.seed + config.seeds)

    def cells(self, found: Found) -> Sequence[Cell]:
        each = product(self._seeds, self._laws, POLICIES)
        return [self._cell(policy, law, seed) for seed, law, policy in each]

    def _cell(self, policy: Policy, law: Law, seed: int) -> Cell:
        scale, (prompt, output) = self._scale, LAWS[law]
        tokens = PASS // scale
        scheduler = {
            **policy.scheduler,
            "admission_interval": max(1, INTERVAL // scale),
            "max_num_batched_tokens": tokens,
        }
        if scheduler["name"] == "pastfuture":
            window = max(1, WINDOW * self._requests // REQUESTS)
            scheduler |= {"window": window, "initial_length": FIRST // scale}
        if scheduler["name"] == "conservative":
            scheduler["assumed_output_tokens"] = ASSUMED // scale
        longest = (prompt[1] + output[1]) // scale
        return Cell(
            name=_name(policy, law, seed),
            changes={
                "seed": seed,
                "scheduler": scheduler,
                "kvcache": {"name": "paged", "page_tokens": 1},
                "cost": EQUAL_STEPS,
                "executor": {"name": "scripted", "num_kv_pages": CAPACITY // scale},
                "engine.max_batch_tokens": max(tokens, longest),
                "engine.max_model_len": longest,
                "model.max_position": longest,
                "workload": backlog(
                    self._requests,
                    prompt_length=uniform(*prompt, scale),
                    output_length=uniform(*output, scale),
                    max_new_tokens=output[1] // scale,
                ),
            },
            meters=(METER,),
            weight=policy.paper[law][0],
        )

    def rows(self, found: Found) -> Sequence[Row]:
        rows: list[Row] = []
        for law, policy in product(self._laws, POLICIES):
            steps, use, peak, evicted = policy.paper[law]
            claims: tuple[tuple[str, str, float, Bound | None], ...] = (
                ("kv_use", "% KV use", use, within(use, USE_POINTS, "points") if self._whole else None),
                ("steps", "decode steps", steps, relative(steps, STEPS_SHARE) if self._whole else None),
                ("future_peak", "% future peak", peak, None),
                ("evictions", "% evicted", evicted, None),
            )
            for figure, unit, paper, bound in claims:
                times = self._scale * REQUESTS / self._requests if figure == "steps" else 1.0
                got = [times * value for value in self._figure(found, policy, law, figure)]
                rows.append(
                    Row(
                        name=f"{law} {policy.name}",
                        unit=unit,
                        paper=paper,
                        bound=bound,
                        setup=self._setup,
                        **measured(got),
                    )
                )
        if not self._whole:
            rows[0] = replace(rows[0], note=FEW)
        return [*rows, *self._order(found), *self._never(found)]

    @property
    def _whole(self) -> bool:
        return self._requests == REQUESTS

    @property
    def _setup(self) -> str:
        scale = f", lengths and capacity / {self._scale}" if self._scale > 1 else ""
        return f"{self._requests} requests{scale}"

    def _figure(self, found: Found, policy: Policy, law: Law, figure: str) -> list[float]:
        names = [_name(policy, law, seed) for seed in self._seeds]
        return values(found, names, lambda one: one.figures[figure])

    def _order(self, found: Found) -> list[Row]:
        """The paper's order of use, as differences: conservative < pastfuture <= oracle < aggressive."""
        by = {policy.name: policy for policy in POLICIES}
        pairs = (
            ("conservative 100 %", "past-future 3 %", below(0)),
            ("past-future 3 %", "oracle", at_most(0)),
            ("oracle", "aggressive 99 %", below(0)),
        )
        rows = []
        for law, (less, more, bound) in product(self._laws, pairs):
            a, b = (self._figure(found, by[name], law, "kv_use") for name in (less, more))
            gaps = [x - y for x, y in zip(a, b, strict=True)] if len(a) == len(b) else []
            paper = by[less].paper[law][1] - by[more].paper[law][1]
            name = f"{law} KV use of {less} less that of {more}"
            rows.append(Row(name=name, unit="points", paper=paper, bound=bound, **measured(gaps)))
        return rows

    def _never(self, found: Found) -> list[Row]:
        """Rules that never evict."""
        rows = []
        for law, policy in product(self._laws, POLICIES):
            if policy.name in ("oracle", "conservative 100 %"):
                got = measured(self._figure(found, policy, law, "evictions"))
                name = f"{law} evictions of {policy.name}"
                rows.append(Row(name=name, unit="%", paper=0.0, bound=at_most(0), **got))
        return rows

    def plots(self, found: Found) -> Mapping[str, Callable[[Axes], None]]:
        def against(axes: Axes) -> None:
            """Ours over theirs; the diagonal is agreement."""
            for law in self._laws:
                pairs = [
                    (policy.paper[law][1], value)
                    for policy in POLICIES
                    for value in self._figure(found, policy, law, "kv_use")
                ]
                axes.plot(*zip(*pairs, strict=True), "o", alpha=0.7, label=law) if pairs else None
            axes.plot([55, 100], [55, 100], color="0.6", linewidth=1)
            axes.fill_between([55, 100], [53, 98], [57, 102], color="0.9", zorder=0, label="± 2 points")
            axes.set_xlabel("mean KV use in the authors' scripts, %")
            axes.set_ylabel("ours, %")
            axes.legend(frameon=False)

        return {"kv_use": against}


def _name(policy: Policy, law: Law, seed: int) -> str:
    return f"{law} {policy.name} seed {seed}"


class DecodeSteps:
    """Counts decode steps, and what memory held in them.

    Memory at the end of a launch of k steps by n requests was less by n at each step before it. Between two
    changes of the batch M* stays as it is: what requests hold grows as what is left shrinks.
    """

    def __init__(self) -> None:
        self.steps = self.evictions = 0
        self._capacity = 0
        self._used = 0
        """KV tokens held, summed over decode steps."""
        self._prompts: dict[str, int] = {}
        self._produced: dict[str, int] = {}
        self._outputs: dict[str, int] = {}
        self._batch: list[str] = []
        self._batches: list[tuple[int, list[tuple[str, int]]]] = []
        """(decode steps, (request, tokens produced when it began)) of each batch."""

    @hookimpl
    def servelab_on_run_started(self, record: RunStarted) -> None:
        pool = record.info["kv"]["pools"][0]
        self._capacity = pool["pages"] * pool["page_tokens"]

    @hookimpl
    def servelab_on_request_arrived(self, record: RequestArrived) -> None:
        self._prompts[record.request] = record.prompt_tokens

    @hookimpl
    def servelab_on_request_preempted(self, record: RequestPreempted) -> None:
        self.evictions += 1

    @hookimpl
    def servelab_on_request_finished(self, record: RequestFinished) -> None:
        self._outputs[record.request] = record.output_tokens

    @hookimpl
    def servelab_after_step(self, record: StepDone) -> None:
        produced, n, k = self._produced, len(record.requests), len(record.ends_ns)
        if max(record.tokens) == 1:  # nobody computes a prompt
            self.steps += k
            held = self._capacity - record.free_pages[0]
            self._used += k * held - n * k * (k - 1) // 2
            if record.requests != self._batch:
                self._batch = list(record.requests)
                self._batches.append((0, [(name, produced.get(name, 0)) for name in self._batch]))
            before, batch = self._batches[-1]
            self._batches[-1] = before + k, batch
        for name, emitted in zip(record.requests, record.emitted, strict=True):
            produced[name] = produced.get(name, 0) + emitted

    def figures(self, timeline: Timeline) -> Mapping[str, Any]:
        peaks = sum(steps * self._peak(batch) for steps, batch in self._batches)
        over = 100 / (self.steps * self._capacity) if self.steps else 0.0
        return {
            "steps": self.steps,
            "kv_use": self._used * over,
            "future_peak": peaks * over,
            "evictions": 100 * self.evictions / max(1, len(self._outputs)),
        }

    def _peak(self, batch: Sequence[tuple[str, int]]) -> int:
        """M*, by the lengths that outputs really had."""
        left = sorted(((self._outputs[r] - made, self._prompts[r] + made) for r, made in batch), reverse=True)
        held = peak = 0
        for i, (b, a) in enumerate(left, start=1):
            held += a
            peak = max(peak, held + i * b)
        return peak
