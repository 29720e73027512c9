"""Workloads broken on purpose. ``Steady`` is a good one: users who ask, and again when answered."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

from servelab.core.context import Context
from servelab.core.errors import WorkloadError
from servelab.core.records import RequestFinished
from servelab.core.request import Arrival, Cancel, RequestSpec, Truth
from servelab.core.spec import PluginSpec
from servelab.core.testing.mutants import Mutant

USERS, TURNS, PATIENCE_NS = 40, 2, 90_000_000
LONGEST = 60 + 8 * TURNS, 50
"""Prompt and output."""


def _spec(name: str) -> PluginSpec:
    return PluginSpec(
        name=name,
        factory=f"{__name__}:Steady",
        summary="a toy",
        provides=frozenset(
            {"workload.truth", "workload.prompt_ids", "workload.closed_loop", "workload.programs"}
        ),
    )


class Steady:
    """Takes no settings. Users come at random times, ask twice, and have two answers to choose from."""

    spec = _spec("steady")

    def __init__(self, config: None, context: Context) -> None:
        if sum(LONGEST) > context.limits.max_model_len:
            raise WorkloadError(
                f"requests of up to {sum(LONGEST)} tokens do not fit the model",
                do=f"raise engine.max_model_len to {sum(LONGEST)}",
            )
        self.root, self.vocab = context.rng.getrandbits(64), context.model.vocab
        starts = Random(f"{self.root}/start")
        self.starts = sorted(starts.randrange(10**9) for _ in range(USERS))

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        items: list[Arrival | Cancel] = []
        for user, start in enumerate(self.starts):
            items.append(self.ask(user, 0, start))
            if user % 5 == 0:
                items.append(Cancel(start + PATIENCE_NS, f"u{user}.0"))
        yield from sorted(items, key=lambda x: x.time_ns)

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        id, _, sample = finished.request.partition("#")
        user, turn = map(int, id[1:].split("."))
        if sample or finished.outcome != "completed" or turn + 1 == TURNS:
            return ()
        return (self.ask(user, turn + 1, finished.t_ns + 1000),)

    def describe(self) -> dict[str, Any]:
        return {"requests": USERS * TURNS, "cancellations": USERS // 5, "turns": TURNS}

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        draw = Random(f"{self.root}/{user}/{turn}")
        prompt = [draw.randrange(self.vocab) for _ in range(draw.randint(4, 60) + 8 * turn)]
        spec = RequestSpec(
            id=f"u{user}.{turn}",
            prompt_tokens=len(prompt),
            prompt_ids=prompt,
            max_new_tokens=draw.randint(10, 80),
            program=f"u{user}",
            turn=turn,
            is_last_turn=turn + 1 == TURNS,
            n=2 if user % 7 == 0 else 1,
        )
        further = (draw.randint(1, 50),) if spec.n > 1 else ()
        return Arrival(time_ns, spec, Truth(draw.randint(1, 50), further))


# ------------------------------------------------------------------ broken


class Unsorted(Steady):
    spec = _spec("unsorted")

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        for user, start in enumerate(self.starts):
            yield self.ask(user, 0, start)
            if user % 5 == 0:
                yield Cancel(start + PATIENCE_NS, f"u{user}.0")


class CapsTell(Steady):
    spec = _spec("caps_tell")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        assert x.truth is not None
        return replace(x, spec=replace(x.spec, max_new_tokens=x.truth.output_tokens + 4 + user % 9))


class FeaturesTell(Steady):
    spec = _spec("features_tell")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        assert x.truth is not None
        return replace(x, spec=replace(x.spec, features={"row": {"hint": x.truth.output_tokens}}))


class GlobalChance(Steady):
    spec = _spec("global_chance")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, context)
        self.root = random.getrandbits(64)


class SeedOfItsOwn(Steady):
    spec = _spec("seed_of_its_own")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, replace(context, rng=Random(42)))


class ReadsTheClock(Steady):
    spec = _spec("reads_the_clock")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "day": time.time() // 86_400}


class RepeatsIds(Steady):
    spec = _spec("repeats_ids")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        return replace(x, spec=replace(x.spec, id=f"u{user % 39}.{turn}"))


class ReactsInThePast(Steady):
    spec = _spec("reacts_in_the_past")

    def react(self, finished: RequestFinished) -> Iterable[Arrival | Cancel]:
        return tuple(replace(x, time_ns=x.time_ns - 2000) for x in super().react(finished))


class ReactsUndeclared(Steady):
    spec = replace(_spec("reacts_undeclared"), provides=frozenset({"workload.truth"}))


class SendsOnce(Steady):
    spec = _spec("sends_once")

    def __init__(self, config: None, context: Context) -> None:
        super().__init__(config, context)
        self.items = super().arrivals()

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        return self.items


class CancelsStrangers(Steady):
    spec = _spec("cancels_strangers")

    def arrivals(self) -> Iterator[Arrival | Cancel]:
        for x in super().arrivals():
            yield replace(x, request_id=f"{x.request_id}0") if isinstance(x, Cancel) else x


class ForgetsSamples(Steady):
    spec = _spec("forgets_samples")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        return replace(x, spec=replace(x.spec, n=3 * x.spec.n - 2))


class OutsideTheVocabulary(Steady):
    spec = _spec("outside_the_vocabulary")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        assert x.spec.prompt_ids is not None
        return replace(x, spec=replace(x.spec, prompt_ids=[i + 1 for i in x.spec.prompt_ids]))


class EmptyPrompts(Steady):
    spec = _spec("empty_prompts")

    def ask(self, user: int, turn: int, time_ns: int) -> Arrival:
        x = super().ask(user, turn, time_ns)
        if user != 3:
            return x
        return replace(x, spec=replace(x.spec, prompt_tokens=0, prompt_ids=[]))


class TooLong(Steady):
    spec = _spec("too_long")

    def __init__(self, config: None, context: Context) -> None:
        roomy = replace(context.limits, max_model_len=10**6)
        super().__init__(config, replace(context, limits=roomy))


class TellsInfinity(Steady):
    spec = _spec("tells_infinity")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "request_rate": float("inf")}


class Miscounts(Steady):
    spec = _spec("miscounts")

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "requests": USERS}


def _mutant(plugin: type, check: str, message: str, breaks: str) -> Mutant:
    return Mutant(
        suite="workload", plugin=plugin, original=Steady, check=check, message=message, breaks=breaks
    )


MUTANTS = (
    _mutant(
        Unsorted,
        "test_times_are_in_order",
        "sort by time before yielding, cancellations included",
        "yields a cancellation right behind its request",
    ),
    _mutant(
        CapsTell,
        "test_specs_do_not_tell_the_length",
        "max_new_tokens of a request follows its true length",
        "sets the cap a little above the true length",
    ),
    _mutant(
        FeaturesTell,
        "test_specs_do_not_tell_the_length",
        "features.row.hint of a request follows its true length",
        "puts the true length among the features",
    ),
    _mutant(
        GlobalChance,
        "test_touches_no_clock_and_no_global_chance",
        "calls random.getrandbits",
        "draws from the global generator",
    ),
    _mutant(
        SeedOfItsOwn,
        "test_other_seed_other_traffic",
        "draw from ctx.rng, not from a generator with a seed of its own",
        "has a seed of its own",
    ),
    _mutant(
        ReadsTheClock,
        "test_touches_no_clock_and_no_global_chance",
        "calls time.time",
        "reads the clock for its description",
    ),
    _mutant(
        RepeatsIds,
        "test_ids_are_unique",
        "a second request is called 'u0.0'",
        "gives two users the same ids",
    ),
    _mutant(
        ReactsInThePast,
        "test_reactions",
        "count pauses from finished.t_ns",
        "reacts before the end it reacts to",
    ),
    _mutant(
        ReactsUndeclared,
        "test_reactions",
        "declare 'workload.closed_loop'",
        "reacts without declaring that it is a closed loop",
    ),
    _mutant(
        SendsOnce,
        "test_arrivals_begin_anew",
        "a stream that each call restarts",
        "hands out one iterator for ever",
    ),
    _mutant(
        CancelsStrangers,
        "test_cancellations",
        "there is no such request",
        "cancels ids that nobody has",
    ),
    _mutant(
        ForgetsSamples,
        "test_truths",
        "give n - 1 lengths, or none",
        "asks for more samples than it has true lengths for",
    ),
    _mutant(
        OutsideTheVocabulary,
        "test_prompt_ids",
        "draw ids below ctx.model.vocab",
        "counts token ids from 1",
    ),
    _mutant(
        EmptyPrompts,
        "test_lengths_are_possible",
        "draw whole numbers from 1 on",
        "sends an empty prompt",
    ),
    _mutant(
        TooLong,
        "test_too_long_requests_are_refused",
        "check in the constructor, and raise WorkloadError",
        "does not look at the model's length",
    ),
    _mutant(
        TellsInfinity,
        "test_description",
        "write infinity as text",
        "describes itself with a number that JSON does not have",
    ),
    _mutant(
        Miscounts,
        "test_description",
        "count what arrivals() yields",
        "counts users instead of requests",
    ),
)
