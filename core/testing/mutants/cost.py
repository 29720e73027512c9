"""Broken cost models, each one change away from a line through tokens and context."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from servelab.core.engine.swap import Transfer
from servelab.core.events import Batch
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


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(suite="cost", plugin=plugin, original=Line, check=check, message=message, breaks=breaks)


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
)
