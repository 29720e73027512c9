"""``vllm_v1`` against its card (techniques/scheduling: vllm_fcfs, *faithful when*), over random traces.

(a) is about v0 only: here its opposite holds, steps mix prompts and decodes.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from tests.draws import seeds

from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import ConfigError
from servelab.core.facts import Limits
from servelab.core.families.scheduler import StepView
from servelab.core.plan import StepPlan, Tokens
from servelab.core.records import Record, RequestAdmitted, RequestFinished, StepDone
from servelab.core.request import Arrival, Truth
from servelab.core.testing.fakes import (
    ListWorkload,
    Rig,
    ToyCost,
    ToyExecutor,
    arrival,
    make_engine,
    raises_in,
    toy_limits,
)
from servelab.plugins.schedulers.vllm_v1 import VllmV1

Make = Callable[..., VllmV1]


class Watched:
    """Checks every plan against the card, from the view the scheduler had."""

    def __init__(self, inner: VllmV1) -> None:
        self.inner = inner
        self.engine: Any = None
        self.plans = self.preempting = self.mixed = self.admissions = 0

    def plan(self, view: StepView) -> StepPlan:
        running, waiting = [x.id for x in view.running], [x.id for x in view.waiting]
        ran = [x.admitted_ns is not None for x in view.waiting]
        assert ran == sorted(ran, reverse=True), "(d) a preempted request stands before any that never ran"
        plan = self.inner.plan(view)
        config = self.inner.config
        items = [x for x in plan.work if isinstance(x, Tokens)]
        work = [x.request.id for x in items]
        victims = [p.request.id for p in plan.preemptions]
        # (b)
        assert sum(x.n for x in items) <= config.max_num_batched_tokens
        old = [id for id in work if id in running]
        new = [id for id in work if id not in running]
        assert work == old + new, "(b) running requests come first"
        assert old == [id for id in running if id in set(old)], "(b) older ones first"
        decodes = [x.id for x in view.running if x.pending_tokens == 1]
        served = [id in old for id in decodes if id not in victims]
        assert served == sorted(served, reverse=True), "(b) no decode is overtaken by a younger one"
        # (c)
        assert victims == running[::-1][: len(victims)], "(c) victims are the youngest, youngest first"
        assert all(p.mode == "recompute" for p in plan.preemptions)
        assert not set(victims) & set(work)
        # (e)
        assert not (victims and new), "(e) nobody is admitted in a step that preempted"
        assert new == waiting[: len(new)], "first come first served"
        assert len(running) - len(victims) + len(new) <= config.max_num_seqs
        self.plans += 1
        self.preempting += bool(victims)
        self.admissions += len(new)
        self.mixed += bool(new) and bool(decodes)
        # (f)
        ledger = self.engine.ledger
        held = {p for lease in ledger._leases.values() for p in lease.tables[0]}
        assert ledger.device[0].free + len(held) == ledger.total()[0]
        return plan


def trace(rng: Random, n: int) -> list[Arrival]:
    now, out = 0, []
    for k in range(n):
        now += rng.choice([0, 0, 300, 2000])
        out.append(arrival(f"r{k}", rng.randint(1, 60), rng.randint(1, 30), cap=rng.randint(1, 30), at=now))
    return out


def serve(
    vllm: Make, items: list[Arrival], *, pages: int, limits: Limits, **settings: Any
) -> tuple[Watched, list[Record], dict[str, list[int]]]:
    truths: dict[str, Truth] = {}
    executor, cost = ToyExecutor(truths), ToyCost(step_ns=100, token_ns=5, context_ns=1)
    watched = Watched(vllm(limits, **settings))
    engine = make_engine(watched, pages=pages, limits=limits, cost=cost, horizon=executor.horizon)
    watched.engine = engine
    outputs: dict[str, list[int]] = {}
    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        if isinstance(record, RequestAdmitted):
            outputs[record.request] = engine.requests[record.request].output

    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=emit,
    ).run()
    engine.check_integrity()
    assert engine.ledger.free() == engine.ledger.total()
    return watched, records, outputs


def steps_of(records: list[Record]) -> int:
    return sum(len(x.ends_ns) for x in records if isinstance(x, StepDone))


def check_outputs(items: list[Arrival], records: list[Record]) -> None:
    ends = {x.request: x for x in records if isinstance(x, RequestFinished)}
    assert len(ends) == len(items)
    for item in items:
        assert item.truth is not None
        end, truth, cap = ends[item.spec.id], item.truth.output_tokens, item.spec.max_new_tokens
        assert end.outcome == "completed"
        assert end.output_tokens == min(truth, cap)
        assert end.reason == ("stop" if truth <= cap else "length")
        emitted = sum(
            n
            for x in records
            if isinstance(x, StepDone)
            for id, n in zip(x.requests, x.emitted, strict=True)
            if id == item.spec.id
        )
        assert emitted == end.output_tokens


def random_steps(vllm: Make, wanted: int, hold_steps: int) -> None:
    done, seed, preempted, mixed = 0, 0, 0, 0
    while done < wanted:
        rng = Random(seed)
        limits = toy_limits(tokens=rng.choice([16, 33, 200]), requests=rng.choice([2, 5, 12]), model_len=90)
        settings = {
            "max_num_seqs": rng.randint(1, limits.max_batch_requests),
            "long_prefill_token_threshold": rng.choice([0, 0, 7]),
        }
        items = trace(rng, 40)
        pages = rng.choice([23, 25, 40])
        watched, records, _ = serve(
            vllm, items, pages=pages, limits=limits, hold_steps=hold_steps, **settings
        )
        check_outputs(items, records)
        done += steps_of(records)
        preempted += watched.preempting
        mixed += watched.mixed
        seed += 1
    assert preempted > wanted / 1000, "the traces must be hard enough to preempt"
    assert mixed, "steps mix prompts and decodes"


@pytest.mark.parametrize("hold_steps", [1, 4096])
def test_faithful_over_1e4_steps(vllm: Make, hold_steps: int) -> None:
    random_steps(vllm, 10_000, hold_steps)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_faithful_over_1e5_steps(vllm: Make) -> None:
    random_steps(vllm, 100_000, 1)


@pytest.mark.parametrize("seed", seeds(5))
def test_recompute_preserves_the_output(vllm: Make, seed: int) -> None:
    """(g) Outputs with KV memory tiny equal those with KV memory large."""
    items = trace(Random(seed), 30)
    limits = toy_limits(tokens=40, requests=8, model_len=90)
    large, _, expected = serve(vllm, items, pages=1000, limits=limits)
    tiny, _, got = serve(vllm, items, pages=23, limits=limits)
    assert large.preempting == 0
    assert tiny.preempting > 0
    assert got == expected
    assert all(out == list(range(len(out))) for out in got.values())


# -------------------------------------------------------------------- small examples


def rig_of(vllm: Make, limits: Limits, pages: int, **settings: Any) -> Rig:
    return Rig(make_engine(vllm(limits, **settings), pages=pages, limits=limits))


def ran(rig: Rig) -> dict[str, int]:
    batch = rig.batches[-1]
    return {r.id: n for r, n in zip(batch.requests, batch.tokens, strict=True)}


def test_the_budget_goes_to_running_requests_then_to_the_queue(vllm: Make) -> None:
    rig = rig_of(vllm, toy_limits(tokens=10, requests=8), 64, hold_steps=1)
    rig.arrive("a", 14, 9)
    assert ran(rig) == {"a": 10}
    rig.arrive("b", 3, 9)
    rig.arrive("c", 9, 9)
    rig.finish()
    assert ran(rig) == {"a": 4, "b": 3, "c": 3}
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1, "c": 6}


def test_a_long_prompt_is_cut_at_the_threshold(vllm: Make) -> None:
    rig = rig_of(vllm, toy_limits(tokens=20, requests=8), 64, long_prefill_token_threshold=6)
    rig.arrive("a", 14, 9)
    assert ran(rig) == {"a": 6}
    rig.arrive("b", 14, 9)
    rig.finish()
    assert ran(rig) == {"a": 6, "b": 6}


def test_the_first_that_does_not_fit_blocks_those_behind_it(vllm: Make) -> None:
    rig = rig_of(vllm, toy_limits(tokens=64, requests=8), 5)
    rig.arrive("a", 8, 9)
    rig.arrive("big", 16, 9)
    rig.arrive("small", 1, 9)
    rig.finish()
    assert ran(rig) == {"a": 1}
    assert list(rig.engine.waiting) == ["big", "small"]


def test_the_youngest_is_dropped_until_the_pages_suffice(vllm: Make) -> None:
    """Three requests of one page each in three pages; the oldest needs a second page."""
    rig = rig_of(vllm, toy_limits(tokens=64, requests=8), 3, hold_steps=1)
    for id in "abc":
        rig.arrive(id, 4, 9)
    rig.finish()
    # a takes its second page, b the third: c does not fit
    assert list(rig.engine.running) == ["a", "b"]
    assert list(rig.engine.waiting) == ["c"]
    rig.finish()
    assert list(rig.engine.running) == ["a"]
    assert list(rig.engine.waiting) == ["b", "c"], "b goes to the front"
    assert rig.request("b").generated == 1


def test_several_victims_keep_their_order(vllm: Make) -> None:
    rig = rig_of(vllm, toy_limits(tokens=64, requests=8), 6, hold_steps=1)
    rig.engine.ledger.device[0].resize(-1)
    for id, prompt in (("a", 8), ("b", 4), ("c", 4), ("d", 4)):
        rig.send(_arrive(rig, id, prompt))
    rig.schedule()
    assert ran(rig) == {"a": 8, "b": 4, "c": 4, "d": 4}
    rig.finish()
    # a, b, c, d each need a page and none is free: d goes for a, c for b
    assert list(rig.engine.running) == ["a", "b"]
    assert list(rig.engine.waiting) == ["c", "d"]
    rig.engine.check_integrity()


def _arrive(rig: Rig, id: str, prompt: int) -> Any:
    from servelab.core.events import Arrive
    from servelab.core.request import RequestSpec

    rig.truths[id] = Truth(9)
    return Arrive(RequestSpec(id=id, prompt_tokens=prompt, max_new_tokens=50))


@pytest.mark.parametrize(
    ("settings", "name", "ours", "device"),
    [
        ({"max_num_batched_tokens": 65}, "max_num_batched_tokens", 65, 64),
        ({"max_num_seqs": 17}, "max_num_seqs", 17, 16),
    ],
)
def test_asking_for_more_than_the_device_takes_is_refused(
    vllm: Make, settings: dict[str, int], name: str, ours: int, device: int
) -> None:
    error = raises_in(lambda: vllm(toy_limits(), **settings))
    assert type(error) is ConfigError
    assert error.what == f"scheduler.{name} is {ours}"
    assert error.why == f"the engine accepts {device} per launch"


@pytest.mark.parametrize("pages", [6, 7, 8, 12])
@pytest.mark.parametrize("seed", seeds(4))
def test_planning_a_step_ahead_ends_in_tiny_pools_too(vllm: Make, pages: int, seed: int) -> None:
    """No live lock: requests in flight are not victims, and everybody gets through in the end."""
    rng = Random(seed)
    items = [arrival(f"r{k}", rng.randint(1, 8), rng.randint(1, 16), cap=16, at=k * 90) for k in range(8)]
    limits = toy_limits(tokens=20, requests=4, model_len=24, in_flight=2)
    for hold in (1, 64):
        _, records, outputs = serve(vllm, items, pages=pages, limits=limits, hold_steps=hold)
        check_outputs(items, records)
        assert all(out == list(range(len(out))) for out in outputs.values())


def test_samples_beyond_the_token_budget_wait_for_the_next_step(vllm: Make) -> None:
    rig = Rig(make_engine(vllm(toy_limits(), max_num_batched_tokens=4, max_num_seqs=16), shares=True))
    rig.arrive("a", 4, 3, n=6)
    rig.finish()
    assert len(rig.engine.running) == 6
    assert rig.batches[-1].tokens == [1] * 4
