"""Several lanes and planning ahead: a held run is the stepped run, down to what the scheduler is shown.

``RandomPlans`` draws any legal plan, so one call more, or one page more in view, sets the whole rest apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from tests.draws import seeds

from servelab.core.context import Context, seeded
from servelab.core.engine.virtual import VirtualDriver
from servelab.core.errors import StallError
from servelab.core.events import Batch
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Hold, StepPlan, Tokens
from servelab.core.records import (
    Planned,
    Record,
    RequestAdmitted,
    RequestFinished,
    RequestForked,
    StepDone,
    TransferEnded,
    TransferStarted,
)
from servelab.core.request import Arrival, Cancel, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    ListWorkload,
    RandomPlans,
    Script,
    ToyCost,
    ToyExecutor,
    ToyKV,
    arrival,
    make_engine,
    step_by_step,
    toy_layout,
    toy_limits,
)
from servelab.plugins.prefix.hash import HashConfig, HashStore
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

WAYS = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (3, 2)]
"""Lanes, launches in flight on each."""
OTHERS = (RequestAdmitted, RequestForked, TransferStarted, TransferEnded)
STEMS = ([1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4, 9, 9, 9, 9] * 3)


@dataclass
class Told:
    """A scheduler, and all it was shown and answered."""

    inner: Any
    calls: list[Any] = field(default_factory=list)

    def plan(self, view: StepView) -> StepPlan:
        queues = (view.waiting, view.running, view.paused, view.swapped)
        shown = [
            (r.id, r.phase, r.computed_tokens, r.pending_tokens, r.in_flight_tokens, r.slack_tokens)
            for queue in queues
            for r in queue
        ]
        free = (view.kv.free_pages, view.kv.free_host_pages)
        self.calls.append((view.now_ns, view.lane, view.step, view.forking, free, shown))
        return self.inner.plan(view)  # type: ignore[no-any-return]


@dataclass
class Ran:
    records: list[Record]
    calls: list[Any]
    launches: int
    stalled: bool

    @property
    def steps(self) -> list[Any]:
        """What happened; with the moments at which others came and went."""
        others = [(x.ev, x.t_ns, getattr(x, "request", "")) for x in self.records if isinstance(x, OTHERS)]
        return [*step_by_step(self.records), *others, self.stalled]

    @property
    def numbers(self) -> list[int]:
        steps = (x for x in self.records if isinstance(x, StepDone))
        return sorted(x.step + k for x in steps for k in range(len(x.ends_ns)))


def traffic(rng: Random) -> list[Arrival | Cancel]:
    """Clients give up: during holds, at the instant of an arrival or of a step's end."""
    items: list[Arrival | Cancel] = []
    now = 0
    for k in range(rng.randint(1, 7)):
        now += rng.choice([0, 0, 1, 50, 100, 107, 114, 600, 2500])
        prompt, n = rng.randint(1, 20), rng.choice([1, 1, 1, 2, 3])
        ids = rng.choice(STEMS)[:prompt]
        sizes = (prompt, rng.randint(1, 25))
        items.append(arrival(f"r{k}", *sizes, cap=rng.randint(1, 25), at=now, n=n, prompt_ids=ids))
        if rng.randrange(3) == 0:
            later = rng.choice([0, rng.randrange(3000), 100 * rng.randrange(30)])
            items.append(Cancel(now + later, rng.choice([f"r{k}", f"r{k}#1"])))
    return sorted(items, key=lambda x: x.time_ns)


def drawn(rng: Random, seed: int, prefix: bool) -> RandomPlans:
    return RandomPlans(Random(seed), RandomPlans.KINDS - ({"rewrite"} if prefix else set()))


def vllm(limits: Any, hold: int = 1000) -> VllmV1:
    ctx = Context(
        kind="scheduler",
        name="vllm_v1",
        rng=seeded(0, "scheduler", "vllm_v1"),
        model=TOY_MODEL,
        hardware=None,
        limits=limits,
    )
    config = VllmV1Config(
        max_num_batched_tokens=limits.max_batch_tokens,
        max_num_seqs=limits.max_batch_requests,
        hold_steps=hold,
    )
    return VllmV1(config, ctx)


