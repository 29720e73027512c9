"""Any order of events, any registered parts: nothing is lost or booked twice, and all KV is the right KV.

``EngineMachine`` builds an engine of plugins that may meet and plays its driver with every freedom that the
contract leaves: launches and transfers end in any order and after any number of steps, clients give up at any
time, pools shrink and grow, plugins raise, the device dies. After every event all that must hold is checked,
and a shadow of every page (``shadow``) says whether each request reads KV of its own text.

For a plugin of one's own::

    from servelab.core.testing.machine import QUICK, EngineMachine, run_machine


    class MyMachine(EngineMachine):
        only = {"scheduler": ["mine"]}


    def test_any_order_of_events() -> None:
        run_machine(MyMachine, QUICK)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any, ClassVar, Literal

from hypothesis import HealthCheck, Phase, currently_in_test_context, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from servelab.core.errors import PluginCallError, ServeLabError
from servelab.core.events import Batch, Command, Emit, Launch, Schedule
from servelab.core.facts import ModelFacts
from servelab.core.fitting import check_layout, check_shareable
from servelab.core.plan import Outcome
from servelab.core.records import RequestAdmitted, RequestArrived, RequestForked, to_dict
from servelab.core.registry import Registry
from servelab.core.request import Phase as Stage
from servelab.core.request import Truth
from servelab.core.testing.fakes import TOY_MODEL, RandomPlans, Rig, make_engine, toy_limits
from servelab.core.testing.faulty import Faulty
from servelab.core.testing.invariants import Invariants
from servelab.core.testing.parts import Combination, Parts, combinations, with_toys
from servelab.core.testing.shadow import Launched, Shadow

QUICK = settings(
    max_examples=3,
    stateful_step_count=15,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes: the long profile does it
)
"""For every change: seconds, and the same each time."""
LONG = settings(
    QUICK, max_examples=70, stateful_step_count=100, derandomize=False, print_blob=True, phases=list(Phase)
)
"""For a night: other draws each time, and what fails is made small."""

MODEL_LEN = 24
STEMS = ([1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4, 9, 9, 9, 9] * 3, [0] * 24)
"""Prompts are beginnings of these, so that they often repeat each other."""
WINDOWS = ((), (), (), (3, 3, 3, 3), (None, None, 5, 5), (2, None, 7, 2))
"""By layer of the toy model."""
CLASSES = ("online", "online", "offline", "latency", "deadline")

dice = st.integers(0, 1 << 16).map(Random)


class EngineMachine(Invariants, RuleBasedStateMachine):
    """The engine under parts drawn from all that are registered."""

    only: ClassVar[Mapping[str, Sequence[str | None]]] = {}
    """By kind (``scheduler``, ``kvcache``, ``prefix``), the names to draw from; None: no prefix store."""
    config: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """By kind, settings to use instead of drawn ones."""
    registry: Registry | None = None
    """Where plugins are; default: everything installed, and the toys of ``parts``."""
    tally: ClassVar[Counter[str]] = Counter()
    """What has happened in all examples so far: see that it is what you think is being tested."""
    progress: ClassVar[Any] = None
    """A static method that is given the tally after every example."""
    digest: ClassVar[Any] = None
    """A hash object that is fed every record."""

    # -------------------------------------------------------------------- start

    @initialize(
        pick=st.integers(0, 9999),
        lanes=st.integers(1, 2),
        in_flight=st.integers(1, 2),
        room=st.integers(0, 24),
        host=st.sampled_from([0, 4, 10]),
        windows=st.sampled_from(WINDOWS),
        tokens=st.integers(3, 20),
        rows=st.integers(1, 5),
        foresight=st.sampled_from([True, True, False]),
        eager=st.booleans(),
        checks=st.sampled_from(["basic", "full"]),
        seed=st.integers(0, 9999),
    )
    def start(
        self,
        *,
        pick: int,
        lanes: int,
        in_flight: int,
        room: int,
        host: int,
        windows: tuple[int | None, ...],
        tokens: int,
        rows: int,
        foresight: bool,
        eager: bool,
        checks: Literal["basic", "full"],
        seed: int,
    ) -> None:
        self.registry = self.registry or with_toys()
        found = combinations(self.registry, self.only)
        assert found, f"no registered parts may meet under {dict(self.only)}"
        self.parts = found[pick % len(found)]
        if currently_in_test_context():
            note(f"parts: {self.parts}")
        self.rng = Random(seed)
        self.limits = toy_limits(
            tokens=tokens,
            requests=rows,
            model_len=MODEL_LEN,
            lanes=lanes if self.parts.lanes else 1,
            in_flight=in_flight if self.parts.ahead else 1,
        )
        self.truths: dict[str, Truth] = {}
        engine = self._engine(windows, room, host, checks)
        self.rig = Rig(engine, truths=self.truths, auto=False)
        self.rig.executor.foresight = foresight
        self.capacity = engine.capacity.device_pages
        tenants = not getattr(self.store, "share_tenants", False)
        self.shadow = Shadow(engine, eager=eager, tenants=tenants)
        self.launched: dict[int, Launched] = {}
        """By launch, what is in flight."""
        self.seen_output: dict[str, int] = {}
        self.read = 0
        self.open: set[str] = set()
        self.turns: dict[str, tuple[str, list[int]]] = {}
        """By live program, its last request and that one's prompt."""
        self.several(Random(seed))

    def _engine(
        self, windows: tuple[int | None, ...], room: int, host: int, checks: Literal["basic", "full"]
    ) -> Any:
        chosen, registry = self.parts, self.registry
        assert registry is not None
        model, kvcache, layout = self._kvcache(replace(TOY_MODEL, windows=windows), chosen)
        make = self._parts(model)
        store = None
        if chosen.prefix is not None:
            store = make.make("prefix", chosen.prefix)
        scheduler = make.make("scheduler", chosen.scheduler)
        if store is not None and isinstance(scheduler, RandomPlans):
            scheduler.kinds -= {"rewrite"}  # refused with a store
        provides = frozenset().union(
            *(
                registry.spec(kind, name).provides
                for kind in ("scheduler", "kvcache", "prefix")
                if (name := getattr(chosen, kind)) is not None
            )
        )
        pages = []
        for pool in layout.pools:
            most = pool.most_tokens(MODEL_LEN, self.limits.max_batch_tokens)
            need = kvcache.pages_for(pool, None, most)
            pages.append(need + need * room // 12)  # compose() asks that the longest request fits
        self.scheduler, self.kvcache = Faulty(scheduler), Faulty(kvcache)
        self.store = Faulty(store) if store is not None else None
        return make_engine(
            self.scheduler,
            kvcache=self.kvcache,
            pages=pages,
            host_pages=host if "kvcache.swap" in provides else 0,
            limits=self.limits,
            checks=checks,
            prefix=self.store,
            shares="kvcache.fork" in provides,
            horizon=lambda batch, steps: self.rig.executor.horizon(batch, steps),
            model=model,
        )

    def _parts(self, model: ModelFacts) -> Parts:
        assert self.registry is not None
        return Parts(
            self.registry,
            self.rng,
            limits=self.limits,
            model=model,
            oracle=lambda id: self.truths[id],
            config=self.config,
        )

    def _kvcache(self, model: ModelFacts, chosen: Combination) -> tuple[ModelFacts, Any, Any]:
        """A kvcache and a model that its layout serves: without windows where it refuses them."""
        for _ in range(100):
            kvcache = self._parts(model).make("kvcache", chosen.kvcache)
            layout = kvcache.layout(model)
            try:
                if model.windows:
                    check_layout(layout, chosen.kvcache, model)
                if chosen.prefix is not None:
                    check_shareable(layout, chosen.prefix)
                    self._parts(model).make("prefix", chosen.prefix).attach(layout)
            except ServeLabError:
                model = replace(model, windows=())
                continue
            return model, kvcache, layout
        raise AssertionError(f"no layout of kvcache {chosen.kvcache!r} serves {chosen}")

    # -------------------------------------------------------------------- rules

    @precondition(lambda self: self.ready)
    @rule(
        prompt=st.integers(1, 16) | st.just(MODEL_LEN),
        output=st.integers(1, 16),
        cap=st.integers(1, 20),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        rng=dice,
    )
    def arrive(self, prompt: int, output: int, cap: int, n: int, rng: Random) -> None:
        if len(self.rig.engine.requests) >= 6:
            return
        self.tally["rules"] += 1
        id = f"r{self.rig.engine.arrived}"
        more: dict[str, Any] = {
            "prompt_ids": rng.choice(STEMS)[:prompt] if rng.randrange(8) else None,
            "tenant": rng.choice(["a", "a", "b"]),
            "request_class": rng.choice(CLASSES),
            "priority": rng.randrange(-1, 2),
        }
        if rng.randrange(3) == 0:
            prompt, turn = self._turn(id, prompt, rng)
            more |= turn
        self.rig.arrive(id, prompt, output, cap=cap, n=n, **more)
        self.plan()

    def _turn(self, id: str, prompt: int, rng: Random) -> tuple[int, dict[str, Any]]:
        """The next turn of a program whose last one has ended, or the first of another."""
        for program, (last, text) in sorted(self.turns.items()):
            if last in self.rig.engine.requests:
                continue
            (end,) = self.rig.ends(last)
            text = [*text, *range(end.output_tokens)]
            if end.outcome == "completed" and len(text) < MODEL_LEN - 2:
                break
            del self.turns[program]
        else:
            program, text = f"p{self.rig.engine.arrived}", []
        repeats = min(len(text), rng.choice([len(text), len(text) - 1, len(text) // 2]))
        ids = [*text[: max(repeats, 0)], *rng.choice(STEMS)[:prompt]][: MODEL_LEN - 1]
        self.turns[program] = (id, ids)
        return len(ids), {
            "prompt_ids": ids,
            "tenant": "a",
            "program": program,
            "context_tokens": max(repeats, 0),
            "is_last_turn": rng.randrange(4) == 0,
        }

    @property
    def ready(self) -> bool:
        return hasattr(self, "rig") and not self.over

    def plan(self) -> None:
        self.note(self.rig.send(Schedule(), at=self.rig.now_ns))
        for lane, flights in self.rig.flights.items():
            assert len(flights) <= self.limits.max_in_flight, f"lane {lane} has {len(flights)} launches"

    def note(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Launch):
                self.check_batch(command.batch)
                launched = self.launched[command.batch.launch] = Launched(command.batch)
                self.shadow.sent(launched)
        for flights in self.rig.flights.values():
            if flights:
                self.shadow.begin(self.launched[flights[0].launch])

    @precondition(lambda self: self.ready)
    @rule()
    def schedule(self) -> None:
        self.tally["rules"] += 1
        self.plan()

    @precondition(lambda self: self.ready and any(self.rig.flights.values()))
    @rule(rng=dice)
    def finish(self, rng: Random) -> None:
        self.tally["rules"] += 1
        rig = self.rig
        lane = rng.choice([i for i, flights in rig.flights.items() if flights])
        batch = rig.flights[lane][0]
        steps, starts = rng.choice([batch.steps, rng.randint(1, batch.steps)]), list(batch.starts)
        more = steps < batch.steps and rng.randrange(2) == 0  # cut short, with a step still running
        outcomes = []
        for i, r in enumerate(batch.requests):
            draft = batch.extras[i].draft if i in batch.extras else 0
            outcome = rig.executor.outcome(batch, i, steps, rng.randint(0, draft))
            if outcome.finish and not draft and len(outcome.tokens) > 1 and r.phase is not Stage.FINISHED:
                assert r.generated + steps == self.truths[r.id].output_tokens, "ran past the end"
            outcomes.append(outcome)
        launched = self.launched[batch.launch]
        self._finish(lane, batch, steps, outcomes, more)
        self.shadow.end(launched, starts, steps)
        if more:
            assert batch.steps == 1
            self.check_batch(batch)
            self.launched[batch.launch] = again = Launched(batch)
            again.begun = True
        else:
            self.launched.pop(batch.launch)
        self.tally["held"] += steps > 1
        self.note([])
        if rng.randrange(5):  # else more happens at this instant
            self.plan()

    def _finish(self, lane: int, batch: Batch, steps: int, outcomes: list[Outcome], more: bool) -> None:
        self.rig.finish(lane, steps=steps, outcomes=outcomes, more=more)

    @precondition(lambda self: self.ready and self.rig.transfers)
    @rule(rng=dice)
    def transferred(self, rng: Random) -> None:
        self.tally["rules"] += 1
        transfer = self.rig.transfers[rng.choice(list(self.rig.transfers))]
        self.shadow.moved(transfer)
        self.rig.finish_transfer(transfer.id)
        if rng.randrange(5):
            self.plan()

    @precondition(lambda self: self.ready and self.rig.engine.requests)
    @rule(rng=dice)
    def abort(self, rng: Random) -> None:
        self.tally["rules"] += 1
        id = rng.choice(list(self.rig.engine.requests))
        self.rig.abort(id)
        assert len(self.rig.ends(id)) == 1, "an abort takes effect at once"

    @precondition(lambda self: self.ready)
    @rule()
    def tick(self) -> None:
        """A timer, perhaps one that nobody asked for."""
        self.tally["rules"] += 1
        self.rig.tick()
        self.plan()

    @precondition(lambda self: self.ready and any(t > self.rig.now_ns for t in self.rig.timers))
    @rule()
    def wait(self) -> None:
        """Nothing happens until the next timer that was asked for."""
        self.tally["rules"] += 1
        due = min(t for t in self.rig.timers if t > self.rig.now_ns)
        if due < 1 << 39:  # a pin that only its program ends
            self.rig.now_ns = due - self.rig.tick_ns
            self.rig.tick()
            self.plan()

    @precondition(lambda self: self.ready)
    @rule(rng=dice)
    def resize(self, rng: Random) -> None:
        self.tally["rules"] += 1
        ledger = self.rig.engine.ledger
        ledger.device[rng.randrange(len(ledger.pools))].resize(rng.randint(-4, 4))

    @precondition(lambda self: self.ready)
    @rule(rng=dice)
    def several(self, rng: Random) -> None:
        """Many events in a row, most of them completions: rules alone seldom get far."""
        for _ in range(80):
            moves: list[Any] = [self.schedule, self.tick]
            if any(t > self.rig.now_ns for t in self.rig.timers):
                moves.append(self.wait)
            if any(self.rig.flights.values()):
                moves += [self.finish] * 12
            if self.rig.transfers:
                moves += [self.transferred] * 6
            if self.rig.engine.requests:
                moves.append(self.abort)
            if len(self.rig.engine.requests) < 4:
                moves += [self.arrive] * 3
            if rng.randrange(20) == 0:
                moves = [self.resize]
            move = rng.choice(moves)
            if move == self.arrive:
                n = rng.choice([1, 1, 1, 2, 3])
                self.arrive(rng.randint(1, 16), rng.randint(1, 16), rng.randint(1, 20), n, rng)
            elif move in (self.schedule, self.tick, self.wait):
                move()
            else:
                move(rng)
            self.everything_holds()

    @precondition(lambda self: self.ready and self.rig.engine.arrived > 3)
    @rule(sure=st.integers(0, 5))
    def lose(self, sure: int) -> None:
        """The device and all its KV are gone. Rarely, because nothing happens afterwards."""
        if sure != 5:
            return
        self.tally["rules"] += 1
        self.tally["lost"] += 1
        rig = self.rig
        running = list(rig.engine.requests)
        late = [(lane, b) for lane, flights in rig.flights.items() for b in flights]
        rig.lose()
        assert not rig.engine.requests
        assert all([x.outcome for x in rig.ends(id)] == ["failed"] for id in running)
        self.over = True
        self.launched.clear()
        for lane, batch in late:  # completions that were already on their way
            rig.flights[lane].popleft()
            rig.finish_late(lane, batch, [Outcome() for _ in batch.requests])
        for id in list(rig.transfers):
            rig.finish_transfer(id)
        assert rig.engine.in_flight == 0
        rig.arrive("late")
        assert [x.outcome for x in rig.ends("late")] == ["failed"]

    @precondition(lambda self: self.over)
    @rule()
    def afterwards(self) -> None:
        """Nothing can happen any more."""
        assert not self.rig.engine.requests

    @precondition(lambda self: self.ready and self.rig.engine.requests)
    @rule()
    def scheduler_raises(self) -> None:
        """What it leaves is as before the call, and the run could go on."""
        self.tally["rules"] += 1
        before = self.freeze()
        self.scheduler.armed = True
        try:
            self.plan()
        except PluginCallError as error:
            assert "ZeroDivisionError: planted" in str(error)
            self.tally["scheduler raised"] += 1
            if self.scheduler.raised == "plan":
                said, self.rig.engine._out = self.rig.engine._out, []
                # what went out before in the same call, a held lane's next launch, stands
                assert self.freeze() == before or any(isinstance(x, Launch) for x in said)
                self.rig._take(said)
                self.note(said)
            else:  # it could not learn what has happened: nobody says that a run can go on
                self._broken(error)
        finally:
            self.scheduler.armed = False

    @precondition(lambda self: self.ready and self.rig.engine.requests)
    @rule(sure=st.integers(0, 3), rng=dice)
    def other_part_raises(self, sure: int, rng: Random) -> None:
        """The run ends, its error names the part, and every request gets its terminal record."""
        if sure != 3:
            return
        part = rng.choice([x for x in (self.kvcache, self.store) if x is not None])
        part.armed = True
        try:
            for _ in range(rng.randrange(1, 12)):
                self.finish(rng) if any(self.rig.flights.values()) else self.schedule()
                if not part.armed:
                    raise AssertionError(f"what {part.raised}() raised was swallowed")
        except ServeLabError as error:
            who = "kvcache" if part is self.kvcache else "prefix store"
            assert who in str(error) and "ZeroDivisionError: planted" in str(error), str(error)
            self.tally[f"{who} raised in {part.raised}"] += 1
            self._broken(error)
        except Exception:
            self.over = True
            raise
        finally:
            part.armed = False

    def _broken(self, error: Exception) -> None:
        """End the run as drivers do."""
        rig = self.rig
        self.over = True
        said = [c for c in rig.engine.stop(rig.now_ns, "broken") if isinstance(c, Emit)]
        rig._take(said)
        assert not rig.engine.requests
        ends = Counter(x.request for x in rig.ends())
        arrived = {x.request for x in rig.records if isinstance(x, RequestArrived)}
        assert set(ends) == arrived and set(ends.values()) <= {1}, "not one terminal record each"

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

    # --------------------------------------------------------------- invariants

    @invariant()
    def everything_holds_and_plugins_agree(self) -> None:
        if self.ready:
            self.everything_holds()
            self.plugins_agree()

    # ----------------------------------------------------------------------- end

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        rig, engine = self.rig, self.rig.engine
        if not self.over:
            self._come_to_an_end()
            for id in list(engine.requests):
                rig.abort(id)
            rig.drain()
            engine.contexts.drop_all("the run is over")
            rig.drain()
            engine.check_integrity()
            assert engine.in_flight == 0
            assert engine.ledger.free() == engine.ledger.total(), "pages were lost"
            assert engine.ledger.free("host") == engine.ledger.total("host"), "host pages were lost"
            assert not engine.ledger._leases
        self._count()

    def _come_to_an_end(self) -> None:
        """With all memory back and nobody else arriving, a technique serves everyone."""
        engine = self.rig.engine
        if isinstance(self.scheduler.inner, RandomPlans):
            return
        for i, n in enumerate(self.capacity):
            engine.ledger.device[i].resize(n)
        rng = Random(0)
        for _ in range(3000):
            if not engine.requests:
                return
            if self.rig.transfers:
                self.transferred(rng)
            elif any(self.rig.flights.values()):
                self.finish(rng)
            else:
                self.wait() if any(t > self.rig.now_ns for t in self.rig.timers) else self.tick()
        raise AssertionError(f"some requests are never served: {engine.stall_reason()}")

    def _count(self) -> None:
        tally, records = self.tally, self.rig.records
        tally["examples"] += 1
        tally[f"parts {self.parts}"] += 1
        for record in records:
            tally[record.ev] += 1
            tally["hits"] += isinstance(record, RequestAdmitted) and record.cached_tokens > 0
            tally["shared forks"] += isinstance(record, RequestForked) and record.shared_tokens > 0
        tally["copies"] += self.shadow.copies
        if self.digest is not None:
            for record in records:
                self.digest.update(repr(to_dict(record)).encode())
        if self.progress is not None:
            self.progress(tally)


def run_machine(machine: type[EngineMachine], profile: settings = QUICK) -> Counter[str]:
    """Run one; returns what happened.

    Raises:
        AssertionError: an invariant broke; the steps that lead there are printed.
    """

    class Run(machine):  # type: ignore[valid-type, misc]
        registry = machine.registry or with_toys()
        tally: ClassVar[Counter[str]] = Counter()

    Run.__name__ = Run.__qualname__ = machine.__name__
    run_state_machine_as_test(Run, settings=profile)
    return Run.tally
