"""Conformance of cost models: whole, positive, monotone, pure prices; busy times and energy within them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from random import Random
from typing import Any, ClassVar

import pytest

from servelab.core.engine.state import Lease, Request
from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.core.facts import HardwareFacts
from servelab.core.plan import Tokens
from servelab.core.request import RequestSpec
from servelab.core.testing.fakes import TOY_MODEL, toy_limits
from servelab.core.testing.suite import PolicySuite

GRID = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    511,
    512,
    1000,
    1023,
    1024,
    2047,
    2048,
)
"""Counts on both sides of where tiles and pages end."""

TOY_DEVICE = HardwareFacts(
    name="toy device",
    flops=1e12,
    flops_int8=2e12,
    flops_fp8=2e12,
    memory_bytes=2**30,
    memory_bytes_per_s=1e10,
    host_link_bytes_per_s=1e9,
    link_bytes_per_s=2e9,
    network_bytes_per_s=1e9,
    idle_watts=10.0,
    peak_watts=100.0,
    mfu=0.8,
    mbu=0.9,
    smoothness=2.0,
    op_ns=100,
    layer_ns=0,
    step_ns=1000,
    request_ns=10,
)
"""A device that states every figure a cost model may ask for; round ones, of no real device."""

Row = tuple[int, int]
"""(tokens, start) of one request."""


def batch_of(
    rows: Sequence[Row], *, drafts: Sequence[int] = (), first_step: int = 0, steps: int = 1
) -> Batch:
    """A launch of requests with a prompt of 4096 tokens.

    Args:
        rows: tokens and start of each.
        drafts: draft tokens of the first ones.
        first_step: number of its first step.
        steps: to run at most.
    """
    requests = []
    for k, (tokens, start) in enumerate(rows):
        r = Request(RequestSpec(id=f"r{k}", prompt_tokens=4096, max_new_tokens=64), 0, 64, Lease(f"r{k}", 1))
        r.computed, r.flying = start, tokens
        requests.append(r)
    extras = {k: Tokens(requests[k].view, rows[k][0], draft=n) for k, n in enumerate(drafts) if n}
    return Batch(
        lane=0,
        launch=0,
        first_step=first_step,
        steps=steps,
        requests=requests,
        leases=[r.lease for r in requests],
        tokens=[tokens for tokens, _ in rows],
        starts=[start for _, start in rows],
        samples=[True] * len(rows),
        extras=extras,
    )


def transfer_of(size: int, pages: int = 4) -> Transfer:
    """A transfer out of so many bytes."""
    table = [list(range(pages))]
    return Transfer(0, "r0", "out", Lease("r0", 1), table, table, size, pages)


class CostSuite(PolicySuite):
    """What is true of every cost model; see ``servelab.core.families.cost``."""

    kind: ClassVar[str] = "cost"
    contract: ClassVar[str] = "servelab/core/families/cost.py"

    # ------------------------------------------------------------- helpers

    def make(self, **context: Any) -> Any:
        """On a device with every figure, unless the check says another."""
        return super().make(**{"hardware": TOY_DEVICE} | context)

    def cost(self) -> Any:
        """A fresh cost model."""
        return self.make(limits=toy_limits(tokens=8192, requests=512, model_len=4096), model=TOY_MODEL)

    def batches(self) -> Iterator[Batch]:
        """Prompts, decodes, both together, with drafts."""
        rng = Random(self.seed)
        yield batch_of([(1, 0)])
        yield batch_of([(512, 0)])
        yield batch_of([(1, 100)] * 32)
        yield batch_of([(1, 50), (1, 900)], drafts=(4, 0))
        for _ in range(12):
            rows = [(rng.choice([1, 1, 5, 200]), rng.randrange(3000)) for _ in range(rng.randint(1, 40))]
            yield batch_of(rows, first_step=rng.randrange(50))

    def price(self, cost: Any, batch: Batch, steps: int = 1) -> list[int]:
        """The prices of its steps, checked."""
        prices = list(cost.price(batch, steps))
        bad = [p for p in prices if type(p) is not int or p < 1]
        if len(prices) != steps or bad:
            self.fail(
                f"{self.name}: price() of {len(batch.requests)} requests, {batch.num_tokens()} tokens and "
                f"{steps} "
                f"steps is {prices[:6]}",
                rule="price() gives a whole number of nanoseconds for each step, at least 1",
                do="round up, and return a list of `steps` ints; an empty price is no price",
            )
        return prices

    def _grows(self, what: str, priced: Callable[[int], int], counts: Sequence[int] = GRID) -> None:
        for (a, low), (b, high) in pairwise((n, priced(n)) for n in counts):
            if high < low:
                self.fail(
                    f"{self.name}: {what} of {b} costs {high} ns, of {a} it costs {low} ns",
                    rule="prices are monotone in every token count and every context length",
                    do="look where a tile, a page or a table entry ends; round work up, never down",
                )

    # -------------------------------------------------------------- checks

    def test_prices_are_whole_and_positive(self) -> None:
        """One int of at least 1 ns per step, for every batch."""
        cost = self.cost()
        for batch in self.batches():
            self.price(cost, batch)
        self.price(cost, batch_of([(1, 10)] * 3), 50)

    def test_steps_equal_single_calls(self) -> None:
        """The price of k steps is that of k calls, each a token further on."""
        cost, rng = self.cost(), Random(self.seed)
        for rows in (1, 2, 16, 60):
            starts, steps = [rng.randrange(1, 2000) for _ in range(rows)], 40
            together = self.price(cost, batch_of([(1, s) for s in starts], first_step=7), steps)
            for k in range(steps):
                moved = batch_of([(1, s + k) for s in starts], first_step=7 + k)
                (alone,) = self.price(cost, moved)
                if alone != together[k]:
                    self.fail(
                        f"{self.name}: step {k} of {steps} decodes of {rows} requests costs {together[k]} "
                        f"ns in one call, and {alone} ns in a call of its own",
                        rule="price(batch, k) equals k single calls on batches moved on by one token per "
                        "step",
                        do="let contexts grow by one token per request and step, first_step by one",
                    )

    def test_grows_with_tokens(self) -> None:
        """A longer chunk, a longer draft and one more request never cost less."""
        cost = self.cost()
        self._grows("a prompt", lambda n: self.price(cost, batch_of([(n, 0)]))[0])
        self._grows("a prompt beside decodes", lambda n: self.price(cost, batch_of([(n, 0), (1, 99)]))[0])
        self._grows("a batch of decodes", lambda n: self.price(cost, batch_of([(1, 64)] * n))[0], GRID[:20])
        self._grows(
            "a draft", lambda n: self.price(cost, batch_of([(1, 64)], drafts=(n,)))[0], tuple(range(9))
        )

    def test_kinds_of_steps(self) -> None:
        """A decode beside a prompt that becomes a chunk of two tokens never gets cheaper."""
        cost = self.cost()
        self._grows(
            "a row beside a prompt",
            lambda n: self.price(cost, batch_of([(n, 9), (300, 0)]))[0],
            (1, 2, 3, 50),
        )

    def test_drafts_are_tokens(self) -> None:
        """A draft of many tokens costs more than none."""
        cost = self.cost()
        without, long = (self.price(cost, batch_of([(1, 64)] * 4, drafts=(n,)))[0] for n in (0, 1024))
        if long <= without:
            self.fail(
                f"{self.name}: four decodes, one with a draft of 1024 tokens, cost {long} ns; without the "
                f"draft {without} ns",
                rule="draft tokens are run like any others: prices grow with them",
                do="add item.draft of batch.extras to the request's tokens, as Batch.num_tokens() does",
            )

    def test_order_does_not_matter(self) -> None:
        """The requests of a batch in another order cost the same."""
        cost, rng = self.cost(), Random(self.seed)
        rows = [(rng.choice([1, 1, 7, 300]), rng.randrange(2000)) for _ in range(24)]
        (price,) = self.price(cost, batch_of(rows))
        for _ in range(5):
            rng.shuffle(rows)
            (again,) = self.price(cost, batch_of(rows))
            if again != price:
                self.fail(
                    f"{self.name}: {len(rows)} requests cost {price} ns, and {again} ns in another order",
                    rule="prices come from shapes alone, whatever the order of the requests",
                    do="sum over all requests; round once, at the end",
                )

    def test_grows_with_context(self) -> None:
        """A longer context never costs less."""
        cost = self.cost()
        self._grows("a decode behind a context", lambda n: self.price(cost, batch_of([(1, n)]))[0])
        self._grows("a chunk behind a context", lambda n: self.price(cost, batch_of([(64, n)]))[0])

    def test_busy(self) -> None:
        """With ``cost.lanes``: whole times from 0 to the price, of the same resources, in any order."""
        cost, rng = self.cost(), Random(self.seed)
        if hasattr(cost, "busy") and not self.may("cost.lanes"):
            self.fail(
                f"{self.name} has busy() and does not declare 'cost.lanes'",
                rule="what is declared is what runs do: lanes are priced together, and reports must not say "
                "otherwise",
                do="add cost.lanes to provides, or take busy() away",
            )
        self.needs("cost.lanes")
        names: list[str] | None = None
        for batch in self.batches():
            (price,), busy = self.price(cost, batch), dict(cost.busy(batch))
            names = names or sorted(busy)
            bad = [ns for ns in busy.values() if type(ns) is not int or not 0 <= ns <= price]
            if bad or sorted(busy) != names or not any(busy.values()):
                self.fail(
                    f"{self.name}: busy() of {len(batch.requests)} requests, {batch.num_tokens()} tokens and "
                    f"a price of {price} ns is {busy}",
                    rule="each resource is busy for a whole number of nanoseconds from 0 to the price, not "
                    f"all for none, and all batches have the same ones, here {', '.join(names) or 'none'}",
                    do="count each operation's time on each resource, and round down",
                )
            order = rng.sample(range(len(batch.tokens)), len(batch.tokens))
            rows = [(batch.tokens[i], batch.starts[i]) for i in order]
            drafts = [batch.extras[i].draft if i in batch.extras else 0 for i in order]
            again = dict(cost.busy(batch_of(rows, drafts=drafts, first_step=batch.first_step)))
            if again != busy:
                self.fail(
                    f"{self.name}: {len(rows)} requests keep {busy} ns busy, and {again} ns in another order",
                    rule="busy times come from shapes alone, whatever the order of the requests",
                    do="sum over all requests; round once, at the end",
                )

    def test_energy(self) -> None:
        """With ``cost.energy``: never more than the devices draw at their peak; k steps are k calls."""
        self.needs("cost.energy")
        cost = self.cost()
        idle, peak = cost.idle_watts, cost.peak_watts
        if (idle is None) != (peak is None) or (idle is not None and not 0 <= idle <= peak):
            self.fail(
                f"{self.name}: idle_watts is {idle}, peak_watts is {peak}",
                rule="both are known or neither, and devices that work draw no less than idle ones",
                do="take both from the device's profile; None where it states one of them only",
            )
        if idle is None:
            pytest.skip(f"{self.name} knows no power of {TOY_DEVICE.name}")
        for batch in self.batches():
            (price,), (joules,) = self.price(cost, batch), cost.energy(batch, 1)
            most = (peak - idle) * price * 1e-9
            if not 0 <= joules <= most * (1 + 1e-9):
                self.fail(
                    f"{self.name}: a step of {price} ns takes {joules:.3g} J beyond what idle devices do, "
                    f"which draw {idle:g} of {peak:g} W",
                    rule=f"devices draw from idle_watts to peak_watts: here at most {most:.3g} J",
                    do="leave out what idle devices take; bound the power by the peak",
                )
        rows = [(1, 100), (1, 700)]
        together = list(cost.energy(batch_of(rows), 3))
        steps = [cost.energy(batch_of([(n, start + k) for n, start in rows]), 1)[0] for k in range(3)]
        if together != pytest.approx(steps):
            self.fail(
                f"{self.name}: 3 steps take {together} J in one call, and {steps} J in three",
                rule="energy(batch, k) equals k single calls on batches moved on by one token per step",
                do="let contexts grow by one token per request and step, as in price()",
            )

    def test_transfers(self) -> None:
        """Whole, positive, and never less for more bytes."""
        cost = self.cost()

        def priced(size: int) -> int:
            took = cost.transfer_time(transfer_of(size))
            if type(took) is not int or took < 1:
                self.fail(
                    f"{self.name}: transfer_time() of {size} bytes is {took!r}",
                    rule="transfer_time() is a whole number of nanoseconds, at least 1",
                    do="use // instead of /, and add what a copy costs at least",
                )
            return took

        self._grows("a transfer", priced, [n * 1000 for n in GRID])

    def test_is_pure(self) -> None:
        """The same batch costs the same, whatever was priced before, and is left as it was."""
        cost, first = self.cost(), []
        for batch in self.batches():
            before = (
                list(batch.tokens),
                list(batch.starts),
                list(batch.samples),
                batch.steps,
                batch.first_step,
            )
            first.append(self.price(cost, batch))
            after = (
                list(batch.tokens),
                list(batch.starts),
                list(batch.samples),
                batch.steps,
                batch.first_step,
            )
            if before != after:
                self.fail(
                    f"{self.name}: price() changed its batch from {before} to {after}",
                    rule="price() is a pure function: the batch goes to the executor",
                    do="copy what you move on",
                )
        for name, other in (("again", cost), ("by a fresh instance", self.cost())):
            for k, batch in reversed(list(enumerate(self.batches()))):
                again = self.price(other, batch)
                if again != first[k]:
                    self.fail(
                        f"{self.name}: a batch that cost {first[k]} ns costs {again} ns when it is priced "
                        f"{name}",
                        rule="no state that changes a price, no clock, no chance outside the seeded "
                        "generator",
                        do="compute the price from the batch and the settings alone",
                    )

    def test_no_clock_no_chance_no_environment(self) -> None:
        """Prices come from shapes alone."""
        cost = self.cost()
        self.calls_nothing_forbidden(lambda: [cost.price(batch, 1) for batch in self.batches()])
        self.calls_nothing_forbidden(lambda: cost.transfer_time(transfer_of(4096)))