class Shared(ToyCost):
    """Lanes share the device: prompts keep one resource busy, decodes another."""

    def busy(self, batch: Batch) -> Mapping[str, int]:
        (price,), tokens = self.price(batch, 1), min(batch.num_tokens(), 12)
        return {"compute": price * tokens // 12, "memory": price * (16 - tokens) // 16}


def run(
    seed: int, way: tuple[int, int], foresight: bool, hold: int | None = None, shared: bool = False
) -> Ran:
    """One run of drawn traffic on a drawn device; ``hold``: under vLLM's scheduler, else any legal plans."""
    rng = Random(seed)
    items = traffic(rng)
    rows = rng.choice([1, 2, 4])
    limits = toy_limits(tokens=12, requests=rows, model_len=40, lanes=way[0], in_flight=way[1])
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths, foresight=foresight)
    # without a price per token, lanes often end at the same instant
    prices = {"token_ns": rng.choice([0, 7]), "context_ns": rng.choice([0, 1])}
    cost = (Shared if shared else ToyCost)(step_ns=100, transfer_ns=rng.choice([100, 137]), **prices)
    window, prefix = rng.choice([None, None, 5]), rng.randrange(3) == 0
    store = HashStore(HashConfig(), _context("prefix", "hash", limits)) if prefix and not window else None
    kvcache = ToyKV(toy_layout(4, windows=[window]))
    scheduler = Told(drawn(rng, seed, store is not None) if hold is None else vllm(limits, hold))
    records: list[Record] = []
    engine = make_engine(
        scheduler,
        kvcache=kvcache,
        pages=rng.choice([12, 14, 20]),
        host_pages=12 if window is None else 0,
        limits=limits,
        cost=cost,
        horizon=executor.horizon,
        shares=rng.randrange(3) > 0,
        prefix=store,
    )
    driver = VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    )
    try:
        driver.run()
    except StallError:  # drawn plans may leave somebody paused for good
        assert hold is None
        return Ran(records, scheduler.calls, len(executor.launched), True)
    engine.check_integrity()
    assert engine.ledger.free() == engine.ledger.total()
    return Ran(records, scheduler.calls, len(executor.launched), False)


def _context(kind: str, name: str, limits: Any) -> Context:
    rng = seeded(0, kind, name)
    return Context(kind=kind, name=name, rng=rng, model=TOY_MODEL, hardware=None, limits=limits)


def compare(seed: int, way: tuple[int, int], tally: Counter[str], shared: bool = False) -> None:
    held, stepped = (run(seed, way, foresight, shared=shared) for foresight in (True, False))
    for k, (one, other) in enumerate(zip(held.calls, stepped.calls, strict=False)):
        assert one == other, f"seed {seed}: call {k} is shown something else"
    assert held.steps == stepped.steps, f"seed {seed}"
    assert held.numbers == stepped.numbers == list(range(len(held.numbers))), f"seed {seed}"
    tally["fewer launches"] += held.launches < stepped.launches


def compare_with_planning_every_step(
    seed: int, way: tuple[int, int], tally: Counter[str], shared: bool = False
) -> None:
    held, planned = (run(seed, way, True, hold, shared) for hold in (1000, 1))
    assert held.steps == planned.steps, f"seed {seed}"
    tally["fewer calls"] += len(held.calls) < len(planned.calls)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_held_run_is_the_stepped_run(way: tuple[int, int]) -> None:
    tally: Counter[str] = Counter()
    for seed in (
        *seeds(120),
        252,
    ):  # 252: a page that a cut launch has copied is free between two of its steps
        compare(seed, way, tally)
    assert (tally["fewer launches"] > 5) == (way[1] == 1), "nothing was held"


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_held_run_is_the_one_planned_every_step(way: tuple[int, int]) -> None:
    """As far as the scheduler holds only what it would plan again, which vLLM's does."""
    tally: Counter[str] = Counter()
    for seed in seeds(60):
        compare_with_planning_every_step(seed, way, tally)
    assert tally["fewer calls"] > 30


@pytest.mark.parametrize("way", WAYS[2:], ids=str)
def test_a_held_run_is_the_stepped_run_when_lanes_share_the_device(way: tuple[int, int]) -> None:
    tally: Counter[str] = Counter()
    for seed in seeds(60):
        compare(seed, way, tally, shared=True)
        compare_with_planning_every_step(seed, way, tally, shared=True)
        alone, beside = (run(seed, way, True, hold=1000, shared=shared) for shared in (False, True))
        tally["slower"] += alone.steps != beside.steps
    assert (tally["fewer launches"] > 5) == (way[1] == 1) and tally["slower"] > 30


