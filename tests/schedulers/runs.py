"""Runs of the LightLLM schedulers on toy parts, every plan checked against what all four have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import BaseModel

from servelab.core.context import Context, Oracle, seeded
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.facts import Limits
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import Planned, Record, RequestPreempted, StepDone
from servelab.core.request import Arrival, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    ListWorkload,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
)
from servelab.plugins.kvcache.paged import Paged, PagedConfig
from servelab.plugins.schedulers._lightllm import ComposerConfig, LightLLM
from servelab.plugins.schedulers.aggressive import Aggressive, AggressiveConfig
from servelab.plugins.schedulers.conservative import Conservative, ConservativeConfig
from servelab.plugins.schedulers.pastfuture import PastFuture, PastFutureConfig
from servelab.plugins.schedulers.pf_oracle import PFOracle, PFOracleConfig

POLICIES: dict[str, tuple[Callable[..., LightLLM], type[BaseModel]]] = {
    "pastfuture": (PastFuture, PastFutureConfig),
    "aggressive": (Aggressive, AggressiveConfig),
    "conservative": (Conservative, ConservativeConfig),
    "pf_oracle": (PFOracle, PFOracleConfig),
}


def build(
    name: str,
    limits: Limits,
    truths: Mapping[str, Truth] | None = None,
    rng: Random | None = None,
    **settings: Any,
) -> Any:
    """One scheduler; its budgets default to the device's."""
    factory, config = POLICIES[name]
    settings.setdefault("max_num_batched_tokens", limits.max_batch_tokens)
    settings.setdefault("max_num_seqs", min(limits.max_batch_requests, settings["max_num_batched_tokens"]))
    oracle = truths.__getitem__ if truths is not None and name == "pf_oracle" else None
    return factory(config(**settings), _context("scheduler", name, limits, rng, oracle))


def _context(
    kind: str, name: str, limits: Limits, rng: Random | None = None, oracle: Oracle | None = None
) -> Context:
    return Context(
        kind=kind,
        name=name,
        rng=rng or seeded(0, kind, name),
        model=TOY_MODEL,
        hardware=None,
        limits=limits,
        oracle=oracle,
    )


class Watched:
    """Checks every plan from the view the scheduler had."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.engine: Any = None
        self.on_event = getattr(inner, "on_event", lambda record: None)

    def plan(self, view: StepView) -> StepPlan:
        config: ComposerConfig = self.inner._config
        running, waiting = [r.id for r in view.running], [r.id for r in view.waiting]
        decoding = {r.id for r in view.running if r.pending_tokens == 1}
        order = [r.arrival_ns for r in [*view.running, *view.waiting]]
        assert order == sorted(order), "every running request is older than every waiting one"
        plan = self.inner.plan(view)
        items = [item for item in plan.work if isinstance(item, Tokens)]
        work = [item.request.id for item in items]
        victims = [p.request.id for p in plan.preemptions]
        new = [id for id in work if id not in running]
        gone = {v.request.id for v in (*plan.rejections, *plan.aborts)}
        running, waiting = ([id for id in ids if id not in gone] for ids in (running, waiting))
        decoding -= gone
        deferred = [v.request.id for v in plan.deferred]
        assert new == waiting[: len(new)], "(f) nobody overtakes the head"
        assert deferred in ([], waiting[len(new) : len(new) + 1]), "a pass stops at its first failure"
        assert victims == running[::-1][: len(victims)], "victims are the newest, newest first"
        assert all(p.mode == "recompute" for p in plan.preemptions)
        assert not (victims and new)
        assert work == [id for id in running if id in work] + new, "decodes first"
        assert sum(item.n for item in items) <= config.max_num_batched_tokens
        assert len(running) - len(victims) + len(new) <= config.max_num_seqs
        assert len(new) <= (config.max_new_per_pass or len(new))
        if new or any(item.n > 1 for item in items):
            assert config.mixed or not set(work) & decoding, "prompts have steps of their own"
        if set(work) & decoding:
            assert [id for id in work if id in decoding] == [
                id for id in running if id in decoding and id not in victims
            ], "every decode runs"
        return plan


@dataclass
class Served:
    records: list[Record]
    pages: int

    def of(self, kind: type[Any]) -> list[Any]:
        return [r for r in self.records if isinstance(r, kind)]

    @property
    def evictions(self) -> int:
        return len(self.of(RequestPreempted))

    def decisions(self) -> list[tuple[Any, ...]]:
        """Plans that did more than repeat the one before."""
        return [
            (p.t_ns, p.step, p.work, p.preempted, p.deferred)
            for p in self.of(Planned)
            if p.preempted or p.deferred or any(n > 1 for _, n in p.work)
        ]

    def use(self) -> float:
        """Mean share of KV pages in use over steps with somebody waiting."""
        steps = [s for s in self.of(StepDone) if s.waiting]
        total = sum(len(s.ends_ns) for s in steps)
        return sum(len(s.ends_ns) * (1 - s.free_pages[0] / self.pages) for s in steps) / total


def serve(
    name: str,
    items: list[Arrival],
    *,
    pages: int,
    limits: Limits,
    page_tokens: int = 1,
    seed: int = 0,
    complete: bool = True,
    **settings: Any,
) -> Served:
    truths: dict[str, Truth] = {}
    executor, cost = ToyExecutor(truths), ToyCost(step_ns=100, token_ns=5, context_ns=1)
    scheduler = build(name, limits, truths, seeded(seed, "scheduler", name), **settings)
    watched = Watched(scheduler)
    engine = make_engine(
        watched,
        kvcache=Paged(PagedConfig(page_tokens=page_tokens), _context("kvcache", "paged", limits)),
        pages=pages,
        limits=limits,
        cost=cost,
        horizon=executor.horizon,
    )
    records: list[Record] = []
    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    engine.check_integrity()
    assert engine.ledger.free() == engine.ledger.total()
    assert sum(engine.ended.values()) == len(items)
    assert engine.ended["completed"] == len(items) or not complete
    return Served(records, pages)


def trace(rng: Random, n: int, *, prompt: int = 40, output: int = 30, gap: int = 2000) -> list[Arrival]:
    """Requests with caps that are sometimes below, mostly above their true lengths."""
    now, items = 0, []
    for k in range(n):
        now += rng.choice([1, 300, gap])
        p, o = rng.randint(1, prompt), rng.randint(1, output)
        items.append(arrival(f"r{k}", p, o, cap=rng.randint(1, 2 * output), at=now))
    return items
