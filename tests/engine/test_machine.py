"""Any order of events, any legal plan: nothing is lost, nothing is booked twice.

``EngineMachine`` plays the driver with every freedom the contract leaves: launches and transfers end in any
order and after any number of steps, clients give up at any time, pools shrink, the device dies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import Phase as Phases
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from servelab.core.context import Context, seeded
from servelab.core.engine.ledger import WITHDRAWN
from servelab.core.errors import PluginCallError
from servelab.core.events import Batch, Command, Launch, Schedule
from servelab.core.families.scheduler import StepView
from servelab.core.plan import Outcome, StepPlan
from servelab.core.records import RequestArrived
from servelab.core.request import Phase, Truth
from servelab.core.testing.fakes import (
    TOY_MODEL,
    RandomPlans,
    Rig,
    ToyKV,
    make_engine,
    toy_layout,
    toy_limits,
)
from servelab.plugins.schedulers.vllm_v1 import VllmV1, VllmV1Config

SHORT = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phases.explicit, Phases.generate],  # shrinking takes minutes: the long profile does it
)
LONG = settings(SHORT, max_examples=1500, stateful_step_count=100, derandomize=False, phases=list(Phases))


dice = st.integers(0, 1 << 16).map(Random)


class Fault:
    """Wraps a scheduler; raises when told to."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.armed = False

    def plan(self, view: StepView) -> StepPlan:
        if self.armed:
            self.armed = False
            raise ZeroDivisionError("planted")
        plan: StepPlan = self.inner.plan(view)
        return plan


