"""Broken cost models, each one change away from a line through tokens and context."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import ToyCost
from servelab.core.testing.mutants import Mutant


class Line(ToyCost):
    """The honest one."""

    def __init__(self, config: Any = None, context: Any = None) -> None:
        super().__init__(context_ns=1)

    def transfer_time(self, transfer: Transfer) -> int:
        return 500 + transfer.bytes // 25


class Fractions(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        return [p / 3 for p in super().price(batch, steps)]  # type: ignore[misc]


class OnePriceForAllSteps(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        return [sum(super().price(batch, steps))]


class FirstStepForAll(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        return list(super().price(batch, 1)) * steps


class CheaperInTiles(Line):
    """Whole tiles of 64 tokens take a faster path."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        off = 300 if batch.num_tokens() % 64 == 0 else 0
        return [p - off for p in super().price(batch, steps)]


class ALaunchPerKind(Line):
    """Prompts and decodes take a fixed time each, so that a row that turns from one to the other saves it."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        kinds = len({n == 1 for n in batch.tokens})
        prices = super().price(batch, steps)
        return [prices[0] + 5000 * kinds, *(p + 5000 for p in prices[1:])]


class ForgetsOldContext(Line):
    """Prices a context beyond 256 tokens as if it began again."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        reads = [sum((s + k) % 256 for s in batch.starts) for k in range(steps)]
        return [self.step_ns + self.token_ns * batch.num_tokens() + n for n in reads]


