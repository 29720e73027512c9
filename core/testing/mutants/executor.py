"""Broken executors, each one change away from placeholder tokens that end at true lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from servelab.core.engine.state import Request
from servelab.core.events import Batch
from servelab.core.layout import Capacity, KVLayout
from servelab.core.plan import Outcome
from servelab.core.spec import PluginSpec
from servelab.core.testing.fakes import ToyExecutor
from servelab.core.testing.mutants import Mutant


class Placeholders(ToyExecutor):
    """The honest one: the k-th token of a request is k."""

    spec = PluginSpec(
        name="placeholders",
        factory="servelab.core.testing.mutants.executor:Placeholders",
        runs=("sim",),
        provides=frozenset({"executor.sim", "executor.simulated"}),
        requires=frozenset({"workload.truth"}),
    )

    def __init__(self, config: Any, context: Any) -> None:
        super().__init__({})
        self.oracle = context.oracle

    def _truth(self, r: Request) -> int:
        try:
            return int(self.oracle(r.id).output_tokens)
        except KeyError:  # it ended while in flight: its outcome is dropped
            return 1 << 30

    def capacity(self, layout: KVLayout) -> Capacity:
        return Capacity(device_pages=(64,) * len(layout.pools))


class CountsDecodesOnly(Placeholders):
    """Reports the requests that got a token, and leaves out the others."""

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        return [x for x in super().launch(batch, steps) if x.tokens]


class SamplesEveryChunk(Placeholders):
    """Draws a token after each chunk of a prompt."""

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        return super().outcome(replace(batch, samples=[True] * len(batch.samples)), i, steps, accept)


class OneTokenPerLaunch(Placeholders):
    """Does not know of held launches."""

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        return super().outcome(batch, i, 1, accept)


class EndsLate(Placeholders):
    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        done = super().outcome(batch, i, steps, accept)
        late = batch.requests[i].generated + len(done.tokens) > self._truth(batch.requests[i])
        return replace(done, finish="stop" if late else None)

    def horizon(self, batch: Batch, max_steps: int) -> int:
        return 1


class MixesUpTokens(Placeholders):
    """Returns the tokens of a held launch in the order of a stack."""

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        done = super().outcome(batch, i, steps, accept)
        return replace(done, tokens=done.tokens[::-1])


class DrawsByPlace(Placeholders):
    """A token depends on where in the batch its request is."""

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        done = super().outcome(batch, i, steps, accept)
        return replace(done, tokens=tuple(t + 5000 * i for t in done.tokens))


class LooksTooFar(Placeholders):
    def horizon(self, batch: Batch, max_steps: int) -> int:
        return max_steps + 1


class StandsStill(Placeholders):
    def horizon(self, batch: Batch, max_steps: int) -> int:
        return 0


class ForgetsSamples(Placeholders):
    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        return replace(super().outcome(batch, i, steps, accept), forks=())


class AcceptsTooMuch(Placeholders):
    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        done = super().outcome(batch, i, steps, accept)
        return replace(done, accepted=done.accepted + 1) if done.accepted else done


class MissesThoseWhoLeft(Placeholders):
    """Asks for the length of a request whose client has given up."""

    def _truth(self, r: Request) -> int:
        return int(self.oracle(r.id).output_tokens)


class CannotClose(Placeholders):
    """Closes what its first launch opens."""

    def launch(self, batch: Batch, steps: int) -> Sequence[Outcome]:
        self.device = "open"
        return super().launch(batch, steps)

    def close(self) -> None:
        del self.device


class OnePoolTooFew(Placeholders):
    def capacity(self, layout: KVLayout) -> Capacity:
        return Capacity(device_pages=())


class Remembers(Placeholders):
    """Counts launches in its class."""

    launches = 0

    def outcome(self, batch: Batch, i: int, steps: int, accept: int | None = None) -> Outcome:
        Remembers.launches += 1
        done = super().outcome(batch, i, steps, accept)
        return replace(done, tokens=tuple(t + Remembers.launches for t in done.tokens))


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="executor", plugin=plugin, original=Placeholders, check=check, message=message, breaks=breaks
    )


SERVES = "test_serves_the_worlds"
MUTANTS = (
    _mutant(CountsDecodesOnly, SERVES, "outcomes", "leaves requests without a token out of its report"),
    _mutant(
        SamplesEveryChunk, SERVES, "1 tokens instead of 0", "draws a token after every chunk of a prompt"
    ),
    _mutant(
        OneTokenPerLaunch, SERVES, "1 tokens instead of", "gives one token for a launch of several steps"
    ),
    _mutant(EndsLate, SERVES, "tokens instead of", "ends requests a token after their true length"),
    _mutant(
        MixesUpTokens,
        "test_tokens_do_not_depend_on_the_schedule",
        "alone and in company",
        "returns tokens of a held launch out of order",
    ),
    _mutant(
        DrawsByPlace,
        "test_tokens_do_not_depend_on_the_schedule",
        "alone and in company",
        "a token depends on the place of its row",
    ),
    _mutant(LooksTooFar, SERVES, "horizon() of at most", "promises more steps than it was asked for"),
    _mutant(StandsStill, SERVES, "steps is 0", "promises no step at all"),
    _mutant(ForgetsSamples, SERVES, "began 0 of", "draws no first token for further samples"),
    _mutant(AcceptsTooMuch, "test_drafts", "draft tokens of request", "accepts a token that was not drafted"),
    _mutant(MissesThoseWhoLeft, SERVES, "raised KeyError", "fails for a request that ended in flight"),
    _mutant(
        CannotClose,
        "test_builds",
        "close() raised AttributeError",
        "cannot be closed before its first launch",
    ),
    _mutant(OnePoolTooFew, "test_capacity", "reports pages for 0 pools", "has no pages for a pool"),
    _mutant(Remembers, "test_same_run_twice", "in two runs of one seed", "keeps state in its class"),
)