class Pages:
    """Pages a launch names, as they were when it started."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.tables = [[list(t) for t in lease.tables] for lease in batch.leases]


class EngineMachine(RuleBasedStateMachine):
    """The engine under the random scheduler."""

    rig: Rig
    lanes = 2

    @initialize(
        lanes=st.integers(1, 2),
        in_flight=st.integers(1, 2),
        pages=st.integers(5, 20),
        host=st.sampled_from([0, 4, 10]),
        page_tokens=st.sampled_from([(1,), (4,), (3, 2)]),
        windows=st.sampled_from([(), (), (1,), (2,), (5,), (None, 3), (None, 7), (4, 9)]),
        tokens=st.integers(3, 20),
        rows=st.integers(1, 5),
        foresight=st.booleans(),
        checks=st.sampled_from(["basic", "full"]),
        seed=st.integers(0, 9999),
    )
    def start(
        self,
        lanes: int,
        in_flight: int,
        pages: int,
        host: int,
        page_tokens: tuple[int, ...],
        windows: tuple[int | None, ...],
        tokens: int,
        rows: int,
        foresight: bool,
        checks: Any,
        seed: int,
    ) -> None:
        self.limits = toy_limits(
            tokens=tokens, requests=rows, model_len=24, lanes=min(lanes, self.lanes), in_flight=in_flight
        )
        self.fault = Fault(self.scheduler(Random(seed)))
        truths: dict[str, Truth] = {}
        engine = make_engine(
            self.fault,
            kvcache=ToyKV(toy_layout(*page_tokens, windows=windows)),
            pages=pages,
            host_pages=host,
            limits=self.limits,
            checks=checks,
            prefix=self.store(),
            shares=True,
            horizon=lambda batch, steps: self.rig.executor.horizon(batch, steps),
        )
        self.rig = Rig(engine, truths=truths, auto=False)
        self.rig.executor.foresight = foresight
        self.pages = pages
        self.seen_output: dict[str, int] = {}
        self.fences: dict[int, Pages] = {}
        self.lost = False
        self.several(Random(seed))

    def scheduler(self, rng: Random) -> Any:
        return RandomPlans(rng)

    def store(self) -> Any:
        """The prefix store, if any."""
        return None

    def more(self, prompt: int) -> dict[str, Any]:
        """What else a request states."""
        return {}

    # -------------------------------------------------------------------- rules

    @rule(
        prompt=st.integers(1, 16) | st.just(24),
        output=st.integers(1, 10),
        cap=st.integers(1, 12),
        n=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def arrive(self, prompt: int, output: int, cap: int, n: int) -> None:
        live = len(self.rig.engine.requests)
        if live < 6:
            id = f"r{self.rig.engine.arrived}"
            self.rig.arrive(id, prompt, output, cap=cap, n=n, **self.more(prompt))
            self.plan()

    def plan(self) -> None:
        before = {lane: len(f) for lane, f in self.rig.flights.items()}
        self.note(self.rig.send(Schedule(), at=self.rig.now_ns))
        for lane, flights in self.rig.flights.items():
            assert len(flights) <= self.limits.max_in_flight, f"lane {lane} had {before[lane]}"

    def note(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Launch):
                self.check_batch(command.batch)
                self.fences[command.batch.launch] = Pages(command.batch)

    @rule()
    def schedule(self) -> None:
        self.plan()

    @precondition(lambda self: any(self.rig.flights.values()))
    @rule(rng=dice)
    def finish(self, rng: Random) -> None:
        lane = rng.choice([i for i, flights in self.rig.flights.items() if flights])
        batch = self.rig.flights[lane][0]
        steps = rng.choice([batch.steps, rng.randint(1, batch.steps)])
        more = steps < batch.steps and rng.randrange(2) == 0  # cut short, with a step still running
        outcomes = []
        for i, r in enumerate(batch.requests):
            draft = batch.extras[i].draft if i in batch.extras else 0
            accept = rng.randint(0, draft)
            outcome = self.rig.executor.outcome(batch, i, steps, accept)
            if outcome.finish and not draft and len(outcome.tokens) > 1 and r.phase is not Phase.FINISHED:
                assert r.generated + steps == self.rig.truths[r.id].output_tokens, "ran past the end"
            outcomes.append(outcome)
        self.rig.finish(lane, steps=steps, outcomes=outcomes, more=more)
        if more:
            assert batch.steps == 1
            self.check_batch(batch)
            self.fences[batch.launch] = Pages(batch)
        else:
            self.fences.pop(batch.launch)
        if rng.randrange(5):  # else more happens at this instant
            self.plan()

    @precondition(lambda self: self.rig.transfers)
    @rule(rng=dice)
    def transferred(self, rng: Random) -> None:
        self.rig.finish_transfer(rng.choice(list(self.rig.transfers)))
        if rng.randrange(5):
            self.plan()

    @precondition(lambda self: self.rig.engine.requests)
    @rule(rng=dice)
    def abort(self, rng: Random) -> None:
        id = rng.choice(list(self.rig.engine.requests))
        self.rig.abort(id)
        assert len(self.rig.ends(id)) == 1, "an abort takes effect at once"

    @rule()
    def tick(self) -> None:
        self.rig.tick()
        self.plan()

    @rule(rng=dice)
    def resize(self, rng: Random) -> None:
        ledger = self.rig.engine.ledger
        pool = rng.randrange(len(ledger.pools))
        ledger.resize(pool, rng.randint(-4, 4))

    @precondition(lambda self: not self.lost)
    @rule(rng=dice)
    def several(self, rng: Random) -> None:
        """A hundred events in a row, most of them completions: rules alone seldom get far."""
        for _ in range(100):
            moves: list[Any] = [self.schedule, self.tick]
            if any(self.rig.flights.values()):
                moves += [self.finish] * 12
            if self.rig.transfers:
                moves += [self.transferred] * 6
            if self.rig.engine.requests:
                moves.append(self.abort)
            if len(self.rig.engine.requests) < 4:
                moves += [self.arrive] * 2
            move = rng.choice(moves)
            if move == self.arrive:
                n = rng.choice([1, 1, 1, 2, 3])
                self.arrive(rng.randint(1, 16), rng.randint(1, 10), rng.randint(1, 12), n)
            elif move in (self.schedule, self.tick):
                move()
            else:
                move(rng)
            self.everything_holds()

    @precondition(lambda self: not self.lost and self.rig.engine.arrived > 3)
    @rule(sure=st.integers(0, 5))
    def lose(self, sure: int) -> None:
        if sure:
            return
        live = list(self.rig.engine.requests)
        late = [(lane, b) for lane, flights in self.rig.flights.items() for b in flights]
        self.rig.lose()
        assert not self.rig.engine.requests
        assert all([x.outcome for x in self.rig.ends(id)] == ["failed"] for id in live)
        self.lost = True
        self.fences.clear()
        for lane, batch in late:  # completions that were already on their way
            outcomes = [Outcome() for _ in batch.requests]
            self.rig.flights[lane].popleft()
            self.rig.finish_late(lane, batch, outcomes)
        for id_ in list(self.rig.transfers):
            self.rig.finish_transfer(id_)
        assert self.rig.engine.in_flight == 0

    @precondition(lambda self: self.rig.engine.requests and not self.lost)
    @rule()
    def scheduler_raises(self) -> None:
        before = self.freeze()
        self.fault.armed = True
        try:
            self.plan()
        except PluginCallError as error:
            assert "ZeroDivisionError: planted" in str(error)
            # what went out before in the same call, a held lane's next launch, stands
            assert self.freeze() == before or self.limits.lanes > 1
            said, self.rig.engine._out = self.rig.engine._out, []
            self.rig._take(said)
            self.note(said)
        self.fault.armed = False

    # --------------------------------------------------------------- invariants

    def freeze(self) -> object:
        engine = self.rig.engine
        return (
            {id: r.view.freeze() for id, r in engine.requests.items()},
            [list(q) for q in engine.queues],
            engine.ledger.free(),
            engine.ledger.free("host"),
            engine.step,
            engine.in_flight,
        )

    def check_batch(self, batch: Batch) -> None:
        assert batch.num_tokens() <= self.limits.max_batch_tokens
        assert len(batch.requests) <= self.limits.max_batch_requests
        assert len({r.id for r in batch.requests}) == len(batch.requests)
        for i, lease in enumerate(batch.leases):
            item = batch.extras.get(i)
            assert batch.starts[i] >= 0
            if batch.requests[i].lease is not lease or batch.requests[i].phase is Phase.FINISHED:
                continue  # it ended while a held launch went on: its row is dropped
            if item is None or item.advance == "append":
                draft = item.draft if item else 0
                reach = batch.starts[i] + batch.tokens[i] + draft
                for pool, first, table in zip(
                    self.rig.engine.ledger.pools, lease.first, lease.tables, strict=True
                ):
                    assert reach <= (first + len(table)) * pool.page_tokens, "writes beyond its pages"
            for pool, first in zip(self.rig.engine.ledger.pools, lease.first, strict=True):
                seen = max(0, batch.starts[i] + 1 - (pool.window_tokens or 1 << 30))
                assert first * pool.page_tokens <= seen, "reads what was given up"

    def integrity(self) -> None:
        self.rig.engine.check_integrity()

    def pages_are_conserved(self) -> None:
        ledger = self.rig.engine.ledger
        for i in range(len(ledger.pools)):
            tier = ledger._device[i]
            tables: Counter[int] = Counter()
            fading: set[int] = set()
            families: dict[int, set[str]] = {}
            """By page, the prompts whose samples hold it or still read it."""
            for lease in ledger._leases.values():
                given_up = {page for pool, page, _ in lease.sources if pool == i}
                tables.update(lease.tables[i])
                fading |= given_up
                for page in (*lease.tables[i], *given_up):
                    families.setdefault(page, set()).add(lease.owner.partition("#")[0])
            assert all(len(names) == 1 for names in families.values()), "a page is with two prompts"
            assert all(tier.refs[page] == n for page, n in tables.items()), "references are miscounted"
            fading -= set(tables)
            gone = tier.refs.count(WITHDRAWN)
            assert tier.free + len(tables) + len(fading) + gone == self.pages
            assert tier.promised == sum(p[i] for p in ledger._promises.values())
            kv = ledger.kvcache
            assert isinstance(kv, ToyKV)
            assert kv.free[i, "device"] == {p for p, refs in enumerate(tier.refs) if refs == 0} - fading

    def fences_hold(self) -> None:
        ledger = self.rig.engine.ledger
        owners = [
            {
                (p, id(lease))
                for lease in ledger._leases.values()
                for p in (*lease.tables[i], *(page for pool, page, _ in lease.sources if pool == i))
            }
            for i in range(len(ledger.pools))
        ]
        for fence in self.fences.values():
            for lease, tables in zip(fence.batch.leases, fence.tables, strict=True):
                for i, table in enumerate(tables):
                    for page in table:
                        assert (page, id(lease)) in owners[i], f"page {page} was given away in flight"

    def fences_count_what_is_in_flight(self) -> None:
        engine = self.rig.engine
        named: Counter[int] = Counter(id(t.lease) for t in engine.transfers.values())
        launches: Counter[str] = Counter()
        lanes: dict[str, set[int]] = {}
        for lane, flights in self.rig.flights.items():
            for batch in flights:
                named.update(map(id, batch.leases))
                for r, lease in zip(batch.requests, batch.leases, strict=True):
                    if r.lease is lease:
                        launches[r.id] += 1
                        lanes.setdefault(r.id, set()).add(lane)
        for lease in engine.ledger._leases.values():
            assert lease.in_flight == named[id(lease)]
            assert lease.in_flight or not lease.released, "a released lease was left behind"
        for r in engine.requests.values():
            assert r.launches == launches[r.id]
            assert len(lanes.get(r.id, ())) <= 1, "in flight on two lanes"

    def tokens_add_up(self) -> None:
        for r in self.rig.engine.requests.values():
            first = 1000 * r.spec.sample
            assert r.output == list(range(first, first + r.generated)), "output lost, repeated or disordered"
            assert len(r.token_times) == r.generated
            assert r.token_times == sorted(r.token_times)
            assert r.generated >= self.seen_output.get(r.id, 0), "output was taken back"
            self.seen_output[r.id] = r.generated
            assert r.generated < r.max_new_tokens
            assert r.generated + r.expected <= r.max_new_tokens
            assert min(r.computed, r.flying, r.expected, r.pending, r.slack) >= 0
            assert r.computed <= r.prompt_tokens + r.generated
            left = r.prompt_tokens + r.generated + r.expected - r.computed - r.flying
            capped = r.generated + r.expected >= r.max_new_tokens
            drafting = left < 0
            assert r.pending == left or (r.pending == 0 and (capped or drafting))
            if r.phase in (Phase.RUNNING, Phase.PAUSED):
                pools = zip(self.rig.engine.ledger.pools, r.lease.first, r.lease.tables, strict=True)
                sizes = [
                    (pool, first, (first + len(table)) * pool.page_tokens) for pool, first, table in pools
                ]
                at = r.computed + r.flying
                ledger = self.rig.engine.ledger
                tails = [ledger._shared_tail(i, r.lease, at) for i in range(len(sizes))]
                room = min(end for _, _, end in sizes) - at
                # after a fork it is 0 until the request asks again, even if the other has made its copy
                assert r.slack == room or (r.slack == 0 and ledger._shares)
                assert not r.slack or all(tail is None for tail in tails), "it would write to a shared page"
                for pool, first, _ in sizes:
                    hidden = max(0, r.computed + 1 - (pool.window_tokens or 1 << 30))
                    assert first == hidden // pool.page_tokens, "pages nobody sees are kept, or seen ones not"
            if r.phase in (Phase.WAITING, Phase.FORKING, Phase.SWAPPED):
                assert not any(r.lease.tables)

    def one_terminal_record_each(self) -> None:
        ends = Counter(x.request for x in self.rig.ends())
        arrived = [x.request for x in self.rig.records if isinstance(x, RequestArrived)]
        assert all(n == 1 for n in ends.values())
        assert set(ends) | set(self.rig.engine.requests) == set(arrived)
        assert not set(ends) & set(self.rig.engine.requests)
        times = [x.t_ns for x in self.rig.records]
        assert times == sorted(times), "records out of order"

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "rig"):
            self.integrity()
            self.pages_are_conserved()
            self.fences_hold()
            self.fences_count_what_is_in_flight()
            self.tokens_add_up()
            self.one_terminal_record_each()

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        for id in list(self.rig.engine.requests):
            self.rig.abort(id)
        self.rig.drain()
        engine = self.rig.engine
        engine.check_integrity()
        assert engine.in_flight == 0
        assert engine.ledger.free() == engine.ledger.total(), "pages were lost"
        assert engine.ledger.free("host") == engine.ledger.total("host"), "host pages were lost"
        assert not engine.ledger._leases


class VllmMachine(EngineMachine):
    """The engine under ``vllm_v1``."""

    def scheduler(self, rng: Random) -> Any:
        limits = self.limits
        config = VllmV1Config(
            max_num_batched_tokens=limits.max_batch_tokens,
            max_num_seqs=limits.max_batch_requests,
            long_prefill_token_threshold=rng.randrange(0, 4),
            hold_steps=rng.choice([1, 4, 64]),
        )
        return VllmV1(
            config,
            Context(
                kind="scheduler",
                name="vllm_v1",
                rng=seeded(0, "scheduler", "vllm_v1"),
                model=TOY_MODEL,
                hardware=None,
                limits=limits,
            ),
        )


TestEngine = EngineMachine.TestCase
TestEngine.settings = SHORT
TestVllm = VllmMachine.TestCase
TestVllm.settings = SHORT


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [EngineMachine, VllmMachine])
def test_long_runs(machine: type[EngineMachine]) -> None:
    long: Any = type(f"Long{machine.__name__}", (machine,), {})
    case = long.TestCase
    case.settings = LONG
    case("runTest").runTest()