class BlindToDrafts(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        return super().price(replace(batch, extras={}), steps)


class FirstIsSpecial(Line):
    """Prices the batch as if all contexts were as long as the first."""

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        alike = [batch.starts[0]] * len(batch.starts)
        return super().price(replace(batch, starts=alike), steps)


class WarmsUp(Line):
    calls = 0

    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        self.calls += 1
        return [p + 5000 // self.calls for p in super().price(batch, steps)]


class MovesTheBatch(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        prices: list[int] = []
        for _ in range(steps):
            prices += super().price(batch, 1)
            batch.starts[:] = [s + 1 for s in batch.starts]
        return prices


class MeasuresItself(Line):
    def price(self, batch: Batch, steps: int) -> Sequence[int]:
        began = time.perf_counter_ns()
        prices = super().price(batch, steps)
        self.spent = time.perf_counter_ns() - began
        return prices


class FreeTransfers(Line):
    def transfer_time(self, transfer: Transfer) -> int:
        return transfer.bytes // 10_000


class FasterWhenLarge(Line):
    def transfer_time(self, transfer: Transfer) -> int:
        return 500 + transfer.bytes // (25 if transfer.bytes < 100_000 else 100)


class Shared(Line):
    """The honest one with lanes and energy: memory is busy but for the step's own time."""

    spec = PluginSpec(
        name="shared",
        factory="servelab.core.testing.mutants.cost:Shared",
        provides=frozenset({"cost.lanes", "cost.energy"}),
    )
    idle_watts = 10.0
    peak_watts = 50.0

    def busy(self, batch: Batch) -> Mapping[str, int]:
        (price,) = self.price(batch, 1)
        return {"compute": 5 * batch.num_tokens(), "memory": price - self.step_ns}

    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        return [40e-9 * (price - self.step_ns) for price in self.price(batch, steps)]


class UndeclaredLanes(Shared):
    spec = replace(Shared.spec, provides=frozenset({"cost.energy"}))


class BusierThanItsPrice(Shared):
    def busy(self, batch: Batch) -> Mapping[str, int]:
        return {"compute": 15 * batch.num_tokens(), "memory": 0}


class BusyInParts(Shared):
    def busy(self, batch: Batch) -> Mapping[str, int]:
        return {name: ns / 3 for name, ns in super().busy(batch).items()}  # type: ignore[misc]


class FreeLanes(Shared):
    """Lanes are free hardware again."""

    def busy(self, batch: Batch) -> Mapping[str, int]:
        return {"compute": 0, "memory": 0}


class NamesWhatIsBusiest(Shared):
    def busy(self, batch: Batch) -> Mapping[str, int]:
        busy = super().busy(batch)
        busiest = max(busy, key=busy.__getitem__)
        return {("any" if batch.num_tokens() > 1 else busiest): busy[busiest]}


class BusyWithTheFirst(Shared):
    def busy(self, batch: Batch) -> Mapping[str, int]:
        return {**super().busy(batch), "memory": batch.starts[0] + 1}


class PowerOfTwo(Shared):
    """Draws the energy of idle devices twice: once by itself, once as the run's."""

    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        return [50e-9 * price for price in self.price(batch, steps)]


class FirstJoules(Shared):
    def energy(self, batch: Batch, steps: int) -> Sequence[float]:
        return [super().energy(batch, 1)[0]] * steps


class ColdAtWork(Shared):
    peak_watts = 5.0


def _mutant(plugin: type, check: str, message: str, breaks: str, original: type = Line) -> Mutant:
    return Mutant(suite="cost", plugin=plugin, original=original, check=check, message=message, breaks=breaks)


def _shared(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return _mutant(plugin, check, message, breaks, Shared)


WHOLE = "test_prices_are_whole_and_positive"
MUTANTS = (
    _mutant(Fractions, WHOLE, "steps is [336.6", "prices in fractions of a nanosecond"),
    _mutant(OnePriceForAllSteps, WHOLE, "50 steps is [", "sums up the steps"),
    _mutant(
        FirstStepForAll,
        "test_steps_equal_single_calls",
        "in a call of its own",
        "prices every step as the first",
    ),
    _mutant(
        CheaperInTiles, "test_grows_with_tokens", "a prompt of 64 costs", "a full tile costs less than a part"
    ),
    _mutant(
        ALaunchPerKind,
        "test_kinds_of_steps",
        "a row beside a prompt of 2 costs",
        "prompts and decodes have a fixed time each",
    ),
    _mutant(
        ForgetsOldContext,
        "test_grows_with_context",
        "a decode behind a context of 256 costs",
        "a long context costs less",
    ),
    _mutant(
        BlindToDrafts, "test_drafts_are_tokens", "a draft of 1024 tokens, cost", "drafts are run for nothing"
    ),
    _mutant(
        FirstIsSpecial,
        "test_order_does_not_matter",
        "in another order",
        "the first request stands for all",
    ),
    _mutant(WarmsUp, "test_is_pure", "when it is priced again", "prices depend on what was priced before"),
    _mutant(MovesTheBatch, "test_is_pure", "price() changed its batch", "moves the batch on in place"),
    _mutant(
        MeasuresItself,
        "test_no_clock_no_chance_no_environment",
        "calls time.perf_counter_ns",
        "reads the wall clock",
    ),
    _mutant(FreeTransfers, "test_transfers", "of 1000 bytes is 0", "small transfers are free"),
    _mutant(
        FasterWhenLarge, "test_transfers", "a transfer of 127000 costs", "a large transfer takes less time"
    ),
    _shared(UndeclaredLanes, "test_busy", "does not declare 'cost.lanes'", "prices lanes together, unsaid"),
    _shared(
        BusierThanItsPrice, "test_busy", "'compute': 7680", "a resource is busy for longer than the step"
    ),
    _shared(BusyInParts, "test_busy", "'compute': 1.66", "busy times in fractions of a nanosecond"),
    _shared(FreeLanes, "test_busy", "'compute': 0, 'memory': 0", "lanes are free hardware"),
    _shared(NamesWhatIsBusiest, "test_busy", "is {'any'", "batches keep different resources busy"),
    _shared(BusyWithTheFirst, "test_busy", "in another order", "the first request stands for all"),
    _shared(PowerOfTwo, "test_energy", "J beyond what idle devices do", "counts idle devices twice"),
    _shared(FirstJoules, "test_energy", "3 steps take", "every step takes the energy of the first"),
    _shared(ColdAtWork, "test_energy", "peak_watts is 5", "devices that work draw less than idle ones"),
)
