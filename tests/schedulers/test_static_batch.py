"""``static_batch`` against its card (techniques/scheduling, *faithful when*), and examples by hand."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from tests.draws import seeds
from tests.schedulers.classic import (
    PAGE,
    Seen,
    Served,
    build,
    deferred,
    first_come_first_served,
    ran,
    rig_of,
    serve,
    together,
    trace,
)

from servelab.core.errors import ConfigError
from servelab.core.plan import Background
from servelab.core.records import StepDone
from servelab.core.testing.fakes import TOY_MODEL, arrival, raises_in, toy_limits
from servelab.plugins.schedulers.static_batch import padding_flops

LIMITS = toy_limits(tokens=200, requests=8, model_len=66)


def closed(seen: Seen) -> None:
    """(a)"""
    assert not (seen.running and seen.new)
    assert not seen.running or set(seen.items) == set(seen.running)


def whole_prompts(seen: Seen) -> None:
    """(b)"""
    assert all(n == seen.pending[id] for id, n in seen.items.items())


def reservations_fit(seen: Seen) -> None:
    """(c)"""
    each = -(-seen.engine.limits.max_model_len // PAGE)
    assert len({*seen.running, *seen.items}) * each <= seen.engine.ledger.total()[0]
    assert not seen.plan.preemptions


def full(seen: Seen) -> None:
    """A batch begins with as many as fit."""
    outside = [id for id in seen.waiting if id not in seen.items]
    if seen.new and outside:
        each = -(-seen.engine.limits.max_model_len // PAGE)
        assert (
            len(seen.new) == seen.policy.config.max_num_seqs
            or (len(seen.new) + 1) * each > seen.engine.ledger.total()[0]
            or sum(seen.items.values()) + seen.pending[outside[0]] > seen.engine.limits.max_batch_tokens
        )


CHECKS = (closed, whole_prompts, reservations_fit, full, first_come_first_served)


@pytest.mark.parametrize("hold_steps", [1, 4096])
@pytest.mark.parametrize("padding", [False, True])
def test_faithful_over_random_traces(padding: bool, hold_steps: int) -> None:
    sizes = set()
    for seed in seeds(4):
        rng = Random(seed)
        got = serve(
            "static_batch",
            trace(rng, 40),
            pages=rng.choice([17, 40, 200]),
            limits=LIMITS,
            checks=CHECKS,
            max_num_seqs=rng.choice([3, 8]),
            keep_padding=padding,
            hold_steps=hold_steps,
        )
        sizes |= {len(x.requests) for x in got.of(StepDone)}
    assert sizes >= {1, 2, 3}


def decode_iterations(got: Served) -> int:
    return sum(len(x.ends_ns) for x in got.of(StepDone) if all(n == 1 for n in x.tokens))


@pytest.mark.parametrize(("name", "iterations"), [("static_batch", 20), ("orca", 14)])
def test_the_cards_example(name: str, iterations: int) -> None:
    """(d) Two places, outputs of 2, 10, 2, 10: 10 + 10 against 14.

    An output of L tokens takes L iterations here, the first of which runs the prompt.
    """
    items = [arrival(f"r{k}", 1, output, cap=output) for k, output in enumerate((2, 10, 2, 10))]
    got = serve(name, items, pages=200, limits=LIMITS, max_num_seqs=2)
    assert got.steps == decode_iterations(got) == iterations


@pytest.mark.parametrize("seed", seeds(3))
def test_a_batch_takes_as_many_iterations_as_its_longest(seed: int) -> None:
    """(d)"""
    rng = Random(seed)
    lengths = [rng.randint(1, 30) for _ in range(12)]
    items = [arrival(f"r{k:02}", 4, n, cap=n) for k, n in enumerate(lengths)]
    got = serve("static_batch", items, pages=400, limits=LIMITS, max_num_seqs=4)
    assert got.steps == sum(max(lengths[k : k + 4]) for k in (0, 4, 8))


# -------------------------------------------------------------------- small examples


def test_nobody_joins_until_the_last_has_finished() -> None:
    rig = rig_of("static_batch", toy_limits(model_len=20), 20)
    together(rig, a=(4, 2, 9), b=(6, 4, 9))
    assert ran(rig) == {"a": 4, "b": 6}
    rig.arrive("c", 4, 2)
    rig.finish()
    assert ran(rig) == {"a": 1, "b": 1}
    rig.finish()
    for _ in "12":
        assert ran(rig) == {"b": 1}
        rig.finish()
    assert ran(rig) == {"c": 4}


def test_places_and_reservations_bound_a_batch() -> None:
    rig = rig_of("static_batch", toy_limits(model_len=20), 12)
    together(rig, a=1, b=1, c=1)
    assert ran(rig) == {"a": 1, "b": 1} and deferred(rig) == {"c": "(2,) KV pages are not reserved"}
    rig = rig_of("static_batch", toy_limits(model_len=20), 12, reserve="request_max")
    together(rig, a=(1, 9, 7), b=(1, 9, 7), c=(1, 9, 7))
    assert ran(rig) == {"a": 1, "b": 1, "c": 1}
    rig = rig_of("static_batch", toy_limits(model_len=20), 64, max_num_seqs=2)
    together(rig, a=1, b=1, c=1)
    assert deferred(rig) == {"c": "max_num_seqs 2 reached"}
    rig = rig_of("static_batch", toy_limits(tokens=20, model_len=20), 64)
    together(rig, a=12, b=9)
    assert deferred(rig) == {"b": "prompt of 9 tokens, 8 left in this iteration"}


def test_samples_are_members_and_end_with_the_batch() -> None:
    rig = rig_of("static_batch", toy_limits(model_len=20), 40, max_num_seqs=4, shares=True)
    rig.arrive("first", 1, 1)
    rig.arrive("a", 4, 3, n=3)
    rig.arrive("b", 4, 3)
    rig.arrive("c", 4, 3)
    rig.finish()
    assert ran(rig) == {"a": 4, "b": 4}, "three and one places"
    rig.finish()
    assert ran(rig) == {"a": 1, "a#1": 1, "a#2": 1, "b": 1}


# -------------------------------------------------------------------- padding


def background(got: Any) -> list[Background]:
    return [one for batch in got.batches for one in batch.background]


def test_finished_places_are_priced_until_the_batch_ends() -> None:
    """Three places; a ends after 2 tokens and b after 3: one place in one iteration, then two."""
    rig = rig_of("static_batch", toy_limits(model_len=20), 40, keep_padding=True)
    together(rig, a=(4, 2, 9), b=(4, 3, 9), c=(6, 5, 9))
    rig.drain()
    assert background(rig) == [Background("padding", n * padding_flops(TOY_MODEL)) for n in (1, 2, 2)]
    rig = rig_of("static_batch", toy_limits(model_len=20), 40)
    together(rig, a=(4, 2, 9), b=(4, 3, 9), c=(6, 5, 9))
    rig.drain()
    assert background(rig) == []


def test_samples_still_to_start_are_no_finished_places() -> None:
    """Planned a step ahead, while the prompt of three samples is in flight."""
    limits = toy_limits(model_len=20, in_flight=2)
    rig = rig_of("static_batch", limits, 40, keep_padding=True, shares=True)
    rig.arrive("a", 4, 3, n=3)
    assert len(rig.flights[0]) == 2 and background(rig) == []


def test_flops_of_a_place_by_hand() -> None:
    """Toy model: hidden 64, 4 heads and 2 KV heads of 16, ffn 128, vocabulary 256, four layers."""
    linears = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128
    norms = (2 * 4 + 1) * 64
    assert padding_flops(TOY_MODEL) == 2 * (4 * linears + 256 * 64 + norms)


def test_asking_for_more_than_the_device_takes_is_refused() -> None:
    error = raises_in(lambda: build("static_batch", toy_limits(), max_num_seqs=17))
    assert type(error) is ConfigError and error.what == "scheduler.max_num_seqs is 17"