def serve(
    plan: Any, items: list[Arrival | Cancel], lanes: int = 2, foresight: bool = True, token_ns: int = 0
) -> Ran:
    """A worked case: every step takes 100 ns, and what its tokens cost."""
    truths: dict[str, Truth] = {}
    executor, cost = ToyExecutor(truths, foresight=foresight), ToyCost(step_ns=100, token_ns=token_ns)
    scheduler = Told(plan if not callable(plan) else Script(then=plan))
    records: list[Record] = []
    limits = toy_limits(lanes=lanes)
    engine = make_engine(scheduler, pages=64, limits=limits, cost=cost, horizon=executor.horizon)
    VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload(items),
        truths=truths,
        emit=records.append,
    ).run()
    return Ran(records, scheduler.calls, len(executor.launched), False)


def one_each(view: StepView) -> StepPlan:
    """Every lane runs one request, and holds it."""
    for request in view.running:
        return StepPlan([request.next_token], hold=Hold(50))
    for request in view.waiting:
        return StepPlan([Tokens(request, request.pending_tokens)])
    return StepPlan()


def test_a_lane_alone_is_fast_forwarded_and_the_idle_one_is_not_asked() -> None:
    for foresight in (True, False):
        ran = serve(one_each, [arrival("a", 4, 20)], foresight=foresight)
        # at 0 and at 100 both; at its end nobody is left to be planned
        assert [call[:2] for call in ran.calls] == [(0, 0), (0, 1), (100, 0), (100, 1)]
        assert ran.launches == (2 if foresight else 20)
        if foresight:
            assert [x.held for x in ran.records if isinstance(x, Planned)] == [1, 19]


def test_what_another_lane_plans_or_ends_ends_a_hold() -> None:
    """b arrives at 250: a is asked at 300, since it decided without knowing of b, and from then on at its
    every step's end, since b's come in between.
    """
    for foresight in (True, False):
        ran = serve(one_each, [arrival("a", 4, 8), arrival("b", 4, 3, at=250)], foresight=foresight)
        asked = [call[0] for call in ran.calls if call[1] == 0]
        assert asked == [0, 100, 300, 400, 500, 600, 700][: len(asked)] and len(asked) > 4
        ends = [(x.lane, x.start_ns, x.ends_ns[-1]) for x in ran.records if isinstance(x, StepDone)]
        assert (1, 250, 350) in ends and (1, 350, 450) in ends and (0, 300, 400) in ends


def test_what_another_lane_plans_at_the_same_instant_ends_a_hold() -> None:
    """At 300 both lanes are asked: a's first, which holds and does not know of b's long step."""
    for foresight in (True, False):
        ran = serve(
            one_each, [arrival("a", 4, 8), arrival("b", 12, 3, at=300)], foresight=foresight, token_ns=50
        )
        asked = [call[0] for call in ran.calls if call[1] == 0]
        assert asked[:4] == [0, 300, 450, 1050], "asked after its first step, then when b's has ended"


def test_requests_stay_on_their_lane() -> None:
    """The first lane is idle when the second, alone by then, ends a step: asked first, it would take over."""
    items: list[Arrival | Cancel] = [arrival("a", 4, 2), arrival("b", 4, 9, at=50)]
    for hold in (1, 50):

        def plan(view: StepView, hold: int = hold) -> StepPlan:
            out = one_each(view)
            out.hold = Hold(hold) if hold > 1 and out.hold else None
            return out

        ran = serve(plan, items)
        lanes = {x.requests[0]: x.lane for x in ran.records if isinstance(x, StepDone)}
        assert lanes == {"a": 0, "b": 1}


@pytest.mark.parametrize("step_ns", [100, 101])
@pytest.mark.parametrize("lanes", [2, 3])
@pytest.mark.timeout(300)
def test_lanes_do_not_drop_their_own_in_turn_for_ever(lanes: int, step_ns: int) -> None:
    """Each fits alone, and all begin together: the oldest of a lane must wait and not give up its pages."""
    limits = toy_limits(tokens=12, requests=1, model_len=40, lanes=lanes)
    truths: dict[str, Truth] = {}
    executor = ToyExecutor(truths)
    cost = ToyCost(step_ns=step_ns, token_ns=0)
    engine = make_engine(vllm(limits), pages=10, limits=limits, cost=cost, horizon=executor.horizon)
    records: list[Record] = []
    driver = VirtualDriver(
        engines=[engine],
        executors=[executor],
        costs=[cost],
        workload=ListWorkload([arrival(f"r{k}", 8, 25, at=k) for k in range(3)]),
        truths=truths,
        emit=records.append,
    )
    driver.run()
    assert [x.outcome for x in records if isinstance(x, RequestFinished)] == ["completed"] * 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_long(way: tuple[int, int]) -> None:
    tally: Counter[str] = Counter()
    for seed in seeds(5000):
        shared = seed % 2 == 0
        compare(seed, way, tally, shared)
        compare_with_planning_every_step(seed, way, tally, shared)
