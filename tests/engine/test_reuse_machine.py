"""Any order of events with a prefix store: every token reads the KV that its own text would have written."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from tests.engine.test_machine import LONG, SHORT, EngineMachine, Pages, VllmMachine, dice

from servelab.core.context import Context, seeded
from servelab.core.engine.ledger import WITHDRAWN
from servelab.core.engine.state import Request
from servelab.core.records import RequestAdmitted, RequestForked
from servelab.core.request import Phase
from servelab.core.testing.fakes import TOY_MODEL, RandomPlans, ToyKV, toy_limits
from servelab.plugins.prefix.hash import HashConfig, HashStore

STEMS = ([1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4, 9, 9, 9, 9] * 3, [0] * 24)
"""Prompts are beginnings of these, so that they often repeat each other."""


class ReuseMachine(EngineMachine):
    """As ``EngineMachine``, with a shadow of every page: which text the KV in each slot stands for."""

    @initialize(
        lanes=st.integers(1, 2),
        in_flight=st.integers(1, 2),
        pages=st.integers(6, 24),
        host=st.sampled_from([0, 0, 8]),
        page_tokens=st.sampled_from([(1,), (2,), (4,)]),
        windows=st.just(()),
        tokens=st.integers(3, 20),
        rows=st.integers(1, 5),
        foresight=st.booleans(),
        checks=st.sampled_from(["basic", "full"]),
        seed=st.integers(0, 9999),
    )
    def start(self, **drawn: Any) -> None:
        self.shadow: dict[tuple[str, int, int], tuple[int, ...]] = {}
        self.copied = 0
        """The last launch whose copies on write are made."""
        self.rng = Random(drawn["seed"])
        super().start(**drawn)

    def scheduler(self, rng: Random) -> Any:
        return RandomPlans(rng, RandomPlans.KINDS - {"rewrite"})  # refused with a store

    def store(self) -> HashStore:
        context = Context(
            kind="prefix",
            name="hash",
            rng=seeded(0, "prefix", "hash"),
            model=TOY_MODEL,
            hardware=None,
            limits=toy_limits(),
        )
        self.hashes = HashStore(HashConfig(), context)
        return self.hashes

    def more(self, prompt: int) -> dict[str, Any]:
        tenant = self.rng.choice(["a", "a", "b"])
        return {"prompt_ids": self.rng.choice(STEMS)[:prompt], "tenant": tenant}

    # ------------------------------------------------------------------ the shadow

    def text(self, r: Request, end: int) -> tuple[int, ...]:
        """What KV at position ``end - 1`` stands for: the text up to it, and whose it is."""
        assert r.spec.prompt_ids is not None
        output = range(1000 * r.spec.sample, 1000 * r.spec.sample + 99)
        return (ord(r.spec.tenant), *([*r.spec.prompt_ids, *output][:end]))

    @precondition(lambda self: any(self.rig.flights.values()))
    @rule(rng=dice)
    def finish(self, rng: Random) -> None:
        before = {x.launch: (x, list(x.starts), x.steps) for f in self.rig.flights.values() for x in f}
        fences = dict(self.fences)
        plan, self.plan = self.plan, lambda: None  # type: ignore[method-assign]
        super().finish(rng)
        self.plan = plan  # type: ignore[method-assign]
        after = {x.launch: x for f in self.rig.flights.values() for x in f}
        for launch, (_, starts, steps) in before.items():
            if launch not in after or after[launch].starts != starts:
                self.write(fences[launch], starts, steps)
        if rng.randrange(5):
            self.plan()

    def plan(self) -> None:
        super().plan()
        size = self.rig.engine.ledger.pools[0].page_tokens
        for fence in self.fences.values():
            if fence.batch.launch <= self.copied:
                continue
            self.copied = fence.batch.launch
            SEEN["copies"] += len(fence.batch.copies)
            for _, source, target in fence.batch.copies:
                for slot in range(size):
                    self.shadow["device", target, slot] = self.shadow.get(("device", source, slot), ())

    def write(self, fence: Pages, starts: list[int], steps: int) -> None:
        batch, size = fence.batch, self.rig.engine.ledger.pools[0].page_tokens
        for i, (r, lease) in enumerate(zip(batch.requests, batch.leases, strict=True)):
            item = batch.extras.get(i)
            if item is not None and item.advance != "append":
                continue
            table = lease.tables[0] or fence.tables[i][0]
            # drafts the model did not confirm leave KV of other text behind; here it is told by a wrong tail
            for at in range(starts[i], starts[i] + batch.tokens[i] + steps - 1):
                if at // size < len(table):
                    self.shadow["device", table[at // size], at % size] = self.text(r, at + 1)
            for at in range(starts[i] + batch.tokens[i], starts[i] + batch.tokens[i] + self.draft(item)):
                good = at < r.computed and r.lease is lease
                text = self.text(r, at + 1)
                self.shadow["device", table[at // size], at % size] = text if good else (-1, at)

    @staticmethod
    def draft(item: Any) -> int:
        return item.draft if item is not None else 0

    @precondition(lambda self: self.rig.transfers)
    @rule(rng=dice)
    def transferred(self, rng: Random) -> None:
        before = dict(self.rig.transfers)
        plan, self.plan = self.plan, lambda: None  # type: ignore[method-assign]
        super().transferred(rng)
        self.plan = plan  # type: ignore[method-assign]
        size = self.rig.engine.ledger.pools[0].page_tokens
        for id in before.keys() - self.rig.transfers.keys():
            x = before[id]
            tiers = ("device", "host") if x.direction == "out" else ("host", "device")
            for a, b in zip(x.source[0], x.destination[0], strict=True):
                for slot in range(size):
                    self.shadow[tiers[1], b, slot] = self.shadow.get((tiers[0], a, slot), ())
        self.plan()

    # ------------------------------------------------------------------- invariants

    def tokens_add_up(self) -> None:
        super().tokens_add_up()
        size = self.rig.engine.ledger.pools[0].page_tokens
        for r in self.rig.engine.requests.values():
            if r.phase not in (Phase.RUNNING, Phase.PAUSED):
                continue
            table = r.lease.tables[0]
            for at in range(r.computed):
                found = self.shadow.get(("device", table[at // size], at % size))
                assert found == self.text(r, at + 1), f"{r.id} reads KV of another text at {at}"

    def pages_are_conserved(self) -> None:
        ledger, store = self.rig.engine.ledger, self.hashes
        tier = ledger._device[0]
        tables = Counter(page for x in ledger._leases.values() for page in x.tables[0])
        kept = Counter(page for x in ledger._leases.values() for _, page in x.kept)
        assert set(tier.external) == set(store._keys), "the store and the ledger disagree"
        for page, refs in enumerate(tier.refs):
            if refs == WITHDRAWN:
                continue
            assert refs == tables[page] + kept[page] + (page in store._keys)
            assert (page in store._free) == (page in store._keys and refs == 1)
        kv = ledger.kvcache
        assert isinstance(kv, ToyKV)
        assert kv.free[0, "device"] == {p for p, refs in enumerate(tier.refs) if refs == 0} - set(
            tier.reading
        )
        assert sum(map(len, store._pages.values())) == len(store._keys) == len(store._users)

    def fences_hold(self) -> None:
        """No page that a launch writes to is in another's table, but for what the other does not read: a
        sample that forked while its first ran ahead copies the page, or has it alone, before it writes.
        """
        ledger, size = self.rig.engine.ledger, self.rig.engine.ledger.pools[0].page_tokens
        for fence in self.fences.values():
            for i, lease in enumerate(fence.batch.leases):
                start = fence.batch.starts[i]
                written = fence.tables[i][0][start // size :]
                for other in ledger._leases.values():
                    if other is not lease:
                        r = self.rig.engine.requests.get(other.owner)
                        end = r.prompt_tokens if r is not None and r.spec.sample else 0
                        unread = {start // size} if end and start >= end else set()
                        read = {p for k, p in enumerate(other.tables[0]) if k not in unread}
                        assert not set(written) & read, "given away in flight"
                assert not any(page in self.hashes._free for page in fence.tables[i][0]), "could be evicted"

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            SEEN["hits"] += sum(
                x.cached_tokens > 0 for x in self.rig.records if isinstance(x, RequestAdmitted)
            )
            SEEN["forks"] += sum(
                isinstance(x, RequestForked) and x.shared_tokens > 0 for x in self.rig.records
            )
            SEEN["evicted"] += sum(x.ev == "evicted" for x in self.rig.records)
        super().teardown()


class VllmReuseMachine(ReuseMachine):
    """The engine and a store under ``vllm_v1``."""

    scheduler = VllmMachine.scheduler
    lanes = VllmMachine.lanes


SEEN: Counter[str] = Counter()


@pytest.mark.parametrize("machine", [ReuseMachine, VllmReuseMachine])
def test_any_order_of_events_reads_the_right_kv(machine: type[ReuseMachine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    SEEN.clear()
    run_state_machine_as_test(machine, settings=SHORT)
    assert min(SEEN[what] for what in ("hits", "evicted", "forks", "copies")) > 100, SEEN


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [ReuseMachine, VllmReuseMachine])
def test_longer_any_order_of_events_reads_the_right_kv(machine: type[ReuseMachine]) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(machine, settings=LONG)
